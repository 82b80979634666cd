/** Several workers on one port: how they fail or become too heavy, and are replaced. */

import assert from "node:assert/strict";
import { readConfig } from "../src/config.ts";
import { createLog } from "../src/log.ts";
import { Workers, type WorkersOptions } from "../src/workers.ts";
import { Client, connectMany } from "./harness/client.ts";
import type { Harm } from "./harness/frail_worker.ts";
import { type Env, Metered, onEachEngine, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { eventually, soon } from "./harness/wait.ts";
import { request } from "./harness/wire.ts";

/** Workers in this process, which can be harmed. */
class FrailWorkers extends Metered implements AsyncDisposable {
  readonly #file: string;
  #harms = 0;
  private constructor(readonly workers: Workers, file: string) {
    super();
    this.#file = file;
  }

  static async start(redis: RedisServer, env: Env = {}, options: WorkersOptions = {}): Promise<FrailWorkers> {
    const file = await Deno.makeTempFile();
    await Deno.writeTextFile(file, "{}");
    const settings = { ...testEnv(redis, { WORKERS: "2", ...env }), HARM_FILE: file };
    const config = readConfig(settings);
    const script = new URL("./harness/frail_worker.ts", import.meta.url);
    const workers = await Workers.start(config, settings, createLog(config.logging), {
      script,
      // Ten of them are as long as a sound worker may be kept from its core.
      beatMs: 200,
      ...options,
    });
    const frail = new FrailWorkers(workers, file);
    await eventually("healthy", () => frail.isHealthy());
    return frail;
  }

  get port(): number {
    return this.workers.port;
  }

  async harm(index: number, harm: Harm): Promise<void> {
    const next = `${this.#file}.next`;
    await Deno.writeTextFile(next, JSON.stringify({ index, harm, n: this.#harms++ }));
    await Deno.rename(next, this.#file);
  }

  /** NaN when there is no answer: what the kernel had queued for a worker that ended is reset. */
  override async metric(name: string): Promise<number> {
    const { body } = await request(this.port, "/metrics").catch(() => ({ body: "" }));
    return Number(new RegExp(`^${name} (.*)$`, "m").exec(body)?.[1]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.workers.stop();
    await Deno.remove(this.#file);
  }
}

for (const harm of ["throw", "reject", "exit", "close"] as const) {
  onEachEngine(
    `A worker that ends by ${harm} is replaced, and the other one's clients feel nothing`,
    async (engine) => {
      await using redis = await RedisServer.start();
      await using frail = await FrailWorkers.start(redis, {
        ...engine,
        MAX_CONNECTIONS: "40",
        MAX_CONNECTIONS_PER_ADDRESS: "40",
      });
      const clients = await connectMany(frail.port, 40);
      await frail.counts("wsproxy_opened_total", 40);
      await frail.harm(0, harm);
      const lost = clients.map((client) => client.closed);
      await soon(Promise.race(lost), "the worker's clients are cut off");
      // A worker that closes itself is missed only when it does not answer.
      let left = 40;
      await eventually("it is missed", async () => (left = await frail.metric("wsproxy_connections")) < 40);
      assert(left > 0);
      await frail.counts("wsproxy_workers", 2);
      await eventually("the others are gone", () => {
        return clients.filter(({ socket }) => socket.readyState === WebSocket.OPEN).length === left;
      });
      // What it held is free, and what it counted is not forgotten.
      const others = await connectMany(frail.port, 40 - left, "t");
      await assert.rejects(Client.connect(frail.port, "one too many"), /429|503/);
      await frail.counts("wsproxy_opened_total", 40 + others.length);
      const control = redis.client();
      for (const client of clients.filter(({ socket }) => socket.readyState === WebSocket.OPEN)) {
        client.send("1");
      }
      assert.equal(await control.publish("session:t0:down", "new"), 1);
      assert.equal(await others[0]!.next(), "new");
      const open = [...clients, ...others].filter(({ socket }) => socket.readyState === WebSocket.OPEN);
      await Promise.all(open.map((client) => client.close()));
    },
  );
}

onEachEngine("A worker that hangs cannot be ended: the others drain, and the process fails", async (engine) => {
  await using redis = await RedisServer.start();
  const file = await Deno.makeTempFile();
  await Deno.writeTextFile(file, "{}");
  const env = { ...testEnv(redis, { ...engine, WORKERS: "2", LOG_LEVEL: "info" }), HARM_FILE: file };
  const main = new URL("./harness/frail_main.ts", import.meta.url).pathname;
  await using proxy = ProxyProcess.spawn(env, ["--allow-env=HARM_FILE", `--allow-read=${file},tests,main.ts`], main);
  const { port } = JSON.parse(await proxy.log.until((line) => line.includes('"listening"')));
  const clients = await connectMany(port, 40);
  await Deno.writeTextFile(`${file}.next`, JSON.stringify({ index: 1, harm: "loop" }));
  await Deno.rename(`${file}.next`, file);
  const { code } = await proxy.exit();
  assert.equal(code, 1);
  const codes = new Set(await Promise.all(clients.map(async (client) => (await client.ended()).code)));
  // Deno's client has no 1006.
  assert.deepEqual([...codes].sort(), [0, 1001]);
  await Deno.remove(file);
});

Deno.test("A replacement that fails leaves the old workers in place, and none beside them", async () => {
  await using redis = await RedisServer.start();
  await using frail = await FrailWorkers.start(redis);
  const clients = await connectMany(frail.port, 20);
  await frail.harm(-1, "start");
  for (let round = 0; round < 3; round++) await frail.workers.replace();
  assert(clients.every(({ socket }) => socket.readyState === WebSocket.OPEN));
  await frail.harm(-1, "throw");
  await frail.workers.replace();
  for (const client of clients) assert.equal((await client.ended()).code, 1001);
  await frail.counts("wsproxy_workers", 2);
});

Deno.test("A worker that is too heavy is replaced", async () => {
  await using redis = await RedisServer.start();
  await using frail = await FrailWorkers.start(redis, { WORKER_MAX_HEAP_MB: "1" }, { soundAfterMs: 1500 });
  const client = await Client.connect(frail.port, "s1");
  assert.equal((await client.ended()).code, 1001);
  // What the kernel had queued for the listener that has closed is reset.
  let next: Client | undefined;
  await eventually("it is served again", async () => {
    next = await Client.connect(frail.port, "s1").catch(() => undefined);
    return next !== undefined;
  });
  assert.equal((await next!.ended()).code, 1001);
});
