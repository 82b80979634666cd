import assert from "node:assert/strict";
// @ts-types="@types/ws"
import WebSocketOfNpm from "ws";
import { sparePort } from "../../scripts/spare_port.ts";
import { refusals } from "../../src/replies.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { RedisServer, subscribers } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import {
  handshake,
  readReply,
  type Reply,
  request,
  requestHead,
  type RequestOptions,
  writeAll,
} from "../harness/wire.ts";

const path = "/agent/ws/s1";

/** A handshake with a good token, changed by `headers`. */
async function upgrade(proxy: TestProxy, at = path, headers: Record<string, string> = {}, session = "s1") {
  return await proxy.request(at, { headers: { ...await handshake(session), ...headers } });
}

function assertRefused(reply: Reply, status: number, reason: RegExp): void {
  assert.equal(reply.status, status);
  assert.match(reply.body, reason);
  assert.match(reply.headers.get("content-type") ?? "", /^text\/plain/);
}

onEachEngine("Requests are refused with the statuses of the table", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const unknown of ["/", "/agent", "/agent/ws", "/agent/ws/s1/", "/agent/ws/s1/x", "/agent/wss/s1", "/healthy"]) {
    assertRefused(await upgrade(proxy, unknown), 404, /no such path/);
  }
  for (const known of [path, "/health", "/ready", "/metrics"]) {
    const reply = await proxy.request(known, { method: "POST", headers: { "Content-Length": "0" } });
    assertRefused(reply, 405, /only GET/);
    assert.equal(reply.headers.get("allow"), known === path ? "GET" : "GET, HEAD");
  }
  for (const [name, value] of [["Upgrade", ""], ["Upgrade", "h2c"], ["Connection", "keep-alive"]] as const) {
    const reply = await upgrade(proxy, path, { [name]: value });
    assertRefused(reply, 426, /WebSocket only/);
    assert.equal(reply.headers.get("upgrade"), "websocket");
  }
  for (const key of ["", "a", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ==x", "****************************"]) {
    assertRefused(await upgrade(proxy, path, { "Sec-WebSocket-Key": key }), 400, /: Sec-WebSocket-Key must be/);
  }
  for (const version of ["", "8", "14"]) {
    const reply = await upgrade(proxy, path, { "Sec-WebSocket-Version": version });
    assertRefused(reply, 400, new RegExp(`^Sec-WebSocket-Version must be 13: .*${version}`));
    assert.equal(reply.headers.get("sec-websocket-version"), "13");
  }
  assertRefused(await upgrade(proxy, path, { "Sec-WebSocket-Protocol": "a,,b" }), 400, /list of tokens/);
  for (const bad of ["//ws/s1", "/agent/ws/", `/agent/ws/${"x".repeat(129)}`, "/agent/ws/%00", "/a%0Ab/ws/s1"]) {
    assertRefused(await upgrade(proxy, bad), 400, /1 to 128 characters, .*: current value is "/);
  }
  for (const bad of ["/agent/ws/%", "/agent/ws/%zz", "/agent/ws/%ff"]) {
    assertRefused(await upgrade(proxy, bad), 400, /percent-encoded/);
  }
  const anonymous = await upgrade(proxy, path, { Authorization: "" });
  assertRefused(anonymous, 401, /token is required/);
  assert.equal(anonymous.headers.get("www-authenticate"), "Bearer");
  assertRefused(await upgrade(proxy, `${path}?token=${await mint("s1")}`, { Authorization: "" }), 401, /token/);
  assertRefused(await upgrade(proxy, path, { Authorization: "Bearer nonsense" }), 403, /malformed/);
  assertRefused(await upgrade(proxy, "/agent/ws/s2"), 403, /not for this session/);
  await proxy.empty();
  for (const reason of ["tokenMalformed", "wrongSession"]) {
    await proxy.counts(`wsproxy_refused_total{status="403",reason="${reason}"}`, 1);
  }
});

/** What is asked for. */
interface Asked {
  readonly path: string;
  readonly method?: string;
  readonly headers: Record<string, string>;
}

/** The reasons that a request is refused with while its faults are mended, one after the other. */
async function mend(
  ask: (path: string, options: RequestOptions) => Promise<Reply>,
  asked: Asked,
  mends: readonly Partial<Asked>[],
): Promise<string[]> {
  const names: string[] = [];
  for (const change of [{}, ...mends]) {
    asked = { ...asked, ...change, headers: { ...asked.headers, ...change.headers } };
    const { path, ...options } = asked;
    const { status, body } = await ask(path, options);
    // This row has a text for each fault.
    const reason = body.replace(/^Host must be a host .*/, refusals.badTarget.reason);
    const rows = Object.entries(refusals).filter(([, row]) => row.status === status && reason.startsWith(row.reason));
    names.push(rows[0]?.[0] ?? `${status} ${body}`);
  }
  return names;
}

onEachEngine("A request is refused with the first row of the table that applies", async (engine) => {
  await using redis = await RedisServer.start();
  const adminPort = sparePort();
  const env = {
    ...engine,
    ALLOWED_ORIGINS: "https://app.example",
    ADMIN_PORT: String(adminPort),
    ADMIN_PASSWORD: "p".repeat(12),
  };
  await using proxy = await ProxyProcess.start(redis, env);
  const ask = (at: string, options: RequestOptions) => request(proxy.port, at, options);
  const authorization = { Authorization: `Bearer ${await mint("s1")}` };
  const pathFaults: Partial<Asked>[] = [{ headers: { Host: "x" } }];
  const grantFaults: Partial<Asked>[] = [{ headers: { Authorization: "Bearer nonsense" } }, {
    headers: { Origin: "https://app.example" },
  }];
  const upgrades = await mend(ask, {
    path: "/agent/ws/%00?resume=x",
    method: "PUT",
    headers: {
      ...{ Host: "a b", Upgrade: "", Connection: "Upgrade", "Sec-WebSocket-Key": "a", "Sec-WebSocket-Version": "8" },
      ...{ "Sec-WebSocket-Protocol": "wsproxy.resume.v1", Origin: "https://other.example" },
      Authorization: "",
    },
  }, [
    ...pathFaults,
    { method: "GET" },
    { headers: { Upgrade: "websocket" } },
    { headers: { "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==" } },
    { headers: { "Sec-WebSocket-Version": "13" } },
    { path: "/agent/ws/s1?resume=x" },
    { path: "/agent/ws/s1" },
    ...grantFaults,
    { headers: authorization },
  ]);
  const streams = await mend(ask, {
    path: "/agent/sse/%00?resume=x",
    method: "PUT",
    headers: { Host: "a b", Upgrade: "websocket", Connection: "Upgrade", Origin: "https://other.example" },
  }, [
    ...pathFaults,
    { method: "GET" },
    { headers: { Upgrade: "" } },
    { path: "/agent/sse/s1?resume=x" },
    { path: "/agent/sse/s1" },
    ...grantFaults,
  ]);
  const operators = await mend((at, options) => request(adminPort, at, options), {
    path: "/sessions/%00",
    method: "PUT",
    headers: { Host: "a b" },
  }, [
    { headers: { Host: "evil.example" } },
    { method: "GET" },
    { headers: { Host: "x" } },
    { headers: { Authorization: "Basic eDp4" } },
    { headers: { Authorization: `Basic ${btoa(`x:${"p".repeat(12)}`)}` } },
    { path: "/sessions/s1" },
  ]);
  const order = Object.keys(refusals);
  for (const names of [upgrades, streams, operators]) {
    if (names === upgrades) assert.match(names.pop()!, /^101 /);
    assert.deepEqual(names, order.filter((name) => names.includes(name)), names.join());
    assert(names.length >= 7, names.join());
  }
});

onEachEngine("A Host, or a target, that is not one chooses no route", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const hosts = ["x/metrics?", "x/metrics#", "x?", "a b", "u@x", "x:80:80", "x:port", "[::1", "gr\u00fc\u00df", "x\\y"];
  for (const Host of hosts) {
    assertRefused(await upgrade(proxy, path, { Host }), 400, /Host must be a host and a port/);
    assertRefused(await proxy.request("/metrics", { headers: { Host } }), 400, /Host must be/);
  }
  const targets = [
    "http://u@x/metrics",
    "http://x y/metrics",
    "http://x:port/metrics",
    "http://u@x?/metrics",
    "ftp://x/metrics",
  ];
  for (const target of targets) assert.equal((await proxy.request(target)).status, 400, target);
  for (const Host of ["x", "x:80", "x:", "[::1]", "[::1]:8080", "a_b.example", "127.0.0.1"]) {
    assert.equal((await proxy.request("/ready", { headers: { Host } })).status, 200, Host);
  }
  for (const target of ["http://x/ready", "HTTP://x:80/ready?x=1", "https://x/ready"]) {
    assert.equal((await proxy.request(target)).status, 200, target);
  }
  assertRefused(await upgrade(proxy, `http://x${path}/x`), 404, /no such path/);
  assert.equal((await upgrade(proxy, `http://x${path}`)).status, 101);
});

onEachEngine("A request without a Host is a 400, but for health checks of HTTP/1.0", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const Authorization = `Bearer ${await mint("s1")}`;
  for (const at of [path, "/agent/sse/s1", "/nothing"]) {
    assertRefused(await upgrade(proxy, at, { Host: "" }), 400, /Host is missing/);
    assertRefused(await proxy.request(at, { headers: { Host: "", Authorization } }), 400, /Host is missing/);
  }
  for (const version of ["1.0", "1.1"]) {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    await writeAll(connection, new TextEncoder().encode(`GET /ready HTTP/${version}\r\n\r\n`));
    const { status } = await soon(readReply(connection), version);
    // Deno does not show the version.
    assert.equal(status, version === "1.1" && engine["WS_ENGINE"] === "ws" ? 400 : 200);
  }
});

onEachEngine("Two Authorization headers are refused, whatever is in them", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const { Authorization, ...headers } = await handshake("s1");
  for (
    const [first, second] of [[Authorization, Authorization], [Authorization, "Basic eDp5"], [
      "Basic eDp5",
      Authorization,
    ]]
  ) {
    const twice = { ...headers, Authorization: `${first}\r\nAuthorization: ${second}` };
    assertRefused(await proxy.request(path, { headers: twice }), 400, /Authorization/);
  }
  // No token of ours, and one: it comes as a subprotocol.
  const Digest = 'Digest username="x", realm="y"';
  const protocols = { "Sec-WebSocket-Protocol": `bearer, ${await mint("s1")}` };
  assertRefused(await upgrade(proxy, path, { Authorization: Digest }), 401, /token/);
  assert.equal((await upgrade(proxy, path, { Authorization: Digest, ...protocols })).status, 101);
});

onEachEngine("A handshake with a body is a 400", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const [name, value] of [["Content-Length", "2"], ["Transfer-Encoding", "chunked"]] as const) {
    assert.equal((await upgrade(proxy, path, { [name]: value })).status, 400);
  }
  // Envoy adds it; Deno itself refuses it: docs/engines.md.
  const { status } = await upgrade(proxy, path, { "Content-Length": "0" });
  assert.equal(status, engine["WS_ENGINE"] === "ws" ? 101 : 400);
});

onEachEngine("A path that is not percent-encoded is a 400", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  assert.equal((await upgrade(proxy, "/agent/ws/gr\u00fc\u00dfe", {}, "gr\u00fc\u00dfe")).status, 400);
  assert.equal((await upgrade(proxy, "/agent/ws/gr%C3%BC%C3%9Fe", {}, "gr\u00fc\u00dfe")).status, 101);
});

onEachEngine("An Upgrade that offers more than websocket is a WebSocket's", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const Upgrade of ["websocket, h2c", "h2c,WebSocket"]) {
    assert.equal((await upgrade(proxy, path, { Upgrade })).status, 101, Upgrade);
  }
});

onEachEngine("HEAD is answered as GET, without the body", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const at of ["/health", "/ready", "/metrics"]) {
    const { body, headers } = await proxy.request(at);
    using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
    await writeAll(connection, new TextEncoder().encode(requestHead(at, { method: "HEAD" })));
    const answer = await soon(readReply(connection, false), at);
    assert.equal(answer.status, 200);
    assert.equal(answer.body, "");
    assert.equal(answer.headers.get("content-type"), headers.get("content-type"));
    const length = Number(answer.headers.get("content-length"));
    assert(at === "/metrics" ? length > 100 : length === body.length, `${length}`);
    // The connection goes on: there was no body.
    await writeAll(connection, new TextEncoder().encode(requestHead("/ready")));
    assert.equal((await soon(readReply(connection), "second answer")).body, '{"status":"ready"}');
  }
  assert.equal((await proxy.request("/health", { method: "POST" })).status, 405);
  assert.equal((await proxy.request(path, { method: "HEAD" })).status, 405);
});

Deno.test("[ws] An idle connection is kept for KEEP_ALIVE_TIMEOUT_SECS, and no longer", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws", KEEP_ALIVE_TIMEOUT_SECS: "1" });
  using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  for (let n = 0; n < 2; n++) {
    await writeAll(connection, new TextEncoder().encode(requestHead("/ready")));
    assert.equal((await soon(readReply(connection), "answer")).status, 200);
  }
  assert.equal(await soon(connection.read(new Uint8Array(1)), "end"), null);
});

onEachEngine("A token of 100 KB is refused, whichever way it comes", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ALLOW_QUERY_TOKEN: "true" });
  const token = await mint("s1", { filler: "x".repeat(75_000) });
  // An engine may refuse so long a head before wsproxy sees it: 400, 414 or 431 instead of our 403.
  for (
    const reply of [
      await upgrade(proxy, path, { Authorization: `Bearer ${token}` }),
      await upgrade(proxy, path, { Authorization: "", "Sec-WebSocket-Protocol": `bearer, ${token}` }),
      await upgrade(proxy, `${path}?token=${token}`, { Authorization: "" }),
    ]
  ) assert([400, 403, 414, 431].includes(reply.status), String(reply.status));
  assertRefused(await upgrade(proxy, path, { Authorization: `Bearer ${token.slice(0, 9000)}` }), 403, /too long/);
  await using client = await proxy.connect("s1");
  client.send("{}");
});

onEachEngine("Ids are percent-decoded, and may hold colons, slashes, spaces and emoji", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  for (const session of ["a:b", "tenant/42", "ein zwei", "💡", "%", "x".repeat(128), "💡".repeat(128)]) {
    await using client = await proxy.connect(session, { agent: session, claims: { agent_id: session } });
    await redis.client().publish(`session:${session}:down`, "hello");
    assert.equal(await client.next(), "hello");
  }
});

onEachEngine("Every token carrier works", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ALLOW_QUERY_TOKEN: "true" });
  const token = await mint("s1");
  for (const headers of [{ Authorization: `Bearer ${token}` }, { Authorization: `bearer ${token}` }]) {
    const reply = await upgrade(proxy, path, headers);
    assert.equal(reply.status, 101);
    assert.equal(reply.headers.get("sec-websocket-protocol"), null);
    assert.equal(reply.headers.get("sec-websocket-accept"), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
  }
  // With and without spaces, first or not, beside others.
  for (const list of [`bearer, ${token}`, `bearer,${token}`, `chat,bearer , ${token},more`]) {
    const reply = await upgrade(proxy, path, { Authorization: "", "Sec-WebSocket-Protocol": list });
    assert.equal(reply.status, 101);
    assert.equal(reply.headers.get("sec-websocket-protocol"), "bearer");
  }
  const other = await upgrade(proxy, path, { "Sec-WebSocket-Protocol": "chat" });
  assert.equal(other.status, 101);
  assert.equal(other.headers.get("sec-websocket-protocol"), null);
  assert.equal((await upgrade(proxy, `${path}?x=1&token=${token}`, { Authorization: "" })).status, 101);
  await proxy.empty();
});

onEachEngine("Both secrets of a rotation are accepted", async (engine) => {
  await using redis = await RedisServer.start();
  const former = "the former secret, of 32 bytes too";
  await using proxy = await TestProxy.start(redis, { ...engine, JWT_SECRET_PREVIOUS: former });
  await using _new = await proxy.connect("s1");
  await using _old = await proxy.connect("s1", { token: await mint("s1", {}, former) });
});

onEachEngine("Only allowed origins, and clients without an origin, may connect", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, {
    ...engine,
    ALLOWED_ORIGINS: "https://app.example, http://localhost:5173",
  });
  assertRefused(
    await upgrade(proxy, path, { Origin: "https://evil.example" }),
    403,
    /^Origin is not in ALLOWED_ORIGINS: .*evil/,
  );
  assertRefused(await upgrade(proxy, path, { Origin: "null" }), 403, /^Origin is not in ALLOWED_ORIGINS: .*"null"/);
  assert.equal((await upgrade(proxy, path, { Origin: "http://localhost:5173" })).status, 101);
  assert.equal((await upgrade(proxy, path)).status, 101);
});

onEachEngine("Over MAX_CONNECTIONS the answer is 503 with Retry-After, until a client leaves", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_CONNECTIONS: "2" });
  await using _one = await proxy.connect("s1");
  const two = await proxy.connect("s2");
  const reply = await upgrade(proxy);
  assertRefused(reply, 503, /too many connections/);
  const retryAfter = Number(reply.headers.get("retry-after"));
  assert(retryAfter >= 1 && retryAfter <= 5, String(retryAfter));
  await two.close();
  await eventually("the place is free", () => proxy.proxy.sessions === 1);
  await using _three = await proxy.connect("s3");
});

onEachEngine("Without Redis: 503 with Retry-After for clients, unhealthy, ready all the same", async (engine) => {
  await using proxy = await TestProxy.start(`redis://127.0.0.1:${sparePort()}`, engine, { ready: false });
  const reply = await upgrade(proxy);
  assertRefused(reply, 503, /Redis is unavailable/);
  assert(Number(reply.headers.get("retry-after")) >= 1);
  const health = await proxy.request("/health");
  assert.equal(health.status, 503);
  const { error, ...rest } = JSON.parse(health.body);
  assert.deepEqual(rest, { status: "unhealthy", redis: "disconnected" });
  assert.equal(typeof error, "string");
  assert.equal((await proxy.request("/ready")).status, 200);
});

onEachEngine(
  "A subscription that Redis does not confirm in time is a 504, and leaves nothing behind",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, HANDSHAKE_TIMEOUT_SECS: "1" });
    redis.signal("SIGSTOP");
    assertRefused(await upgrade(proxy), 504, /did not confirm/);
    redis.signal("SIGCONT");
    await proxy.empty();
  },
);

onEachEngine("Health, readiness and metrics answer as documented", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1");
  client.send("{}");
  await redis.client().publish("session:s1:down", "x");
  await client.next();
  const health = await proxy.request("/health?verbose=1");
  assert.equal(health.status, 200);
  assert.match(health.headers.get("content-type")!, /^application\/json/);
  assert.equal(health.body, '{"status":"healthy","redis":"connected","active_connections":1}');
  assert.equal((await proxy.request("/ready")).body, '{"status":"ready"}');
  const metrics = await proxy.request("/metrics");
  assert.match(metrics.headers.get("content-type")!, /^text\/plain; version=0.0.4/);
  await proxy.counts("wsproxy_connections", 1);
  await proxy.counts("wsproxy_subscriptions", 3);
  await proxy.counts("wsproxy_redis_up", 1);
  await proxy.counts("wsproxy_messages_down_total", 1);
  await proxy.counts("wsproxy_messages_up_total", 1);
  await proxy.counts("wsproxy_opened_total", 1);
});

onEachEngine("Health turns unhealthy while Redis is frozen, and healthy again", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  redis.signal("SIGSTOP");
  assert.equal((await proxy.request("/health")).status, 503);
  redis.signal("SIGCONT");
  await eventually("healthy again", () => proxy.isHealthy());
});

onEachEngine("Clients that leave between request and 101 leave nothing behind", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  const head = new TextEncoder().encode(requestHead(path, { headers: await handshake("s1") }));
  for (let round = 0; round < 5; round++) {
    // With Redis frozen every request waits for its subscription, and its client is gone before the answer.
    redis.signal("SIGSTOP");
    const left: Deno.Conn[] = [];
    for (let i = 0; i < 20; i++) {
      const connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
      await connection.write(head);
      if (i % 2) connection.close();
      else {
        await connection.closeWrite();
        left.push(connection);
      }
    }
    await eventually("requests wait", () => proxy.proxy.sessions > 0);
    redis.signal("SIGCONT");
    await proxy.empty();
    await eventually("Redis has forgotten", async () => await subscribers(control, "session:s1:down") === 0);
    for (const connection of left) connection.close();
  }
  assert.equal((await upgrade(proxy)).status, 101);
});

onEachEngine(
  "A client of another make (npm ws) exchanges messages, with the token as a subprotocol",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const client = new WebSocketOfNpm(`ws://127.0.0.1:${proxy.port}${path}`, ["bearer", await mint("s1")]);
    const opened = Promise.withResolvers<void>();
    client.on("open", opened.resolve).on("error", opened.reject);
    await soon(opened.promise, "open");
    assert.equal(client.protocol, "bearer");
    const got = new Promise<string>((resolve) => client.once("message", (data) => resolve(String(data))));
    await control.publish("session:s1:down", "hello 💡");
    assert.equal(await soon(got, "message"), "hello 💡");
    const closed = new Promise((resolve) => client.once("close", resolve));
    client.close();
    await soon(closed, "close");
    await proxy.empty();
  },
);
