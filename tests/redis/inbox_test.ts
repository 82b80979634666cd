/** What backends read of their agents' sessions, against what happened to their clients. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { Client } from "../harness/client.ts";
import { assertForgotten, entriesOf, entriesWith, type Entry, inboxEnv, names, storyOf } from "../harness/entries.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { kept, Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

onEachEngine("Everything that happens to a session is in its agent's inbox, in order", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ...inboxEnv });
  const control = redis.client();
  const first = await proxy.connect("s1");
  first.send('"one"');
  const second = await proxy.connect("s1");
  first.send('"two, ü"');
  await entriesWith(control, "message", 2);
  await first.close();
  await entriesWith(control, "disconnected", 1);
  second.send('"three"');
  await second.close();
  const entries = await entriesWith(control, "vacated", 1);
  assert.deepEqual(storyOf(entries, "s1"), [
    "connected",
    'message "one"',
    "connected",
    'message "two, ü"',
    "disconnected 1005",
    'message "three"',
    "disconnected 1005",
    "vacated",
  ]);
  assert.deepEqual(entries.map(({ sockets }) => sockets).filter((count) => count !== undefined), ["1", "2", "1", "0"]);
  assert.deepEqual(Object.keys(entries[0]!).sort(), ["at", "connection", "session", "sockets", "type"]);
  const connections = entries.slice(0, -1).map(({ connection }) => connection);
  assert.deepEqual(connections.map((name) => connections.indexOf(name)), [0, 0, 2, 0, 0, 2, 2]);
  for (const { at } of entries) assert(Math.abs(Number(at) - Date.now()) < 60_000);
  await proxy.counts("wsproxy_inbox_entries_total", 8);
  // No backend is subscribed, but the inbox has them all.
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
  await assertForgotten(control);
});

onEachEngine("A connection whose token runs out while it opens is told, and its end, too", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ...inboxEnv, VACATED_GRACE_SECS: "1" });
  const control = redis.client();
  await control.ping();
  const exp = Math.ceil(Date.now() / 1000) + 1;
  redis.signal("SIGSTOP");
  const connecting = proxy.connect("s1", { claims: { exp } });
  await eventually("the token has run out", () => Date.now() >= exp * 1000);
  redis.signal("SIGCONT");
  const client = await connecting;
  assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
  const entries = await entriesWith(control, "vacated", 1);
  assert.deepEqual(storyOf(entries, "s1"), ["connected", "disconnected 4401", "vacated"]);
  await assertForgotten(control);
});

Deno.test("Without INBOX nothing is written", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const client = await proxy.connect("s1");
  client.send('"one"');
  await proxy.counts("wsproxy_unheard_total", 1);
  await client.close();
  assert.deepEqual(await redis.client().keys("*"), []);
});

Deno.test("A resuming client's disconnection says what it was sent last; a reload within the grace vacates nothing", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...inboxEnv, VACATED_GRACE_SECS: "1" });
  const control = redis.client();
  await proxy.resumable();
  const client = await proxy.connect("s1", { resume: "0" });
  await client.next();
  const [position] = await control.call("FCALL", "wsproxy_send", 1, "session:s1:down", "hello") as string[];
  assert.equal(await client.next(), `${position}\nhello`);
  await client.close();
  const again = await proxy.connect("s1");
  await entriesWith(control, "connected", 2);
  const vacant = await control.zcard("wsproxy:{agent:agent:inbox}:vacant");
  assert.equal(vacant, 0);
  await again.close();
  const entries = await entriesWith(control, "vacated", 1);
  assert.equal(entries.find(({ type }) => type === "disconnected")!["position"], position);
  assert.deepEqual(storyOf(entries, "s1"), [
    "connected",
    "disconnected 1005",
    "connected",
    "disconnected 1005",
    "vacated",
  ]);
});

Deno.test("What is posted over SSE is an entry without a connection, and is heard", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const headers = { Authorization: `Bearer ${await mint("s1")}` };
  const url = `http://127.0.0.1:${proxy.port}/agent/sse/s1`;
  const posted = await fetch(url, { method: "POST", headers, body: '"posted"' });
  assert.deepEqual([posted.status, await posted.json()], [202, { receivers: 0, entered: true }]);
  const again = await fetch(url, { method: "POST", headers: { ...headers, "Idempotency-Key": "id-1" }, body: "1" });
  assert.deepEqual([again.status, await again.json()], [202, { id: "id-1", receivers: 0, entered: true }]);
  const [entry, second] = await entriesWith(redis.client(), "message", 2);
  const common = { type: "message", session: "s1", connection: "", at: "" };
  assert.deepEqual({ ...entry, at: "" }, { ...common, data: '"posted"' });
  assert.deepEqual({ ...second, at: "" }, { ...common, data: "1", id: "id-1" });
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
});

Deno.test("What is posted and entered is taken, though it cannot be published: a client that repeated it would double it", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const headers = { Authorization: `Bearer ${await mint("s1")}` };
  const post = async (body: string) => {
    const answer = await fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1`, { method: "POST", headers, body });
    return [answer.status, await answer.text()];
  };
  const control = redis.client();
  const permit = (...rules: string[]) => control.call("ACL", "SETUSER", "default", ...rules);
  await permit("-publish");
  assert.deepEqual(await post('"entered"'), [202, '{"receivers":0,"entered":true}']);
  await permit("-xadd");
  const [status, reason] = await post('"neither"');
  assert.equal(status, 503);
  assert.match(String(reason), /^not published: /);
  await permit("+xadd", "+publish");
  const [entry] = await entriesWith(control, "message", 1);
  assert.equal(entry!["data"], '"entered"');
  assert.equal(await proxy.metric("wsproxy_upstream_lost_total"), 1);
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
});

/** What a proxy that has died leaves: its name is among the dead ones, so that no proxy waits for its beats. */
async function plantDead(redis: Redis, agent: string, name: string, sessions: readonly string[]): Promise<void> {
  const prefix = `wsproxy:{agent:${agent}:inbox}`;
  for (let at = 0; at < sessions.length; at += 1000) {
    const some = sessions.slice(at, at + 1000);
    await redis.hset(`${prefix}:held:${name}`, ...some.flatMap((session) => [`${name}-${session}`, `${session}\n1`]));
    await redis.hset(`${prefix}:sockets`, ...some.flatMap((session) => [session, "1"]));
  }
  await redis.set(`${prefix}:known:${name}`, "0 0 1 1");
  await redis.set(`${prefix}:epoch`, "1 0 1");
  await redis.sadd(`wsproxy:{proxies}:${name}:agents`, agent);
  await redis.sadd("wsproxy:{proxies}:dead", name);
}

Deno.test("Of a dead proxy with 20,001 connections each one is told, and vacated", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await plantDead(control, "agent", "dead", names("s", 20_001));
  await using proxy = await TestProxy.start(redis, inboxEnv);
  await proxy.counts("wsproxy_inbox_entries_total", 2 * 20_001);
  const entries = await entriesOf(control);
  for (const type of ["disconnected", "vacated"]) {
    const told = entries.filter((entry) => entry["type"] === type).map(({ session }) => session);
    assert.deepEqual(told.toSorted(), names("s", 20_001).toSorted());
  }
  await assertForgotten(control);
});

Deno.test("Of a dead proxy with 1,001 agents each one is told", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const agents = names("agent", 1001);
  for (const agent of agents) await plantDead(control, agent, "dead", ["s"]);
  await using proxy = await TestProxy.start(redis, inboxEnv);
  await proxy.counts("wsproxy_inbox_entries_total", 2 * agents.length);
  await eventually("all agents are idle", async () => await control.zcard("wsproxy:{proxies}:idle") === agents.length);
  await eventually("nothing is kept of them", async () => (await control.keys("wsproxy:*:sockets")).length === 0);
  assert.deepEqual(await control.keys("wsproxy:*:{vacant,agents}"), []);
});

Deno.test("Two proxies that die one grace apart leave no session untold", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  // The first one's sessions are swept while those of the second one are taken in, page by page.
  await plantDead(control, "agent", "first", names("a", 1));
  await plantDead(control, "agent", "second", names("b", 3000));
  await using proxy = await TestProxy.start(redis, inboxEnv);
  await proxy.counts("wsproxy_inbox_entries_total", 2 * 3001);
  const vacated = await entriesWith(control, "vacated", 3001);
  assert.equal(new Set(vacated.filter(({ type }) => type === "vacated").map(({ session }) => session)).size, 3001);
  await assertForgotten(control);
});

Deno.test("Connections to Redis that are cut at any moment leave every session's story whole", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  const control = redis.client();
  await using proxy = await TestProxy.start(relay.url, inboxEnv);
  for (let round = 0; round < 5; round++) {
    const clients = await Promise.all(names(`r${round}`, 20).map((name) => proxy.connect(name)));
    relay.cut();
    const closing = clients.slice(0, 10).map((client) => client.close());
    relay.cut();
    await Promise.all(closing);
    await eventually("healthy", () => proxy.isHealthy());
    await Promise.all(clients.slice(10).map((client) => client.close()));
  }
  const entries = await entriesWith(control, "vacated", 100);
  for (let round = 0; round < 5; round++) {
    for (const name of names(`r${round}`, 20)) {
      assert.deepEqual(storyOf(entries, name), ["connected", "disconnected 1005", "vacated"]);
    }
  }
});

Deno.test("Redis loses everything under 201 sockets of an agent, and 1,001 other agents: all are connected again", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  const others = names("agent", 1001);
  const clients = await Promise.all([
    ...names("s", 201).map((name) => proxy.connect(name)),
    ...others.map((agent) => proxy.connect("s", { agent })),
  ]);
  await proxy.counts("wsproxy_inbox_entries_total", clients.length);
  await control.flushall();
  await proxy.counts("wsproxy_inbox_entries_total", 2 * clients.length);
  const told = (await entriesOf(control)).map(({ session }) => session!).sort();
  assert.deepEqual(told, names("s", 201).sort());
  const lengths = await Promise.all(others.map((agent) => control.xlen(`agent:${agent}:inbox`)));
  assert.deepEqual(lengths, others.map(() => 1));
  await Promise.all(clients.map((client) => client.close()));
  await eventually("all agents are idle", async () => await control.zcard("wsproxy:{proxies}:idle") === 1002);
  await eventually("nothing is kept of them", async () => (await control.keys("wsproxy:{agent:*")).length === 0);
  await eventually("none is ours", async () => (await control.keys("wsproxy:{proxies}:*:agents")).length === 0);
});

Deno.test("A full Redis takes no entries: messages go on, what is lost is counted, and connections are told later", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  await using client = await proxy.connect("s1");
  await entriesWith(control, "connected", 1);
  const ear = redis.client();
  const heard: string[] = [];
  ear.on("message", (_channel, text) => heard.push(text));
  await ear.subscribe("session:s1:up", "session:s2:up");
  await control.config("SET", "maxmemory", "1");
  await using other = await proxy.connect("s2");
  client.send('"one"');
  other.send('"two"');
  await eventually("both are published", () => heard.length === 2);
  await proxy.counts("wsproxy_inbox_lost_total", 2);
  await control.config("SET", "maxmemory", "0");
  await entriesWith(control, "connected", 2);
  other.send('"three"');
  const entries = await entriesWith(control, "message", 1);
  assert.deepEqual(storyOf(entries, "s2"), ["connected", 'message "three"']);
});

/** Messages of a client as JSON texts of so many bytes. */
const jsonOf = (bytes: number, letter = "x") => `"${letter.repeat(bytes - 2)}"`;

onEachEngine("A message of any size that is allowed is both published and an entry", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ...inboxEnv });
  const ear = await Listener.to(redis, "session:s1:up");
  await using client = await proxy.connect("s1");
  // Up to MAX_MESSAGE_SIZE_BYTES, which is also MAX_BUFFER_SIZE_BYTES.
  const sizes = [1_048_000, 1_048_471, 1_048_472, 1_048_575, 1_048_576];
  for (const size of sizes) {
    client.send(jsonOf(size));
    assert.equal((await ear.take(1))[0]!.length, size);
  }
  const entries = await entriesWith(redis.client(), "message", sizes.length);
  assert.deepEqual(entries.flatMap(({ data }) => data === undefined ? [] : [data.length]), sizes);
});

Deno.test("At the bound of a client each message is both published and an entry, or neither", async () => {
  await using redis = await RedisServer.start();
  // A client that is sending while it is closed sees the code for certain with this engine only.
  await using proxy = await TestProxy.start(redis, { ...inboxEnv, WS_ENGINE: "ws", MAX_BUFFER_SIZE_BYTES: "3000" });
  const control = redis.client();
  for (const size of [10, 100, 500, 1000, 2743, 2744, 2745, 3000]) {
    const session = `s${size}`;
    const ear = await Listener.to(redis, `session:${session}:up`);
    const client = await proxy.connect(session);
    await entriesWith(control, "connected", 1, "agent");
    redis.signal("SIGSTOP");
    for (let n = 0; n < 20; n++) client.send(jsonOf(size, String.fromCharCode(97 + n)));
    const { code } = await client.ended();
    redis.signal("SIGCONT");
    assert.equal(code, 1013);
    const isOfSession = (entry: Entry) => entry["session"] === session;
    const storyEnds = async () => (await entriesOf(control)).some((entry) => isOfSession(entry) && entry["code"]);
    await eventually("its end is told", storyEnds);
    const entered = (await entriesOf(control)).filter((entry) => isOfSession(entry) && entry["data"]);
    assert(entered.length > 0 && entered.length < 20);
    assert.deepEqual(await ear.take(entered.length), entered.map(({ data }) => data));
    await proxy.counts("wsproxy_pending_bytes", 0);
    assert.equal(ear.waiting, 0);
  }
});

/** A client that stays, one that leaves while Redis is away, and one that has left shortly before. */
async function testForgotten(
  redis: RedisServer,
  forget: (between: () => Promise<void>) => Promise<void>,
): Promise<void> {
  await using proxy = await TestProxy.start(redis, {
    ...inboxEnv,
    VACATED_GRACE_SECS: "2",
    REDIS_OUTAGE_GRACE_SECS: "60",
  });
  const control = redis.client();
  const [stays, leaves, left] = await Promise.all(["stays", "leaves", "left"].map((name) => proxy.connect(name)));
  await proxy.counts("wsproxy_inbox_entries_total", 3);
  await left!.close();
  await proxy.counts("wsproxy_inbox_entries_total", 4);
  await forget(async () => {
    stays!.send('"waits"');
    await leaves!.close();
  });
  stays!.send('"after"');
  await eventually("healthy", () => proxy.isHealthy());
  await using _new = await proxy.connect("new");
  const entries = await entriesWith(control, "vacated", 2);
  assert.deepEqual(storyOf(entries, "stays"), ["connected", 'message "waits"', 'message "after"']);
  for (const session of ["leaves", "left"]) {
    assert.deepEqual(storyOf(entries, session), ["connected", "disconnected 1005", "vacated"]);
  }
  assert.deepEqual(storyOf(entries, "new"), ["connected"]);
  await proxy.counts("wsproxy_inbox_entries_total", 4 + entries.length);
  await stays!.close();
  await entriesWith(control, "vacated", 3);
  assert.deepEqual(await control.hkeys("wsproxy:{agent:agent:inbox}:sockets"), ["new"]);
}

Deno.test("Redis comes back empty: every story is told from its beginning, also of clients that have left meanwhile", async () => {
  await using redis = await RedisServer.start();
  await testForgotten(redis, async (between) => {
    await redis.kill();
    await between();
    await redis.start();
  });
});

Deno.test("Redis is emptied under live connections: every story is told from its beginning", async () => {
  await using redis = await RedisServer.start();
  await testForgotten(redis, async (between) => {
    await redis.client().flushall();
    await between();
  });
});

Deno.test("Redis that comes back with what it had is told nothing twice", async () => {
  await using redis = await RedisServer.start(...kept);
  await using proxy = await TestProxy.start(redis, {
    ...inboxEnv,
    VACATED_GRACE_SECS: "2",
    REDIS_OUTAGE_GRACE_SECS: "60",
  });
  const control = redis.client();
  const [stays, leaves, left] = await Promise.all(["stays", "leaves", "left"].map((name) => proxy.connect(name)));
  await proxy.counts("wsproxy_inbox_entries_total", 3);
  await left!.close();
  await proxy.counts("wsproxy_inbox_entries_total", 4);
  await redis.kill();
  stays!.send('"waits"');
  await leaves!.close();
  await redis.start();
  const entries = await entriesWith(control, "vacated", 2);
  assert.deepEqual(storyOf(entries, "stays"), ["connected", 'message "waits"']);
  for (const session of ["leaves", "left"]) {
    assert.deepEqual(storyOf(entries, session), ["connected", "disconnected 1005", "vacated"]);
  }
  await stays!.close();
  await entriesWith(control, "vacated", 3);
  await assertForgotten(control);
});

Deno.test("After SCRIPT FLUSH nothing is lost, and connected is still first", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  for (let round = 0; round < 20; round++) {
    await control.script("FLUSH");
    const client = await proxy.connect(`s${round}`);
    for (const text of ['"one"', '"two"']) client.send(text);
    await client.close();
  }
  const entries = await entriesWith(control, "vacated", 20);
  for (let round = 0; round < 20; round++) {
    assert.deepEqual(storyOf(entries, `s${round}`), [
      ...["connected", 'message "one"', 'message "two"', "disconnected 1005", "vacated"],
    ]);
  }
  assert.equal(await proxy.metric("wsproxy_inbox_lost_total"), 0);
});

Deno.test("The sockets of a session are counted over all workers of a proxy, and not over proxies", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await using workers = await ProxyProcess.start(redis, { ...inboxEnv, WORKERS: "2" });
  await using other = await ProxyProcess.start(redis, inboxEnv);
  const count = 12;
  const clients: Client[] = [];
  for (let n = 1; n <= count; n++) {
    clients.push(await Client.connect(workers.port, "s1"));
    await entriesWith(control, "connected", n);
  }
  const elsewhere = await Client.connect(other.port, "s1");
  await entriesWith(control, "connected", count + 1);
  for (const [n, client] of clients.entries()) {
    await client.close();
    await entriesWith(control, "disconnected", n + 1);
  }
  await elsewhere.close();
  const entries = await entriesWith(control, "vacated", 1);
  const up = Array.from({ length: count }, (_, n) => String(n + 1));
  assert.deepEqual(entries.map(({ sockets }) => sockets), [
    ...up,
    "1",
    ...up.map((_, n) => String(count - 1 - n)),
    "0",
    undefined,
  ]);
  assert.deepEqual(await control.keys("*:process:*"), []);
});

Deno.test("An inbox that no group reads is deleted when nothing was written into it for long", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const plant = async (agent: string, id: string) => await control.xadd(`agent:${agent}:inbox`, id, "type", "vacated");
  const invented = names("invented", 201);
  for (const agent of invented) await plant(agent, "1-1");
  for (const agent of ["read", "busy"]) await plant(agent, "1-1");
  await plant("fresh", "*");
  await control.xgroup("CREATE", "agent:read:inbox", "answers", "0");
  await control.hset("wsproxy:{agent:busy:inbox}:sockets", "s1", "1");
  const idle = [...invented, "read", "busy", "fresh"];
  await control.zadd("wsproxy:{proxies}:idle", ...idle.flatMap((agent) => [1, agent]));
  await using proxy = await TestProxy.start(redis, inboxEnv);
  await eventually("idle agents are seen", async () => await control.zcard("wsproxy:{proxies}:idle") === 1);
  assert.deepEqual((await control.keys("agent:*")).sort(), [
    "agent:busy:inbox",
    "agent:fresh:inbox",
    "agent:read:inbox",
  ]);
  const hourMs = 3_600_000;
  const isInAnHour = async (agent: string) =>
    Math.abs(Number(await control.zscore("wsproxy:{proxies}:idle", agent)) - Date.now() - hourMs) < 60_000;
  assert(await isInAnHour("fresh"));
  // Whatever writes into an inbox leaves it among them: a connection, and what is posted.
  await (await proxy.connect("s1", { agent: "left" })).close();
  const headers = { Authorization: `Bearer ${await mint("s1")}` };
  await (await fetch(`http://127.0.0.1:${proxy.port}/posted/sse/s1`, { method: "POST", headers, body: "1" })).body
    ?.cancel();
  for (const agent of ["left", "posted"]) await eventually(`${agent} is idle`, () => isInAnHour(agent));
});
