/**
 * A worker that answers what clients send, of which any number can run: they share an agent's inbox.
 *
 *     deno task worker <name> [<agent_id>]
 *
 * Start some with different names, and kill one in the middle of an answer: after IDLE_SECS another goes on where it
 * stopped. The proxy needs INBOX=true, the worker its REDIS_URL. A worker does one thing at a time.
 */

import { Redis } from "ioredis";

const group = "answers";
/** A worker that has not said for so long that it still works on an entry is dead. */
const idleMs = Number(Deno.env.get("IDLE_SECS") || 5) * 1000;
const wordDelayMs = 50;

interface Entry {
  readonly id: string;
  readonly fields: Readonly<Record<string, string>>;
}

/** Stands in for a language model, which would be asked again with what has been said already. */
function answer(question: string): string[] {
  return `You said ${question} and this is what any of us has to say about it, word by word.`.split(" ");
}

/** A worker on one inbox. */
class Worker {
  readonly #redis: Redis;
  readonly #name: string;
  readonly #inbox: string;

  constructor(redis: Redis, name: string, agentId: string) {
    this.#redis = redis;
    this.#name = name;
    this.#inbox = `agent:${agentId}:inbox`;
  }

  async work(): Promise<never> {
    try {
      // From the first entry on, also of those from before any worker was started.
      await this.#redis.xgroup("CREATE", this.#inbox, group, "0", "MKSTREAM");
    } catch (error) {
      if (!(error as Error).message.startsWith("BUSYGROUP")) throw error;
    }
    console.log(`${this.#name}: ready`);
    while (true) {
      try {
        for (const entry of await this.#next()) await this.#handle(entry);
      } catch (error) {
        console.error(`Redis: ${(error as Error).message}`);
        await new Promise((resolve) => setTimeout(resolve, 1000));
      }
    }
  }

  /** What a dead worker left, else what is new. */
  async #next(): Promise<Entry[]> {
    const claim = ["XAUTOCLAIM", this.#inbox, group, this.#name, idleMs, "0", "COUNT", 1] as const;
    const [, left] = await this.#redis.call(...claim) as [string, Pairs];
    if (left.length > 0) {
      console.log(`${this.#name}: goes on with ${left[0]![0]}`);
      return entriesOf(left);
    }
    const read = ["GROUP", group, this.#name, "COUNT", 1, "BLOCK", 1000, "STREAMS", this.#inbox, ">"] as const;
    const streams = await this.#redis.call("XREADGROUP", ...read) as [string, Pairs][] | null;
    return entriesOf(streams?.[0]?.[1] ?? []);
  }

  async #handle({ id, fields }: Entry): Promise<void> {
    const vacant = `vacant:${fields["session"]}`;
    if (fields["type"] === "message") await this.#stream(id, fields);
    else if (fields["type"] === "connected") await this.#redis.del(vacant);
    else if (fields["type"] === "vacated") await this.#redis.set(vacant, "1", "EX", 3600);
    await this.#redis.xack(this.#inbox, group, id);
  }

  /** Streams an answer from where a worker before us stopped, and no further when all clients have gone. */
  async #stream(id: string, fields: Entry["fields"]): Promise<void> {
    const redis = this.#redis;
    const session = fields["session"]!;
    const [channel, done] = [`session:${session}:down`, `answer:${id}`];
    const words = answer(fields["data"]!);
    for (let at = Number(await redis.get(done)); at < words.length; at++) {
      if (await redis.exists(`vacant:${session}`)) return console.log(`${this.#name}: ${session} is vacant, stopped`);
      // Two workers may answer two questions of one session at once: `answer` says which words belong together.
      const text = JSON.stringify({ type: "word", answer: id, at, text: words[at] });
      // The nonce keeps a word from being sent twice when its sender died before it could note it down.
      await redis.fcall("wsproxy_send", 1, channel, text, `${id}/${at}`);
      await redis.set(done, at + 1, "EX", 3600);
      // It is still ours.
      await redis.xclaim(this.#inbox, group, this.#name, 0, id, "JUSTID");
      await new Promise((resolve) => setTimeout(resolve, wordDelayMs));
    }
    await redis.fcall("wsproxy_send", 1, channel, JSON.stringify({ type: "end", answer: id }), `${id}/end`);
    console.log(`${this.#name}: ${session} answered`);
  }
}

type Pairs = [id: string, words: string[]][];

function entriesOf(pairs: Pairs): Entry[] {
  return pairs.map(([id, words]) => ({
    id,
    fields: Object.fromEntries(words.flatMap((word, i) => i % 2 === 0 ? [[word, words[i + 1]!]] : [])),
  }));
}

if (import.meta.main) {
  const [name, agentId = "agent"] = Deno.args;
  if (name === undefined) {
    console.error("usage: deno task worker <name> [<agent_id>]");
    Deno.exit(1);
  }
  const redis = new Redis(Deno.env.get("REDIS_URL") || "redis://127.0.0.1:6379");
  redis.on("error", (error) => console.error(`Redis: ${error.message}`));
  await new Worker(redis, name, agentId).work();
}
