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
 * One worker is killed in the middle of an answer, and another one goes on: the client sees every word once. An answer
 * that no test waits for any more is stopped.
 */
export async function testWorkers(start: (name: string, env: Record<string, string>) => WorkerProcess): Promise<void> {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  const env = { REDIS_URL: redis.url, IDLE_SECS: "1" };
  await using second = start("second", env);
  await second.prints("second: ready");
  {
    await using first = start("first", env);
    await first.prints("first: ready");
    await using client = await Client.connect(proxy.port, "s1", { resume: "0" });
    await client.next();
    const control = redis.client();
    // Whichever worker took it: that one is killed.
    client.send('"a question"');
    const words: { type: string; answer: string; at: number }[] = [];
    const take = async () => {
      const frame = await client.next();
      words.push(JSON.parse(frame.slice(frame.indexOf("\n") + 1)));
    };
    for (let i = 0; i < 3; i++) await take();
    const pending = await control.xpending("agent:agent:inbox", "answers", "-", "+", 10) as [string, string][];
    const consumer = pending.at(-1)![1];
    const [killed, other] = consumer === "first" ? [first, second] : [second, first];
    await killed[Symbol.asyncDispose]();
    await other.prints(`${consumer === "first" ? "second" : "first"}: goes on`);
    while (words.at(-1)!.type !== "end") await take();
    assert.deepEqual(words.slice(0, -1).map(({ at }) => at), words.slice(0, -1).map((_, i) => i));
    assert.equal(words.length, 20);
    assert.equal(new Set(words.map(({ answer }) => answer)).size, 1);
  }
  await using third = start("third", env);
  await third.prints("third: ready");
  await using fourth = start("fourth", env);
  await fourth.prints("fourth: ready");
  const leaving = await Client.connect(proxy.port, "s2", { resume: "0" });
  await leaving.next();
  leaving.send('"who listens?"');
  await leaving.take(2);
  await leaving.close();
  const control = redis.client();
  await eventually("vacancy noted", async () => await control.exists("vacant:s2") === 1);
  await eventually("the answer is given up", async () => {
    const [pending] = await control.xpending("agent:agent:inbox", "answers") as [number];
    return pending === 0;
  });
  const last = await control.xrevrange("session:s2:down", "+", "-", "COUNT", 1);
  assert.doesNotMatch(last[0]![1].join(), /"end"/);
}
