/** What the example workers of every language must do with an inbox that they share. */

import assert from "node:assert/strict";
import { ProxyProcess } from "./proxy.ts";
import { RedisServer } from "./redis.ts";
import { Client } from "./client.ts";
import { lines } from "./process.ts";
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
 * that is no JSON hurts nobody, a stop is obeyed, Redis may restart, and an answer that nobody waits for is stopped.
 */
export async function testWorkers(start: (name: string, env: Record<string, string>) => WorkerProcess): Promise<void> {
  await using redis = await RedisServer.start("--appendonly", "yes", "--appendfsync", "always");
  await using proxy = await ProxyProcess.start(redis, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  const env = { REDIS_URL: redis.url, IDLE_SECS: "1" };
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
