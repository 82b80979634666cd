/** A Cluster under open sessions: all shards, slots that move, masters that die, servers that come and go. */

import assert from "node:assert/strict";
import { pino } from "pino";
import { slotOf } from "../../src/redis/slot.ts";
import { missedNotice } from "../../src/session/frames.ts";
import type { Client } from "../harness/client.ts";
import { type ClusterNode, sessionIn, TestCluster } from "../harness/cluster.ts";
import { type Env, onEachEngine, TestProxy } from "../harness/proxy.ts";
import { mint } from "../harness/token.ts";
import { functionsLoaded, Published } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";

const down = (session: string) => `session:${session}:down`;
const up = (session: string) => `session:${session}:up`;

const startProxy = (cluster: TestCluster, shards: number, env: Env = {}) =>
  TestProxy.start(cluster.url, env, { idleSubscriptions: shards + 1 });

/** A session whose down and up channels some of the slots have. */
function sessionOf(slots: ReadonlySet<number>, upSlots = slots, prefix = "s"): string {
  for (let n = 0;; n++) {
    const session = `${prefix}${n}`;
    if (slots.has(slotOf(down(session))) && upSlots.has(slotOf(up(session)))) return session;
  }
}

/** A backend's ear on one sharded channel, wherever it lives now. */
async function hear(cluster: TestCluster, channel: string): Promise<string[]> {
  const heard: string[] = [];
  const ear = (await cluster.ownerOf(channel)).server.client();
  ear.on("smessage", (_channel, text) => heard.push(text));
  await ear.ssubscribe(channel);
  return heard;
}

/** Publishes until the client gets it, and returns what came before. */
async function reaches(cluster: TestCluster, session: string, client: Client, text: string): Promise<string[]> {
  const got: string[] = [];
  await eventually(`${text} arrives`, async () => {
    await cluster.publish(down(session), text);
    got.push(...client.arrived());
    return got.includes(text);
  });
  return got.slice(0, got.indexOf(text));
}

Deno.test("Each server's logs are looked after, and those of a slot that has moved: attached ones live, functions come back", async () => {
  await using cluster = await TestCluster.start(2);
  await using proxy = await startProxy(cluster, 2, { LOG_TTL_SECS: "16" });
  const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
  const [moved, first] = await Promise.all(
    [from, from].map(async (node, n) => sessionOf(await cluster.slotsOf(node), undefined, `s${n}-`)),
  ) as [string, string];
  const second = sessionOf(await cluster.slotsOf(to));
  const sessions = [moved, first, second];
  await using stack = new AsyncDisposableStack();
  const clients: Client[] = [];
  for (const session of sessions) clients.push(stack.use(await proxy.connect(session, { resume: "0" })));
  for (const client of clients) assert.match(await client.next(), /^!live\n/);
  const slot = slotOf(down(moved));
  await cluster.beginMove(slot, from, to);
  await cluster.moveKeys(slot, from, to);
  await cluster.finishMove(slot, from, to);
  for (const session of sessions) await cluster.call(down(session), "PEXPIRE", down(session), 12_000);
  for (const { control } of cluster.nodes) await control.call("FUNCTION", "FLUSH");
  for (const { control } of cluster.nodes) await functionsLoaded(control);
  for (const [i, session] of sessions.entries()) {
    const left = async () => Number(await cluster.call(down(session), "PTTL", down(session)));
    await eventually("prolonged", async () => await left() > 16_000);
    const position = await cluster.send(session, "again");
    let frame = "";
    while (frame !== `${position}\nagain`) {
      frame = await clients[i]!.next();
      assert(!frame.startsWith("!gap"));
    }
  }
});

onEachEngine("Sessions of all shards: both ways, the log, SSE's POST, health", async (engine) => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await startProxy(cluster, 3, engine);
  const shares = await Promise.all(cluster.nodes.map((node) => cluster.slotsOf(node)));
  for (const slots of shares) {
    for (const upSlots of shares) {
      const session = sessionOf(slots, upSlots);
      const heard = await hear(cluster, up(session));
      await using bare = await proxy.connect(session);
      assert.equal(await cluster.publish(down(session), "one"), 1);
      assert.equal(await bare.next(), "one");
      await using resuming = await proxy.connect(session, { resume: "0" });
      const [live] = await resuming.take(1);
      assert.match(live!, /^!live\n/);
      const position = await cluster.send(session, "two");
      assert.equal(await bare.next(), "two");
      assert.equal(await resuming.next(), `${position}\ntwo`);
      await using late = await proxy.connect(session, { resume: "0" });
      assert.equal(await late.next(), `${position}\ntwo`);
      for (let n = 0; n < 100; n++) bare.send(String(n));
      await eventually("all are heard", () => heard.length === 100);
      assert.deepEqual(heard, Array.from({ length: 100 }, (_, n) => String(n)));
      const headers = { Authorization: `Bearer ${await mint(session)}` };
      const url = `http://127.0.0.1:${proxy.port}/agent/sse/${session}`;
      const posted = await fetch(url, { method: "POST", headers, body: '"posted"' });
      assert.deepEqual([posted.status, await posted.json()], [202, { receivers: 1, entered: false }]);
    }
  }
  const health = await proxy.request("/health");
  assert.deepEqual([health.status, JSON.parse(health.body).redis], [200, "connected"]);
  await proxy.counts("wsproxy_redis_up", 1);
});

onEachEngine(
  "A slot moves under open sessions: its own are told once or resume, the others feel nothing",
  async (engine) => {
    await using cluster = await TestCluster.start(3);
    await using proxy = await startProxy(cluster, 3, engine);
    const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
    const slots = await cluster.slotsOf(from);
    const session = sessionOf(slots);
    const other = sessionOf(slots, slots, "other");
    await using bare = await proxy.connect(session);
    await using resuming = await proxy.connect(session, { resume: "0" });
    await resuming.next();
    await using neighbour = await proxy.connect(other);
    const sent: string[] = [];
    for (let n = 0; n < 20; n++) sent.push(`${await cluster.send(session, String(n))}\n${n}`);
    assert.deepEqual(await resuming.take(20), sent);
    await bare.take(20);
    const slot = slotOf(down(session));
    await cluster.beginMove(slot, from, to);
    await cluster.finishMove(slot, from, to);
    const meanwhile = await cluster.send(session, "meanwhile");
    await reaches(cluster, other, neighbour, "felt nothing").then((before) => assert.deepEqual(before, []));
    const before = await reaches(cluster, session, bare, "after");
    assert.deepEqual(before.filter((text) => text !== "meanwhile"), [missedNotice.bare]);
    const frames: string[] = [];
    while (!frames.includes(`${meanwhile}\nmeanwhile`)) frames.push(await resuming.next());
    assert(!frames.some((frame) => frame.startsWith("!gap")), frames.join());
    const next = await cluster.send(session, "next");
    while (frames.at(-1) !== `${next}\nnext`) frames.push(await resuming.next());
    assert.deepEqual(frames.filter((frame) => /^\d/.test(frame)), [`${meanwhile}\nmeanwhile`, `${next}\nnext`]);
  },
);

Deno.test("What clients send while slots move again and again arrives once and in order", async () => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await startProxy(cluster, 3, { MAX_BUFFER_SIZE_BYTES: "33554432" });
  const shares = await Promise.all(cluster.nodes.map((node) => cluster.slotsOf(node)));
  const sessions = shares.map((slots) => sessionOf(slots));
  const clients = await Promise.all(sessions.map((session) => proxy.connect(session)));
  await using published = await Published.on(cluster.nodes.map(({ server }) => server));
  let sent = 0;
  const pump = setInterval(() => {
    for (let n = 0; n < 20; n++, sent++) for (const client of clients) client.send(String(sent));
  }, 1);
  for (let round = 1; round <= 2; round++) {
    for (const [i, session] of sessions.entries()) {
      const slot = slotOf(up(session));
      const from = cluster.nodes[(i + round - 1) % 3]!;
      const to = cluster.nodes[(i + round) % 3]!;
      await cluster.beginMove(slot, from, to);
      await to.control.call("CLUSTER", "SETSLOT", slot, "NODE", to.id);
      await from.control.call("CLUSTER", "SETSLOT", slot, "NODE", to.id);
      await cluster.agreed();
    }
  }
  clearInterval(pump);
  for (const [i, client] of clients.entries()) {
    const arrived = () => published.to(up(sessions[i]!));
    await eventually("all have arrived", () => arrived().length === sent);
    assert.deepEqual(arrived(), Array.from({ length: sent }, (_, n) => String(n)));
    assert.deepEqual(client.arrived(), []);
    await client.close();
  }
});

onEachEngine("A master is killed: its sessions go on with the replica, the others feel nothing", async (engine) => {
  await using cluster = await TestCluster.start(3, 1, "--cluster-require-full-coverage", "no");
  await using proxy = await startProxy(cluster, 3, engine);
  const victim = cluster.nodes[0]!;
  const slots = await cluster.slotsOf(victim);
  const rest = await cluster.slotsOf(cluster.nodes[1]!);
  const [session, other] = [sessionOf(slots), sessionOf(rest)];
  await using bare = await proxy.connect(session);
  await using resuming = await proxy.connect(session, { resume: "0" });
  await resuming.next();
  await using neighbour = await proxy.connect(other);
  const position = await cluster.send(session, "kept");
  assert.equal(await resuming.next(), `${position}\nkept`);
  assert.equal(await victim.control.wait(1, 5000), 1);
  assert.equal(await bare.next(), "kept");
  await victim.server.kill();
  let published = 0;
  const stream = setInterval(() => void cluster.publish(down(other), String(published++)), 20);
  const before = await reaches(cluster, session, bare, "after").finally(() => clearInterval(stream));
  assert.deepEqual(before, [missedNotice.bare]);
  const heard = await hear(cluster, up(session));
  await eventually("it is heard", () => {
    bare.send('"up"');
    return heard.length > 0;
  });
  const next = await cluster.send(session, "next");
  const frames: string[] = [];
  while (frames.at(-1) !== `${next}\nnext`) frames.push(await resuming.next());
  assert(!frames.some((frame) => frame.startsWith("!gap")), frames.join());
  assert.deepEqual(await neighbour.take(published), Array.from({ length: published }, (_, n) => String(n)));
  // The former master comes back as a replica, and no session goes there.
  await victim.server.start();
  await reaches(cluster, session, bare, "still");
  assert.equal((await proxy.request("/health")).status, 200);
});

Deno.test("A frozen server delays neither looks at the table nor slots that leave it", async () => {
  await using cluster = await TestCluster.start(3, 0, "--cluster-require-full-coverage", "no");
  await using proxy = await startProxy(cluster, 3, { REDIS_OUTAGE_GRACE_SECS: "60" });
  const [frozen, other] = cluster.nodes as [ClusterNode, ClusterNode];
  const slots = await cluster.slotsOf(frozen);
  const session = sessionOf(slots);
  const stays = sessionOf(slots, slots, "stays");
  await using client = await proxy.connect(session);
  await using neighbour = await proxy.connect(stays);
  frozen.server.signal("SIGSTOP");
  // Sent to the frozen server, and not answered: what comes later of the slot waits behind it.
  client.send('"unanswered"');
  const looks = async () => {
    const stats = await other.control.info("commandstats");
    return Number(/cmdstat_cluster\|slots:calls=(\d+)/.exec(stats)![1]);
  };
  // A canary has come to one of the two others at most every quarter of a second.
  const beats = () => proxy.metric("wsproxy_redis_round_trip_seconds_count");
  const [beatsBefore, looksBefore] = [await beats(), await looks()];
  await eventually("two seconds have passed", async () => await beats() > beatsBefore + 8);
  const looked = await looks() - looksBefore;
  assert(looked > 2, `${looked} looks in two seconds`);
  for (const name of [down(session), up(session)]) {
    await other.control.call("CLUSTER", "SETSLOT", slotOf(name), "NODE", other.id);
  }
  await other.control.call("CLUSTER", "BUMPEPOCH");
  const control = other.control;
  const ear = other.server.client();
  const heard: string[] = [];
  ear.on("smessage", (_channel, text) => heard.push(text));
  await ear.ssubscribe(up(session));
  await eventually("it flows down", async () => {
    await control.spublish(down(session), '"down"');
    return client.arrived().includes('"down"');
  });
  await eventually("it flows up", () => {
    client.send('"up"');
    return heard.length > 0;
  });
  assert(!heard.includes('"unanswered"'));
  frozen.server.signal("SIGCONT");
  await reaches(cluster, stays, neighbour, "still");
});

Deno.test("A planned failover, and one back: no session is lost", async () => {
  await using cluster = await TestCluster.start(3, 1);
  await using proxy = await startProxy(cluster, 3);
  const [master, replica] = [cluster.nodes[0]!, cluster.nodes[3]!];
  const session = sessionOf(await cluster.slotsOf(master));
  await using client = await proxy.connect(session);
  for (const next of [replica, master]) {
    await cluster.failOver(next, down(session));
    await reaches(cluster, session, client, "after");
    const heard = await hear(cluster, up(session));
    await eventually("it is heard", () => {
      client.send('"up"');
      return heard.length > 0;
    });
    client.arrived();
  }
});

Deno.test("A shard is gone for good: its sessions are closed after the grace and refused, the others stay", async () => {
  await using cluster = await TestCluster.start(3, 0, "--cluster-require-full-coverage", "no");
  await using proxy = await startProxy(cluster, 3, { REDIS_OUTAGE_GRACE_SECS: "1" });
  const victim = cluster.nodes[0]!;
  const [slots, rest] = [await cluster.slotsOf(victim), await cluster.slotsOf(cluster.nodes[1]!)];
  const concerned = await Promise.all([
    proxy.connect(sessionOf(slots, rest)),
    proxy.connect(sessionOf(rest, slots)),
    proxy.connect(sessionOf(slots)),
  ]);
  const other = sessionOf(rest);
  await using neighbour = await proxy.connect(other);
  await victim.server.kill();
  for (const client of concerned) assert.equal((await client.ended()).code, 1013);
  assert.deepEqual(await reaches(cluster, other, neighbour, "stays"), []);
  await assert.rejects(proxy.connect(sessionOf(slots)), /503/);
  await using _new = await proxy.connect(sessionOf(rest, rest, "new"));
  const health = await proxy.request("/health");
  const { status, shards } = JSON.parse(health.body);
  assert.deepEqual([health.status, status], [200, "degraded"]);
  assert.equal(shards[`127.0.0.1:${cluster.nodes[1]!.server.port}`], "connected");
  assert.notEqual(shards[`127.0.0.1:${victim.server.port}`], "connected");
  assert.equal(await proxy.metric("wsproxy_redis_up"), 0);
  await victim.server.start();
  await eventually("it is back", () => proxy.isHealthy());
  await using back = await proxy.connect(sessionOf(slots));
  await reaches(cluster, sessionOf(slots), back, "again");
});

Deno.test("Slots that no server serves: new clients are refused at once, open ones wait, operators are told", async () => {
  await using cluster = await TestCluster.start(2, 0, "--cluster-require-full-coverage", "no");
  const logged: { msg: string; level: number; part?: string }[] = [];
  const log = pino({}, { write: (line: string) => logged.push(JSON.parse(line)) });
  const lines = (msg: string) => logged.filter((line) => line.msg === msg).map(({ level, part }) => ({ level, part }));
  const env = { REDIS_OUTAGE_GRACE_SECS: "60", HANDSHAKE_TIMEOUT_SECS: "60" };
  await using proxy = await TestProxy.start(cluster.url, env, { idleSubscriptions: 3, log });
  const [owner] = cluster.nodes as [ClusterNode];
  const slots = await cluster.slotsOf(owner);
  const [canary] = await owner.control.call("PUBSUB", "SHARDCHANNELS", "wsproxy:canary:*") as string[];
  const session = sessionOf(slots);
  await using client = await proxy.connect(session);
  const holes = [slotOf(down(session)), slotOf(up(session)), slotOf(canary!)].sort((a, b) => a - b);
  const other = sessionIn((slot) => slots.has(slot) && !holes.includes(slot), "other");
  await using neighbour = await proxy.connect(other);
  for (const { control } of cluster.nodes) await control.call("CLUSTER", "DELSLOTS", ...holes);
  const part = `slots ${holes.join(", ")}`;
  await eventually("it is told", () => lines("a part of the Cluster is down").length > 0);
  // The canary has gone to another slot of the server by then, or will: its sessions feel nothing.
  await eventually("degraded", async () => {
    const { status, shards } = JSON.parse((await proxy.request("/health")).body);
    const states = new Set(cluster.nodes.map(({ server }) => shards[`127.0.0.1:${server.port}`]));
    return status === "degraded" && shards[part] === "no server serves them" && [...states].join() === "connected";
  });
  assert.equal((await proxy.request("/health")).status, 200);
  assert.equal(await proxy.metric("wsproxy_redis_up"), 0);
  await assert.rejects(proxy.connect(session), /503/);
  client.send('"waits"');
  assert.deepEqual(await reaches(cluster, other, neighbour, "felt nothing"), []);
  await using published = await Published.on([owner.server]);
  await owner.control.call("CLUSTER", "ADDSLOTS", ...holes);
  await cluster.agreed();
  assert.deepEqual(await reaches(cluster, session, client, "again"), [missedNotice.bare]);
  await eventually("what waited is published", () => published.to(up(session)).join() === '"waits"');
  await eventually("whole", () => proxy.isHealthy());
  assert.deepEqual(lines("a part of the Cluster is down"), [{ level: 40, part }]);
  assert.deepEqual(lines("all parts of the Cluster are up again"), [{ level: 30, part: undefined }]);
});

Deno.test("Slots that no server serves for longer than the grace: their sessions are closed, the others stay", async () => {
  await using cluster = await TestCluster.start(2, 0, "--cluster-require-full-coverage", "no");
  await using proxy = await startProxy(cluster, 2, { REDIS_OUTAGE_GRACE_SECS: "1" });
  const slots = await cluster.slotsOf(cluster.nodes[0]!);
  const [downward, upward, other] = ["downward", "upward", "other"].map((prefix) => sessionOf(slots, slots, prefix));
  const clients = await Promise.all([proxy.connect(downward!), proxy.connect(upward!)]);
  await using neighbour = await proxy.connect(other!);
  for (const { control } of cluster.nodes) {
    await control.call("CLUSTER", "DELSLOTS", slotOf(down(downward!)), slotOf(up(upward!)));
  }
  for (const client of clients) assert.equal((await client.ended()).code, 1013);
  assert.deepEqual(await reaches(cluster, other!, neighbour, "felt nothing"), []);
});

Deno.test("A shard is gone and full coverage is required: Pub/Sub of the others flows, keys are down, and told so", async () => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await startProxy(cluster, 3, { REDIS_OUTAGE_GRACE_SECS: "60", INBOX: "true" });
  const [victim, other] = cluster.nodes as [ClusterNode, ClusterNode];
  const rest = await cluster.slotsOf(other);
  const session = sessionOf(rest);
  const agent = Array.from({ length: 1000 }, (_, n) => `a${n}`).find((name) =>
    rest.has(slotOf(`agent:${name}:inbox`))
  )!;
  await using client = await proxy.connect(session, { agent });
  const heard = await hear(cluster, up(session));
  await victim.server.kill();
  await eventually("it is told", async () => {
    const { status, shards } = JSON.parse((await proxy.request("/health")).body);
    return status === "degraded" && shards.keys?.startsWith("cluster_state") &&
      shards[`127.0.0.1:${other.server.port}`] === "connected";
  });
  assert.equal(await other.control.spublish(down(session), '"down"'), 1);
  assert.equal(await client.next(), '"down"');
  client.send('"up"');
  await eventually("it is heard", () => heard.includes('"up"'));
  await using _new = await proxy.connect(sessionOf(rest, rest, "new"), { agent });
  await assert.rejects(
    other.control.call("FCALL", "wsproxy_send", 1, down(session), "text") as Promise<unknown>,
    /CLUSTERDOWN/,
  );
  const key = `agent:${agent}:inbox`;
  await assert.rejects(other.control.xlen(key), /CLUSTERDOWN/);
  await using resuming = await proxy.connect(sessionOf(rest, rest, "resuming"), { agent, resume: "0" });
  await victim.server.start();
  await eventually("whole", () => proxy.isHealthy());
  // Entries have waited, and so has the log.
  await eventually("all are entered", async () => await cluster.call(key, "XLEN", key) === 4);
  assert.match(await resuming.next(), /^!live\n/);
  assert.equal(await proxy.metric("wsproxy_inbox_lost_total"), 0);
});

Deno.test("A server is added and takes slots, in the middle of which a client resumes; then it goes again", async () => {
  await using cluster = await TestCluster.start(2);
  await using proxy = await startProxy(cluster, 2);
  const from = cluster.nodes[0]!;
  const session = sessionOf(await cluster.slotsOf(from));
  await using open = await proxy.connect(session, { resume: "0" });
  await open.next();
  const position = await cluster.send(session, "one");
  assert.equal(await open.next(), `${position}\none`);
  const added = await cluster.add();
  const slot = slotOf(down(session));
  await cluster.beginMove(slot, from, added);
  await cluster.moveKeys(slot, from, added);
  // The log is there, and the channel still here: ASK.
  await using late = await proxy.connect(session, { resume: "0" });
  assert.equal(await late.next(), `${position}\none`);
  assert.equal(await late.next(), `!live\n${position}`);
  await cluster.finishMove(slot, from, added);
  const two = await cluster.send(session, "two");
  for (const client of [open, late]) {
    let frame = await client.next();
    while (frame.startsWith("!live")) frame = await client.next();
    assert.equal(frame, `${two}\ntwo`);
  }
  await eventually("its canary", () => proxy.proxy.subscriptions === 5);
  await cluster.beginMove(slot, added, from);
  await cluster.finishMove(slot, added, from);
  const three = await cluster.send(session, "three");
  for (const client of [open, late]) {
    let frame = await client.next();
    while (frame.startsWith("!live")) frame = await client.next();
    assert.equal(frame, `${three}\nthree`);
  }
  await eventually("nothing is left of it", () => proxy.proxy.subscriptions === 4);
});

Deno.test("Servers that cannot be reached at first, and stop all at once, are found again", async () => {
  await using cluster = await TestCluster.start(3);
  await Promise.all(cluster.nodes.map(({ server }) => server.kill()));
  await using proxy = await TestProxy.start(cluster.url, {}, { ready: false, idleSubscriptions: 4 });
  assert.equal((await proxy.request("/health")).status, 503);
  await assert.rejects(proxy.connect("s1"), /503/);
  const session = sessionIn(() => true);
  for (let round = 0; round < 2; round++) {
    await Promise.all(cluster.nodes.map(({ server, control }) => server.start().then(() => control.ping())));
    await eventually("healthy", () => proxy.isHealthy());
    await using client = await proxy.connect(session);
    await reaches(cluster, session, client, "hello");
    await Promise.all(cluster.nodes.map(({ server }) => server.kill()));
  }
  await Promise.all(cluster.nodes.map(({ server, control }) => server.start().then(() => control.ping())));
});

Deno.test("Inboxes in a Cluster: every agent's story is whole, whatever braces its name has", async () => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await startProxy(cluster, 3, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  const agents = ["a", "b", "c", "d", "{x}y", "x}y", "{}", "{x", "}{"];
  for (const agent of agents) {
    const client = await proxy.connect("s1", { agent, resume: "0" });
    assert.match(await client.next(), /^!live\n/);
    client.send('!send\nid-1\n"hello"');
    // Its inbox may be on another server than its channel: both have answered.
    assert.equal(await client.next(), '!sent\n{"id":"id-1","receivers":0,"entered":true}');
    const key = `agent:${agent}:inbox`;
    const types = async () => {
      const entries = await cluster.call(key, "XRANGE", key, "-", "+") as [string, string[]][];
      return entries.map(([, words]) => words[1]).join(" ");
    };
    await eventually("it is told", async () => await types() === "connected message");
    await client.close();
    await eventually("all is told", async () => await types() === "connected message disconnected vacated");
  }
  assert.equal(await proxy.metric("wsproxy_unheard_total"), 0);
  assert.equal(await proxy.metric("wsproxy_inbox_lost_total"), 0);
});

Deno.test("Entries of an inbox whose slot is moving wait, and stay in order", async () => {
  await using cluster = await TestCluster.start(2);
  await using proxy = await startProxy(cluster, 2, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  const key = "agent:agent:inbox";
  const from = await cluster.ownerOf(key);
  const to = cluster.nodes.find((node) => node !== from)!;
  const client = await proxy.connect("s1");
  const lengthIs = (length: number) => async () => await cluster.call(key, "XLEN", key) === length;
  client.send("1");
  await eventually("two entries", lengthIs(2));
  await cluster.beginMove(slotOf(key), from, to);
  await cluster.moveKeys(slotOf(key), from, to);
  for (let n = 2; n <= 50; n++) client.send(String(n));
  const other = await proxy.connect("s2");
  await other.close();
  await cluster.finishMove(slotOf(key), from, to);
  client.send("51");
  await client.close();
  await eventually("all entries", lengthIs(57));
  const entries = await cluster.call(key, "XRANGE", key, "-", "+") as [string, string[]][];
  const data = entries.map(([, words]) => words[words.indexOf("data") + 1]!).filter((word) => /^\d+$/.test(word));
  assert.deepEqual(data, Array.from({ length: 51 }, (_, n) => String(n + 1)));
  assert.equal(await proxy.metric("wsproxy_inbox_lost_total"), 0);
});

Deno.test("Entries of an inbox whose slot was about to move, and stays, are in order while more come", async () => {
  await using cluster = await TestCluster.start(2);
  await using proxy = await startProxy(cluster, 2, { INBOX: "true", VACATED_GRACE_SECS: "0" });
  // What an inbox that is not there yet is to begin with is for the other server: it waits, as long as nothing is there.
  for (const agent of ["a", "b", "c", "d"]) {
    const key = `agent:${agent}:inbox`;
    const from = await cluster.ownerOf(key);
    const to = cluster.nodes.find((node) => node !== from)!;
    await cluster.beginMove(slotOf(key), from, to);
    const client = await proxy.connect(`session-of-${agent}`, { agent });
    let sent = 0;
    const pump = setInterval(() => client.send(String(sent++)), 1);
    await eventually("entries wait", () => sent > 80);
    for (const node of [from, to]) await node.control.call("CLUSTER", "SETSLOT", slotOf(key), "STABLE");
    await eventually("entries come", async () => await from.control.call("XLEN", key) as number > 80);
    clearInterval(pump);
    await client.close();
    await eventually("all entries", async () => await from.control.call("XLEN", key) as number >= sent + 3);
    const entries = await from.control.call("XRANGE", key, "-", "+") as [string, string[]][];
    const data = entries.map(([, words]) => words[words.indexOf("data") + 1]!).filter((word) => /^\d+$/.test(word));
    assert.deepEqual(data, Array.from({ length: sent }, (_, n) => String(n)));
  }
  assert.equal(await proxy.metric("wsproxy_inbox_lost_total"), 0);
});

Deno.test("The slot by which a server is watched moves: that is no outage of its sessions", async () => {
  await using cluster = await TestCluster.start(2);
  await using proxy = await startProxy(cluster, 2);
  const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
  const [canary] = await from.control.call("PUBSUB", "SHARDCHANNELS", "wsproxy:canary:*") as string[];
  const slot = slotOf(canary!);
  const slots = await cluster.slotsOf(from);
  slots.delete(slot);
  const session = sessionOf(slots);
  const client = await proxy.connect(session);
  await cluster.beginMove(slot, from, to);
  await cluster.finishMove(slot, from, to);
  await eventually("another canary", async () => {
    const channels = await from.control.call("PUBSUB", "SHARDCHANNELS", "wsproxy:canary:*") as string[];
    return channels.length === 1 && channels[0] !== canary;
  });
  const beats = await proxy.metric("wsproxy_redis_round_trip_seconds_count");
  await eventually("it beats", async () => await proxy.metric("wsproxy_redis_round_trip_seconds_count") > beats + 6);
  assert(await proxy.isHealthy());
  assert.equal(await cluster.publish(down(session), "heard"), 1);
  assert.equal(await client.next(), "heard");
  assert.equal(await proxy.metric("wsproxy_gaps_total"), 0);
  await client.close();
});

Deno.test("Commands and revocations in a Cluster reach all, and the newest proxy", async () => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await startProxy(cluster, 3);
  const [session] = [sessionIn(() => true)];
  const client = await proxy.connect(session);
  assert.equal(await cluster.publish("wsproxy:control", '{"command":"broadcast","payload":"all"}'), 1);
  assert.equal(await client.next(), "all");
  const before = Math.floor(Date.now() / 1000) + 1;
  await cluster.publish(
    "wsproxy:control",
    JSON.stringify({ command: "close", agent_id: "agent", issued_before: before }),
  );
  assert.equal((await client.ended()).code, 4401);
  await eventually("it is kept", async () => await cluster.call("wsproxy:revoked", "HLEN", "wsproxy:revoked") === 1);
  await using second = await startProxy(cluster, 3);
  await assert.rejects(second.connect(session, { claims: { iat: before - 1 } }), /403/);
  await using last = await startProxy(cluster, 3, { SESSION_SOCKETS: "last" });
  const first = await last.connect(session, { agent: "b" });
  // Its socket is open at the proxy, too.
  await cluster.publish(`session:${session}:down`, "first");
  assert.equal(await first.next(), "first");
  await using _second = await last.connect(session, { agent: "b" });
  assert.equal((await first.ended()).code, 4409);
});
