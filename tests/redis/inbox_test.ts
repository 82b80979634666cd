/** What backends read of their agents' sessions, against what happened to their clients. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { Client } from "../harness/client.ts";
import { type Env, onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

const inboxEnv = { INBOX: "true", VACATED_GRACE_SECS: "0" };

type Entry = Record<string, string>;

/** All entries of an agent's inbox, oldest first. */
async function entriesOf(redis: Redis, agent = "agent"): Promise<Entry[]> {
  const entries = await redis.xrange(`agent:${agent}:inbox`, "-", "+");
  return entries.map(([, words]) =>
    Object.fromEntries(words.flatMap((word, i) => i % 2 === 0 ? [[word, words[i + 1]!]] : []))
  );
}

/** The entries, once there are so many of a type. */
async function entriesWith(redis: Redis, type: string, count: number, agent = "agent"): Promise<Entry[]> {
  let entries: Entry[] = [];
  await eventually(`${count} entries ${type}`, async () => {
    entries = await entriesOf(redis, agent);
    return entries.filter((entry) => entry["type"] === type).length >= count;
  });
  return entries;
}

/** A session's story as words: types, with a message's data and a disconnection's code. */
function storyOf(entries: readonly Entry[], session: string): string[] {
  return entries.filter((entry) => entry["session"] === session).map(({ type, data, code }) =>
    [type, data ?? code].filter((word) => word !== undefined).join(" ")
  );
}

/** Nothing is kept of sessions that have ended and were told vacant. */
async function assertForgotten(redis: Redis): Promise<void> {
  const keys = (await redis.keys("wsproxy:*")).filter((key) => /:(held:.*|sockets|vacant)$/.test(key));
  assert.deepEqual(keys, []);
}

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
  // Nobody is subscribed, but the inbox has them all.
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
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
  const [entry] = await entriesWith(redis.client(), "message", 1);
  assert.deepEqual({ ...entry, at: "" }, { type: "message", session: "s1", connection: "", at: "", data: '"posted"' });
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
});

/** Several proxies as processes of their own, for those that are killed and frozen. */
async function startProxies(count: number, redis: RedisServer | string, env: Env): Promise<ProxyProcess[]> {
  return await Promise.all(Array.from({ length: count }, () => ProxyProcess.start(redis, { ...inboxEnv, ...env })));
}

const connectAll = (port: number, names: readonly string[]) =>
  Promise.all(names.map((name) => Client.connect(port, name)));

const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}-${i}`);

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

/** What a proxy that has died leaves: its name is among the dead ones, so that nobody waits for its beats. */
async function plantDead(redis: Redis, agent: string, name: string, sessions: readonly string[]): Promise<void> {
  const prefix = `wsproxy:{agent:${agent}:inbox}`;
  for (let at = 0; at < sessions.length; at += 1000) {
    const some = sessions.slice(at, at + 1000);
    await redis.hset(`${prefix}:held:${name}`, ...some.flatMap((session) => [`${name}-${session}`, session]));
    await redis.hset(`${prefix}:sockets`, ...some.flatMap((session) => [session, "1"]));
  }
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
    await eventually("healthy", async () => (await proxy.request("/health")).status === 200);
    await Promise.all(clients.slice(10).map((client) => client.close()));
  }
  const entries = await entriesWith(control, "vacated", 100);
  for (let round = 0; round < 5; round++) {
    for (const name of names(`r${round}`, 20)) {
      assert.deepEqual(storyOf(entries, name), ["connected", "disconnected 1005", "vacated"]);
    }
  }
});

Deno.test("Redis loses everything under open sockets: they are told as connected again", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  const control = redis.client();
  await using _one = await proxy.connect("s1");
  await entriesWith(control, "connected", 1);
  await control.flushall();
  assert.deepEqual(storyOf(await entriesWith(control, "connected", 1), "s1"), ["connected"]);
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
