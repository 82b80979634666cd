/** The ws engine's watch over its own listener: a deaf one is found, and one that works is never taken for deaf. */

import assert from "node:assert/strict";
import { EventEmitter } from "node:events";
import { ListenerWatch } from "../../src/engine/ws_watchdog.ts";
import { Client } from "../harness/client.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";

/** A watch over a listener whose behaviour at each knock is given; resolves with the knock at which it reopened. */
async function watched(
  atKnock: (http: EventEmitter, n: number) => Promise<Disposable>,
  mostKnocks: number,
  { listeners = 1, intervalMs = 20 } = {},
) {
  const http = new EventEmitter();
  const { promise, resolve } = Promise.withResolvers<number | undefined>();
  let knocks = 0;
  const knock = () => {
    if (++knocks > mostKnocks) resolve(undefined);
    return atKnock(http, knocks);
  };
  const onDeaf = () => resolve(knocks);
  const watch = new ListenerWatch(http as never, { knock, onDeaf, listeners, intervalMs });
  const reopened = await promise;
  watch.stop();
  return reopened;
}

const connection = { [Symbol.dispose]() {} };

/** The third, or a later one: a knock during which this process was stalled says nothing of the listener. */
function assertReopened(knock: number | undefined): void {
  assert(knock !== undefined && knock >= 3, String(knock));
}

Deno.test("A listener that lets no knock in is opened again after the third", async () => {
  assertReopened(await watched(() => Promise.resolve(connection), 100));
});

Deno.test("A listener whose queue is so full that a knock finds no room is opened again, too", async () => {
  assertReopened(await watched(() => new Promise(() => {}), 100));
});

Deno.test("A listener that lets others in, or drops them over its limit, works, however long a knock waits", async () => {
  for (const event of ["connection", "drop"]) {
    const reopened = await watched((http) => {
      queueMicrotask(() => http.emit(event));
      return new Promise(() => {});
    }, 20);
    assert.equal(reopened, undefined, event);
  }
});

Deno.test("Without a descriptor for a knock nothing is known, and nothing done", async () => {
  assert.equal(await watched(() => Promise.reject(new Error("EMFILE")), 20), undefined);
});

Deno.test("Two knocks in vain and a third one that is heard are no deafness", async () => {
  const reopened = await watched((http, n) => {
    if (n % 3 === 0) queueMicrotask(() => http.emit("connection"));
    return Promise.resolve(connection);
  }, 30);
  assert.equal(reopened, undefined);
});

Deno.test("Where several listeners share a port, one that hears a knock in many works, and one that hears none is deaf", async () => {
  // The kernel leads this one to us once in eight times.
  const reopened = await watched(
    (http, n) => {
      if (n % 8 === 7) queueMicrotask(() => http.emit("connection"));
      return Promise.resolve(connection);
    },
    60,
    // Long enough for eight knocks, also where timers are late.
    { listeners: 4, intervalMs: 200 },
  );
  assert.equal(reopened, undefined);
  const knocks = await watched(() => Promise.resolve(connection), 1000, { listeners: 4 });
  assert(knocks !== undefined && knocks > 3, String(knocks));
});

Deno.test("[ws] A process that was stopped for long does not take its listener for deaf", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { WS_ENGINE: "ws" });
  for (let n = 0; n < 3; n++) {
    proxy.signal("SIGSTOP");
    // As long as a stall of the machine can be: what is tested is the time.
    await new Promise((resolve) => setTimeout(resolve, 2500));
    proxy.signal("SIGCONT");
    await using _client = await Client.connect(proxy.port, `s${n}`);
  }
  await proxy.counts("wsproxy_opened_total", 3);
  assert.equal(await proxy.metric("wsproxy_relistened_total"), 0);
});
