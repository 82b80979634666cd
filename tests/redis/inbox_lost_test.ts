/** What backends are told when Redis loses single keys, as when it evicts them. */

import assert from "node:assert/strict";
import { entriesWith, inboxEnv, storyOf } from "../harness/entries.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";

Deno.test("Redis loses a key of an inbox: no session with a socket is vacated, and each one that has left is", async () => {
  await using redis = await RedisServer.start();
  await using first = await TestProxy.start(redis, inboxEnv);
  await using second = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  await Promise.all(["sockets", "held:*", "vacant", "known:*", "epoch"].map(async (lost) => {
    const agent = lost.replace(/:.*/, "");
    const leaves = await first.connect("both", { agent });
    const gone = await first.connect("gone", { agent });
    const stays = await second.connect("both", { agent });
    await entriesWith(control, "connected", 3, agent);
    const keys = await control.keys(`wsproxy:{agent:${agent}:inbox}:${lost}`);
    if (keys.length > 0) await control.del(...keys);
    await leaves.close();
    await gone.close();
    const left = await entriesWith(control, "vacated", 1, agent);
    assert.deepEqual(storyOf(left, "gone"), ["connected", "disconnected 1005", "vacated"]);
    assert.deepEqual(storyOf(left, "both"), ["connected", "connected", "disconnected 1005"]);
    await stays.close();
    const all = await entriesWith(control, "vacated", 2, agent);
    assert.deepEqual(storyOf(all, "both").slice(3), ["disconnected 1005", "vacated"]);
  }));
});
