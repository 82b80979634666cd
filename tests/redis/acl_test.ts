/** The Redis users of docs/redis.md, read from there, may do what their side needs and nothing else. */

import assert from "node:assert/strict";
import { Redis } from "ioredis";
import { pino } from "pino";
import { describe, needless, needsOf, Rights, type Wants } from "../../src/redis/rights.ts";
import { parseRedisUrl, type ServerAddress } from "../../src/redis_url.ts";
import { slotOf } from "../../src/redis/slot.ts";
import { type ClusterNode, sessionIn, TestCluster } from "../harness/cluster.ts";
import { entriesOf, entriesWith } from "../harness/entries.ts";
import { start } from "../../main.ts";
import { password, rulesOf } from "../harness/acl.ts";
import { readConfig } from "../../src/config.ts";
import { testEnv, TestProxy } from "../harness/proxy.ts";
import { disconnect, Listener, RedisServer, subscribers } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";
import { request } from "../harness/wire.ts";
import { Worker } from "../../clients/js/backend.js";

/** Creates the users that the page tells an operator to create, with a password of ours; `all` with all it may need. */
async function createUsers(control: Redis, all = false): Promise<void> {
  for (const [user, count] of [["wsproxy", 4], ["backend", 5]] as const) {
    const rules = await rulesOf(user);
    assert.equal(rules.length, count);
    for (const words of all ? rules : rules.slice(0, 1)) await control.acl("SETUSER", user, ...words);
  }
}

const urlOf = (redis: RedisServer, user: string) => redis.url.replace("redis://", `redis://${user}:${password}@`);

/** What Redis has denied so far, as "command" or "channel". */
async function denials(control: Redis): Promise<string[]> {
  const entries = await control.call("ACL", "LOG") as string[][];
  return entries.map((entry) => entry[entry.indexOf("object") + 1]!)
    // ioredis introduces itself, and does not mind when it may not; Redis 7.0 does not know the command.
    .filter((object) => object !== "client|setinfo");
}

Deno.test("A Redis user with the rights in docs/redis.md is all that the proxy and a backend need", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control);
  const backend = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false, connectionName: "backend" });
  const ear = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false, connectionName: "ear" });
  const heard = new Promise((resolve) => ear.on("message", (_channel, text) => resolve(text)));
  try {
    await using proxy = await TestProxy.start(urlOf(redis, "wsproxy"));
    assert.equal((await request(proxy.port, "/health")).status, 200);
    await proxy.resumable();
    await ear.subscribe("session:s:1:up");
    // As the examples do, which hear every session.
    await ear.psubscribe("session:*:up");
    {
      await using client = await proxy.connect("s:1");
      assert.equal(await backend.publish("session:s:1:down", '"down"'), 1);
      assert.equal(await client.next(), '"down"');
      client.send('"up"');
      assert.equal(await heard, '"up"');
      const [position] = await backend.call(
        "FCALL",
        "wsproxy_send",
        1,
        "session:s:1:down",
        "logged",
        "nonce",
      ) as string[];
      assert.equal(await client.next(), "logged");
      await using resuming = await proxy.connect("s:1", { resume: "0" });
      assert.equal(await resuming.next(), `${position}\nlogged`);
      assert.equal(
        (await backend.call("FCALL", "wsproxy_begin", 1, "session:s:1:down", "begun", "n") as unknown[])[2],
        1,
      );
      assert.equal(await client.next(), "begun");
      assert.equal(await backend.call("FCALL", "wsproxy_close", 1, "session:s:1:down", 4000, "done"), 1);
      for (const socket of [client, resuming]) assert.equal((await socket.ended()).code, 4000);
    }
    await eventually("unsubscribed", async () => await subscribers(control, "session:s:1:down") === 0);
    assert.deepEqual(await denials(control), []);
  } finally {
    for (const client of [backend, ear]) {
      const ended = new Promise((resolve) => client.once("end", resolve));
      client.disconnect();
      await ended;
    }
  }
});

Deno.test("With what the page adds, a worker answers, stops, and sets aside what it cannot answer", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control, true);
  const backend = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false, disableClientInfo: true });
  await using _ended = { [Symbol.asyncDispose]: () => disconnect(backend) };
  await using proxy = await TestProxy.start(urlOf(redis, "wsproxy"), { INBOX: "true" });
  const worker = new Worker({
    redis: backend,
    agent: "agent",
    maxDeliveries: 1,
    onError: () => {},
    interrupts: ({ data }) => data === '"stop"' ? "stopped" : undefined,
    async handle(question) {
      if (question.data === '"stop"') return;
      const answer = await question.begin("start");
      await answer.soFar();
      if (question.data === '"bad"') throw new Error("bad");
      await new Promise((resolve) => answer.cancelled.addEventListener("abort", resolve));
    },
  });
  const done = worker.run();
  await using client = await proxy.connect("s1");
  client.send('"bad"');
  assert.equal(await client.next(), "start");
  assert.match(await client.next(), /"failed"/);
  client.send('"long"');
  assert.equal(await client.next(), "start");
  client.send('"stop"');
  assert.equal(await client.next(), "stopped");
  worker.stop();
  await done;
  assert.deepEqual(await denials(control), []);
});

Deno.test("With what the page adds, a proxy keeps inboxes, ends what others left, and gives a session one socket; a backend reads and commands", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control, true);
  // Another proxy has died long ago.
  await control.hset("wsproxy:{proxies}", "dead", "1");
  await control.sadd("wsproxy:{proxies}:dead:agents", "agent");
  await control.hset("wsproxy:{agent:agent:inbox}:held:dead", "dead-1", "s0");
  await control.hset("wsproxy:{agent:agent:inbox}:sockets", "s0", "1");
  // Nothing has been written for long into the inbox of another agent, and no group reads it.
  await control.xadd("agent:old:inbox", "1-1", "type", "vacated");
  await control.zadd("wsproxy:{proxies}:idle", 1, "old");
  {
    const env = { INBOX: "true", VACATED_GRACE_SECS: "0", SESSION_SOCKETS: "last" };
    await using proxy = await TestProxy.start(urlOf(redis, "wsproxy"), env);
    const first = await proxy.connect("s1");
    await using _second = await proxy.connect("s1");
    assert.equal((await first.ended()).code, 4409);
    const backend = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false });
    await using _ended = { [Symbol.asyncDispose]: () => disconnect(backend) };
    await backend.publish("wsproxy:control", '{"command":"close","issued_before":1}');
    await eventually("revoked", async () => await control.hget("wsproxy:revoked", "*") === "1");
    const inbox = "agent:agent:inbox";
    await backend.xgroup("CREATE", inbox, "answers", "0");
    const read = await backend.xreadgroup("GROUP", "answers", "one", "COUNT", 1, "STREAMS", inbox, ">");
    const [[, [[id]]]] = read as [[string, [[string]]]];
    await backend.xclaim(inbox, "answers", "one", 0, id);
    await backend.xautoclaim(inbox, "answers", "two", 0, "0");
    assert.equal(await backend.xack(inbox, "answers", id), 1);
    await eventually("the dead one's session is vacated", async () => {
      return (await entriesOf(control)).some(({ type, session }) => type === "vacated" && session === "s0");
    });
    assert.equal(await control.hlen("wsproxy:{proxies}"), 1);
    await eventually("the old inbox is deleted", async () => await control.exists("agent:old:inbox") === 0);
    await using resuming = await proxy.connect("s2", { resume: "0" });
    assert.match(await resuming.next(), /^!live/);
    // A log that was emptied by hand is asked for its last id.
    await control.xtrim("session:s2:down", "MAXLEN", 0);
    await control.call("FCALL", "wsproxy_send", 1, "session:s2:down", "logged");
    while (!(await resuming.next()).endsWith("\nlogged"));
  }
  assert.deepEqual(await denials(control), []);
  const stats = await control.info("commandstats");
  const calls = new Map(
    [...stats.matchAll(/^cmdstat_(\S+):calls=(\d+)/gm)].map(([, name, count]) => [name, Number(count)]),
  );
  for (const command of needsOf({ ...everything, db: 0, sharded: false }).flatMap((need) => need.commands)) {
    const name = wordOf(command).slice(1);
    assert(calls.get(name)! > 0, `${name} is used`);
  }
});

Deno.test("With what the page adds for a Cluster, a proxy and a backend need no more, also while a slot moves", async () => {
  await using cluster = await TestCluster.start(2);
  for (const { control } of cluster.nodes) await createUsers(control, true);
  const url = cluster.url.replace("://", `://wsproxy:${password}@`);
  const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
  const slots = await cluster.slotsOf(from);
  const session = sessionIn((slot) => slots.has(slot));
  const channel = `session:${session}:down`;
  {
    const env = { INBOX: "true", VACATED_GRACE_SECS: "0", SESSION_SOCKETS: "last" };
    await using proxy = await TestProxy.start(url, env, { idleSubscriptions: 3 });
    const backend = from.server.client();
    await backend.auth("backend", password);
    await proxy.resumable(session);
    await using client = await proxy.connect(session, { resume: "0" });
    await client.next();
    assert.equal(await backend.spublish(channel, "plain"), 1);
    assert.equal(await client.next(), "\nplain");
    const [position] = await backend.call("FCALL", "wsproxy_send", 1, channel, "logged") as string[];
    assert.equal(await client.next(), `${position}\nlogged`);
    await cluster.beginMove(slotOf(channel), from, to);
    await cluster.moveKeys(slotOf(channel), from, to);
    await using last = await proxy.connect(session, { resume: "0" });
    assert.equal(await last.next(), `${position}\nlogged`);
    await cluster.finishMove(slotOf(channel), from, to);
    assert.equal((await client.ended()).code, 4409);
    const next = await cluster.send(session, "moved");
    let frame = "";
    while (frame !== `${next}\nmoved`) frame = await last.next();
    await cluster.publish("wsproxy:control", '{"command":"close","issued_before":1}');
    await eventually("revoked", async () => await cluster.call("wsproxy:revoked", "HLEN", "wsproxy:revoked") === 1);
  }
  for (const { control } of cluster.nodes) assert.deepEqual(await denials(control), []);
});

Deno.test("The same user may use no key, no other channel, and neither side's channels the wrong way round", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control);
  const proxy = new Redis(urlOf(redis, "wsproxy"), { enableReadyCheck: false });
  try {
    const forbidden: [string, ...string[]][] = [
      ["GET", "key"],
      ["KEYS", "*"],
      ["INFO"],
      ["CONFIG", "GET", "*"],
      ["FLUSHALL"],
      ["PUBLISH", "other", "x"],
      ["PUBLISH", "session:s1:down", "x"],
      ["SUBSCRIBE", "other"],
      ["SUBSCRIBE", "session:s1:up"],
      ["PSUBSCRIBE", "session:*:down"],
      ["FCALL", "wsproxy_send", "1", "other", "x"],
      ["XRANGE", "other", "-", "+"],
      ["DEL", "session:s1:down"],
      ["FUNCTION", "FLUSH"],
    ];
    for (const [command, ...args] of forbidden) {
      await assert.rejects(proxy.call(command, ...args), /NOPERM/, [command, ...args].join(" "));
    }
  } finally {
    const ended = new Promise((resolve) => proxy.once("end", resolve));
    proxy.disconnect();
    await ended;
  }
});

const everything: Omit<Wants, "db" | "sharded"> = { inbox: true, lastSocket: true };

/** What a proxy with these settings says of a server when it starts. */
async function toldBy(
  url: string,
  wants: Omit<Wants, "db">,
): Promise<{ level: number; msg: string; reason: string }[]> {
  const told: { level: number; msg: string; reason: string }[] = [];
  let untried = 0;
  const write = (line: string) => {
    const { msg, ...fields } = JSON.parse(line);
    if (msg === "rights could not be tried") untried++;
    else told.push({ msg, ...fields });
  };
  const log = pino({ level: "debug", base: undefined, timestamp: false }, { write });
  const rights = new Rights(parseRedisUrl(url) as ServerAddress, wants, log);
  // What was told is not told again. A server on a busy machine may take longer to answer than a try may.
  for (let tries = 0; tries < 2 + untried && tries < 10; tries++) {
    rights.try();
    await rights.tried;
  }
  return told;
}

/** The word of a rule for a command. */
const wordOf = (command: string) =>
  `+${describe(command).toLowerCase().split(" ").filter((word) => !word.includes(":")).join("|")}`;

/** The word of a rule that permits a command, if its patterns cover what the command is about. */
function permitting(rule: string, command: string): string | undefined {
  const names = describe(command).split(" ").filter((word) => word.includes(":"));
  const word = wordOf(command);
  const words = rule.replace(/[()]/g, "").split(" ");
  const covers = (name: string) =>
    // No user is kept from leaving a channel.
    word.endsWith("unsubscribe") || words.some((pattern) => {
      const text = pattern.slice(1).replace(/[{}]/g, "\\$&").replaceAll("*", ".*");
      return /^[~&]/.test(pattern) && new RegExp(`^${text}$`).test(name);
    });
  return words.includes(word) && names.every(covers) ? word : undefined;
}

/** A rule without one of its words; empty when nothing is left. */
function without(rule: string, word: string): string {
  if (!rule.startsWith("(")) return rule === word ? "" : rule;
  return `(${rule.slice(1, -1).split(" ").filter((each) => each !== word).join(" ")})`;
}

Deno.test("Each right of the page that is missing is named at the start, with what needs it; no other is on the page", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const rules = await rulesOf("wsproxy");
  const used = new Set<string>();
  for (const sharded of [false, true]) {
    const wants = { ...everything, sharded };
    const granted = (sharded ? rules : rules.slice(0, 3)).flat();
    await control.acl("SETUSER", "wsproxy", "reset", ...granted);
    assert.deepEqual(await toldBy(urlOf(redis, "wsproxy"), wants), []);
    for (const { what, level = "error", commands } of needsOf({ ...wants, db: 0 })) {
      for (const command of commands) {
        const rest = granted.map((rule) => {
          const word = permitting(rule, command);
          if (word === undefined) return rule;
          used.add(`${word} of ${rule}`);
          return without(rule, word);
        });
        await control.acl("SETUSER", "wsproxy", "reset", ...rest.filter((rule) => rule !== ""));
        const told = await toldBy(urlOf(redis, "wsproxy"), wants);
        const line = told.find(({ msg }) => msg === `Redis refuses what ${what} needs`);
        const refused = line?.reason.split(", ").includes(`${describe(command)} (NOPERM)`);
        assert(refused, `${command}: ${JSON.stringify(told)}`);
        assert.equal(line!.level, pino.levels.values[level]);
      }
    }
  }
  const granted = rules.flat().flatMap((rule) => (rule.match(/\+[a-z|]+/g) ?? []).map((word) => `${word} of ${rule}`));
  assert.deepEqual(
    new Set(granted.filter((word) => !used.has(word))),
    new Set(
      needless.map(wordOf).map((word) => `${word} of ${word}`),
    ),
  );
});

/** What every client may expect: messages both ways, from the log too, and one session's inbox. */
async function serves(redis: RedisServer, url: string): Promise<void> {
  await using proxy = await TestProxy.start(url, { INBOX: "true", VACATED_GRACE_SECS: "0", SESSION_SOCKETS: "last" });
  // It asks for nothing by itself.
  const control = new Redis(redis.url, { enableReadyCheck: false, disableClientInfo: true });
  await using _ = { [Symbol.asyncDispose]: () => disconnect(control) };
  await proxy.resumable();
  const first = await proxy.connect("s1", { resume: "0" });
  await first.next();
  await using client = await proxy.connect("s1", { resume: "0" });
  assert.match(await client.next(), /^!live/);
  assert.equal((await first.ended()).code, 4409);
  await control.publish("session:s1:down", "plain");
  assert.equal(await client.next(), "\nplain");
  const [position] = await control.call("FCALL", "wsproxy_send", 1, "session:s1:down", "logged") as string[];
  assert.equal(await client.next(), `${position}\nlogged`);
  client.send('"up"');
  await entriesWith(control, "message", 1);
}

Deno.test("A server without ROLE, PING, INFO, MULTI and CLIENT, or a user without rights to them, serves all the same", async () => {
  const renamed = ["ROLE", "INFO", "MULTI", "CLIENT", "PING"].flatMap((command) => ["--rename-command", command, ""]);
  await using bare = await RedisServer.start(...renamed);
  const wants = { ...everything, sharded: false };
  const untried = (why: string) => [{ level: 40, reason: `MULTI (${why})`, msg: "Redis does not let rights be tried" }];
  await serves(bare, bare.url);
  assert.deepEqual(await toldBy(bare.url, wants), untried("ERR unknown command 'MULTI'"));
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.acl(
    "SETUSER",
    "wsproxy",
    "on",
    `>${password}`,
    "~*",
    "&*",
    "+@all",
    "-role",
    "-ping",
    "-info",
    "-multi",
    "-client",
  );
  await serves(redis, urlOf(redis, "wsproxy"));
  assert.deepEqual(await toldBy(urlOf(redis, "wsproxy"), wants), untried("NOPERM"));
  await control.acl("SETUSER", "wsproxy", "+multi");
  assert.deepEqual(await toldBy(urlOf(redis, "wsproxy"), wants), [{
    level: 40,
    reason: "ROLE (NOPERM)",
    msg: "Redis refuses what the watch for a master that was demoted needs",
  }]);
});

Deno.test("A user that may only publish and subscribe serves clients that want no more", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const rights = ["-@all", "+subscribe", "+publish", "&session:*", "&wsproxy:canary:*"];
  await control.acl("SETUSER", "wsproxy", "on", `>${password}`, ...rights);
  const up = await Listener.to(redis, "session:s1:up");
  const env = { INBOX: "true", SESSION_SOCKETS: "last" };
  const proxy = await TestProxy.start(urlOf(redis, "wsproxy"), env);
  for (const options of [{}, { resume: "0" }]) {
    await using client = await proxy.connect("s1", options);
    await control.publish("session:s1:down", "down");
    assert.equal(await client.next(), "down");
    client.send('"up"');
    assert.deepEqual(await up.take(1), ['"up"']);
  }
  await eventually("no sessions left", () => proxy.proxy.sessions === 0);
  await proxy.proxy.stop();
});

Deno.test("A command that a server does not have is named, and its arguments are not: they may be a secret", async () => {
  const gone = ["XRANGE", "EVAL", "SMEMBERS", "UNSUBSCRIBE", "AUTH", "SELECT"];
  const renamed = gone.flatMap((command) => ["--rename-command", command, ""]);
  await using redis = await RedisServer.start(...renamed);
  const told = await toldBy(`${redis.url}/3`, { ...everything, sharded: false });
  const unknown = (name: string, about = "") => `${name}${about} (ERR unknown command '${name}')`;
  assert.deepEqual(told.map(({ msg, reason }) => `${msg}: ${reason}`), [
    `Redis refuses what every session needs: ${unknown("SELECT")}, ${unknown("UNSUBSCRIBE", " session:*:down")}`,
    `Redis refuses what resuming needs: ${unknown("XRANGE", " session:*:down")}`,
    `Redis refuses what revocation needs: ${unknown("EVAL", " wsproxy:revoked")}`,
    `Redis refuses what SESSION_SOCKETS=last needs: ${unknown("EVAL", " session:*:down")}`,
    `Redis refuses what INBOX=true needs: ${unknown("SMEMBERS", " wsproxy:{proxies}:*")}`,
  ]);
  const lines: string[] = [];
  const config = readConfig(testEnv(redis.url.replace("://", "://user:hunter2@")));
  const proxy = await start(config, pino({ level: "debug" }, { write: (line) => void lines.push(line) }));
  try {
    await eventually("told", () => lines.some((line) => /ERR unknown command 'auth'"/i.test(line)));
    assert(!lines.join("").includes("hunter2"));
  } finally {
    await proxy.stop();
  }
});

Deno.test("A Redis that evicts is told of at the start", async () => {
  await using redis = await RedisServer.start("--maxmemory-policy", "allkeys-lru");
  const told = async () => (await toldBy(redis.url, { ...everything, sharded: false }));
  assert.deepEqual(await told(), [{
    level: 50,
    reason: "maxmemory-policy allkeys-lru",
    msg: "Redis may evict inboxes, records of connections, revoked tokens and session logs",
  }]);
  const control = redis.client();
  await control.config("SET", "maxmemory-policy", "volatile-ttl");
  assert.deepEqual((await told()).map(({ level, msg }) => [level, msg]), [[40, "Redis may evict session logs early"]]);
  await control.config("SET", "maxmemory-policy", "noeviction");
  assert.deepEqual(await told(), []);
});
