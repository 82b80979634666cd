import assert from "node:assert/strict";
import { Deadlines } from "../../src/deadline.ts";
import { Bridge } from "../../src/redis/bridge.ts";
import { downChannel, type Endpoint } from "../../src/redis/link.ts";
import { parseRedisUrl } from "../../src/redis_url.ts";
import { createLog } from "../../src/log.ts";
import { missedNotice } from "../../src/session/frames.ts";
import { Client } from "../harness/client.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer, subscribers } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";
import { handshake } from "../harness/wire.ts";

const numbers = (count: number, first = 0) => Array.from({ length: count }, (_, i) => String(first + i));

/** Publishes until a client listens: what a backend that knows of the outage would do. */
async function publishHeard(redis: RedisServer, channel: string, text: string): Promise<void> {
  const control = redis.client();
  await eventually(`${channel} has a subscriber`, async () => await control.publish(channel, text) > 0);
}

onEachEngine("Redis is killed and comes back: sockets stay open, clients are told, and all goes on", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1");
  await using other = await proxy.connect("s2");
  await redis.kill();
  await eventually("unhealthy", async () => !await proxy.isHealthy());
  for (const n of numbers(100)) client.send(n);
  assert.equal((await proxy.request("/agent/ws/s3", { headers: await handshake("s3") })).status, 503);
  // The backend is back before the proxy: Redis refuses no connection, and the proxy is kept out until the backend listens.
  const backend = redis.client();
  const heard: string[] = [];
  backend.on("message", (_channel, text) => heard.push(text));
  const subscribed = backend.subscribe("session:s1:up");
  await redis.start();
  await subscribed;
  await eventually("healthy", () => proxy.isHealthy());
  await publishHeard(redis, "session:s1:down", "after");
  await publishHeard(redis, "session:s2:down", "after");
  assert.deepEqual(await client.take(2), [missedNotice.bare, "after"]);
  assert.deepEqual(await other.take(2), [missedNotice.bare, "after"]);
  client.send("100");
  await eventually("the last one is heard", () => heard.at(-1) === "100");
  // The one that reconnects first wins, so a few may have gone out before the backend listened; none twice, none reordered.
  assert.deepEqual(heard, numbers(heard.length, 101 - heard.length));
  await proxy.counts("wsproxy_gaps_total", 2);
});

onEachEngine(
  "Redis is frozen: nothing is lost either way, no client is told of a gap, new clients do not hang",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await using client = await proxy.connect("s1");
    const backend = await Listener.to(redis, "session:s1:up");
    const control = redis.client();
    client.send('"before"');
    assert.deepEqual(await backend.take(1), ['"before"']);
    redis.signal("SIGSTOP");
    const published = numbers(100).map((n) => control.publish("session:s1:down", n));
    for (const n of numbers(100)) client.send(n);
    assert.equal((await proxy.request("/health")).status, 503);
    await eventually("new clients are refused", async () => {
      const { status, headers } = await proxy.request("/agent/ws/s2", { headers: await handshake("s2") });
      return status === 503 && headers.has("retry-after");
    });
    redis.signal("SIGCONT");
    await eventually("healthy", () => proxy.isHealthy());
    assert.deepEqual(await backend.take(100), numbers(100));
    assert.deepEqual(await client.take(100), numbers(100));
    await Promise.all(published);
    assert.equal(await proxy.metric("wsproxy_gaps_total"), 0);
    await using _new = await proxy.connect("s2");
  },
);

onEachEngine(
  "Cut Pub/Sub connections: every session is subscribed again and told, before anything newer",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const clients = await Promise.all(numbers(20).map((session) => proxy.connect(session)));
    for (let round = 1; round <= 3; round++) {
      await control.client("KILL", "TYPE", "pubsub");
      for (const session of numbers(20)) await publishHeard(redis, downChannel(session), `after ${round}`);
      for (const client of clients) assert.deepEqual(await client.take(2), [missedNotice.bare, `after ${round}`]);
    }
    await Promise.all(clients.map((client) => client.close()));
    await proxy.empty();
  },
);

for (const { policy, told } of [{ policy: "close", told: 1012 }, { policy: "ignore", told: undefined }]) {
  onEachEngine(`With REDIS_GAP=${policy} a gap is ${told ?? "not told"}, and counted`, async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, REDIS_GAP: policy });
    await using client = await proxy.connect("s1");
    await redis.client().client("KILL", "TYPE", "pubsub");
    if (told) assert.deepEqual(await client.ended(), { code: told, reason: "messages may have been lost" });
    else {
      await publishHeard(redis, "session:s1:down", "after");
      assert.equal(await client.next(), "after");
    }
    await proxy.counts("wsproxy_gaps_total", 1);
  });
}

onEachEngine(
  "An outage beyond the grace ends sessions with 1013; what they had not published is dropped and counted",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, REDIS_OUTAGE_GRACE_SECS: "1" });
    const clients = await Promise.all(numbers(30).map((session) => proxy.connect(session)));
    await redis.kill();
    await eventually("unhealthy", async () => !await proxy.isHealthy());
    for (const client of clients) client.send('"lost"');
    for (const client of clients) {
      assert.deepEqual(await client.ended(), {
        code: 1013,
        reason: "Redis is unavailable",
      });
    }
    await proxy.empty();
    await redis.start();
    await eventually("healthy", () => proxy.isHealthy());
    await proxy.counts("wsproxy_upstream_lost_total", 30);
    await using again = await proxy.connect("1");
    await publishHeard(redis, "session:1:down", "hello");
    assert.equal(await again.next(), "hello");
  },
);

onEachEngine(
  "What the queue for Redis cannot hold ends in 1013 and a count, and hurts no other client",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "20000" });
    await using greedy = await proxy.connect("s1");
    await using modest = await proxy.connect("s2");
    const backend = await Listener.to(redis, "session:s2:up");
    redis.signal("SIGSTOP");
    for (let i = 0; i < 100; i++) greedy.send(JSON.stringify("x".repeat(1000)));
    modest.send('"still here"');
    assert.deepEqual(await greedy.ended(), { code: 1013, reason: "message could not be queued for Redis" });
    await proxy.counts("wsproxy_upstream_refused_total", 1);
    redis.signal("SIGCONT");
    assert.deepEqual(await backend.take(1), ['"still here"']);
  },
);

onEachEngine("A publish that may have arrived is not repeated, and its sender is told", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1");
  redis.signal("SIGSTOP");
  client.send('"in doubt"');
  await proxy.counts("wsproxy_messages_up_total", 1);
  await redis.kill();
  assert.equal(await client.next(), missedNotice.bare);
  await proxy.counts("wsproxy_upstream_lost_total", 1);
  await redis.start();
  const backend = await Listener.to(redis, "session:s1:up");
  await eventually("healthy", () => proxy.isHealthy());
  client.send('"next"');
  assert.deepEqual(await backend.take(1), ['"next"']);
});

for (const connection of ["subscriber", "publisher"] as const) {
  Deno.test(`A ${connection} connection that went silent is replaced, and no other`, async () => {
    await using redis = await RedisServer.start();
    using relay = new Relay(redis.port);
    await using proxy = await TestProxy.start(relay.url);
    await using client = await proxy.connect("s1");
    const backend = await Listener.to(redis, "session:s1:up");
    const control = redis.client();
    const id = async (name: string) => {
      const list = await control.client("LIST") as string;
      return list.split("\n").filter((line) => line.includes(`name=wsproxy-${name} `)).map((line) =>
        line.split(" ")[0]
      );
    };
    const other = connection === "subscriber" ? "publisher" : "subscriber";
    const [before] = await id(other);
    relay.freeze(`wsproxy-${connection}`);
    await proxy.counts("wsproxy_redis_up", 0);
    await proxy.counts("wsproxy_redis_up", 1);
    assert.deepEqual(await id(other), [before]);
    await eventually("messages come down again", async () => {
      await control.publish("session:s1:down", "hello");
      return await proxy.metric("wsproxy_messages_down_total") > 0;
    });
    client.send('"up"');
    assert.deepEqual(await backend.take(1), ['"up"']);
  });
}

Deno.test("A subscriber that Redis cut for its full output buffer is back, and clients are told", async () => {
  await using redis = await RedisServer.start("--client-output-buffer-limit", "pubsub 1mb 1mb 1");
  await using proxy = await ProxyProcess.start(redis);
  await using client = await Client.connect(proxy.port, "s1");
  const control = redis.client();
  proxy.signal("SIGSTOP");
  const text = "x".repeat(100_000);
  await eventually("Redis has cut it", async () => await control.publish("session:s1:down", text) === 0);
  proxy.signal("SIGCONT");
  await publishHeard(redis, "session:s1:down", "after");
  let got = await client.next();
  while (got === text) got = await client.next();
  assert.deepEqual([got, await client.next()], [missedNotice.bare, "after"]);
  await eventually("healthy", () => proxy.isHealthy());
});

function connect(redis: RedisServer): Bridge {
  return new Bridge({
    address: parseRedisUrl(redis.url),
    log: createLog({ level: "silent", format: "json" }),
    outageGraceMs: 10_000,
    maxPendingCost: 1_000_000,
    sessionLogs: { maxMessages: 100, ttlMs: 60_000, maxMessageBytes: 1000 },
    onOutage() {},
    onRecovery() {},
  });
}

/** An endpoint that does nothing but what is given. */
const endpoint = (given: Partial<Endpoint>): Endpoint => ({
  agentId: "agent",
  traceparent: "",
  claims: "",
  address: "",
  deliver: () => "taken",
  backlog: "none",
  gap() {},
  rejected() {},
  lost() {},
  unheard() {},
  fail(error) {
    throw error;
  },
  ...given,
});

Deno.test("A listener that has a backlog for ever, slow or moving, keeps nothing from the others", async () => {
  await using redis = await RedisServer.start();
  const bridge = connect(redis);
  await eventually("Redis is up", () => bridge.available);
  // A moving one is waited for longer, so it gets less.
  for (const [backlog, count] of [["slow", 100], ["moving", 3]] as const) {
    let heard = 0;
    let kept = 0;
    const slow = bridge.link("slow", endpoint({ deliver: () => (kept++, "full"), backlog }));
    const other = bridge.link("other", endpoint({ deliver: () => (heard++, "taken") }));
    await Promise.all([slow, other].map((link) => link.attach(20_000, new Deadlines())));
    const pipeline = redis.client().pipeline();
    const text = "x".repeat(50_000);
    for (let n = 0; n < count; n++) {
      pipeline.publish(downChannel("slow"), text);
      pipeline.publish(downChannel("other"), text);
    }
    await pipeline.exec();
    await eventually("all is heard", () => heard === count);
    // And what comes in the middle of a pause.
    await redis.client().publish(downChannel("slow"), text);
    await eventually("there is a pause", () => kept === count + 1);
    await redis.client().publish(downChannel("other"), text);
    await eventually("that is heard", () => heard === count + 1);
    for (const link of [slow, other]) link.detach();
  }
  await bridge.close(1000);
});

Deno.test("5,000 sessions are all subscribed again after a cut, as Redis itself counts them", async () => {
  await using redis = await RedisServer.start();
  const bridge = connect(redis);
  await eventually("Redis is up", () => bridge.available);
  const sessions = numbers(5000);
  let missed = 0;
  const links = sessions.map((session) => bridge.link(session, endpoint({ gap: () => missed++ })));
  await Promise.all(links.map((link) => link.attach(20_000, new Deadlines())));
  const control = redis.client();
  const subscribed = async () => {
    const counts = await control.pubsub("NUMSUB", ...sessions.map(downChannel)) as (string | number)[];
    return counts.filter((count) => count === 1).length;
  };
  assert.equal(await subscribed(), 5000);
  await control.client("KILL", "TYPE", "pubsub");
  await eventually("all are told", () => missed === 5000);
  assert.equal(await subscribed(), 5000);
  for (const link of links) link.detach();
  await eventually("Redis has forgotten them", async () => await subscribed() === 0);
  await bridge.close(1000);
});

Deno.test("Unsubscribing and subscribing in one tick ends subscribed, in any number", async () => {
  await using redis = await RedisServer.start();
  const bridge = connect(redis);
  await eventually("Redis is up", () => bridge.available);
  const control = redis.client();
  const got: string[] = [];
  const links = numbers(10).map((n) =>
    bridge.link("s1", endpoint({ deliver: (text) => (got.push(`${n} ${text}`), "taken") }))
  );
  await links[0]!.attach(20_000, new Deadlines());
  for (let i = 1; i < 10; i++) {
    links[i - 1]!.detach();
    const attached = links[i]!.attach(20_000, new Deadlines());
    links[i - 1]!.detach();
    await attached;
    assert.equal(await control.publish("session:s1:down", "hello"), 1);
    await eventually("it is heard", () => got.length === i);
    assert.equal(got.at(-1), `${i} hello`);
  }
  links[9]!.detach();
  await eventually("Redis has forgotten", async () => await subscribers(control, "session:s1:down") === 0);
  await bridge.close(1000);
});
