import assert from "node:assert/strict";
import { Client } from "./harness/client.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "./harness/proxy.ts";
import { Listener, RedisServer } from "./harness/redis.ts";
import { eventually, soon } from "./harness/wait.ts";
import { frame, handshake, openRaw, readReply, readToEnd, requestHead, writeAll } from "./harness/wire.ts";

const nowSecs = () => Math.floor(Date.now() / 1000);
const bytes = (text: string) => new TextEncoder().encode(text);

const hungUp = (connection: Deno.TcpConn) => soon(readToEnd(connection), "end of the connection");

/** What no honest client sends once its socket is open. */
const malformed: Record<string, Uint8Array[]> = {
  "noise": [crypto.getRandomValues(new Uint8Array(1000)).map((byte, i) => i === 0 ? 0xf3 : byte)],
  "HTTP in place of a frame": [bytes("GET / HTTP/1.1\r\n\r\n")],
  "bad UTF-8": [frame(1, new Uint8Array([0x22, 0xff, 0x22]))],
  "half a surrogate pair": [frame(1, new Uint8Array([0x22, 0xed, 0xa0, 0x80, 0x22]))],
  "reserved bits": [frame(1, "{}", { reserved: 4 })],
  "a reserved opcode": [frame(3, "{}")],
  "a fragmented ping": [frame(9, "x", { fin: false })],
  "a ping of 126 bytes": [frame(9, "x".repeat(126))],
  "a continuation of nothing": [frame(0, "{}")],
  "a message within a message": [frame(1, "{", { fin: false }), frame(1, "{}")],
  "a close with one byte": [frame(8, new Uint8Array([3]))],
  "a close with code 1005": [frame(8, new Uint8Array([3, 237]))],
};

onEachEngine(
  "Malformed frames end their sender alone, and leave no session, subscription or descriptor",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, engine);
    await using witness = await Client.connect(proxy.port, "witness");
    const before = proxy.descriptors;
    for (const [what, frames] of Object.entries(malformed)) {
      const connection = await openRaw(proxy.port, "s1");
      for (const bytes of frames) await writeAll(connection, bytes);
      await hungUp(connection);
      connection.close();
      await eventually(`${what}: the session has ended`, async () => await proxy.metric("wsproxy_connections") === 1);
      await redis.client().publish("session:witness:down", what);
      assert.equal(await witness.next(), what);
    }
    await proxy.counts("wsproxy_subscriptions", 3);
    await eventually("descriptors are back", () => proxy.descriptors <= before);
  },
);

onEachEngine(
  "Half a frame, half a message and half a request wait for ever or time out, and end with their peer",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, { ...engine, HANDSHAKE_TIMEOUT_SECS: "3600" });
    await using witness = await Client.connect(proxy.port, "witness");
    const before = proxy.descriptors;
    const connections: Deno.TcpConn[] = [];
    for (const half of [frame(1, "{}").subarray(0, 4), frame(1, "{", { fin: false }), new Uint8Array([0x81])]) {
      const connection = await openRaw(proxy.port, "s1");
      await writeAll(connection, half);
      connections.push(connection);
    }
    const head = bytes(requestHead("/agent/ws/s1", { headers: await handshake("s1") }));
    for (const size of [1, 20, head.length - 1]) {
      const connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
      await writeAll(connection, head.subarray(0, size));
      connections.push(connection);
    }
    await redis.client().publish("session:witness:down", "all the same");
    assert.equal(await witness.next(), "all the same");
    for (const connection of connections) connection.close();
    await proxy.counts("wsproxy_connections", 1);
    await eventually("descriptors are back", () => proxy.descriptors <= before);
  },
);

onEachEngine("A peer that never answers a close is given up", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  using _silent = await openRaw(proxy.port, "s1", { exp: nowSecs() + 3 });
  await proxy.counts('wsproxy_closed_total{code="4401"}', 1);
  await eventually("unsubscribed before it is gone", () => proxy.proxy.subscriptions === 2);
  await proxy.empty();
});

onEachEngine("A client process that stops is cut off, and its session ends", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, {
    ...engine,
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "1",
  });
  const { Authorization } = await handshake("s1");
  const program =
    `new WebSocket("ws://127.0.0.1:${proxy.port}/agent/ws/s1", { headers: { Authorization: "${Authorization}" } })`;
  const client = new Deno.Command(Deno.execPath(), { args: ["eval", program], stdout: "null", stderr: "null" }).spawn();
  await proxy.counts("wsproxy_connections", 1);
  client.kill("SIGSTOP");
  await proxy.empty();
  client.kill("SIGKILL");
  await client.status;
});

onEachEngine("A client over MAX_MESSAGES_PER_SEC is closed with 1008, and one below it is not", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_MESSAGES_PER_SEC: "50" });
  await using fast = await proxy.connect("s1");
  await using modest = await proxy.connect("s2");
  for (let n = 0; n < 200; n++) fast.send(String(n));
  for (let n = 0; n < 50; n++) modest.send(String(n));
  assert.deepEqual(await fast.ended(), { code: 1008, reason: "client too fast" });
  assert.equal(await proxy.metric("wsproxy_slow_clients_total"), 0);
  await redis.client().publish("session:s2:down", "still here");
  assert.equal(await modest.next(), "still here");
  const accepted = await proxy.metric("wsproxy_messages_up_total");
  assert(accepted >= 100 && accepted < 200, String(accepted));
});

onEachEngine(
  "Over MAX_CONNECTS_PER_SEC the answer is 503 with Retry-After, and only good tokens count",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, MAX_CONNECTS_PER_SEC: "3" });
    const upgrade = async (session: string) =>
      await proxy.request("/agent/ws/s1", { headers: await handshake(session) });
    for (let i = 0; i < 10; i++) assert.equal((await upgrade("other")).status, 403);
    const replies = await Promise.all(Array.from({ length: 10 }, () => upgrade("s1")));
    const refused = replies.filter(({ status }) => status === 503);
    assert(refused.length >= 1 && refused.length <= 7, String(refused.length));
    for (const { body, headers } of refused) {
      assert.match(body, /too many new connections/);
      assert(Number(headers.get("retry-after")) >= 1);
    }
    await eventually("there is room again", async () => (await upgrade("s1")).status === 101);
  },
);

Deno.test("[ws] A message over the limit is refused before it is buffered, also in fragments", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws", MAX_MESSAGE_SIZE_BYTES: "1000" });
  const told = '{"error":"Message too large","max_size":1000}';
  for (
    const frames of [
      // The head of a message of a gigabyte, of which nothing follows.
      [frame(1, "", { claimedBytes: 1_000_000_000 })],
      [frame(1, "x".repeat(600), { fin: false }), frame(0, "x".repeat(600), { fin: false })],
    ]
  ) {
    using connection = await openRaw(proxy.port, "s1");
    for (const bytes of frames) await writeAll(connection, bytes);
    const expected = [
      ...frameFromServer(1, bytes(told)),
      ...frameFromServer(8, closePayload(1009, "message too large")),
    ];
    assert.deepEqual([...await readExactly(connection, expected.length)], expected);
  }
  await proxy.empty();
});

Deno.test("[ws] A long message is not cut off while its bytes flow, though no pong can come", async () => {
  await using redis = await RedisServer.start();
  const backend = await Listener.to(redis, "session:s1:up");
  await using proxy = await TestProxy.start(redis, {
    WS_ENGINE: "ws",
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "1",
  });
  const text = JSON.stringify("x".repeat(400_000));
  const message = frame(1, text);
  using connection = await openRaw(proxy.port, "s1");
  const startMs = performance.now();
  for (let at = 0; at < message.length; at += 20_000) {
    await writeAll(connection, message.subarray(at, at + 20_000));
    // The pace of a slow phone is what is tested: more than twice of interval and timeout together.
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
  assert(performance.now() - startMs > 4000);
  assert.deepEqual(await backend.take(1), [text]);
  // And then nothing comes any more, not even a pong.
  await hungUp(connection);
});

Deno.test("[ws] Slow requests are answered with 408", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws", HANDSHAKE_TIMEOUT_SECS: "1" });
  for (const part of ["", "GET /agent/ws/s1 HTTP/1.1\r\nHost: x\r\n"]) {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    if (part) await writeAll(connection, bytes(part));
    assert.equal((await soon(readReply(connection), "408")).status, 408);
  }
});

Deno.test("[ws] A text that is no UTF-8 is refused with 1007", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws", VALIDATE_JSON: "false" });
  for (const text of [[0xff], [0xc3], [0xed, 0xa0, 0x80]]) {
    using connection = await openRaw(proxy.port, "s1");
    await writeAll(connection, frame(1, new Uint8Array(text)));
    const expected = [...frameFromServer(8, new Uint8Array([1007 >> 8, 1007 & 255]))];
    assert.deepEqual([...await readExactly(connection, expected.length)], expected);
  }
  await proxy.empty();
});

Deno.test("[ws] Unmasked frames are refused with 1002", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws" });
  using connection = await openRaw(proxy.port, "s1");
  await writeAll(connection, frame(1, "{}", { masked: false }));
  const expected = [...frameFromServer(8, new Uint8Array([1002 >> 8, 1002 & 255]))];
  assert.deepEqual([...await readExactly(connection, expected.length)], expected);
  await proxy.empty();
});

Deno.test("[ws] Running out of file descriptors ends no session, and the listener comes back", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { WS_ENGINE: "ws" }, { maxDescriptors: 80 });
  await using client = await Client.connect(proxy.port, "s1");
  const crowd: Deno.TcpConn[] = [];
  for (let i = 0; i < 150; i++) crowd.push(await Deno.connect({ hostname: "127.0.0.1", port: proxy.port }));
  await redis.client().publish("session:s1:down", "still here");
  assert.equal(await client.next(), "still here");
  for (const connection of crowd) connection.close();
  await using _again = await reconnect(proxy.port, "s2");
  await proxy.counts("wsproxy_relistened_total", 1);
  const told = await soon(proxy.log.until((line) => line.includes("had gone deaf")), "a line about it");
  assert.equal(JSON.parse(told).level, "warn");
});

/** Connects as clients do that do not give up. What a deaf listener had not accepted is reset when it listens again. */
async function reconnect(port: number, session: string): Promise<Client> {
  let client: Client | undefined;
  await eventually("a client can connect", async () => {
    client = await Client.connect(port, session).catch(() => undefined);
    return client !== undefined;
  });
  return client!;
}

function frameFromServer(opcode: number, payload: Uint8Array): Uint8Array {
  return frame(opcode, payload, { masked: false });
}

function closePayload(code: number, reason: string): Uint8Array {
  return new Uint8Array([code >> 8, code & 255, ...bytes(reason)]);
}

async function readExactly(connection: Deno.TcpConn, count: number): Promise<Uint8Array> {
  const all = new Uint8Array(count);
  const read = async () => {
    for (let at = 0; at < count;) {
      const size = await connection.read(all.subarray(at));
      if (size === null) throw new Error(`connection ended after ${at} of ${count} bytes`);
      at += size;
    }
  };
  await soon(read(), `${count} bytes`);
  return all;
}
