/**
 * The demo's backend: answers each question word by word, through the session's log. It keeps how far it is in Redis,
 * so that it goes on where it was when it is killed and started again.
 */

import { Redis } from "ioredis";

const url = Deno.env.get("REDIS_URL")!;
const words = Deno.readTextFileSync(new URL("answer.txt", import.meta.url)).trim().split(/\s+/);
const wordMs = 60;

const redis = new Redis(url);
const ear = new Redis(url);

/** An answer under way: its number, and the word that comes next. */
interface Answer {
  id: number;
  next: number;
}

const stateKey = (session: string) => `demo:${session}`;

async function answer(session: string, { id, next }: Answer): Promise<void> {
  for (let n = next; n < words.length; n++) {
    // Stopped, or another question has come.
    const state = await redis.get(stateKey(session));
    if (state === null || JSON.parse(state).id !== id) return;
    const token = JSON.stringify({ answer: id, n, word: words[n], of: words.length });
    // Said again after a crash, it has the same nonce and is no second word.
    await redis.call("FCALL", "wsproxy_send", 1, `session:${session}:down`, token, `${id}-${n}`);
    await redis.set(stateKey(session), JSON.stringify({ id, next: n + 1 }), "EX", 3600);
    await new Promise((resolve) => setTimeout(resolve, wordMs));
  }
  await redis.del(stateKey(session));
}

ear.on("pmessage", async (_pattern, channel: string, text: string) => {
  const session = channel.slice("session:".length, -":up".length);
  const message = JSON.parse(text);
  // A disconnect is not a stop: that is a message of its own.
  if (message.stop) return void await redis.del(stateKey(session));
  const id = await redis.incr("demo-answers");
  await redis.set(stateKey(session), JSON.stringify({ id, next: 0 }), "EX", 3600);
  const question = JSON.stringify({ answer: id, question: String(message.question) });
  await redis.call("FCALL", "wsproxy_send", 1, `session:${session}:down`, question, `${id}-question`);
  await answer(session, { id, next: 0 });
});
await ear.psubscribe("session:*:up");
for (const key of await redis.keys("demo:*")) {
  const state = await redis.get(key);
  if (state) void answer(key.slice("demo:".length), JSON.parse(state));
}
console.log("demo backend ready");
