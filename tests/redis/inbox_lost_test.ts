/** What backends are told when Redis loses single keys, as when it evicts them. */

import assert from "node:assert/strict";
import script from "../../src/redis/inbox.lua" with { type: "text" };
import { entriesWith, inboxEnv, storyOf } from "../harness/entries.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";

const inbox = "agent:agent:inbox";

Deno.test("Redis loses a key of an inbox: no session with a socket is vacated, and each one that has left is", async () => {
  await using redis = await RedisServer.start();
  await using first = await TestProxy.start(redis, inboxEnv);
  await using second = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  const keysOf = async (agent: string, names: readonly string[]) =>
    (await Promise.all(names.map((name) => control.keys(`wsproxy:{agent:${agent}:inbox}:${name}`)))).flat();
  /** Told again by each proxy, of which nothing is written. */
  const toldAgain = async (agent: string) => {
    await control.del(...await keysOf(agent, ["epoch"]));
    await eventually("both proxies have told", async () => {
      const [epoch] = (await control.get(`wsproxy:{agent:${agent}:inbox}:epoch`) ?? "").split(" ");
      const known = await Promise.all((await keysOf(agent, ["known:*"])).map((key) => control.get(key)));
      return known.filter((text) => text?.split(" ")[2] === epoch).length === 2;
    });
  };
  const losses = [
    ...[["sockets"], ["held:*"], ["vacant"], ["known:*"], ["epoch"], ["held:*", "known:*"]],
    ["epoch", "sockets", "vacant", "known:*"],
    ["again", "held:*", "known:*"],
  ];
  await Promise.all(losses.map(async (lost, n) => {
    const agent = `agent-${n}`;
    const leaves = await first.connect("both", { agent });
    const gone = await first.connect("gone", { agent });
    const stays = await second.connect("both", { agent });
    await entriesWith(control, "connected", 3, agent);
    if (lost[0] === "again") await toldAgain(agent);
    const keys = await keysOf(agent, lost);
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

Deno.test("What Redis refuses while all is told again already is told once", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  await using proxy = await TestProxy.start(relay.url, inboxEnv);
  const control = redis.client();
  const beat = async () => (await control.hvals("wsproxy:{proxies}")).join();
  const beats = async () => {
    const before = await beat();
    await eventually("it beats", async () => await beat() !== before);
  };
  const known = async () => await control.keys("wsproxy:{agent:agent:inbox}:known:*");
  const stays = await proxy.connect("stays");
  const leaves = await proxy.connect("leaves");
  await entriesWith(control, "connected", 2);
  await beats();
  // All is told again at once, and the next time at a beat only.
  await control.del(...await known());
  await (await proxy.connect("first")).close();
  await entriesWith(control, "connected", 3);
  await control.del(...await known());
  await (await proxy.connect("refused")).close();
  relay.delayMs = 300;
  await beats();
  // This is refused, and that is heard after the answer to the beat.
  await leaves.close();
  const entries = await entriesWith(control, "vacated", 3);
  assert.deepEqual(storyOf(entries, "refused"), ["connected", "disconnected 1005", "vacated"]);
  assert.deepEqual(storyOf(entries, "leaves"), ["connected", "disconnected 1005", "vacated"]);
  await stays.close();
});

Deno.test("A proxy whose key is lost while others bury a former generation of it tells all again", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  const stays = await proxy.connect("stays");
  await entriesWith(control, "connected", 1);
  const [known] = await control.keys("wsproxy:{agent:agent:inbox}:known:*");
  const [prefix, holder] = known!.split(":known:");
  const [generation] = (await control.get(known!))!.split(" ");
  const [connection] = await control.hkeys(`${prefix}:held:${holder}`);
  const beside = ["sockets", "vacant", `held:${holder}`, `known:${holder}`, "epoch"];
  const keys = [inbox, ...beside.map((name) => `${prefix}:${name}`)];
  const bury = (what: string, ...words: string[]) =>
    [script, keys.length, ...keys, what, "1000", String(Number(generation) - 1), "60000", ...words] as const;
  await control.multi().del(known!).eval(...bury("bury", "1", connection!)).eval(...bury("buried", "3600000")).exec();
  const entries = await entriesWith(control, "connected", 2);
  assert.deepEqual(storyOf(entries, "stays"), ["connected", "disconnected 1006", "connected"]);
  await stays.close();
  assert.deepEqual(storyOf(await entriesWith(control, "vacated", 1), "stays").slice(3), [
    "disconnected 1005",
    "vacated",
  ]);
});
