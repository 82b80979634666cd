import assert from "node:assert/strict";
import { setImmediate } from "node:timers/promises";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";

const count = 100;
/** As in the engine: how long a peer is silent that has paused. */
const pauseMs = 20;

Deno.test("Of many sockets whose pauses end at once eight are closed in a turn, and all with the code", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "deno" });
  const clients = await Promise.all(Array.from({ length: count }, (_, n) => proxy.connect(`s${n}`)));
  const ends = Promise.all(clients.map((client) => client.ended()));
  let closed = 0;
  let inTurn = 0;
  let most = 0;
  const { close } = WebSocket.prototype;
  WebSocket.prototype.close = function (code, reason) {
    closed++;
    most = Math.max(most, ++inTurn);
    if (inTurn === 1) void setImmediate().then(() => inTurn = 0);
    return close.call(this, code, reason);
  };
  const { setTimeout } = globalThis;
  const held: (() => void)[] = [];
  // Once all wait for a pause, as on a busy machine.
  const release = () => {
    if (held.length + closed < count) timer = setTimeout(release, 1);
    else for (const each of held.splice(0)) each();
  };
  let timer: ReturnType<typeof setTimeout> | undefined;
  globalThis.setTimeout = ((action: () => void, delayMs?: number) => {
    if (delayMs !== pauseMs) return setTimeout(action, delayMs);
    held.push(action);
    clearTimeout(timer);
    return timer = setTimeout(release, 1);
  }) as typeof globalThis.setTimeout;
  using _ = {
    [Symbol.dispose]() {
      WebSocket.prototype.close = close;
      globalThis.setTimeout = setTimeout;
    },
  };
  await redis.client().publish("wsproxy:control", '{"command":"close","agent_id":"agent","code":4000}');
  assert.deepEqual((await ends).filter(({ code }) => code !== 4000), []);
  assert.equal(closed, count);
  // What is seen as one turn may be two: the first socket is closed by a timer, before the turn's immediates.
  assert(most > 1 && most <= 16, `${most} in one turn`);
});
