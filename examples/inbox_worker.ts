/**
 * A worker that answers what clients send, of which any number can run: they share an agent's inbox.
 *
 *     deno task worker <name> [<agent_id>]
 *
 * Start some with different names, and kill one in the middle of an answer: after IDLE_SECS another goes on where it
 * stopped. `{"type":"stop"}` ends the answer, wherever it is written. The proxy needs INBOX=true, the worker its REDIS_URL.
 */

import { Redis } from "ioredis";
import { type Entry, type Question, Worker } from "../clients/js/backend.js";

const wordDelayMs = 50;

/** Stands in for a language model, which would be asked again with what has been said already. */
function model(question: string): string[] {
  return `You said ${question} and this is what any of us has to say about it, word by word.`.split(" ");
}

/** Whatever a client sends is a question, but for this. */
function isStop(data: string): boolean {
  try {
    return JSON.parse(data)?.type === "stop";
  } catch {
    return false; // A proxy with VALIDATE_JSON=false lets anything pass.
  }
}

/** What is said when an answer goes no further: at a stop, and when no client is left to read it. */
function interrupts({ type, data = "" }: Entry): string | undefined {
  return type === "vacated" || type === "message" && isStop(data) ? JSON.stringify({ type: "stopped" }) : undefined;
}

/** Answers one question, from where a worker before this one stopped. */
async function handle(question: Question, by: string): Promise<void> {
  if (isStop(question.data)) return;
  const { session, id } = question;
  const answer = await question.begin(JSON.stringify({ type: "start", answer: id, by }));
  const said = (await answer.soFar()).length;
  console.log(`${by}: ${said > 0 ? "goes on with" : "answers"} ${session}`);
  for (const [at, text] of model(question.data).entries()) {
    if (at < said) continue;
    await answer.send(JSON.stringify({ type: "word", answer: id, at, text }));
    await new Promise((resolve) => setTimeout(resolve, wordDelayMs));
  }
  await answer.end(JSON.stringify({ type: "end", answer: id }));
  console.log(`${by}: ${session} answered`);
}

if (import.meta.main) {
  const [name, agent = "agent"] = Deno.args;
  if (name === undefined) {
    console.error("usage: deno task worker <name> [<agent_id>]");
    Deno.exit(1);
  }
  const redis = new Redis(Deno.env.get("REDIS_URL") || "redis://127.0.0.1:6379");
  redis.on("error", (error) => console.error(`Redis: ${error.message}`));
  const leaseMs = Number(Deno.env.get("IDLE_SECS") || 5) * 1000;
  const worker = new Worker({ redis, agent, leaseMs, interrupts, handle: (question) => handle(question, name) });
  Deno.addSignalListener("SIGTERM", () => worker.stop());
  console.log(`${name}: ready`);
  await worker.run();
  Deno.exit(0);
}
