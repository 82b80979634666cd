/** A master that sentinels name: killed, demoted, come back, cut off, and lied about. */

import assert from "node:assert/strict";
import { pino } from "pino";
import { RedisConnection } from "../../src/redis/connection.ts";
import { Rights } from "../../src/redis/rights.ts";
import { findMasters } from "../../src/redis/sentinel.ts";
import { missedNotice } from "../../src/session/frames.ts";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { SentinelGroup, SentinelProcess } from "../harness/sentinel.ts";
import { eventually } from "../harness/wait.ts";
import type { Client } from "../harness/client.ts";

/** Publishes on a server until the client gets it, and returns what came before. */
async function reaches(server: RedisServer, client: Client, channel: string, text: string): Promise<string[]> {
  const control = server.client();
  const got: string[] = [];
  await eventually(`${text} arrives`, async () => {
    await control.publish(channel, text);
    got.push(...client.arrived());
    return got.includes(text);
  });
  return got.slice(0, got.indexOf(text));
}

/** What the client sends is heard on a server. */
async function isHeard(server: RedisServer, client: Client, channel: string): Promise<void> {
  const ear = server.client();
  let heard = false;
  ear.on("message", () => heard = true);
  await ear.subscribe(channel);
  await eventually("the client is heard", () => {
    client.send('"up"');
    return heard;
  });
}

onEachEngine(
  "The master is killed under a stream: the proxy follows the sentinels, and clients are told or resume",
  async (engine) => {
    await using group = await SentinelGroup.start();
    await using proxy = await TestProxy.start(group.url, { ...engine, REDIS_OUTAGE_GRACE_SECS: "60" });
    await using bare = await proxy.connect("s1");
    await proxy.resumable();
    await using resuming = await proxy.connect("s2", { resume: "0" });
    await resuming.next();
    const former = await group.master();
    const [position] = await former.client().call("FCALL", "wsproxy_send", 1, "session:s2:down", "kept") as string[];
    assert.equal(await resuming.next(), `${position}\nkept`);
    assert.equal(await former.client().wait(2, 5000), 2);
    await reaches(former, bare, "session:s1:down", "before");
    await former.kill();
    const master = await group.elected(former);
    const meanwhile = await reaches(master, bare, "session:s1:down", "after");
    assert.deepEqual(meanwhile.filter((text) => text !== "before"), [missedNotice.bare]);
    await isHeard(master, bare, "session:s1:up");
    // The new master has the log, and what was sent meanwhile.
    const [next] = await master.client().call("FCALL", "wsproxy_send", 1, "session:s2:down", "next") as string[];
    const frames: string[] = [];
    while (frames.at(-1) !== `${next}\nnext`) frames.push(await resuming.next());
    assert(!frames.some((frame) => frame.startsWith("!gap")), frames.join());
    // The former one comes back as a replica of the new one, and no proxy goes there.
    await former.start();
    await reaches(master, bare, "session:s1:down", "still");
  },
);

Deno.test("A planned failover: live connections to the former master are left", async () => {
  await using group = await SentinelGroup.start();
  await using proxy = await TestProxy.start(group.url);
  await using client = await proxy.connect("s1");
  const former = await group.master();
  await group.sentinels[0]!.redis.call("SENTINEL", "FAILOVER", "mymaster");
  const master = await group.elected(former);
  await reaches(master, client, "session:s1:down", "after");
  await isHeard(master, client, "session:s1:up");
  await using _new = await proxy.connect("s2");
});

Deno.test("A former master that still answers as one is left when the sentinels name another", async () => {
  await using group = await SentinelGroup.start();
  await using proxy = await TestProxy.start(group.url);
  await using client = await proxy.connect("s1");
  const former = await group.master();
  // It is frozen for so long that another one is elected, and comes back without knowing.
  former.signal("SIGSTOP");
  const master = await group.elected(former);
  for (const sentinel of group.sentinels) sentinel.signal("SIGSTOP");
  former.signal("SIGCONT");
  for (const sentinel of group.sentinels) sentinel.signal("SIGCONT");
  await reaches(master, client, "session:s1:down", "after");
  await isHeard(master, client, "session:s1:up");
});

Deno.test("A sentinel that lies is outvoted, and one that names a replica is not followed", async () => {
  await using group = await SentinelGroup.start();
  const [master, replica] = group.servers;
  const ports = group.sentinels.map(({ port }) => port);
  const tcp = (port: number) => ({ host: "127.0.0.1", port });
  const ask = (sentinels: number[]) =>
    findMasters({ sentinels: sentinels.map(tcp), masterName: "mymaster", tls: false });
  // It names a replica as a master of the same name.
  await group.sentinels[0]!.redis.call("SENTINEL", "REMOVE", "mymaster");
  await group.sentinels[0]!.redis.call("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", replica!.port, 3);
  const namedBy = async (...sentinels: number[]) => (await ask(sentinels)).map(({ port }) => port);
  assert.deepEqual(await namedBy(ports[0]!), [replica!.port]);
  assert.deepEqual(await namedBy(...ports), [master!.port]);
  assert.deepEqual(new Set(await namedBy(ports[0]!, ports[1]!)), new Set([master!.port, replica!.port]));
  await using proxy = await TestProxy.start(group.url);
  await using client = await proxy.connect("s1");
  await reaches(master!, client, "session:s1:down", "from the master");
});

Deno.test("Of as many votes for a replica and for the master, the master is found, and stays", async () => {
  await using master = await RedisServer.start();
  await using replica = await RedisServer.start("--replicaof", `127.0.0.1 ${master.port}`);
  await using honest = await SentinelProcess.start(master.port);
  await using mistaken = await SentinelProcess.start(replica.port);
  for (const [first, second] of [[mistaken, honest], [honest, mistaken]]) {
    const hosts = `127.0.0.1:${first!.port},127.0.0.1:${second!.port}`;
    await using proxy = await TestProxy.start(`redis+sentinel://${hosts}?sentinel_master_name=mymaster`);
    await using client = await proxy.connect("s1");
    const connects = await proxy.metric("wsproxy_redis_connects_total");
    const looks = await beats(proxy);
    await eventually("the sentinels are asked again", async () => await beats(proxy) > looks + 2);
    assert.deepEqual(await reaches(master, client, "session:s1:down", "from the master"), []);
    assert.equal(await proxy.metric("wsproxy_redis_connects_total"), connects);
  }
});

/** Half seconds in which messages flowed. */
const beats = (proxy: TestProxy) => proxy.metric("wsproxy_redis_round_trip_seconds_count");

Deno.test("A sentinel that does not answer is not waited for when the others agree, and leaves nothing behind", async () => {
  await using redis = await RedisServer.start();
  await using one = await SentinelProcess.start(redis.port);
  await using two = await SentinelProcess.start(redis.port);
  await using silent = await SentinelProcess.start(redis.port);
  silent.signal("SIGSTOP");
  const tcp = (port: number) => ({ host: "127.0.0.1", port });
  const find = (...sentinels: SentinelProcess[]) =>
    findMasters({ sentinels: sentinels.map(({ port }) => tcp(port)), masterName: "mymaster", tls: false });
  const finished: string[] = [];
  const waits = async () => {
    for (let n = 0; n < 2; n++) await assert.rejects(find(silent), /no answer/);
    finished.push("waits");
  };
  const goesOn = async () => {
    for (let n = 0; n < 3; n++) assert.deepEqual(await find(silent, one, two), [tcp(redis.port)]);
    finished.push("goes on");
  };
  await Promise.all([waits(), goesOn()]);
  assert.deepEqual(finished, ["goes on", "waits"]);
});

Deno.test("A trial of rights that is given up while the sentinels are asked does not go on with the master", async () => {
  await using redis = await RedisServer.start();
  await using sentinel = await SentinelProcess.start(redis.port);
  const rights = new Rights(
    {
      ...{ sentinels: [{ host: "127.0.0.1", port: sentinel.port }], masterName: "mymaster" },
      ...{ db: 0, tls: false },
    },
    { sharded: false, inbox: false, lastSocket: false },
    pino({ level: "silent" }),
  );
  const control = redis.client();
  const trials = async () => /cmdstat_multi:calls=(\d+)/.exec(await control.info("commandstats"))?.[1] ?? "0";
  rights.try();
  await rights.close();
  assert.equal(await trials(), "0");
  rights.try();
  await rights.tried;
  assert.equal(await trials(), "1");
});

Deno.test("An attempt to reach a master that has vanished ends when the sentinels name another", async () => {
  await using vanished = await RedisServer.start();
  await using next = await RedisServer.start();
  using relay = new Relay(vanished.port);
  await using sentinel = await SentinelProcess.start(relay.port);
  vanished.signal("SIGSTOP");
  const { promise: up, resolve: onUp } = Promise.withResolvers<void>();
  const connection = new RedisConnection({
    purpose: "publisher",
    address: {
      ...{ sentinels: [{ host: "127.0.0.1", port: sentinel.port }], masterName: "mymaster" },
      ...{ db: 0, tls: false },
    },
    log: pino({ level: "silent" }),
    prove: (redis) => redis.ping(),
    onUp,
    onDown() {},
    onFailure: () => assert.fail("the attempt was waited for"),
  });
  await eventually("it is under way", () => relay.hasSent("wsproxy-publisher"));
  const named = { host: "127.0.0.1", port: next.port };
  await sentinel.redis.call("SENTINEL", "REMOVE", "mymaster");
  await sentinel.redis.call("SENTINEL", "MONITOR", "mymaster", named.host, named.port, 2);
  connection.expect([named]);
  await up;
  assert.equal(connection.client!.options.port, next.port);
  await connection.close();
});

Deno.test("Sentinels that cannot help say why", async () => {
  await using redis = await RedisServer.start();
  await using open = await SentinelProcess.start(redis.port);
  await using guarded = await SentinelProcess.start(redis.port, "a-password");
  const tcp = (port: number) => ({ host: "127.0.0.1", port });
  const ask = (port: number, masterName: string, sentinelPassword?: string) =>
    findMasters({ sentinels: [tcp(port)], masterName, tls: false, ...sentinelPassword ? { sentinelPassword } : {} });
  await assert.rejects(ask(open.port, "other"), /none of 1 sentinels names the master: it knows no master "other"/);
  await assert.rejects(ask(1, "mymaster"), /ECONNREFUSED|refused/i);
  await assert.rejects(ask(guarded.port, "mymaster"), /NOAUTH/);
  await assert.rejects(ask(guarded.port, "mymaster", "wrong"), /WRONGPASS/);
  assert.deepEqual(await ask(guarded.port, "mymaster", "a-password"), [tcp(redis.port)]);
});
