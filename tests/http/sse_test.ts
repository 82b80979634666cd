/** The twin over Server-Sent Events. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { Inbox } from "../harness/inbox.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer, subscribers } from "../harness/redis.ts";
import { type Claims, mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { handshake, readReply, readUntil, requestHead, writeAll } from "../harness/wire.ts";

const down = "session:s1:down";
const nowSecs = () => Math.floor(Date.now() / 1000);

/** A stream of events, each as its text without the empty line that ends it. */
class Events implements AsyncDisposable {
  readonly #inbox = new Inbox();
  readonly #abort = new AbortController();
  readonly done: Promise<void>;

  private constructor(readonly response: Response, abort: AbortController) {
    this.#abort = abort;
    this.done = this.#read(response.body!);
  }

  static async open(proxy: TestProxy, headers: Record<string, string> = {}, query = "", claims: Claims = {}) {
    const abort = new AbortController();
    const response = await fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1${query}`, {
      headers: { Authorization: `Bearer ${await mint("s1", claims)}`, ...headers },
      signal: abort.signal,
    });
    assert.equal(response.status, 200);
    return new Events(response, abort);
  }

  async #read(body: ReadableStream<Uint8Array<ArrayBuffer>>): Promise<void> {
    let text = "";
    try {
      for await (const chunk of body.pipeThrough(new TextDecoderStream())) {
        text += chunk;
        const events = text.split("\n\n");
        text = events.pop()!;
        // A comment keeps the connection alive.
        for (const event of events) if (!event.startsWith(":")) this.#inbox.add(event);
      }
    } catch {
      // It was aborted, or cut.
    }
    this.#inbox.end();
  }

  take(count: number): Promise<string[]> {
    return this.#inbox.take(count);
  }

  async next(): Promise<string> {
    return (await this.take(1))[0]!;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#abort.abort();
    await this.done;
  }
}

async function send(redis: Redis, text: string): Promise<string> {
  const [position] = await redis.call("FCALL", "wsproxy_send", 1, down, text) as [string];
  return position;
}

async function start(redis: RedisServer, env: Record<string, string>): Promise<TestProxy> {
  const proxy = await TestProxy.start(redis, env);
  await proxy.resumable();
  return proxy;
}

onEachEngine("A stream has the log, then what comes, and goes on after Last-Event-ID", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, engine);
  const control = redis.client();
  const first = await send(control, '"one"');
  {
    await using events = await Events.open(proxy);
    assert.equal(events.response.headers.get("content-type"), "text/event-stream");
    assert.equal(events.response.headers.get("cache-control"), "no-store, no-transform");
    assert.deepEqual(await events.take(2), [`id: ${first}\ndata: "one"`, `event: live\nid: ${first}\ndata: ${first}`]);
    const second = await send(control, "two\nlines");
    assert.equal(await events.next(), `id: ${second}\ndata: two\ndata: lines`);
    await control.publish(down, "grüße 💡");
    assert.equal(await events.next(), "data: grüße 💡");
  }
  await eventually("it has left", async () => await subscribers(control, down) === 0);
  const third = await send(control, "three");
  for (const [headers, query] of [[{}, `?resume=${first}`], [{ "Last-Event-ID": first }, "?resume=0"]] as const) {
    await using events = await Events.open(proxy, headers, query);
    const [missed] = await events.take(1);
    assert.match(missed!, /data: two\ndata: lines$/);
    assert.equal(await events.next(), `id: ${third}\ndata: three`);
  }
  await control.del(down);
  let told: string;
  {
    await using events = await Events.open(proxy, { "Last-Event-ID": third });
    const [, id, position] = /^event: gap\nid: (.+)\ndata: \{"reason":"lost","position":"(.+)"\}$/
      .exec(await events.next())!;
    assert.equal(id, position);
    assert.equal(await events.next(), `event: live\nid: ${id}\ndata: ${id}`);
    told = id!;
  }
  // A browser comes back with the id of the gap, which is none any more.
  const [fourth, fifth] = [await send(control, "four"), await send(control, "five")];
  {
    await using events = await Events.open(proxy, { "Last-Event-ID": told });
    const frames = [`id: ${fourth}\ndata: four`, `id: ${fifth}\ndata: five`];
    assert.deepEqual(await events.take(3), [...frames, `event: live\nid: ${fifth}\ndata: ${fifth}`]);
  }
  // Yesterday's history is no gap, but a position that a browser comes back with is.
  await using yesterday = await Events.open(proxy, {}, `?resume=${third}&from=history`);
  assert.equal(await yesterday.next(), `id: ${fourth}\ndata: four`);
  await using back = await Events.open(proxy, { "Last-Event-ID": third }, `?resume=${third}&from=history`);
  assert.match(await back.next(), /^event: gap\n/);
});

onEachEngine("A stream ends with the event close, for whatever a WebSocket would be closed for", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, engine);
  {
    await using events = await Events.open(proxy, {}, "", { exp: nowSecs() + 2 });
    let event = await events.next();
    while (!event.startsWith("event: close")) event = await events.next();
    assert.equal(event, 'event: close\ndata: {"code":4401,"reason":"token expired"}');
    await events.done;
  }
  await using events = await Events.open(proxy);
  await redis.client().call("FCALL", "wsproxy_close", 1, down, 4403, "banned");
  let event = await events.next();
  while (!event.startsWith("event: close")) event = await events.next();
  assert.equal(event, 'event: close\ndata: {"code":4403,"reason":"banned"}');
  await events.done;
  await proxy.counts('wsproxy_closed_total{code="4403"}', 1);
});

onEachEngine("A drain ends streams, and a proxy stops with them open", async (engine) => {
  await using redis = await RedisServer.start();
  const proxy = await start(redis, engine);
  await using events = await Events.open(proxy);
  await events.next();
  await proxy.proxy.stop();
  assert.equal(await events.next(), 'event: close\ndata: {"code":1001,"reason":"server is going away"}');
  await events.done;
  assert.equal(proxy.proxy.sessions, 0);
});

onEachEngine("What is refused to a WebSocket is refused to a stream", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, ALLOWED_ORIGINS: "https://app.example" });
  const path = "/agent/sse/s1";
  const Authorization = `Bearer ${await mint("s1")}`;
  assert.equal((await proxy.request(path)).status, 401);
  assert.equal((await proxy.request(path, { headers: { Authorization: "Bearer x" } })).status, 403);
  assert.equal((await proxy.request("/agent/sse/s2", { headers: { Authorization } })).status, 403);
  assert.equal((await proxy.request("/agent/sse/%", { headers: { Authorization } })).status, 400);
  assert.equal((await proxy.request(`${path}?resume=x`, { headers: { Authorization } })).status, 400);
  assert.equal((await proxy.request(path, { headers: { Authorization, Origin: "https://evil.example" } })).status, 403);
  const put = await proxy.request(path, { method: "PUT", headers: { "Content-Length": "0" } });
  assert.equal(put.status, 405);
  assert.equal(put.headers.get("allow"), "GET, POST");
  const asked = await proxy.request(path, { method: "OPTIONS", headers: { Origin: "https://app.example" } });
  assert.equal(asked.status, 204);
  assert.equal(asked.headers.get("access-control-allow-origin"), "https://app.example");
  const allowed = asked.headers.get("access-control-allow-headers")!;
  for (const name of ["authorization", "content-type", "idempotency-key", "last-event-id"]) {
    assert(allowed.includes(name));
  }
  assert.equal(
    (await proxy.request(path, { method: "OPTIONS", headers: { Origin: "https://evil.example" } })).status,
    403,
  );
  await using events = await Events.open(proxy, { Origin: "https://app.example" });
  assert.equal(events.response.headers.get("access-control-allow-origin"), "https://app.example");
});

onEachEngine("A stream says when to come back, and not the same time to all", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, engine);
  const head = requestHead("/agent/sse/s1", { headers: { Authorization: `Bearer ${await mint("s1")}` } });
  const times = new Set<number>();
  for (let n = 0; n < 10; n++) {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    await writeAll(connection, new TextEncoder().encode(head));
    const text = await soon(readUntil(connection, /\nretry: \d+\n\n/), "retry");
    times.add(Number(/retry: (\d+)/.exec(text)![1]));
    assert.match(text, /^: comments come every 30 s$/m);
  }
  assert(times.size > 1 && [...times].every((ms) => ms >= 1000 && ms <= 3000), [...times].join());
});

onEachEngine("A page of an allowed origin reads why it is refused, and no other page does", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, {
    ...engine,
    ALLOWED_ORIGINS: "https://app.example",
    MAX_MESSAGE_SIZE_BYTES: "10",
    MAX_CONNECTIONS: "1",
    MAX_MESSAGES_PER_SEC: "3",
  });
  await using _only = await proxy.connect("s1");
  const url = `http://127.0.0.1:${proxy.port}/agent/sse/s1`;
  const token = { Authorization: `Bearer ${await mint("s1")}` };
  const ask = async (Origin: string, status: number, init: RequestInit, query = "") => {
    const response = await fetch(url + query, { ...init, headers: { Origin, ...init.headers } });
    await response.body?.cancel();
    assert.equal(response.status, Origin === "https://app.example" ? status : 403);
    return response.headers;
  };
  const asked: [number, RequestInit, string?][] = [
    [401, {}],
    [401, { method: "POST", body: "1" }],
    [403, { headers: { Authorization: "Bearer x" } }],
    [400, { headers: token }, "?resume=x"],
    [503, { headers: token }],
    [405, { method: "PUT", body: "1" }],
    [413, { method: "POST", headers: token, body: '"x"'.repeat(10) }],
    [400, { method: "POST", headers: token, body: "no JSON" }],
    [202, { method: "POST", headers: token, body: "1" }],
  ];
  for (const [status, init, query] of asked) {
    const headers = await ask("https://app.example", status, init, query);
    assert.equal(headers.get("access-control-allow-origin"), "https://app.example", `${status}`);
    assert.equal(headers.get("vary"), "Origin");
    assert.match(headers.get("access-control-expose-headers")!, /Retry-After/);
    if (status === 503) assert.notEqual(headers.get("retry-after"), null);
  }
  for (let statuses = "";; statuses += "202 ") {
    const init = { method: "POST", headers: { Origin: "https://app.example", ...token }, body: "1" };
    const response = await fetch(url, init);
    await response.body?.cancel();
    if (response.status === 202) continue;
    assert.equal(response.status, 429, statuses);
    assert.equal(response.headers.get("access-control-allow-origin"), "https://app.example");
    break;
  }
  const foreign = await ask("https://evil.example", 403, { headers: token });
  assert.equal(foreign.get("access-control-allow-origin"), null);
});

onEachEngine("What is posted goes up as it is, or is refused", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, VALIDATE_JSON: "false" });
  const backend = await Listener.to(redis, "session:s1:up");
  const post = async (body: BodyInit) => {
    const headers = { Authorization: `Bearer ${await mint("s1")}` };
    const response = await fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1`, { method: "POST", body, headers });
    return [response.status, await response.text()];
  };
  const emoji = "\u{1f4a1}";
  for (const bad of [[0xff], [0x22, 0xc3], [0xed, 0xa0, 0x80], [0xc0, 0x80], [0xf5, 0x80, 0x80, 0x80]]) {
    assert.deepEqual(await post(new Uint8Array(bad)), [400, "a message must be UTF-8\n"]);
  }
  const good = ["", "\ufeffx", `${emoji}\0`, "\ufffd"];
  for (const text of good) assert.equal((await post(new TextEncoder().encode(text)))[0], 202);
  assert.deepEqual(await backend.take(good.length), good);
});

onEachEngine("A body that its client abandons is counted, and no line of the log", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, engine);
  const Authorization = `Bearer ${await mint("s1")}`;
  for (const headers of [{ "Content-Length": "1000" }, { "Transfer-Encoding": "chunked" }]) {
    const connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    const head = requestHead("/agent/sse/s1", { method: "POST", headers: { Authorization, ...headers as object } });
    await writeAll(connection, new TextEncoder().encode(`${head}3\r\nabc\r\n`));
    // Its head has been read when another one's answer has come.
    await proxy.metric("wsproxy_connections");
    connection.close();
  }
  await proxy.counts('wsproxy_refused_total{status="400",reason="clientGone"}', 2);
  proxy.signal("SIGTERM");
  await proxy.exit();
  assert.doesNotMatch(await proxy.log.rest(), /error|refused/);
  assert.equal(await proxy.errors, "");
});

onEachEngine("A WebSocket's handshake for a stream is refused before there is a session", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, INBOX: "true", SESSION_SOCKETS: "last" });
  await using client = await proxy.connect("s1");
  const refused = await proxy.request("/agent/sse/s1", { headers: await handshake("s1") });
  assert.equal(refused.status, 400);
  assert.match(refused.body, /a stream is no WebSocket/);
  await send(redis.client(), "still here");
  assert.equal(await client.next(), "still here");
  assert.equal(await proxy.metric("wsproxy_opened_total"), 1);
  assert.equal(await redis.client().xlen("agent:agent:inbox"), 1);
});

onEachEngine("An Upgrade that we do not speak is ignored, for every path and method", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, engine);
  const Authorization = `Bearer ${await mint("s1")}`;
  const upgrades: Record<string, string>[] = [
    // curl --http2, and Java's HttpClient.
    { Upgrade: "h2c", Connection: "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA" },
    { Upgrade: "TLS/1.0, foo/2", Connection: "upgrade" },
    { Upgrade: "websocket", Connection: "keep-alive" },
  ];
  for (const upgrade of upgrades) {
    const ask = async (path: string, method = "GET", headers: Record<string, string> = {}) =>
      (await proxy.request(path, { method, headers: { Authorization, ...upgrade, ...headers } })).status;
    assert.equal(await ask("/ready"), 200);
    assert.equal(await ask("/nothing"), 404);
    assert.equal(await ask("/agent/ws/s1"), 426);
    assert.equal(await ask("/agent/sse/s1", "OPTIONS"), 204);
    assert.equal(await ask("/agent/sse/s1", "GET", { Authorization: "Bearer x" }), 403);
    assert.equal(await ask("/agent/sse/s1"), 200);
    // Deno itself answers 400 to every Upgrade with a body: docs/engines.md.
    if (engine["WS_ENGINE"] === "deno" && upgrade["Connection"] !== "keep-alive") continue;
    using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    const headers = { Authorization, ...upgrade, "Content-Length": "2" };
    const head = requestHead("/agent/sse/s1", { method: "POST", headers });
    await writeAll(connection, new TextEncoder().encode(`${head}{}`));
    assert.equal((await soon(readReply(connection), "202")).status, 202);
  }
  await proxy.counts("wsproxy_connections", 0);
});

onEachEngine("A POST is one message up", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, MAX_MESSAGES_PER_SEC: "5", MAX_MESSAGE_SIZE_BYTES: "1000" });
  const post = async (body: string, session = "s1", token = "s1", id?: string) => {
    const headers = {
      Authorization: `Bearer ${await mint(token)}`,
      ...id === undefined ? {} : { "Idempotency-Key": id },
    };
    const url = `http://127.0.0.1:${proxy.port}/agent/sse/${session}`;
    const response = await fetch(url, { method: "POST", body, headers });
    return [response.status, await response.text()] as const;
  };
  assert.deepEqual(await post('"to nobody"'), [202, '{"receivers":0,"entered":false}']);
  const backend = await Listener.to(redis, "session:s1:up");
  assert.deepEqual(await post('{"text":"grüße"}'), [202, '{"receivers":1,"entered":false}']);
  assert.deepEqual(await backend.take(1), ['{"text":"grüße"}']);
  const id = `${"x".repeat(62)}-_`;
  assert.deepEqual(await post("1", "s1", "s1", id), [202, `{"id":"${id}","receivers":1,"entered":false}`]);
  assert.deepEqual(await backend.take(1), ["1"]);
  for (const bad of ["", "x y", "ü", `${id}x`, `${id},${id}`]) {
    const [status, text] = await post("1", "s1", "s1", bad);
    assert.equal(status, 400);
    assert.match(text, /^Idempotency-Key must be 1 to 64 characters of \[A-Za-z0-9_-\]: current value is "/);
  }
  assert.equal((await post("no JSON"))[0], 400);
  assert.equal((await post(JSON.stringify("x".repeat(2000))))[0], 413);
  assert.equal((await post('"x"', "s1", "s2"))[0], 403);
  const statuses: number[] = [];
  for (let n = 0; n < 20; n++) statuses.push((await post(String(n)))[0]);
  assert(statuses.includes(429), statuses.join());
  redis.signal("SIGSTOP");
  assert.equal((await post('"x"', "s3", "s3"))[0], 503);
  redis.signal("SIGCONT");
});

onEachEngine("A stream whose reader is stuck frees what it holds", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "1000000" });
  const before = proxy.descriptors;
  using stuck = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  const head = requestHead("/agent/sse/s1", { headers: { Authorization: `Bearer ${await mint("s1")}` } });
  await writeAll(stuck, new TextEncoder().encode(head));
  await proxy.counts("wsproxy_connections", 1);
  const control = redis.client();
  while (await control.publish(down, "x".repeat(100_000)) > 0);
  await proxy.counts('wsproxy_closed_total{code="1008"}', 1);
  // Until it is cut, what it holds is counted.
  assert(await proxy.metric("wsproxy_buffered_bytes") > 500_000);
  await proxy.counts("wsproxy_buffered_bytes", 0);
  // Deno has no way to cut a connection: the stream ends when its reader reads on.
  if (engine["WS_ENGINE"] === "deno") await soon(readUntil(stuck, /\r\n0\r\n\r\n$/), "end");
  else await eventually("its descriptor is free though it holds on", () => proxy.descriptors <= before);
});

onEachEngine("A reader that takes nothing is ended, and one that takes all of a long stream is not", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "100000" });
  const control = redis.client();
  await using reader = await Events.open(proxy);
  await reader.next();
  using stuck = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  const head = `GET /agent/sse/s1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer ${await mint("s1")}\r\n\r\n`;
  await stuck.write(new TextEncoder().encode(head));
  await proxy.counts("wsproxy_connections", 2);
  const text = "x".repeat(20_000);
  for (let n = 0; n < 1000; n++) {
    await control.publish(down, text);
    assert.equal(await reader.next(), `data: ${text}`);
  }
  await proxy.counts('wsproxy_closed_total{code="1008"}', 1);
  await proxy.counts("wsproxy_connections", 1);
});
