import assert from "node:assert/strict";
import { setImmediate } from "node:timers/promises";
import { Turns } from "../../src/http/turns.ts";
import { engines, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";

Deno.test("Steps beyond those of one turn wait for later turns, in order, and other work has its turn between them", async () => {
  const turns = new Turns();
  const log: string[] = [];
  const steps: Promise<unknown>[] = [];
  for (let n = 0; n < 10; n++) {
    const turn = turns.take();
    if (turn === undefined) log.push(String(n));
    else steps.push(turn.then(() => log.push(String(n))));
  }
  assert.equal(log.join(""), "01");
  for (let n = 0; n < 4; n++) {
    await setImmediate();
    log.push("-");
  }
  await Promise.all(steps);
  assert.match(log.join(""), /^01-?23-45-67-89-?$/);
  // Turns that no handshake needed are not saved up.
  for (let n = 0; n < 5; n++) await setImmediate();
  const later = Array.from({ length: 6 }, () => turns.take());
  assert.deepEqual(later.map((turn) => turn === undefined), [true, true, false, false, false, false]);
  await Promise.all(later);
});

Deno.test("How many steps a turn has is the owner's choice", async () => {
  const turns = new Turns(3);
  const taken = Array.from({ length: 7 }, () => turns.take());
  assert.deepEqual(taken.map((turn) => turn === undefined), [true, true, true, false, false, false, false]);
  const done: number[] = [];
  taken.forEach((turn, n) => turn?.then(() => done.push(n)));
  for (let n = 0; n < 3 && done.length === 0; n++) await setImmediate();
  assert.deepEqual(done, [3, 4, 5]);
  await Promise.all(taken);
});

Deno.test("Handshakes that have begun are finished before others begin", async () => {
  const turns = new Turns();
  const log: string[] = [];
  for (let n = 0; n < 2; n++) assert.equal(turns.take(), undefined);
  const steps = ["a", "b", "C", "d", "E", "F"].map((name) =>
    turns.take(name < "a")!.then(() => {
      log.push(name);
    })
  );
  await Promise.all(steps);
  assert.equal(log.join(""), "CEFabd");
});

Deno.test("A handshake whose turn comes late is served all the same, however long it has waited", async () => {
  await using redis = await RedisServer.start();
  const { take } = Turns.prototype;
  // As long as a socket may take to open after it was admitted.
  Turns.prototype.take = (hasBegun) => hasBegun ? new Promise((resolve) => setTimeout(resolve, 5200)) : undefined;
  using _ = { [Symbol.dispose]: () => Turns.prototype.take = take };
  await Promise.all(engines.map(async (WS_ENGINE) => {
    await using proxy = await TestProxy.start(redis, { WS_ENGINE });
    await using client = await proxy.connect(WS_ENGINE);
    await redis.client().publish(`session:${WS_ENGINE}:down`, "here");
    assert.equal(await client.next(), "here");
    assert.equal(await proxy.metric("wsproxy_unopened_total"), 0);
  }));
});
