/** The Redis users of docs/operations.md, read from there, may do what their side needs and nothing else. */

import assert from "node:assert/strict";
import { Redis } from "ioredis";
import { slotOf } from "../../src/redis/slot.ts";
import { type ClusterNode, sessionIn, TestCluster } from "../harness/cluster.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer, subscribers } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";
import { request } from "../harness/wire.ts";

const password = "a-password-of-the-tests";

/** Creates the users that the page tells an operator to create, with a password of ours; `all` with all it may need. */
async function createUsers(control: Redis, all = false): Promise<void> {
  const page = await Deno.readTextFile(new URL("../../docs/operations.md", import.meta.url));
  const rules = (page.match(/^ *ACL SETUSER .*$/gm) ?? []).map((rule) => rule.trim());
  assert.deepEqual(rules.map((rule) => rule.split(" ")[2]), [
    "wsproxy",
    "backend",
    "wsproxy",
    "wsproxy",
    "wsproxy",
    "backend",
  ]);
  for (const rule of all ? rules : rules.slice(0, 2)) {
    // A selector in parentheses is one argument, as redis-cli takes it in quotes.
    const words = rule.replace("PASSWORD", password).match(/"[^"]*"|\S+/g)!.map((word) => word.replaceAll('"', ""));
    await control.call("ACL", ...words.slice(1));
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

Deno.test("A Redis user with the rights in docs/operations.md is all that the proxy and a backend need", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control);
  const backend = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false, connectionName: "backend" });
  const ear = new Redis(urlOf(redis, "backend"), { enableReadyCheck: false, connectionName: "ear" });
  const heard = new Promise((resolve) => ear.on("message", (_channel, text) => resolve(text)));
  try {
    await using proxy = await TestProxy.start(urlOf(redis, "wsproxy"));
    assert.equal((await request(proxy.port, "/health")).status, 200);
    await ear.subscribe("session:s:1:up");
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

Deno.test("With what the page adds, a proxy keeps inboxes, ends what others left, and gives a session one socket", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await createUsers(control, true);
  // Another proxy has died long ago.
  await control.hset("wsproxy:{proxies}", "dead", "1");
  await control.sadd("wsproxy:{proxies}:dead:agents", "agent");
  await control.hset("wsproxy:{agent:agent:inbox}:held:dead", "dead-1", "s0");
  await control.hset("wsproxy:{agent:agent:inbox}:sockets", "s0", "1");
  {
    const env = { INBOX: "true", VACATED_GRACE_SECS: "0", SESSION_SOCKETS: "last" };
    await using proxy = await TestProxy.start(urlOf(redis, "wsproxy"), env);
    const first = await proxy.connect("s1");
    await using _second = await proxy.connect("s1");
    assert.equal((await first.ended()).code, 4409);
    await control.publish("wsproxy:control", '{"command":"close","issued_before":1}');
    await eventually("revoked", async () => await control.hget("wsproxy:revoked", "*") === "1");
    await eventually("the dead one's session is vacated", async () => {
      const entries = await control.xrange("agent:agent:inbox", "-", "+");
      return entries.some(([, words]) => words[1] === "vacated" && words[3] === "s0");
    });
    assert.equal(await control.hlen("wsproxy:{proxies}"), 1);
  }
  assert.deepEqual(await denials(control), []);
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
