import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { Deadlines } from "../../src/deadline.ts";
import { Buffer } from "node:buffer";
import { Bridge } from "../../src/redis/bridge.ts";
import { readConfig } from "../../src/config.ts";
import { createLog } from "../../src/log.ts";
import { createMetrics, metricRows, type Samples } from "../../src/metrics.ts";
import { Session } from "../../src/session/session.ts";
import { Traffic } from "../../src/session/traffic.ts";
import { type Client } from "../harness/client.ts";
import { onEachEngine, testEnv, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer, subscribers } from "../harness/redis.ts";
import { eventually, soon } from "../harness/wait.ts";
import { openRaw, request } from "../harness/wire.ts";

const nowSecs = () => Math.floor(Date.now() / 1000);
const numbers = (count: number, prefix = "") => Array.from({ length: count }, (_, i) => `${prefix}${i}`);

onEachEngine("Messages cross both ways unchanged", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const backend = await Listener.to(redis, "session:s1:up");
  const control = redis.client();
  await using client = await proxy.connect("s1");
  const texts = [
    '"hello"',
    '{"text":"grüße 💡 \u2028 \u{10FFFF}"}',
    '"embedded \\u0000 NUL"',
    "  [1, 2,\n 3]\t",
    `"${"x".repeat(1_048_574)}"`,
    `"${"é".repeat(524_287)}"`,
    "0",
  ];
  for (const text of texts) {
    client.send(text);
    assert.deepEqual(await backend.take(1), [text]);
    await control.publish("session:s1:down", text);
    assert.equal(await client.next(), text);
  }
  // Downwards anything goes: it is the backend's.
  for (const text of ["", "no JSON", "\u0000", "\uFEFFmark", "line\r\nbreak"]) {
    await control.publish("session:s1:down", text);
    assert.equal(await client.next(), text);
  }
});

onEachEngine("Bytes of a backend that are not UTF-8 become U+FFFD, and end nothing", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await using client = await proxy.connect("s1");
  for (const bytes of [[0x61, 0xff, 0x62], [0xe2, 0x82], [0xc3, 0xa9]]) {
    await control.publish("session:s1:down", Buffer.from(bytes));
    assert.equal(await client.next(), new TextDecoder().decode(new Uint8Array(bytes)));
  }
});

onEachEngine("Many sessions at once get their own messages, in order", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  const sessions = numbers(50, "s");
  const clients = await Promise.all(sessions.map((session) => proxy.connect(session)));
  const listeners = await Promise.all(sessions.map((session) => Listener.to(redis, `session:${session}:up`)));
  const count = 200;
  const expected = (session: string) => numbers(count).map((n) => JSON.stringify(`${session} ${n}`));
  for (let n = 0; n < count; n++) {
    sessions.forEach((session, i) => {
      control.publish(`session:${session}:down`, expected(session)[n]!);
      clients[i]!.send(expected(session)[n]!);
    });
  }
  for (const [i, session] of sessions.entries()) {
    assert.deepEqual(await clients[i]!.take(count), expected(session));
    assert.deepEqual(await listeners[i]!.take(count), expected(session));
  }
  await Promise.all(clients.map((client) => client.close()));
  await proxy.empty();
});

onEachEngine("An open socket is a subscribed socket", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  for (const session of numbers(50, "s")) {
    await using client = await proxy.connect(session);
    assert.equal(await control.publish(`session:${session}:down`, "at once"), 1);
    assert.equal(await client.next(), "at once");
  }
});

onEachEngine("What is published between the subscription and the open is not lost", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  for (const session of numbers(20, "s")) {
    const connecting = proxy.connect(session);
    // From the first message that Redis handed to a subscriber on, all of them must arrive.
    const sent: string[] = [];
    for (let n = 0; sent.length < 20; n++) {
      const receivers = await control.publish(`session:${session}:down`, String(n));
      if (receivers > 0) sent.push(String(n));
      else assert.equal(sent.length, 0);
    }
    await using client = await connecting;
    assert.deepEqual(await client.take(sent.length), sent);
  }
});

onEachEngine(
  "Every socket of a session gets every message, and the last to leave ends the subscription",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const tabs = [await proxy.connect("s1"), await proxy.connect("s1"), await proxy.connect("s1")];
    assert.equal(await subscribers(control, "session:s1:down"), 1);
    while (tabs.length > 0) {
      await control.publish("session:s1:down", String(tabs.length));
      for (const tab of tabs) assert.equal(await tab.next(), String(tabs.length));
      await tabs.shift()!.close();
      await eventually("the tab is gone", () => proxy.proxy.sessions === tabs.length);
    }
    await proxy.empty();
    await eventually("Redis has forgotten", async () => await subscribers(control, "session:s1:down") === 0);
  },
);

onEachEngine("A reconnect storm on the same sessions loses nothing on the new sockets", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  const sessions = numbers(20, "s");
  let clients = await Promise.all(sessions.map((session) => proxy.connect(session)));
  for (let round = 0; round < 10; round++) {
    // The old sockets close while the new ones open.
    const closing = clients.map((client) => client.close());
    clients = await Promise.all(sessions.map(async (session) => {
      const client = await proxy.connect(session);
      for (const n of numbers(10)) control.publish(`session:${session}:down`, `${round} ${n}`);
      return client;
    }));
    for (const client of clients) {
      const got = await client.take(10);
      assert.deepEqual(got, numbers(10).map((n) => `${round} ${n}`));
    }
    await Promise.all(closing);
    for (const session of sessions) assert.equal(await control.publish(`session:${session}:down`, "still there"), 1);
    for (const client of clients) assert.equal(await client.next(), "still there");
  }
  await Promise.all(clients.map((client) => client.close()));
  await proxy.empty();
  for (const session of sessions) {
    await eventually("Redis has forgotten", async () => await subscribers(control, `session:${session}:down`) === 0);
  }
});

onEachEngine("A text frame that is not JSON is answered, not published, and the socket stays open", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const backend = await Listener.to(redis, "session:s1:up");
  await using client = await proxy.connect("s1");
  for (const bad of ["hello", "", "{", "{'a':1}", "\uFEFF1", "[1,]", "undefined"]) {
    client.send(bad);
    assert.equal(await client.next(), '{"error":"Invalid JSON format"}');
  }
  client.send("[".repeat(200_000) + "]".repeat(200_000));
  client.send('"good"');
  assert.equal((await backend.take(2))[1], '"good"');
  assert.equal(backend.waiting, 0);
  await proxy.counts("wsproxy_invalid_json_total", 7);
});

onEachEngine("With VALIDATE_JSON off any text is published", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, VALIDATE_JSON: "false" });
  const backend = await Listener.to(redis, "session:s1:up");
  await using client = await proxy.connect("s1");
  const texts = ["hello", "", "{", "\uFEFF1", "\u0000"];
  for (const text of texts) client.send(text);
  assert.deepEqual(await backend.take(texts.length), texts);
});

onEachEngine("A binary frame ends the session with 1003", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1");
  client.send(new Uint8Array([123, 125]));
  assert.deepEqual(await client.ended(), { code: 1003, reason: "only text frames are accepted" });
  await proxy.empty();
  await proxy.counts('wsproxy_closed_total{code="1003"}', 1);
});

onEachEngine("Codes that clients choose share one label of the metric", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const code of [1000, 3000, 3999, 4000, 4402, 4999, 4409]) {
    const client = await proxy.connect("s1");
    client.socket.close(code);
    assert.equal((await client.ended()).code, code);
  }
  await proxy.counts('wsproxy_closed_total{code="other"}', 5);
  const { body } = await proxy.request("/metrics");
  assert.deepEqual([...body.matchAll(/^wsproxy_closed_total\{code="(.*)"\}/gm)].map(([, code]) => code).sort(), [
    "1000",
    "4409",
    "other",
  ]);
});

onEachEngine("The size limit counts UTF-8 bytes; over it the session ends with 1009", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_MESSAGE_SIZE_BYTES: "100" });
  const backend = await Listener.to(redis, "session:s1:up");
  await using fits = await proxy.connect("s1");
  fits.send(`"${"x".repeat(98)}"`);
  fits.send(`"${"é".repeat(49)}"`);
  assert.equal((await backend.take(2)).length, 2);
  for (const long of [`"${"x".repeat(99)}"`, `"${"é".repeat(50)}"`, `"${"💡".repeat(25)}"`, `"${"x".repeat(5000)}"`]) {
    await using client = await proxy.connect("s1");
    client.send(long);
    assert.equal(await client.next(), '{"error":"Message too large","max_size":100}');
    assert.deepEqual(await client.ended(), { code: 1009, reason: "message too large" });
  }
  assert.equal(backend.waiting, 0);
});

onEachEngine("A session ends with 4401 when its token expires, and can come back with a new one", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1", { claims: { exp: nowSecs() + 2 } });
  assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
  await using again = await proxy.connect("s1", { claims: { exp: nowSecs() + 60 } });
  await redis.client().publish("session:s1:down", "hello");
  assert.equal(await again.next(), "hello");
});

onEachEngine(
  "A token that expires in ten weeks, or in a thousand years, does not end the session now",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    for (const secs of [70 * 86_400, 1000 * 365 * 86_400, Number.MAX_VALUE / 1e4]) {
      await using client = await proxy.connect("s1", { claims: { exp: nowSecs() + secs } });
      await redis.client().publish("session:s1:down", "hello");
      assert.equal(await client.next(), "hello");
    }
  },
);

onEachEngine("A client that closes, with whatever code, leaves nothing behind", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const code of [undefined, 1000, 3000, 4999]) {
    const client = await proxy.connect("s1");
    client.socket.close(code);
    const { code: answered } = await client.ended();
    assert.equal(answered, code ?? 1005);
    await proxy.empty();
  }
});

onEachEngine("What a client sent just before it closed is still published", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const backend = await Listener.to(redis, "session:s1:up");
  const client = await proxy.connect("s1");
  for (const n of numbers(100)) client.send(n);
  await client.close();
  assert.deepEqual(await backend.take(100), numbers(100));
});

onEachEngine("A client whose connection breaks leaves nothing behind, and hurts no other", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using other = await proxy.connect("s2");
  for (let i = 0; i < 10; i++) (await openRaw(proxy.port, "s1")).close();
  await eventually("only the other is left", () => proxy.proxy.sessions === 1);
  await redis.client().publish("session:s2:down", "hello");
  assert.equal(await other.next(), "hello");
});

onEachEngine("A quiet client is pinged and stays, for longer than interval and timeout", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, {
    ...engine,
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "1",
  });
  await using client: Client = await proxy.connect("s1", { claims: { exp: nowSecs() + 6 } });
  assert.equal((await client.ended()).code, 4401);
});

onEachEngine("A dead client is cut off after interval plus timeout", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, {
    ...engine,
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "1",
  });
  // It answers nothing: neither pings nor the close.
  using _dead = await openRaw(proxy.port, "s1");
  assert.equal(proxy.proxy.sessions, 1);
  await eventually("Redis has forgotten", () => proxy.proxy.subscriptions === 2);
  await proxy.empty();
});

Deno.test("A bug of ours ends the session that it hits with 1011, and no other", async () => {
  await using redis = await RedisServer.start();
  const config = readConfig(testEnv(redis));
  const log = createLog(config.logging);
  const bridge = new Bridge({
    address: config.redis.address,
    log,
    outageGraceMs: 10_000,
    maxPendingCost: config.limits.maxBufferBytes,
    sessionLogs: config.sessionLogs,
    onOutage() {},
    onRecovery() {},
  });
  const nothing = Object.fromEntries(Object.keys(metricRows).map((name) => [name, () => 0]));
  const metrics = createMetrics(nothing as unknown as Samples);
  const traffic = new Traffic([]);
  await eventually("Redis is up", () => bridge.available);
  const got: string[] = [];
  const closed = Promise.withResolvers<number>();
  const gone: Session[] = [];
  const socket = (send: (text: string) => void, close: (code: number) => void) => ({
    send,
    close,
    bufferedAmount: 0,
    terminate() {},
  });
  const target = { agentId: "agent", sessionId: "s1" };
  const sessions = [0, 1].map(() =>
    new Session(
      target,
      { issuedAtSecs: 0, expiresAtMs: undefined, claims: "" },
      { config, deadlines: new Deadlines(), bridge, metrics, traffic, log, verify: () => assert.fail() },
      (session) => gone.push(session),
    )
  );
  for (const session of sessions) await session.attach();
  sessions[0]!.open(socket(() => {
    throw new Error("a bug");
  }, closed.resolve));
  sessions[1]!.open(socket((text) => got.push(text), () => {}));
  await redis.client().publish("session:s1:down", "hello");
  assert.equal(await soon(closed.promise, "close"), 1011);
  await eventually("the other one hears", () => got.length === 1);
  for (const session of sessions) session.closed(1006);
  assert.deepEqual(gone, sessions);
  await bridge.close(1000);
});

onEachEngine("When the clock jumps, tokens end by it at once, and no session becomes quiet by it", async (engine) => {
  await using redis = await RedisServer.start();
  const adminPort = sparePort();
  await using proxy = await TestProxy.start(redis, { ...engine, ADMIN_PORT: String(adminPort) });
  const hourMs = 3_600_000;
  const exp = Math.floor(Date.now() / 1000) + 3600;
  const bare = await proxy.connect("s1", { claims: { exp } });
  await proxy.resumable();
  const resuming = await proxy.connect("s2", { claims: { exp }, resume: "0" });
  await using later = await proxy.connect("s3", { claims: { exp: exp + 3 * 3600 } });
  await using forever = await proxy.connect("s4");
  const quietMs = async () => JSON.parse((await request(adminPort, "/sessions/s4")).body).sockets[0].quiet_ms;
  const { now } = Date;
  let aheadMs = 0;
  // What the proxy, which runs in this process, reads as the time.
  Date.now = () => now() + aheadMs;
  try {
    aheadMs = 2 * hourMs;
    for (const client of [bare, resuming]) {
      assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
    }
    assert(await quietMs() < hourMs);
    aheadMs = -hourMs;
    await eventually("the jump back is seen", async () => await quietMs() >= 0);
    await redis.client().publish("session:s3:down", "still here");
    assert.equal(await later.next(), "still here");
    assert.equal(forever.socket.readyState, WebSocket.OPEN);
  } finally {
    Date.now = now;
  }
});
