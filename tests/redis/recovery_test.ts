/** Whatever happens to a connection to Redis, messages flow again once Redis is well, and no session is left deaf. */

import assert from "node:assert/strict";
import { pino } from "pino";
import { downChannel } from "../../src/redis/link.ts";
import { missedNotice } from "../../src/session/frames.ts";
import { Client } from "../harness/client.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually, soon } from "../harness/wait.ts";
import { handshake } from "../harness/wire.ts";

const numbers = (count: number, first = 0) => Array.from({ length: count }, (_, i) => String(first + i));

Deno.test("What accepts and hangs up is not hammered, and is left behind once Redis is well", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  await using proxy = await TestProxy.start(relay.url);
  await using client = await proxy.connect("s1");
  relay.hangsUp = true;
  const [before, startMs] = [relay.accepted, performance.now()];
  relay.cut();
  await eventually("all connections tried for a while", () => relay.accepted >= before + 21);
  // Each has five short delays first, and later ones are half a second or more.
  const mostEach = 6 + (performance.now() - startMs) / 500;
  assert(relay.accepted - before <= 3 * mostEach, `${relay.accepted - before} attempts`);
  assert(await proxy.metric("wsproxy_redis_connect_failures_total") >= 10);
  relay.hangsUp = false;
  await eventually("healthy", () => proxy.isHealthy());
  const control = redis.client();
  await eventually("heard", async () => await control.publish("session:s1:down", "after") > 0);
  assert.deepEqual(await client.take(2), [missedNotice.bare, "after"]);
});

Deno.test("Two half-open connections are both replaced, though Redis might as well be frozen", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  await using proxy = await TestProxy.start(relay.url, { REDIS_OUTAGE_GRACE_SECS: "3600" });
  await using client = await proxy.connect("s1");
  relay.freezeAll();
  await proxy.counts("wsproxy_redis_up", 0);
  await eventually("healthy", () => proxy.isHealthy());
  const control = redis.client();
  await eventually("heard", async () => await control.publish("session:s1:down", "after") > 0);
  let got = await client.next();
  while (got === missedNotice.bare) got = await client.next();
  assert.equal(got, "after");
});

Deno.test("A wrong password is told once, counted, and tried less and less often", async () => {
  await using redis = await RedisServer.start("--requirepass", "right");
  const url = redis.url.replace("redis://", "redis://:right@");
  await using proxy = await ProxyProcess.start(url);
  const control = redis.client("right");
  const failures = () => proxy.metric("wsproxy_redis_connect_failures_total");
  const before = await failures();
  await control.config("SET", "requirepass", "rotated");
  await control.client("KILL", "TYPE", "pubsub");
  await control.client("KILL", "TYPE", "normal", "SKIPME", "yes");
  const startMs = performance.now();
  await eventually("it was tried for a while", async () => await failures() >= before + 21);
  const mostEach = 8 + (performance.now() - startMs) / 1000;
  assert(await failures() - before <= 3 * mostEach);
  await control.config("SET", "requirepass", "right");
  await eventually("healthy", () => proxy.isHealthy());
  proxy.signal("SIGTERM");
  await proxy.exit();
  const reasons = (await proxy.log.rest()).split("\n").filter((line) => line.includes("WRONGPASS"));
  const told = reasons.map((line) => JSON.parse(line)).map(({ level, connection }) => `${level} ${connection}`);
  assert.deepEqual(told.sort(), ["warn publisher", "warn reader", "warn subscriber"]);
});

onEachEngine("A subscription that Redis rejects is asked for again, and its client told of the gap", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.call("ACL", "SETUSER", "proxy", "on", ">password", "+@all", "~*", "&*");
  const url = redis.url.replace("redis://", "redis://proxy:password@");
  await using proxy = await TestProxy.start(url, { ...engine, REDIS_OUTAGE_GRACE_SECS: "3600" });
  const clients = await Promise.all(["a", "b", "c"].map((session) => proxy.connect(session)));
  const [a, b] = clients;
  const allow = (...rights: string[]) =>
    control.call("ACL", "SETUSER", "proxy", "resetchannels", "&wsproxy:*", "&session:*:up", ...rights);
  // Redis cuts off a subscriber of what it may not hear any more.
  await allow("&session:a:down");
  const publish = (session: string, text: string) =>
    eventually(`${session} is heard`, async () => await control.publish(downChannel(session), text) > 0);
  await publish("a", "still here");
  assert.deepEqual(await a!.take(2), [missedNotice.bare, "still here"]);
  const { status } = await proxy.request("/agent/ws/b", { headers: await handshake("b") });
  assert.equal(status, 503);
  assert.equal(await control.publish("session:b:down", "missed"), 0);
  await allow("&session:*:down");
  await publish("b", "back");
  assert.deepEqual(await b!.take(2), [missedNotice.bare, "back"]);
  for (const client of clients) await client.close();
});

onEachEngine(
  "A session that is rejected for longer than the outage grace is closed with 1013, and no other one",
  async (engine) => {
    await using redis = await RedisServer.start();
    const control = redis.client();
    await control.call("ACL", "SETUSER", "proxy", "on", ">password", "+@all", "~*", "&*");
    const url = redis.url.replace("redis://", "redis://proxy:password@");
    await using proxy = await TestProxy.start(url, { ...engine, REDIS_OUTAGE_GRACE_SECS: "1" });
    const clients = await Promise.all(numbers(200).map((session) => proxy.connect(session)));
    await control.call("ACL", "SETUSER", "proxy", "resetchannels", "&wsproxy:*", "&session:*:up", "&session:7:down");
    for (const [session, client] of clients.entries()) {
      if (session !== 7) assert.deepEqual(await client.ended(), { code: 1013, reason: "Redis is unavailable" });
    }
    await eventually("heard", async () => await control.publish("session:7:down", "still here") > 0);
    assert.deepEqual(await clients[7]!.take(2), [missedNotice.bare, "still here"]);
    await clients[7]!.close();
  },
);

onEachEngine("While a script keeps Redis busy, messages wait and no client is closed", async (engine) => {
  await using redis = await RedisServer.start("--busy-reply-threshold", "50");
  using relay = new Relay(redis.port);
  const refused = Promise.withResolvers<void>();
  let cutsThen = false;
  const log = pino({}, {
    write(line: string) {
      if (!cutsThen || !line.includes("Redis takes no messages now")) return;
      cutsThen = false;
      relay.cut();
      refused.resolve();
    },
  });
  await using proxy = await TestProxy.start(relay.url, { ...engine, REDIS_OUTAGE_GRACE_SECS: "3600" }, { log });
  await using client = await proxy.connect("s1");
  const backend = await Listener.to(redis, "session:s1:up");
  const control = redis.client();
  // A connection that comes later is refused.
  await control.ping();
  const spinning = redis.client().eval("while true do end", 0).catch(() => "killed");
  await eventually("Redis is busy", async () => {
    try {
      await control.ping();
      return false;
    } catch (error) {
      return String(error).includes("BUSY");
    }
  });
  for (const n of numbers(50)) client.send(n);
  await proxy.counts("wsproxy_messages_up_total", 50);
  // Redis has refused the canary.
  await proxy.counts("wsproxy_redis_up", 0);
  // A new connection is refused as well, and has to try again. Messages that are under way just then may have arrived,
  // and would not be sent again.
  cutsThen = true;
  await soon(refused.promise, "a refusal");
  await eventually("refused", async () => await proxy.metric("wsproxy_redis_connect_failures_total") > 2);
  await control.script("KILL");
  assert.equal(await spinning, "killed");
  assert.deepEqual(await backend.take(50), numbers(50));
  await eventually("healthy", () => proxy.isHealthy());
});

onEachEngine("CLIENT PAUSE WRITE is Redis frozen: nothing is lost, and no connection is replaced", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, REDIS_OUTAGE_GRACE_SECS: "3600" });
  await using client = await proxy.connect("s1");
  const backend = await Listener.to(redis, "session:s1:up");
  const control = redis.client();
  const publishers = async () => {
    const list = await control.client("LIST") as string;
    return list.split("\n").filter((line) => line.includes("name=wsproxy-publisher ")).map((line) =>
      line.split(" ")[0]
    );
  };
  const [first] = await publishers();
  await control.call("CLIENT", "PAUSE", 3_600_000, "WRITE");
  for (const n of numbers(100)) client.send(n);
  await proxy.counts("wsproxy_redis_up", 0);
  // A second connection is tried beside the first, and waits as well.
  await eventually("suspected", async () => (await publishers()).length > 1);
  await eventually(
    "given up, and tried again",
    async () => await proxy.metric("wsproxy_redis_connect_failures_total") > 1,
  );
  await control.call("CLIENT", "UNPAUSE");
  assert.deepEqual(await backend.take(100), numbers(100));
  await eventually("healthy", () => proxy.isHealthy());
  await eventually("only the first is left", async () => (await publishers()).join() === first);
  assert.equal(await proxy.metric("wsproxy_gaps_total"), 0);
  assert.equal(await proxy.metric("wsproxy_upstream_lost_total"), 0);
});

onEachEngine("A master that is demoted under live connections is an outage until a master is there", async (engine) => {
  await using redis = await RedisServer.start();
  await using other = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, REDIS_OUTAGE_GRACE_SECS: "3600" });
  await using client = await proxy.connect("s1");
  const control = redis.client();
  await control.replicaof("127.0.0.1", other.port);
  await proxy.counts("wsproxy_redis_up", 0);
  assert.match((await proxy.request("/health")).body, /unhealthy/);
  assert.equal((await proxy.request("/agent/ws/s2", { headers: await handshake("s2") })).status, 503);
  await eventually(
    "it is not taken for a master",
    async () => await proxy.metric("wsproxy_redis_connect_failures_total") > 4,
  );
  client.send('"during"');
  const backend = await Listener.to(redis, "session:s1:up");
  await control.replicaof("NO", "ONE");
  await eventually("healthy", () => proxy.isHealthy());
  assert.deepEqual(await backend.take(1), ['"during"']);
  await eventually("heard", async () => await control.publish("session:s1:down", "after") > 0);
  let got = await client.next();
  assert.equal(got, missedNotice.bare);
  while (got === missedNotice.bare) got = await client.next();
  assert.equal(got, "after");
});

Deno.test("Redis over a Unix socket, with a password and a database", async () => {
  const path = `${await Deno.makeTempDir()}/redis.sock`;
  await using redis = await RedisServer.start("--unixsocket", path, "--requirepass", "p%ss");
  const url = `redis+unix://:p%25ss@${path}?db=3`;
  await using proxy = await ProxyProcess.start(url, {}, {
    denoArgs: [`--allow-read=${path}`, `--allow-write=${path}`],
  });
  await using client = await Client.connect(proxy.port, "s1");
  await redis.client("p%ss").publish("session:s1:down", "hello");
  assert.equal(await client.next(), "hello");
});

onEachEngine("Messages that come slowly are waited for, though the canary stands behind them", async (engine) => {
  await using redis = await RedisServer.start("--client-output-buffer-limit", "pubsub", "0", "0", "0");
  using relay = new Relay(redis.port);
  await using proxy = await TestProxy.start(relay.url, engine);
  await using client = await proxy.connect("s1");
  // What is published now takes twice as long as a canary is waited for.
  relay.bytesPerSec = 1_000_000;
  const texts = Array.from({ length: 4000 }, (_, n) => `${n} ${"x".repeat(1000)}`);
  const pipeline = redis.client().pipeline();
  for (const text of texts) pipeline.publish("session:s1:down", text);
  await pipeline.exec();
  assert.deepEqual(await client.take(texts.length), texts);
  assert.equal(await proxy.metric("wsproxy_gaps_total"), 0);
});

Deno.test("Connections that lead to different servers are brought together", async () => {
  await using former = await RedisServer.start();
  await using redis = await RedisServer.start();
  using relay = new Relay(former.port);
  await using proxy = await TestProxy.start(relay.url);
  await using client = await proxy.connect("s1");
  // A name that was given to another server: a new connection comes to that one.
  relay.target = redis.port;
  await former.client().client("KILL", "TYPE", "pubsub");
  const control = redis.client();
  await eventually("heard", async () => await control.publish("session:s1:down", "after") > 0);
  const backend = await Listener.to(redis, "session:s1:up");
  await eventually("spoken", async () => {
    client.send('"up"');
    await eventually("healthy", () => proxy.isHealthy());
    return backend.waiting > 0;
  });
  let got = await client.next();
  while (got === missedNotice.bare) got = await client.next();
  assert.equal(got, "after");
});
