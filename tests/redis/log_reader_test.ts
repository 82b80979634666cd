/** Redis that takes away what logs need: resuming clients are told, or served as bare ones, and never left in silence. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { pino } from "pino";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { functionsLoaded, RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";

const down = (session: string) => `session:${session}:down`;
const resumeProtocol = "wsproxy.resume.v1";

/** What a backend calls in place of PUBLISH. */
const send = async (redis: Redis, session: string, text: string) =>
  (await redis.call("FCALL", "wsproxy_send", 1, down(session), text) as [string, number])[0];

/** A client that wants to resume, and takes what it gets. */
const connect = async (proxy: TestProxy, session: string) =>
  await proxy.connect(session, { protocols: [resumeProtocol, "bearer", await mint(session)] });

const unreadable = { code: 1013, reason: "the session's log cannot be read" };

onEachEngine("Functions that are gone under live clients are loaded again, and nothing is missing", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  await using client = await proxy.connect("s1", { resume: "0" });
  assert.match(await client.next(), /^!live\n/);
  await control.call("FUNCTION", "FLUSH");
  // A client that comes now needs them at once.
  await using second = await proxy.connect("s1", { resume: "0" });
  assert.match(await second.next(), /^!live\n/);
  const first = await send(control, "s1", "one");
  for (const each of [client, second]) assert.equal(await each.next(), `${first}\none`);
  // And while no client comes, backends do.
  await control.call("FUNCTION", "FLUSH");
  await functionsLoaded(control);
  const last = await send(control, "s1", "two");
  for (const each of [client, second]) assert.equal(await each.next(), `${last}\ntwo`);
});

Deno.test("Where a library of another kind has taken the place of the functions, clients are bare until they are back", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  await proxy.resumable();
  const theirs = "#!lua name=wsproxy\nredis.register_function('theirs', function() return 'x' end)";
  await control.call("FUNCTION", "LOAD", "REPLACE", theirs);
  const protocolOfNext = async () => {
    await using client = await connect(proxy, "s1");
    const { protocol } = client.socket;
    if (protocol === resumeProtocol) assert.deepEqual(await client.ended(), unreadable);
    return protocol;
  };
  await eventually("clients are bare", async () => await protocolOfNext() === "bearer");
  assert.equal(await control.call("FCALL", "theirs", 0), "x");
  await control.call("FUNCTION", "FLUSH");
  await eventually("clients resume", async () => {
    await using client = await connect(proxy, "s1");
    return client.socket.protocol === resumeProtocol;
  });
});

/** The user "proxy" may do everything, less some rules. */
async function permit(control: Redis, ...less: string[]): Promise<void> {
  await control.call("ACL", "SETUSER", "proxy", "reset", "on", "nopass", "~*", "&*", "+@all", ...less);
}

onEachEngine(
  "Before it is known whether Redis keeps logs, no client that resumes is served as a bare one",
  async (engine) => {
    // The functions cannot be loaded yet, while messages flow.
    await using redis = await RedisServer.start("--min-replicas-to-write", "1");
    await using proxy = await TestProxy.start(redis, { ...engine, HANDSHAKE_TIMEOUT_SECS: "1" });
    const control = redis.client();
    {
      await using bare = await proxy.connect("s1");
      await control.publish(down("s1"), "plain");
      assert.equal(await bare.next(), "plain");
    }
    await assert.rejects(connect(proxy, "s1"), /503/);
    const headers = { authorization: `Bearer ${await mint("s1")}` };
    const statusOfStream = async () => {
      const answer = await fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1`, { headers });
      await answer.body?.cancel();
      return answer.status;
    };
    assert.equal(await statusOfStream(), 503);
    // One that waits for it is served as soon as it is known.
    await using patient = await TestProxy.start(redis, engine);
    const waiting = [connect(patient, "s1"), connect(patient, "s2")];
    await control.config("SET", "min-replicas-to-write", 0);
    for (const each of waiting) {
      await using client = await each;
      assert.equal(client.socket.protocol, resumeProtocol);
      assert.match(await client.next(), /^!live\n/);
    }
    await eventually("the functions are loaded", async () => await statusOfStream() === 200);
  },
);

Deno.test("Where a right for logs is missing at the start, a client that wants to resume is served as a bare one", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const url = redis.url.replace("redis://", "redis://proxy:any@");
  for (const less of [["-xrange"], ["-xrevrange"], ["-pexpire"], ["resetkeys", "~wsproxy:*"]]) {
    await permit(control, ...less);
    await using proxy = await TestProxy.start(url);
    await functionsLoaded(control);
    await using client = await connect(proxy, "s1");
    assert.equal(client.socket.protocol, "bearer", less.join(" "));
    await send(control, "s1", "logged");
    assert.equal(await client.next(), "logged");
    await proxy.counts('wsproxy_resumes_total{result="bare"}', 1);
    assert(await proxy.isHealthy());
  }
});

onEachEngine(
  "Rights that are taken away later end the clients that need them, and new ones are bare until they are back",
  async (engine) => {
    await using redis = await RedisServer.start();
    const control = redis.client();
    await permit(control);
    await using proxy = await TestProxy.start(redis.url.replace("redis://", "redis://proxy:any@"), engine);
    await proxy.resumable();
    await using client = await proxy.connect("s1", { resume: "0" });
    assert.match(await client.next(), /^!live\n/);
    await permit(control, "-xrange");
    const first = await send(control, "s1", "one");
    assert.equal(await client.next(), `${first}\none`);
    const late = await connect(proxy, "s1");
    assert.equal(late.socket.protocol, resumeProtocol);
    assert.deepEqual(await late.ended(), unreadable);
    await proxy.counts('wsproxy_resumes_total{result="unreadable"}', 1);
    await using bare = await connect(proxy, "s1");
    assert.equal(bare.socket.protocol, "bearer");
    // A client that is live needs no log until the subscription breaks.
    const second = await send(control, "s1", "two");
    assert.equal(await client.next(), `${second}\ntwo`);
    assert.equal(await bare.next(), "two");
    await control.client("KILL", "TYPE", "pubsub");
    assert.deepEqual(await client.ended(), unreadable);
    await permit(control);
    let protocol = "";
    await eventually("clients resume again", async () => {
      await using again = await connect(proxy, "s1");
      protocol = again.socket.protocol;
      return protocol === resumeProtocol;
    });
  },
);

for (
  const [what, spoil] of [
    ["A key of another type", (redis: Redis) => redis.set(down("s1"), "a string")],
    ["An entry of another program", (redis: Redis) => redis.xadd(down("s1"), `${10n ** 17n}-1`, "d", "x")],
  ] as const
) {
  onEachEngine(`${what} under a log's name ends its clients, who are bare then, and no others`, async (engine) => {
    await using redis = await RedisServer.start();
    const lines: { msg: string; reason?: string; channel?: string }[] = [];
    const log = pino({ level: "warn", base: undefined }, { write: (line) => void lines.push(JSON.parse(line)) });
    await using proxy = await TestProxy.start(redis, engine, { log });
    const control = redis.client();
    await proxy.resumable();
    await spoil(control);
    await using other = await proxy.connect("s2", { resume: "0" });
    assert.match(await other.next(), /^!live\n/);
    const client = await connect(proxy, "s1");
    assert.equal(client.socket.protocol, resumeProtocol);
    assert.deepEqual(await client.ended(), unreadable);
    for (let time = 0; time < 3; time++) {
      await using bare = await connect(proxy, "s1");
      assert.equal(bare.socket.protocol, "bearer");
      assert.equal(await control.publish(down("s1"), "plain"), 1);
      assert.equal(await bare.next(), "plain");
    }
    const position = await send(control, "s2", "x");
    assert.equal(await other.next(), `${position}\nx`);
    await proxy.counts('wsproxy_resumes_total{result="unreadable"}', 1);
    await proxy.counts('wsproxy_resumes_total{result="bare"}', 3);
    const told = lines.filter(({ msg }) => msg === "session's log cannot be used");
    assert.deepEqual(told.map(({ channel }) => channel), [down("s1")]);
  });
}

Deno.test("A stream of events whose log is refused ends with the event that says so", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const control = redis.client();
  await proxy.resumable();
  await control.set(down("s1"), "a string");
  const headers = { Authorization: `Bearer ${await mint("s1")}` };
  const response = await fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1`, { headers });
  const json = JSON.stringify(unreadable);
  assert((await soon(response.text(), "end of the stream")).endsWith(`event: close\ndata: ${json}\n\n`));
});

onEachEngine(
  "A log that Redis does not open for longer than the grace ends its clients, however well messages flow",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, REDIS_OUTAGE_GRACE_SECS: "1" });
    const control = redis.client();
    await proxy.resumable();
    // It takes no more writes, as with a disk that is full.
    await control.config("SET", "min-replicas-to-write", 1);
    const client = await proxy.connect("s1", { resume: "0" });
    await control.publish(down("s1"), "plain");
    assert.deepEqual(await client.ended(), unreadable);
    assert(await proxy.isHealthy());
    await control.config("SET", "min-replicas-to-write", 0);
    await using again = await proxy.connect("s1", { resume: "0" });
    assert.match(await again.next(), /^!live\n/);
  },
);

Deno.test("A log that Redis evicts as soon as it is there ends its clients after the grace, and tells of nothing", async () => {
  await using redis = await RedisServer.start("--maxmemory-policy", "allkeys-lru");
  await using proxy = await TestProxy.start(redis, { REDIS_OUTAGE_GRACE_SECS: "1" });
  const control = redis.client();
  await proxy.resumable();
  await control.config("SET", "maxmemory", 1);
  const client = await proxy.connect("s1", { resume: "1-1" });
  assert.deepEqual(await client.ended(), unreadable);
  // They come back from the same position, and it is a gap when there is a log to go on with.
  assert.deepEqual(client.arrived(), []);
});
