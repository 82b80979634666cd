/** What is told of a proxy that was away for so long that the others took it for dead, by them and then by itself. */

import assert from "node:assert/strict";
import {
  assertForgotten,
  connectAll,
  entriesWith,
  inboxEnv,
  names,
  startProxies,
  storyOf,
} from "../harness/entries.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";

Deno.test("A proxy that was frozen is taken for dead, and tells what it still holds when it is back", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const [frozen, survivor] = await startProxies(2, redis, {});
  try {
    const clients = await connectAll(frozen!.port, names("s", 100));
    await entriesWith(control, "connected", 100);
    frozen!.signal("SIGSTOP");
    await entriesWith(control, "vacated", 100);
    frozen!.signal("SIGCONT");
    let entries = await entriesWith(control, "connected", 200);
    for (const name of names("s", 100)) {
      assert.deepEqual(storyOf(entries, name), ["connected", "disconnected 1006", "vacated", "connected"]);
    }
    for (const client of clients) client.send('"here"');
    await entriesWith(control, "message", 100);
    for (const client of clients) await client.close();
    entries = await entriesWith(control, "vacated", 200);
    for (const name of names("s", 100)) {
      assert.deepEqual(storyOf(entries, name).slice(4), ['message "here"', "disconnected 1005", "vacated"]);
    }
    await assertForgotten(control);
  } finally {
    await frozen![Symbol.asyncDispose]();
    await survivor![Symbol.asyncDispose]();
  }
});

Deno.test("A proxy that cannot reach Redis for long is taken for dead, and tells what it still holds when it can", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  const control = redis.client();
  await using cutOff = await TestProxy.start(relay.url, { ...inboxEnv, REDIS_OUTAGE_GRACE_SECS: "120" });
  await using _survivor = await TestProxy.start(redis, inboxEnv);
  const clients = await Promise.all(names("s", 200).map((name) => cutOff.connect(name)));
  // What may not have been taken would be told again.
  await cutOff.counts("wsproxy_inbox_entries_total", 200);
  relay.hangsUp = true;
  relay.cut();
  await entriesWith(control, "disconnected", 200);
  for (const client of clients) client.send('"waits"');
  await Promise.all(clients.slice(100).map((client) => client.close()));
  await entriesWith(control, "vacated", 200);
  relay.hangsUp = false;
  let entries = await entriesWith(control, "connected", 300);
  entries = await entriesWith(control, "message", 200);
  await Promise.all(clients.slice(0, 100).map((client) => client.close()));
  entries = await entriesWith(control, "vacated", 300);
  for (const [i, name] of names("s", 200).entries()) {
    const story = storyOf(entries, name);
    // What had been taken before may come before or after the connection is told again.
    assert.deepEqual(story.filter((word) => word !== 'message "waits"'), [
      ...["connected", "disconnected 1006", "vacated"],
      ...i < 100 ? ["connected", "disconnected 1005", "vacated"] : [],
    ]);
    assert.equal(story.length, i < 100 ? 7 : 4);
  }
  await assertForgotten(control);
});
