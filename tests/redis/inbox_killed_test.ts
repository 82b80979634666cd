/** What the proxies that live tell of one that was killed, once its beats have stayed out. */

import assert from "node:assert/strict";
import type { Client } from "../harness/client.ts";
import { assertForgotten, connectAll, entriesWith, names, startProxies, storyOf } from "../harness/entries.ts";
import { onEachEngine } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";

onEachEngine("A killed proxy's sessions are told by exactly one survivor, and are vacated", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const [killed, ...survivors] = await startProxies(3, redis, engine);
  const held: Client[] = [];
  try {
    const gone = names("gone", 150);
    await connectAll(killed!.port, gone);
    held.push(...await connectAll(survivors[0]!.port, names("stays", 50)));
    // These have another socket, on a proxy that lives.
    held.push(...await connectAll(survivors[1]!.port, gone.slice(0, 20)));
    await entriesWith(control, "connected", 220);
    killed!.signal("SIGKILL");
    await killed!.exit();
    const entries = await entriesWith(control, "vacated", 130);
    for (const [i, name] of gone.entries()) {
      const story = storyOf(entries, name);
      if (i < 20) assert.deepEqual(story.sort(), ["connected", "connected", "disconnected 1006"]);
      else assert.deepEqual(story, ["connected", "disconnected 1006", "vacated"]);
    }
    for (const name of names("stays", 50)) assert.deepEqual(storyOf(entries, name), ["connected"]);
    for (const client of held) await client.close();
    const all = await entriesWith(control, "vacated", 200);
    assert.equal(all.filter(({ type }) => type === "connected").length, 220);
    assert.equal(all.filter(({ type }) => type === "disconnected").length, 220);
    assert.equal(all.filter(({ type }) => type === "vacated").length, 200);
    await assertForgotten(control);
  } finally {
    await Promise.all([killed!, ...survivors].map((proxy) => proxy[Symbol.asyncDispose]()));
  }
});
