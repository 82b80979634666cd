/** Messages with an id, each of which is answered. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import type { Client } from "../harness/client.ts";
import { entriesOf, inboxEnv } from "../harness/entries.ts";
import { type Env, onEachEngine, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";

const up = "session:s1:up";
const sent = (id: string, receivers: number, entered = false) => `!sent\n${JSON.stringify({ id, receivers, entered })}`;
const unsent = (id: string, reason: string) => `!unsent\n${JSON.stringify({ id, reason })}`;
const invalidJson = '!error\n{"error":"Invalid JSON format"}';
const malformedId = '!error\n{"error":"Malformed id"}';

async function start(redis: RedisServer | string, env: Env): Promise<TestProxy> {
  const proxy = await TestProxy.start(redis, env);
  await proxy.resumable();
  return proxy;
}

/** A resuming client that has caught up. */
async function connect(proxy: TestProxy, session = "s1"): Promise<Client> {
  const client = await proxy.connect(session, { resume: "0" });
  assert.match(await client.next(), /^!live\n/);
  return client;
}

/** The next frame but those that say that a client is live again after a cut. */
async function nextButLive(client: Client): Promise<string> {
  for (;;) {
    const frame = await client.next();
    if (!frame.startsWith("!live\n")) return frame;
  }
}

onEachEngine("A message with an id goes up unchanged, in order with the others, and is answered", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, engine);
  await using client = await connect(proxy);
  client.send("!send\nnobody\n1");
  assert.equal(await client.next(), unsent("nobody", "unheard"));
  await proxy.counts("wsproxy_unheard_total", 1);
  const backend = await Listener.to(redis, up);
  const id = `${"x".repeat(60)}-_Z9`;
  for (const frame of ["1", `!send\n${id}\n{"a":\n"ü 💡"}`, "2", "!send\na\n3", "4"]) client.send(frame);
  assert.deepEqual(await backend.take(5), ["1", '{"a":\n"ü 💡"}', "2", "3", "4"]);
  assert.deepEqual(await client.take(2), [sent(id, 1), sent("a", 1)]);
  const second = await Listener.to(redis, up);
  client.send("!send\na\n5");
  assert.equal(await client.next(), sent("a", 2));
  assert.deepEqual([await backend.take(1), await second.take(1)], [["5"], ["5"]]);
  await proxy.counts("wsproxy_messages_up_total", 7);
});

onEachEngine(
  "A message that no backend has heard, and that the inbox may take later, is unconfirmed",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await start(redis, { ...engine, ...inboxEnv });
    await using client = await connect(proxy);
    const control = redis.client();
    // A replica takes a PUBLISH, and no XADD. The proxy will find out; the one that comes sooner is what is tested.
    await control.replicaof("127.0.0.1", 1);
    client.send("!send\na\n1");
    assert.equal(await client.next(), unsent("a", "unconfirmed"));
    await control.replicaof("NO", "ONE");
    await eventually("the proxy is healthy", () => proxy.isHealthy());
    client.send("!send\na\n1");
    assert.equal(await client.next(), sent("a", 0, true));
  },
);

onEachEngine("What cannot go up is told by its id, or as a mistake when it has none", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, MAX_MESSAGE_SIZE_BYTES: "1000" });
  const backend = await Listener.to(redis, up);
  await using client = await connect(proxy);
  client.send("!send\na\nno JSON");
  client.send("!send\na\n");
  assert.deepEqual(await client.take(2), [unsent("a", "invalid"), unsent("a", "invalid")]);
  await proxy.counts("wsproxy_invalid_json_total", 2);
  for (const id of ["", " a", "a b", "ü", "a.b", "x".repeat(65), "a\r"]) {
    client.send(`!send\n${id}\n1`);
    assert.equal(await client.next(), malformedId, id);
  }
  for (const frame of ["!send", "!send\n", "!send\na"]) {
    client.send(frame);
    assert.equal(await client.next(), malformedId, frame);
  }
  // The payload is measured, and not what stands before it.
  const largest = JSON.stringify("ü".repeat(499));
  assert.equal(Buffer.byteLength(largest), 1000);
  for (const id of ["a", "x".repeat(64)]) {
    client.send(`!send\n${id}\n${largest}`);
    assert.equal(await client.next(), sent(id, 1));
    assert.deepEqual(await backend.take(1), [largest]);
  }
  for (const [id, more] of [["a", "x"], ["x".repeat(64), "x"], ["a", "x".repeat(3000)]] as const) {
    await using other = await connect(proxy);
    other.send(`!send\n${id}\n${JSON.stringify("ü".repeat(499) + more)}`);
    // An engine that refuses a message before it has all of it does not know its id.
    if (id + more === "ax" || engine["WS_ENGINE"] === "deno") assert.equal(await other.next(), unsent(id, "invalid"));
    assert.equal(await other.next(), '!error\n{"error":"Message too large","max_size":1000}');
    assert.deepEqual(await other.ended(), { code: 1009, reason: "message too large" });
  }
  await using plain = await connect(proxy);
  plain.send(JSON.stringify("ü".repeat(499) + "x"));
  assert.deepEqual(await plain.ended(), { code: 1009, reason: "message too large" });
  assert.deepEqual(backend.takeAll(), []);
});

onEachEngine(
  "Whatever a client sends, each of its messages is published or told of, and each id is answered",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await start(redis, engine);
    const backend = await Listener.to(redis, up);
    const ids = fc.oneof(fc.stringMatching(/^[A-Za-z0-9_-]{1,64}$/), fc.string({ maxLength: 70, unit: "grapheme" }));
    const payloads = fc.oneof(fc.json(), fc.string({ unit: "grapheme" }), fc.constantFrom("", "\n", "!ping\nx", "1\n"));
    const frames = fc.oneof(
      { weight: 3, arbitrary: fc.tuple(ids, payloads).map(([id, payload]) => `!send\n${id}\n${payload}`) },
      fc.string({ maxLength: 70 }).map((text) => `!ping\n${text}`),
      fc.constant("!token\nx"),
      fc.string({ unit: "grapheme" }),
      fc.string().map((text) => `!${text}`),
      fc.json(),
    );
    await using client = await connect(proxy);
    let round = 0;
    await fc.assert(
      fc.asyncProperty(fc.array(frames, { maxLength: 20 }), async (some) => {
        const answers: string[] = [];
        const published: string[] = [];
        for (const frame of some) {
          client.send(frame);
          const [head, id = "", ...rest] = frame.split("\n");
          const payload = head === "!send" ? rest.join("\n") : frame;
          let isJson = true;
          try {
            JSON.parse(payload);
          } catch {
            isJson = false;
          }
          if (head === "!send" && rest.length > 0 && /^[A-Za-z0-9_-]{1,64}$/.test(id)) {
            answers.push(isJson ? sent(id, 1) : unsent(id, "invalid"));
            if (isJson) published.push(payload);
          } else if (head === "!send") answers.push(malformedId);
          else if (head === "!ping") {
            const text = frame.slice("!ping\n".length);
            answers.push(
              text.length > 64 ? '!error\n{"error":"A ping is too long","max_length":64}' : `!pong\n${text}`,
            );
          } else if (head === "!token") {
            answers.push('!error\n{"error":"Invalid token","reason":"the token is malformed"}');
          } else if (frame.startsWith("!")) answers.push('!error\n{"error":"Unknown command"}');
          else if (isJson) published.push(payload);
          else answers.push(invalidJson);
        }
        const end = `end-${++round}`;
        client.send(`!send\n${end}\n${round}`);
        assert.deepEqual(await backend.take(published.length + 1), [...published, String(round)]);
        // What is answered without Redis comes first.
        const got = await client.take(answers.length + 1);
        const fromRedis = (frame: string) => frame.startsWith("!sent");
        const both = [...answers, sent(end, 1)];
        assert.deepEqual(got.filter(fromRedis), both.filter(fromRedis));
        const notFromRedis = (frame: string) => !fromRedis(frame);
        assert.deepEqual(got.filter(notFromRedis), both.filter(notFromRedis));
      }),
      { numRuns: 50 },
    );
  },
);

onEachEngine(
  "With an inbox a message is sent when it is in it, by its id, though no backend is subscribed",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await start(redis, { ...engine, INBOX: "true" });
    await using client = await connect(proxy);
    const control = redis.client();
    for (const frame of ["1", "!send\nid-2\n2", '!send\nid-3\n"ü"', "4"]) client.send(frame);
    assert.deepEqual(await client.take(2), [sent("id-2", 0, true), sent("id-3", 0, true)]);
    const messages = async () =>
      (await entriesOf(control)).filter(({ type }) => type === "message").map(({ data, id }) => [data, id]);
    const all = [["1", undefined], ["2", "id-2"], ['"ü"', "id-3"], ["4", undefined]];
    await eventually("all are entered", async () => (await messages()).length === 4);
    assert.deepEqual(await messages(), all);
    // The stream is gone: what comes next is in a new one, with its id.
    await control.del("agent:agent:inbox");
    client.send("!send\nid-5\n5");
    assert.equal(await client.next(), sent("id-5", 0, true));
    client.send("!send\nid-6\n6");
    assert.equal(await client.next(), sent("id-6", 0, true));
    assert.deepEqual((await messages()).slice(-2), [["5", "id-5"], ["6", "id-6"]]);
    // An inbox that takes nothing leaves those who are subscribed.
    await control.set("agent:agent:inbox", "no stream");
    client.send("!send\nid-7\n7");
    assert.equal(await client.next(), unsent("id-7", "unheard"));
    await Listener.to(redis, up);
    client.send("!send\nid-8\n8");
    assert.equal(await client.next(), sent("id-8", 1));
  },
);

onEachEngine(
  "While Redis is away messages wait, each is answered when its fate is known, and no more wait than may",
  async (engine) => {
    await using redis = await RedisServer.start();
    using relay = new Relay(redis.port);
    const env = { ...engine, MAX_BUFFER_SIZE_BYTES: "20000", REDIS_OUTAGE_GRACE_SECS: "60" };
    await using proxy = await start(relay.url, env);
    const backend = await Listener.to(redis, up);
    await using client = await connect(proxy);
    redis.signal("SIGSTOP");
    // The first one is written, and may have arrived when the connection ends; the others wait.
    client.send("!send\nfirst\n0");
    client.send("!ping\n");
    assert.equal(await client.next(), "!pong\n");
    for (let n = 1; n <= 200; n++) client.send(`!send\nid-${n}\n${n}`);
    client.send("!ping\n");
    const refused: string[] = [];
    for (let frame = await client.next(); frame !== "!pong\n"; frame = await client.next()) refused.push(frame);
    assert(refused.length > 0 && refused.length < 190, String(refused.length));
    const kept = 200 - refused.length;
    assert.deepEqual(refused, Array.from(refused, (_, n) => unsent(`id-${kept + n + 1}`, "refused")));
    relay.cut();
    assert.equal(await nextButLive(client), unsent("first", "unconfirmed"));
    redis.signal("SIGCONT");
    const all = Array.from({ length: kept }, (_, n) => n + 1);
    const answers: string[] = [];
    while (answers.length < kept) answers.push(await nextButLive(client));
    assert.deepEqual(answers, all.map((n) => sent(`id-${n}`, 1)));
    const heard: string[] = [];
    while (heard.at(-1) !== String(kept)) heard.push(...await backend.take(1));
    assert.deepEqual(heard.filter((text) => text !== "0"), all.map(String));
    client.send("!send\nlast\n-1");
    assert.equal(await nextButLive(client), sent("last", 1));
  },
);

onEachEngine("What Redis refuses is told by its id, and ends nothing", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.call("ACL", "SETUSER", "proxy", "on", ">password", "+@all", "~*", "&*");
  await using proxy = await start(redis.url.replace("redis://", "redis://proxy:password@"), engine);
  await using client = await connect(proxy);
  await control.call("ACL", "SETUSER", "proxy", "resetchannels", "&session:*:down", "&wsproxy:*");
  client.send("!send\na\n1");
  assert.equal(await client.next(), unsent("a", "refused"));
  client.send("1");
  assert.deepEqual(await client.ended(), { code: 1013, reason: "Redis refused a message" });
  await proxy.counts("wsproxy_upstream_lost_total", 2);
});

onEachEngine("However often the connection to Redis breaks, each id is answered once, and truly", async (engine) => {
  await using redis = await RedisServer.start();
  using relay = new Relay(redis.port);
  await using proxy = await start(relay.url, { ...engine, INBOX: "true", REDIS_OUTAGE_GRACE_SECS: "60" });
  const backend = await Listener.to(redis, up);
  await using client = await connect(proxy);
  const count = 400;
  const told: string[] = [];
  for (let n = 1; n <= count; n++) {
    client.send(`!send\nid-${n}\n${n}`);
    if (n % 10 === 0) {
      // As many of them have been read, and some are under way.
      client.send("!ping\n");
      for (let frame = await nextButLive(client); frame !== "!pong\n"; frame = await nextButLive(client)) {
        told.push(frame);
      }
    }
    if (n % 40 === 0) relay.cut();
  }
  while (told.length < count) told.push(await nextButLive(client));
  const answers = told.map((frame) => JSON.parse(/^!(?:un)?sent\n(.*)$/.exec(frame)![1]!));
  assert.equal(new Set(answers.map(({ id }) => id)).size, count);
  for (const { reason } of answers) assert(reason === undefined || reason === "unconfirmed", reason);
  client.send("!send\nlast\n0");
  assert.equal(await nextButLive(client), sent("last", 1, true));
  const heard: string[] = [];
  while (heard.at(-1) !== "0") heard.push(...await backend.take(1));
  const entered = (await entriesOf(redis.client())).map(({ id }) => id);
  for (const answer of answers) {
    const text = answer.id.slice("id-".length);
    if (answer.receivers > 0) assert(heard.includes(text), `${answer.id} is told to be heard`);
    if (answer.entered) assert(entered.includes(answer.id), `${answer.id} is told to be entered`);
  }
  const numbers = heard.slice(0, -1).map(Number);
  assert.deepEqual(numbers, [...new Set(numbers)].sort((a, b) => a - b));
});
