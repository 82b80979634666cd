/** A worker of tests/torture/answers.ts: REDIS_URL, and LEASE_MS. */

import { Redis } from "ioredis";
import { Cancelled, type Question, Worker } from "../../clients/js/backend.js";

const redis = new Redis(Deno.env.get("REDIS_URL")!, { retryStrategy: () => 100 });
redis.on("error", () => {});

async function handle(question: Question): Promise<void> {
  const { q, words } = JSON.parse(question.data);
  if (words === undefined) return;
  const by = crypto.randomUUID();
  const say = (kind: string, at?: number) => JSON.stringify({ kind, q, by, at });
  const answer = await question.begin(say("start"));
  for (let at = (await answer.soFar()).length; at < words; at++) {
    await answer.send(say("word", at));
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 40));
  }
  await answer.end(say("end"));
}

const worker = new Worker({
  redis,
  agent: "agent",
  handle,
  leaseMs: Number(Deno.env.get("LEASE_MS")),
  failed: ({ data }) => JSON.stringify({ kind: "failed", q: JSON.parse(data).q }),
  interrupts: ({ type, data = "" }) => {
    if (type !== "message") return undefined;
    const { q, stop } = JSON.parse(data);
    return stop ? JSON.stringify({ kind: "stopped", q }) : undefined;
  },
  onError: (error, what) => {
    if (!(error instanceof Cancelled)) console.error(`${what}: ${error}`);
  },
});
Deno.addSignalListener("SIGTERM", () => worker.stop());
await worker.run();
Deno.exit(0);
