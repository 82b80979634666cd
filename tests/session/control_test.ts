/** Commands that concern many sessions, revoked tokens, and sessions that have one socket only. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { missedNotice } from "../../src/session/frames.ts";
import { Client } from "../harness/client.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { type Claims, mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { handshake, request, requestHead, writeAll } from "../harness/wire.ts";

const nowSecs = () => Math.floor(Date.now() / 1000);

const obeyed = (command: string) => `wsproxy_commands_total{command="${command}",result="obeyed"}`;
const malformed = (command: string) => `wsproxy_commands_total{command="${command}",result="malformed"}`;

/** What a token of these claims is told; the status where it is not refused. */
async function refusal(proxy: TestProxy, agent: string, claims: Claims): Promise<string> {
  const headers = await handshake("s1", {});
  headers["Authorization"] = `Bearer ${await mint("s1", claims)}`;
  const { status, body } = await proxy.request(`/${encodeURIComponent(agent)}/ws/s1`, { headers });
  return status === 403 ? body : String(status);
}

onEachEngine("A close by agent ends that agent's sessions on every proxy, and no other", async (engine) => {
  await using redis = await RedisServer.start();
  await using one = await TestProxy.start(redis, engine);
  await using two = await TestProxy.start(redis, engine);
  const control = redis.client();
  const concerned = await Promise.all([
    one.connect("s1", { agent: "a" }),
    two.connect("s2", { agent: "a" }),
    two.connect("s3", { agent: "a", resume: "0" }),
  ]);
  await using other = await one.connect("s1", { agent: "b" });
  await control.publish("wsproxy:control", '{"command":"close","agent_id":"a"}');
  for (const client of concerned) {
    assert.deepEqual(await client.ended(), { code: 4403, reason: "closed by the backend" });
  }
  await control.publish("session:s1:down", "stays");
  assert.equal(await other.next(), "stays");
  const chosen = await one.connect("s4", { agent: "a" });
  await control.publish("wsproxy:control", '{"command":"close","agent_id":"a","code":4000,"reason":"bye"}');
  assert.deepEqual(await chosen.ended(), { code: 4000, reason: "bye" });
  assert.equal(await one.metric(obeyed("close")), 2);
});

onEachEngine("A client that is ended while it connects is told why", async (engine) => {
  await using redis = await RedisServer.start("--enable-debug-command", "yes");
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  const iat = nowSecs() - 10;
  const commands: [Record<string, unknown>, number, RegExp][] = [
    [{ agent_id: "agent" }, 403, /closed by the backend/],
    [{ agent_id: "agent", code: 4000, reason: "bye" }, 403, /^bye$/m],
    [{ agent_id: "agent", code: 1000, reason: "" }, 403, /was closed while it connected/],
    [{ agent_id: "agent", issued_before: iat + 1 }, 403, /revoked/],
  ];
  for (const [command, status, reason] of commands) {
    for (const kind of ["ws", "sse"]) {
      const headers = await handshake("s1", { iat });
      if (kind === "sse") delete headers["Upgrade"];
      let reply;
      do {
        // Redis is busy before the client subscribes, and the command is what it says first.
        const json = JSON.stringify({ command: "close", ...command });
        const busy = control.multi().publish("wsproxy:control", json).call("DEBUG", "SLEEP", "0.3").exec();
        reply = await proxy.request(`/agent/${kind}/s1`, { headers });
        await busy;
        await proxy.empty();
      } while (reply.status < 300); // it was subscribed before that
      assert.equal(reply.status, status);
      assert.match(reply.body, reason);
    }
  }
  assert.equal(await proxy.metric('wsproxy_refused_total{status="403",reason="endedMeanwhile"}'), 6);
});

Deno.test("A broadcast reaches every socket, or every one of an agent, as a plain message", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  await using bare = await proxy.connect("s1", { agent: "a" });
  await proxy.resumable();
  await using resuming = await proxy.connect("s2", { agent: "b", resume: "0" });
  await resuming.next();
  await control.publish("wsproxy:control", '{"command":"broadcast","payload":"ü"}');
  assert.deepEqual([await bare.next(), await resuming.next()], ["ü", "\nü"]);
  await control.publish("wsproxy:control", '{"command":"broadcast","agent_id":"b","payload":{"type":"notice"}}');
  assert.equal(await resuming.next(), '\n{"type":"notice"}');
  await control.publish("wsproxy:control", '{"command":"broadcast","payload":"last"}');
  assert.equal(await bare.next(), "last");
});

Deno.test("A malformed command is counted, and does nothing", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  await using client = await proxy.connect("s1");
  const commands = [
    "",
    "no JSON",
    "[]",
    "null",
    "{}",
    '{"command":"stop"}',
    '{"command":"close"}',
    '{"command":"close","agent_id":1}',
    '{"command":"close","agent_id":"agent","code":1001}',
    '{"command":"close","agent_id":"agent","reason":1}',
    `{"command":"close","agent_id":"agent","reason":"${"x".repeat(124)}"}`,
    '{"command":"close","issued_before":"yesterday"}',
    '{"command":"close","issued_before":0}',
    // Milliseconds, and what no clock will ever say: each would lock out all clients.
    `{"command":"close","issued_before":${Date.now()}}`,
    `{"command":"close","agent_id":"agent","issued_before":${nowSecs() + 3600}}`,
    '{"command":"close","issued_before":1e300}',
    '{"command":"close","issued_before":1e999}',
    '{"command":"allow","agent_id":1}',
    '{"command":"broadcast"}',
    '{"command":"broadcast","payload":"x","agent_id":""}',
  ];
  for (const command of commands) await control.publish("wsproxy:control", command);
  await control.publish("wsproxy:control", '{"command":"broadcast","payload":"alive"}');
  assert.equal(await client.next(), "alive");
  const names = ["unknown", "close", "allow", "broadcast"];
  const counts = await Promise.all(names.map((name) => proxy.metric(malformed(name))));
  assert.deepEqual(counts, [6, 11, 1, 2]);
  assert.equal(await control.exists("wsproxy:revoked"), 0);
  await using _another = await proxy.connect("s2");
});

onEachEngine(
  "Revoked tokens: their sockets end, they are refused from then on, and by proxies that start later",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const old = { iat: nowSecs() - 100 };
    const client = await proxy.connect("s1", { agent: "a", claims: old });
    await proxy.resumable();
    const resuming = await proxy.connect("s1", { agent: "a", claims: old, resume: "0" });
    await resuming.next();
    await using young = await proxy.connect("s1", { agent: "a" });
    await using other = await proxy.connect("s1", { agent: "b", claims: old });
    const before = nowSecs() - 50;
    await control.publish(
      "wsproxy:control",
      JSON.stringify({ command: "close", agent_id: "a", issued_before: before }),
    );
    assert.deepEqual(await client.ended(), { code: 4401, reason: "token revoked" });
    assert.deepEqual(await resuming.ended(), { code: 4401, reason: "token revoked" });
    assert.match(await refusal(proxy, "a", old), /revoked/);
    await eventually("kept", async () => await control.hget("wsproxy:revoked", "a") === String(before));
    await control.publish("session:s1:down", "stay");
    assert.deepEqual([await young.next(), await other.next()], ["stay", "stay"]);
    // An older one does not take it back.
    await control.publish("wsproxy:control", JSON.stringify({ command: "close", agent_id: "a", issued_before: 1 }));
    await using later = await TestProxy.start(redis, engine);
    assert.match(await refusal(later, "a", old), /revoked/);
    assert.equal(await control.hget("wsproxy:revoked", "a"), String(before));
    await using _fresh = await later.connect("s1", { agent: "a" });
    await using _spared = await later.connect("s1", { agent: "b", claims: old });
    // A new token on an open socket is judged alike.
    await using refreshed = await later.connect("s2", { agent: "a", resume: "0" });
    await refreshed.next();
    refreshed.send(`!token\n${await mint("s2", old)}`);
    assert.match(await refreshed.next(), /^!error\n.*revoked/);
  },
);

Deno.test("A proxy that was away learns what was revoked meanwhile, and ends those sockets", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  const client = await proxy.connect("s1", { claims: { iat: nowSecs() - 100 } });
  await control.hset("wsproxy:revoked", "*", nowSecs() - 50);
  await control.client("KILL", "TYPE", "normal", "SKIPME", "yes");
  assert.equal((await client.ended()).code, 4401);
});

Deno.test("A revocation is taken back on every proxy, on those that start later, and on those that were away", async () => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  await using proxy = await TestProxy.start(redis);
  await using away = await TestProxy.start(relay.url);
  const control = redis.client();
  const old = { iat: nowSecs() - 100 };
  const command = (fields: object) => control.publish("wsproxy:control", JSON.stringify(fields));
  const before = nowSecs() - 50;
  for (const fields of [{ issued_before: before }, { agent_id: "a", issued_before: before }]) {
    await command({ command: "close", ...fields });
  }
  for (const each of [proxy, away]) {
    await eventually("revoked", async () => /revoked/.test(await refusal(each, "a", old)));
  }
  // Where Redis has not confirmed what this one has heard, it tells Redis again when it is back. What it sends is
  // answered in order: once a message is, the revocations are.
  {
    await using client = await away.connect("s1", { agent: "b" });
    client.send('"after the revocations"');
    await away.counts("wsproxy_unheard_total", 1);
  }
  relay.hangsUp = true;
  relay.cut();
  await eventually("cut off", async () => !await away.isHealthy());
  // What was revoked for all is another revocation than the agent's own.
  await command({ command: "allow" });
  await eventually("taken back", async () => Number(await control.hget("wsproxy:revoked", "*")) < 0);
  assert.match(await refusal(proxy, "a", old), /revoked/);
  await (await proxy.connect("s1", { agent: "b", claims: old })).close();
  await command({ command: "allow", agent_id: "a" });
  await eventually("taken back", async () => Number(await control.hget("wsproxy:revoked", "a")) < 0);
  await (await proxy.connect("s1", { agent: "a", claims: old })).close();
  relay.hangsUp = false;
  await eventually("back", () => away.isHealthy());
  await using later = await TestProxy.start(redis);
  for (const each of [away, later]) {
    for (const agent of ["a", "b"]) await (await each.connect("s1", { agent, claims: old })).close();
  }
  assert.equal(await proxy.metric(obeyed("allow")), 2);
  // It can be revoked again, by the same time.
  await command({ command: "close", agent_id: "a", issued_before: before });
  for (const each of [proxy, away, later]) {
    await eventually("revoked again", async () => /revoked/.test(await refusal(each, "a", old)));
  }
  await eventually("kept", async () => await control.hget("wsproxy:revoked", "a") === String(before));
});

onEachEngine(
  "A token from the future does not outlive a revocation, and is as good as any without one",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const future = { iat: nowSecs() + 3600 };
    const client = await proxy.connect("s1", { agent: "a", claims: future });
    await using other = await proxy.connect("s1", { agent: "b", claims: future });
    await control.publish(
      "wsproxy:control",
      JSON.stringify({ command: "close", agent_id: "a", issued_before: nowSecs() }),
    );
    assert.deepEqual(await client.ended(), { code: 4401, reason: "token revoked" });
    assert.match(await refusal(proxy, "a", future), /revoked/);
    await using later = await TestProxy.start(redis, engine);
    await eventually("learnt", async () => /revoked/.test(await refusal(later, "a", future)));
    await control.publish("session:s1:down", "stays");
    assert.equal(await other.next(), "stays");
  },
);

onEachEngine("An agent may be called *: commands to it are to no other agent", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  const old = { iat: nowSecs() - 100 };
  const command = (fields: object) => control.publish("wsproxy:control", JSON.stringify({ agent_id: "*", ...fields }));
  const client = await proxy.connect("s1", { agent: "*", claims: old });
  await using other = await proxy.connect("s1", { agent: "a", claims: old });
  await command({ command: "broadcast", payload: "to *" });
  assert.equal(await client.next(), "to *");
  await command({ command: "close" });
  assert.equal((await client.ended()).code, 4403);
  await command({ command: "close", issued_before: nowSecs() - 50 });
  await eventually("revoked", async () => /revoked/.test(await refusal(proxy, "*", old)));
  await eventually("kept", async () => await control.exists("wsproxy:revoked") === 1);
  await using later = await TestProxy.start(redis, engine);
  assert.match(await refusal(later, "*", old), /revoked/);
  await (await later.connect("s1", { agent: "a", claims: old })).close();
  await control.publish("session:s1:down", "last");
  assert.equal(await other.next(), "last");
  await command({ command: "allow" });
  await eventually("taken back", async () => await refusal(later, "*", old) === "101");
  // What proxies of all versions write for all agents.
  await control.hset("wsproxy:revoked", "*", nowSecs() - 50);
  await using latest = await TestProxy.start(redis, engine);
  for (const agent of ["*", "a"]) assert.match(await refusal(latest, agent, old), /revoked/);
  assert.equal((await other.ended()).code, 4401);
});

Deno.test("Revocations that Redis has lost are brought back by the proxies that know them", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  const before = nowSecs() - 50;
  for (const agent_id of ["a", "b", "c", "constructor"]) {
    const command = { command: "close", agent_id, issued_before: before };
    await control.publish("wsproxy:control", JSON.stringify(command));
  }
  await control.publish("wsproxy:control", '{"command":"allow","agent_id":"c"}');
  const kept = async () => {
    const [a, b, c, d] = await control.hmget("wsproxy:revoked", "a", "b", "c", "constructor");
    return [a, b, d].every((secs) => Number(secs) === before) && Number(c) < 0;
  };
  await eventually("kept", kept);
  // An eviction.
  await control.del("wsproxy:revoked");
  await eventually("brought back", kept);
  // A failover to a server that had not heard all of it.
  await control.hset("wsproxy:revoked", "a", 1);
  await control.hdel("wsproxy:revoked", "b", "c");
  await control.client("KILL", "TYPE", "normal", "SKIPME", "yes");
  await eventually("brought back", kept);
  // A full Redis.
  await control.config("SET", "maxmemory", "1");
  await control.publish("wsproxy:control", `{"command":"close","agent_id":"e","issued_before":${before}}`);
  await eventually("revoked", async () => /revoked/.test(await refusal(proxy, "e", { iat: before - 50 })));
  assert.equal(await control.hexists("wsproxy:revoked", "e"), 0);
  await control.config("SET", "maxmemory", "0");
  await eventually("kept", async () => await control.hget("wsproxy:revoked", "e") === String(before));
  // What it finds and cannot use is neither obeyed nor in the way.
  await control.hset("wsproxy:revoked", "d", "yesterday");
  await using later = await TestProxy.start(redis);
  assert.match(await refusal(later, "a", { iat: before - 50 }), /revoked/);
  await (await later.connect("s1", { agent: "d", claims: { iat: before - 50 } })).close();
});

onEachEngine(
  "SESSION_SOCKETS=last: a new socket ends the others, on every proxy, and is the only one left",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using one = await TestProxy.start(redis, { ...engine, SESSION_SOCKETS: "last" });
    await using two = await TestProxy.start(redis, { ...engine, SESSION_SOCKETS: "last" });
    const control = redis.client();
    const first = await one.connect("s1");
    // Its socket is open at the proxy, too, when it gets a message: the order is the proxies'.
    await control.publish("session:s1:down", "first");
    assert.equal(await first.next(), "first");
    const second = await two.connect("s1");
    assert.deepEqual(await first.ended(), { code: 4409, reason: "replaced by a newer connection" });
    const third = await two.connect("s1", { resume: "0" });
    assert.equal((await second.ended()).code, 4409);
    await using other = await one.connect("s2");
    // Many at once: exactly one is left, whichever it is.
    const many = await Promise.all(Array.from({ length: 20 }, (_, i) => (i % 2 ? one : two).connect("s1")));
    assert.equal((await third.ended()).code, 4409);
    await eventually("one is left", () => one.proxy.sessions + two.proxy.sessions === 2);
    await control.publish("session:s2:down", "alone");
    assert.equal(await other.next(), "alone");
    const left = many.filter((client) => client.socket.readyState === WebSocket.OPEN);
    await eventually(
      "one client is left",
      () => many.filter((client) => client.socket.readyState === WebSocket.OPEN).length === 1,
    );
    await Promise.all(left.map((client) => client.close()));
  },
);

onEachEngine(
  "SESSION_SOCKETS=last: a socket that did not hear of a newer one goes when it hears again",
  async (engine) => {
    await using redis = await RedisServer.start();
    using relay = new Relay(redis.port);
    await using cut = await TestProxy.start(relay.url, { ...engine, SESSION_SOCKETS: "last" });
    await using whole = await TestProxy.start(redis, { ...engine, SESSION_SOCKETS: "last" });
    const control = redis.client();
    const deaf = await cut.connect("s1");
    // Its own word has come back when this has.
    const up = await Listener.to(redis, "session:s1:up");
    deaf.send('"up"');
    await up.take(1);
    await control.publish("session:s1:down", "down");
    assert.equal(await deaf.next(), "down");
    relay.hangsUp = true;
    relay.cut();
    const newer = await whole.connect("s1");
    relay.hangsUp = false;
    assert.equal((await deaf.ended()).code, 4409);
    // Hearing again is no reason for the newest one to go.
    const newest = await cut.connect("s1");
    assert.equal((await newer.ended()).code, 4409);
    relay.cut();
    assert.equal(await newest.next(), missedNotice.bare);
    await eventually("one is left", () => cut.proxy.sessions + whole.proxy.sessions === 1);
    assert.equal(await control.publish("session:s1:down", "stays"), 1);
    assert.equal(await newest.next(), "stays");
    await newest.close();
  },
);

/** The order in which sockets open is their clients', however far from Redis the proxies are. */
onEachEngine(
  "SESSION_SOCKETS=last: after fast reloads the socket that opened last stays, also where its proxy is nearer to Redis",
  async (engine) => {
    await using redis = await RedisServer.start();
    using far = new Relay(redis.port);
    using near = new Relay(redis.port);
    const env = { ...engine, SESSION_SOCKETS: "last" };
    // Of their own processes: with the native engine a client that goes at the wrong moment leaves something behind.
    await using one = await ProxyProcess.start(far.url, { ...env });
    await using two = await ProxyProcess.start(near.url, { ...env, WORKERS: "2" });
    const proxies = [one, two];
    for (const { log } of proxies) log.drain();
    const sum = async (metric: string) => await one.metric(metric) + await two.metric(metric);
    const random = (below: number) => Math.floor(Math.random() * below);
    const wait = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
    const control = redis.client();
    // A page's own way, on which its leaving comes later than the next page's socket.
    using wayToOne = new Relay(one.port);
    using wayToTwo = new Relay(two.port);
    const ways = [wayToOne, wayToTwo];
    const idle = await sum("wsproxy_subscriptions");
    const rounds = Number(Deno.env.get("RELOADS") ?? 50);
    const atOnce = 50;
    let replaced = 0;
    for (let done = 0; done < rounds; done += atOnce) {
      for (const relay of [far, near]) relay.delayMs = random(61);
      for (const way of ways) way.delayMs = random(201);
      const last = await Promise.all(Array.from({ length: atOnce }, async (_, n) => {
        const session = `s${done + n}`;
        const first = random(2);
        // A page that loads, and is loaded again, maybe before its socket is open, and maybe from the other proxy.
        if (random(2) === 0) {
          const connection = await Deno.connect({ hostname: "127.0.0.1", port: ways[first]!.port });
          const head = requestHead(`/agent/ws/${session}`, { headers: await handshake(session) });
          await writeAll(connection, new TextEncoder().encode(head));
          await wait(random(200));
          connection.close();
          return await Client.connect(proxies[1 - first]!.port, session);
        }
        // Or a second page beside the first, which is told to stop.
        const former = await Client.connect(proxies[first]!.port, session);
        await wait(random(2) * random(60));
        const client = await Client.connect(proxies[random(2)]!.port, session);
        const { code } = await Promise.race([former.ended(), client.ended()]);
        assert.equal(code, 4409);
        if (former.socket.readyState !== WebSocket.OPEN) return client;
        replaced++;
        await former.close();
        return client;
      }));
      // Whatever the others had to say has been said when only the last ones are there, and messages flow behind it.
      await eventually("only the last ones are left", async () => await sum("wsproxy_subscriptions") <= atOnce + idle);
      for (const { port } of proxies) assert.equal((await request(port, "/health")).status, 200);
      for (let n = 0; n < atOnce; n++) await control.publish(`session:s${done + n}:down`, "stays");
      for (const client of last) {
        const stays = await client.next().catch(() => "replaced");
        if (stays !== "stays") replaced++;
        else await client.close();
      }
      for (const relay of [far, near]) relay.delayMs = 0;
    }
    assert.equal(replaced, 0, `of ${rounds} last sockets so many were replaced`);
  },
);

onEachEngine(
  "SESSION_SOCKETS=last: a handshake that gets no number in time is refused as one without a subscription",
  async (engine) => {
    await using redis = await RedisServer.start();
    using relay = new Relay(redis.port);
    const env = { ...engine, SESSION_SOCKETS: "last", HANDSHAKE_TIMEOUT_SECS: "1" };
    await using proxy = await TestProxy.start(relay.url, env);
    await (await proxy.connect("s1")).close();
    relay.freeze("wsproxy-publisher");
    const headers = await handshake("s1");
    assert.equal((await proxy.request("/agent/ws/s1", { headers })).status, 504);
    relay.cut();
    await eventually("back", () => proxy.isHealthy());
    await (await proxy.connect("s1")).close();
  },
);

Deno.test("A malformed !replace is counted and logged, and ends nothing", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { SESSION_SOCKETS: "last" });
  await using bare = await TestProxy.start(redis);
  const control = redis.client();
  await using client = await proxy.connect("s1");
  await using other = await bare.connect("s2");
  const malformed = ["", "no JSON", "null", "{}", '{"connection":"x"}', '{"connection":"x","at":"1"}', '{"at":1e18}'];
  for (const session of ["s1", "s2"]) {
    for (const json of malformed) {
      await control.publish(`session:${session}:down`, Buffer.from(`\xff!replace\n${json}`, "latin1"));
    }
    await control.publish(`session:${session}:down`, "stays");
  }
  for (const each of [client, other]) assert.equal(await each.next(), "stays");
  const name = 'wsproxy_commands_total{command="replace",result="malformed"}';
  for (const each of [proxy, bare]) assert.equal(await each.metric(name), malformed.length);
});

Deno.test("Workers obey each command, and log and count it once", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { WORKERS: "2" });
  const control = redis.client();
  const clients = await Promise.all(Array.from({ length: 20 }, (_, n) => Client.connect(proxy.port, `s${n}`)));
  const commands = [
    '{"command":"broadcast","payload":"x"}',
    // The same again, before the workers have told of the first one.
    '{"command":"broadcast","payload":"x"}',
    '{"command":"broadcast"}',
    '{"command":"close","agent_id":"agent"}',
  ];
  for (const command of commands) void control.publish("wsproxy:control", command);
  for (const client of clients) {
    assert.deepEqual(await client.take(2), ["x", "x"]);
    assert.equal((await client.ended()).code, 4403);
  }
  await proxy.counts(obeyed("close"), 1);
  await proxy.counts(obeyed("broadcast"), 2);
  await proxy.counts(malformed("broadcast"), 1);
  const told: unknown[] = [];
  proxy.signal("SIGTERM");
  for (const line of (await proxy.log.rest()).trim().split("\n")) {
    const { command, sockets, msg } = JSON.parse(line);
    if (command !== undefined) told.push([command, sockets, msg]);
  }
  assert.deepEqual(told, [
    ["broadcast", 20, "command obeyed"],
    ["broadcast", 20, "command obeyed"],
    ["broadcast", undefined, "malformed command ignored"],
    ["close", 20, "command obeyed"],
  ]);
});

Deno.test("A command is logged with the number of sockets that it concerned, and never with its payload", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const control = redis.client();
  const client = await Client.connect(proxy.port, "s1");
  await control.publish("wsproxy:control", '{"command":"broadcast","payload":"hidden words"}');
  await control.publish("wsproxy:control", '{"command":"broadcast","payload":"hidden words","agent_id":7}');
  await control.publish("wsproxy:control", '{"command":"close","agent_id":"agent","reason":"bye"}');
  assert.deepEqual(await client.ended(), { code: 4403, reason: "bye" });
  const told: string[] = [];
  const obeyed = (line: string) => told.push(line) > 0 && line.includes('"command":"close"');
  await proxy.log.until(obeyed);
  const commands = told.map((line) => JSON.parse(line)).filter(({ command }) => command !== undefined);
  assert.deepEqual(commands.map(({ command, sockets, msg }) => [command, sockets, msg]), [
    ["broadcast", 1, "command obeyed"],
    ["broadcast", undefined, "malformed command ignored"],
    ["close", 1, "command obeyed"],
  ]);
  assert(!told.join().includes("hidden"));
});
