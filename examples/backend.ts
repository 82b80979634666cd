/**
 * A backend that never sees a WebSocket: it makes a token for one session, hears the client on `session:{id}:up`, and
 * streams answers word by word on `session:{id}:down`. It stops an answer when PUBLISH says that no client listens.
 *
 *     deno task backend <session_id>
 *
 * It needs the proxy's own JWT_SECRET and REDIS_URL, and prints the line that connects a client.
 */

import { Redis } from "ioredis";
import { SignJWT } from "jose";

const wordDelayMs = 50;

/** Stands in for a language model: the words of an answer, one by one. */
async function* answer(question: unknown): AsyncGenerator<string> {
  const text = `You said ${JSON.stringify(question)} and here is what I think about it, one word at a time.`;
  for (const word of text.split(" ")) {
    await new Promise((resolve) => setTimeout(resolve, wordDelayMs));
    yield word;
  }
}

/** A token for one session, good for an hour. */
function mintToken(secret: string, sessionId: string): Promise<string> {
  return new SignJWT({ session_id: sessionId })
    .setProtectedHeader({ alg: "HS256" })
    .setIssuedAt()
    .setExpirationTime("1h")
    .sign(new TextEncoder().encode(secret));
}

/** Streams one answer. Returns false, and stops at that word, when no proxy has this session any more. */
async function stream(redis: Redis, sessionId: string, question: unknown): Promise<boolean> {
  const channel = `session:${sessionId}:down`;
  for await (const text of answer(question)) {
    if (await redis.publish(channel, JSON.stringify({ type: "word", text })) === 0) return false;
  }
  return await redis.publish(channel, JSON.stringify({ type: "end" })) > 0;
}

async function main(): Promise<void> {
  const [sessionId] = Deno.args;
  const secret = Deno.env.get("JWT_SECRET");
  if (!sessionId || !secret) {
    console.error(sessionId ? "JWT_SECRET must be the proxy's" : "usage: deno task backend <session_id>");
    Deno.exit(1);
  }
  const redisUrl = Deno.env.get("REDIS_URL") || "redis://127.0.0.1:6379";
  // Redis may come later, or be away for a while.
  const publisher = new Redis(redisUrl, { maxRetriesPerRequest: null });
  // A connection that subscribes can do nothing else.
  const subscriber = new Redis(redisUrl, { maxRetriesPerRequest: null });
  for (const redis of [publisher, subscriber]) redis.on("error", (error) => console.error(`Redis: ${error.message}`));

  let last = Promise.resolve();
  subscriber.on("message", (_channel, text) => {
    console.log(`heard ${text}`);
    // One after the other, or the words of two answers would mix.
    last = last.then(async () => {
      const heard = await stream(publisher, sessionId, JSON.parse(text));
      console.log(heard ? "answered" : "stopped: no client listens");
    }).catch((error) => console.error(`could not answer: ${error.message}`));
  });
  await subscriber.subscribe(`session:${sessionId}:up`);

  const url = `ws://127.0.0.1:${Deno.env.get("PORT") || 8080}/agent/ws/${encodeURIComponent(sessionId)}`;
  console.log(`./dev client ${url} ${await mintToken(secret, sessionId)}`);
}

if (import.meta.main) await main();
