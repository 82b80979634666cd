/** A worker of tests/torture/answers.ts: LIBRARY (ioredis or node-redis), LEASE_MS, and REDIS_URL as the proxy takes it. */

import { Cancelled, type Options, type Question, Worker } from "../../clients/js/backend.js";

/** The client that a program would make, of a library that alone is loaded: a torture starts many workers. */
async function clientFor(url: string, library: string): Promise<Options["redis"]> {
  const [, scheme, list = ""] = /^redis(\+\w+)?:\/\/([^?]*)/.exec(url)!;
  const servers = list.split(",").map((each) => {
    const [host = "", port] = each.split(":");
    return { host, port: Number(port) };
  });
  const name = "mymaster";
  if (library === "node-redis") {
    const { createClient, createCluster, createSentinel } = await import("redis");
    if (scheme === "+sentinel") return createSentinel({ name, sentinelRootNodes: servers });
    if (scheme === "+cluster") return createCluster({ rootNodes: servers.map((socket) => ({ socket })) });
    return createClient({ url });
  }
  const { Cluster, Redis } = await import("ioredis");
  const client = scheme === "+sentinel"
    ? new Redis({ name, sentinels: servers })
    : scheme === "+cluster"
    ? new Cluster(servers)
    : new Redis(url);
  return client.on("error", () => {});
}

const redis = await clientFor(Deno.env.get("REDIS_URL")!, Deno.env.get("LIBRARY")!);

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
