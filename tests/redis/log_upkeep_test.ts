/** How long logs live that clients are attached to, in a real Redis. */

import assert from "node:assert/strict";
import { LogUpkeep } from "../../src/redis/log_upkeep.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";

/** A channel that a resuming client listens to. */
const channel = (name: string) => ({ name, listeners: [{ resumes: true }] });

Deno.test("All attached logs are prolonged in a pass, one more than go into one write included, and no others", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const ttlMs = 800_000;
  const count = 1001;
  const names = Array.from({ length: count }, (_, n) => `session:s${n}:down`);
  const shortMs = 100_000;
  for (const name of [...names, "session:alone:down"]) await client.set(name, "", "PX", shortMs);
  const attached = names.map((name) => channel(name));
  // These leave while the pass is under way.
  const leaving = attached.slice(-3);
  let passes = 0;
  const upkeep = new LogUpkeep(ttlMs, () => (passes++, attached));
  const { now } = performance;
  // Whole milliseconds add up without an error.
  let atMs = Math.ceil(now.call(performance));
  performance.now = () => atMs;
  try {
    const prolonged = async () => {
      const left = await Promise.all(names.map((name) => client.pttl(name)));
      assert(left.every((ms) => ms <= shortMs || ms > ttlMs), "as long as a log lives, or untouched");
      return left.filter((ms) => ms > shortMs).length;
    };
    await upkeep.step(client);
    assert.equal(await prolonged(), 0);
    // A pass takes an eighth of the time to live.
    atMs += ttlMs / 16;
    assert.equal(await upkeep.step(client), undefined);
    assert.equal(await prolonged(), 501);
    for (const left of leaving) left.listeners = [];
    atMs += ttlMs / 16;
    await upkeep.step(client);
    assert.equal(await prolonged(), count - leaving.length);
    assert.equal(passes, 1);
    assert(await client.pttl("session:alone:down") <= shortMs);
    await upkeep.step(client);
    assert.equal(passes, 2, "the next pass begins when the time of this one is over");
  } finally {
    performance.now = now;
  }
});

Deno.test("What Redis refuses is told, and does not stop the pass; what a broken connection leaves has its turn again", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const names = ["session:s0:down", "session:s1:down"];
  for (const name of names) await client.set(name, "", "PX", 1000_000);
  const upkeep = new LogUpkeep(8, () => names.map((name) => channel(name)));
  const passed = async (until: typeof client) => {
    const endMs = performance.now() + 2;
    while (performance.now() < endMs) await null;
    return await upkeep.step(until);
  };
  await upkeep.step(client);
  const broken = redis.client();
  await broken.quit();
  await assert.rejects(passed(broken), { message: "Connection is closed." });
  await client.call("ACL", "SETUSER", "default", "-pexpire");
  assert.match(String(await passed(client)), /NOPERM/);
  await client.call("ACL", "SETUSER", "default", "+pexpire");
  await passed(client);
  assert.equal(await passed(client), undefined);
  for (const name of names) assert(await client.pttl(name) <= 10);
});

Deno.test("The log of a session that a resuming client is attached to does not expire, however long that is idle", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { LOG_TTL_SECS: "16" });
  const control = redis.client();
  await proxy.resumable();
  const keys = ["resuming", "bare", "alone"].map((session) => `session:${session}:down`);
  const [resuming, bare, alone] = keys as [string, string, string];
  for (const key of keys) await control.call("FCALL", "wsproxy_send", 1, key, "x");
  await using client = await proxy.connect("resuming", { resume: "0" });
  assert.match(await client.next(), /^\d+-1\nx$/);
  await using _other = await proxy.connect("bare");
  const shortMs = 12_000;
  for (const key of keys) await control.pexpire(key, shortMs);
  await eventually("prolonged", async () => await control.pttl(resuming) > 16_000);
  // No client could resume from these, or will.
  for (const key of [bare, alone]) assert(await control.pttl(key) <= shortMs);
});
