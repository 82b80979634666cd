/** What the example workers of every language must do with an inbox that they share. */

import assert from "node:assert/strict";
import { password, rulesOf } from "./acl.ts";
import { ProxyProcess } from "./proxy.ts";
import { kept, RedisServer, subscribers } from "./redis.ts";
import { Client } from "./client.ts";
import { lines } from "./process.ts";
import { secret } from "./token.ts";
import { eventually, soon } from "./wait.ts";

/** A worker as a child process, with its output line by line. */
export class WorkerProcess implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly output: ReturnType<typeof lines>;

  constructor(command: string, args: readonly string[], env: Record<string, string>) {
    this.#child = new Deno.Command(command, { args: [...args], env, stdin: "null", stdout: "piped", stderr: "inherit" })
      .spawn();
    this.output = lines(this.#child.stdout);
  }

  /** Up to the line of its output that begins with this text. */
  prints(start: string): Promise<string> {
    return soon(this.output.until((line) => line.startsWith(start)), `output ${start}`);
  }

  /** Tells it to stop, and returns its exit code. */
  async stop(): Promise<number> {
    this.#child.kill("SIGTERM");
    return (await soon(this.#child.status, "the end of a worker")).code;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#child.kill("SIGKILL");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // it has ended already
    }
    await this.#child.status;
    await this.output.rest();
  }
}

/**
 * One worker is killed in the middle of an answer, and another one goes on: the client sees every word once. A message
 * that is no JSON, or an entry without a type or a session, harms no worker, a stop is obeyed, Redis may restart, and an answer without a client is stopped.
 */
export async function testWorkers(start: (name: string, env: Record<string, string>) => WorkerProcess): Promise<void> {
  const user = ["--user", "backend", ...(await rulesOf("backend")).flat()];
  await using redis = await RedisServer.start(...kept, ...user);
  // The workers have the rights of the documentation, and are there before Redis is.
  const env = { REDIS_URL: redis.url.replace("//", `//backend:${password}@`), IDLE_SECS: "1" };
  await redis.kill();
  const control = redis.client();
  const inbox = "agent:agent:inbox";
  const answered = () =>
    eventually("all is answered", async () => {
      const [pending] = await control.xpending(inbox, "answers") as [number];
      return pending === 0;
    });
  await using second = start("second", env);
  await second.prints("second: ready");
  await using first = start("first", env);
  await first.prints("first: ready");
  await redis.start();
  await using proxy = await ProxyProcess.start(redis, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  {
    await using client = await Client.connect(proxy.port, "s1", { resume: "0" });
    await client.next();
    const take = async () => {
      let frame = await client.next();
      // It is live again after Redis has restarted.
      while (frame.startsWith("!")) frame = await client.next();
      return JSON.parse(frame.slice(frame.indexOf("\n") + 1));
    };
    client.send('"a question"');
    const { type, by } = await take();
    assert.equal(type, "start");
    const words = [await take(), await take(), await take()];
    // Whichever took it: that one is killed.
    const [killed, other] = by === "first" ? [first, second] : [second, first];
    await killed[Symbol.asyncDispose]();
    await other.prints(`${by === "first" ? "second" : "first"}: goes on with s1`);
    let last;
    while ((last = await take()).type !== "end") if (last.type === "word") words.push(last);
    assert.deepEqual(words.map(({ at }) => at), Array.from({ length: 19 }, (_, i) => i));
    assert.equal(new Set(words.map(({ answer }) => answer)).size, 1);
    await redis.kill();
    await redis.start();
    // What is no entry of a proxy's harms no worker, either.
    await control.xadd(inbox, "*", "session", "bad", "data", "without a type");
    await control.xadd(inbox, "*", "type", "message", "data", "without a session");
    for (const data of ["{", "7", "null", "{}"]) {
      await control.xadd(inbox, "*", "type", "message", "session", "bad", "data", data);
    }
    await other.prints(`${by === "first" ? "second" : "first"}: bad answered`);
    client.send('"a long one"');
    while ((await take()).type !== "word");
    client.send('{"type":"stop"}');
    while ((await take()).type !== "stopped");
    await answered();
    assert.equal(await control.exists(`${inbox}:failed`), 0);
  }
  const leaving = await Client.connect(proxy.port, "s2", { resume: "0" });
  await leaving.next();
  leaving.send('"who listens?"');
  await leaving.take(2);
  await leaving.close();
  await eventually("the answer is given up", async () => {
    const [last] = await control.xrevrange("session:s2:down", "+", "-", "COUNT", 1);
    assert.doesNotMatch(last![1].join(), /"end"/);
    return last![1].join().includes("stopped");
  });
  await answered();
}

/**
 * A backend of Pub/Sub starts before Redis does, and outlives a message that is no JSON, a restart of Redis and its own
 * death, with the rights of the documentation. It may hear one session, or all.
 */
export async function testBackend(
  start: (session: string, env: Record<string, string>) => WorkerProcess,
): Promise<void> {
  const user = ["--user", "backend", ...(await rulesOf("backend")).flat()];
  await using redis = await RedisServer.start(...user);
  const env = { REDIS_URL: redis.url.replace("//", `//backend:${password}@`), JWT_SECRET: secret };
  const control = redis.client();
  const client = redis.client();
  const heard: string[] = [];
  client.on("message", (_channel, text) => heard.push(text));
  await client.subscribe("session:s1:down");
  const ask = (text: string) =>
    eventually(
      "it listens",
      async () =>
        await subscribers(control, "session:s1:down") === 1 && await control.publish("session:s1:up", text) > 0,
    );
  const answers = async (question: string) => {
    await ask(`"${question}"`);
    await eventually(`${question} is answered`, () => {
      const at = heard.findIndex((text) => text.includes(question));
      return at >= 0 && heard.slice(at).some((text) => JSON.parse(text).type === "end");
    });
  };
  await redis.kill();
  {
    await using _backend = start("s1", env);
    await redis.start();
    for (const text of ["{", "7", "null", "{}"]) await ask(text);
    await answers("one");
    await redis.kill();
    await redis.start();
    await answers("two");
  }
  await using _backend = start("s1", env);
  await answers("three");
}
