/** Several workers on one port: what they share. */

import assert from "node:assert/strict";
import { createShared, Limits } from "../src/limits.ts";
import { Client, connectMany } from "./harness/client.ts";
import { onEachEngine, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { soon } from "./harness/wait.ts";
import { request } from "./harness/wire.ts";

onEachEngine("Workers share a port; whichever is asked speaks for all of them", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { ...engine, WORKERS: "2", LOG_LEVEL: "debug" });
  const opened: number[] = [];
  const told = proxy.log.until((line) => {
    const { msg, worker } = JSON.parse(line);
    return msg === "session opened" && opened.push(worker) === 60;
  });
  const clients = await connectMany(proxy.port, 60);
  await soon(told, "60 sessions opened");
  for (const worker of [0, 1]) assert(opened.filter((other) => other === worker).length >= 10, String(opened));
  const control = redis.client();
  for (const [n, client] of clients.entries()) {
    assert.equal(await control.publish(`session:s${n}:down`, `to ${n}`), 1);
    assert.equal(await client.next(), `to ${n}`);
  }
  for (let i = 0; i < 10; i++) {
    assert.equal(await proxy.metric("wsproxy_connections"), 60);
    assert.equal(await proxy.metric("wsproxy_workers"), 2);
    assert.equal(await proxy.metric("wsproxy_redis_up"), 1);
    assert.equal(JSON.parse((await request(proxy.port, "/health")).body).active_connections, 60);
  }
  proxy.signal("SIGTERM");
  for (const client of clients) assert.equal((await client.ended()).code, 1001);
  assert.equal((await proxy.exit()).code, 0);
});

onEachEngine("MAX_CONNECTIONS and MAX_CONNECTS_PER_SEC hold for all workers together", async (engine) => {
  await using redis = await RedisServer.start();
  const env = { ...engine, WORKERS: "2", MAX_CONNECTIONS: "10" };
  await using proxy = await ProxyProcess.start(redis, env);
  const outcomes = await Promise.allSettled(
    Array.from({ length: 50 }, (_, n) => Client.connect(proxy.port, `s${n}`)),
  );
  const clients = outcomes.flatMap((outcome) => outcome.status === "fulfilled" ? [outcome.value] : []);
  assert.equal(clients.length, 10);
  await Promise.all(clients.map((client) => client.close()));
  await proxy.counts("wsproxy_connections", 0);
  for (const client of await connectMany(proxy.port, 10, "t")) await client.close();
});

Deno.test("The limits are exact under contention, and what a dead worker held is free again", async () => {
  // So many, or what two seconds allow: a busy machine takes several turns of its scheduler for each.
  const rounds = 3000;
  const max = 20;
  const limits = { maxConnections: max, maxConnectsPerSec: 0 };
  const shared = createShared(3);
  const counts = new Int32Array(new SharedArrayBuffer(4 * rounds * 2));
  const arrived = new Int32Array(new SharedArrayBuffer(8));
  const script = `
    import { Limits } from ${JSON.stringify(new URL("../src/limits.ts", import.meta.url).href)};
    self.onmessage = ({ data: { shared, index, counts, arrived } }) => {
      const limits = new Limits(${JSON.stringify(limits)}, shared, index);
      let barriers = 0;
      // Both leave it at the same moment, where they have a core each; where not, neither burns the other's time.
      const barrier = () => {
        barriers += 2;
        if (Atomics.add(arrived, 0, 1) + 1 === barriers) return void Atomics.notify(arrived, 0);
        for (let spins = 0; spins < 20_000; spins++) if (Atomics.load(arrived, 0) >= barriers) return;
        for (let now; (now = Atomics.load(arrived, 0)) < barriers;) Atomics.wait(arrived, 0, now);
      };
      const endMs = performance.now() + 2000;
      for (let round = 0, isLast = false; !isLast; round++) {
        if (index === 0 && (round === ${rounds - 1} || performance.now() > endMs)) Atomics.store(arrived, 1, round);
        barrier();
        isLast = Atomics.load(arrived, 1) === round && round > 0;
        let admitted = 0;
        while (limits.enter() === undefined) admitted++;
        counts[2 * round + index] = admitted;
        barrier();
        if (!isLast) while (admitted-- > 0) limits.release();
      }
      self.postMessage("done");
    };`;
  const url = URL.createObjectURL(new Blob([script], { type: "application/javascript" }));
  await Promise.all([0, 1].map((index) => {
    const worker = new Worker(url, { type: "module" });
    const { promise, resolve } = Promise.withResolvers<void>();
    worker.onmessage = () => {
      worker.terminate();
      resolve();
    };
    worker.postMessage({ shared, index, counts, arrived });
    return soon(promise, "the worker's counts");
  }));
  const last = arrived[1]!;
  assert(last > 0);
  for (let round = 0; round <= last; round++) {
    assert.equal(counts[2 * round]! + counts[2 * round + 1]!, max, `round ${round}`);
  }
  const third = new Limits(limits, shared, 2);
  assert.equal(third.enter(), "tooManyConnections");
  Limits.forget(shared, 0);
  for (let n = 0; n < counts[2 * last]!; n++) assert.equal(third.enter(), undefined);
  assert.equal(third.enter(), "tooManyConnections");
});

Deno.test("The rate is one for all: so many at once, and no more until time has passed", () => {
  const shared = createShared(2);
  const each = [0, 1].map((index) => new Limits({ maxConnections: 0, maxConnectsPerSec: 50 }, shared, index));
  const startMs = Date.now();
  let admitted = 0;
  for (let n = 0; n < 1000; n++) if (each[n % 2]!.enter() === undefined) admitted++;
  const elapsedMs = Date.now() - startMs;
  assert(admitted >= 50 && admitted <= 51 + elapsedMs / 20, `${admitted} in ${elapsedMs} ms`);
  assert.equal(each[0]!.enter(), "tooManyConnects");
});

Deno.test("A second proxy on the workers' port stops with a clear line", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { WORKERS: "2" });
  for (const WORKERS of ["1", "2"]) {
    await using second = ProxyProcess.spawn(testEnv(redis, { WORKERS, PORT: String(proxy.port), LOG_LEVEL: "info" }));
    const line = JSON.parse(await second.log.until((line) => line.includes("could not start")));
    assert.match(line.err.message, /in use/);
    assert.equal((await second.exit()).code, 1);
  }
});
