/** Refusals that a page can read. */

import assert from "node:assert/strict";
import { Client } from "../harness/client.ts";
import { type Env, onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { type Claims, mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { frame, handshake, readReply, readToEnd, requestHead, writeAll } from "../harness/wire.ts";

const resume = "wsproxy.resume.v1";
const nowSecs = () => Math.floor(Date.now() / 1000);

/** How a page is refused: what its socket tells. */
async function refusal(
  port: number,
  { session = "s1", query = "?refusal=close", protocols = [resume, "bearer"] as string[], headers = {} },
  token: string | undefined,
): Promise<{ code: number; reason: string }> {
  const url = new URL(`ws://127.0.0.1:${port}/agent/ws/${session}${query}`);
  const offered = token === undefined ? protocols.filter((protocol) => protocol !== "bearer") : [...protocols, token];
  const client = await Client.open(url, { protocols: offered, headers });
  assert.equal(client.socket.protocol, resume);
  const end = await client.ended();
  assert.deepEqual(client.arrived(), []);
  return end;
}

/** It is none of the sessions, and Redis hears nothing of it. */
async function countsNowhere(proxy: TestProxy): Promise<void> {
  for (const name of ["wsproxy_connections", "wsproxy_opened_total", "wsproxy_unopened_total"]) {
    assert.equal(await proxy.metric(name), 0, name);
  }
  assert.equal(proxy.proxy.sessions, 0);
  assert.equal(proxy.proxy.subscriptions, proxy.idleSubscriptions);
  const { body } = await proxy.request("/metrics");
  assert.doesNotMatch(body, /^wsproxy_closed_total\{/m);
}

onEachEngine("A token that is no good is told by a close, if a page asks for that", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ALLOWED_ORIGINS: "https://app.example" });
  const refused = async (claims: Claims, session = "s1") =>
    await refusal(proxy.port, { session }, await mint("s1", claims));
  assert.deepEqual(await refused({ exp: nowSecs() - 10 }), { code: 4401, reason: "the token has expired" });
  assert.deepEqual(await refused({ nbf: nowSecs() + 1000 }), { code: 4401, reason: "the token is not valid yet" });
  assert.deepEqual(await refused({}, "s2"), { code: 4403, reason: "the token is not for this session" });
  assert.deepEqual(await refused({ agent_id: "other" }), { code: 4403, reason: "the token is not for this agent" });
  await proxy.counts('wsproxy_refused_total{status="403",reason="wrongSession"}', 1);
  // Strangers could send without a bound to an engine that buffers whole messages.
  const strangers = [[undefined, 401, "a bearer token is required"], [
    "nonsense",
    403,
    "the token is malformed",
  ]] as const;
  for (const [token, status, reason] of strangers) {
    if (engine["WS_ENGINE"] === "ws") assert.deepEqual(await refusal(proxy.port, {}, token), { code: 4401, reason });
    else await assert.rejects(refusal(proxy.port, {}, token), new RegExp(`status code: ${status}`));
  }
  // What does not ask for it, and what no page of ours can have sent, is a status all the same.
  const expired = await mint("s1", { exp: nowSecs() - 10 });
  const good = await mint("s1");
  for (
    const [options, token, status] of [
      [{ query: "" }, expired, 403],
      [{ query: "?refusal=status" }, expired, 403],
      [{ protocols: ["bearer"] }, expired, 403],
      [{ headers: { Origin: "https://evil.example" } }, good, 403],
      [{ headers: { Origin: "https://evil.example" } }, expired, 403],
      [{ headers: { Origin: "https://evil.example" } }, undefined, 401],
      [{ session: "%00" }, expired, 400],
      [{ query: "?refusal=close&resume=x" }, expired, 400],
      [{ query: "?refusal=close&from=x" }, expired, 400],
      [{ session: "s1/x" }, expired, 404],
    ] as const
  ) {
    await assert.rejects(
      refusal(proxy.port, options as Parameters<typeof refusal>[1], token),
      new RegExp(`status code: ${status}`),
      JSON.stringify(options),
    );
  }
  const headers = { ...await handshake("s2"), "Sec-WebSocket-Protocol": resume, "Sec-WebSocket-Version": "8" };
  assert.equal((await proxy.request("/agent/ws/s1?refusal=close", { headers })).status, 400);
  const { code } = await refusal(proxy.port, { headers: { Origin: "https://app.example" } }, expired);
  assert.equal(code, 4401);
  await countsNowhere(proxy);
});

onEachEngine(
  "A limit, a drain and a Redis that is away are told by a close that says when to come back",
  async (engine) => {
    await using redis = await RedisServer.start();
    const env = { ...engine, MAX_CONNECTIONS: "1", HANDSHAKE_TIMEOUT_SECS: "1", SHUTDOWN_GRACE_PERIOD_SECS: "60" };
    await using proxy = await ProxyProcess.start(redis, env);
    const token = await mint("s1");
    const refused = () => refusal(proxy.port, {}, token);
    const waits = async (code: number, reason: RegExp) => {
      const end = await refused();
      assert.equal(end.code, code);
      assert.match(end.reason, reason);
    };
    {
      await using _only = await Client.connect(proxy.port, "s1");
      await waits(4429, /^retry_after_secs=[1-5]; too many connections$/);
    }
    await proxy.counts("wsproxy_connections", 0);
    redis.signal("SIGSTOP");
    // Nothing of the outage is known yet.
    assert.deepEqual(await refused(), { code: 4504, reason: "Redis did not confirm the subscription in time" });
    redis.signal("SIGCONT");
    await redis.kill();
    await eventually("Redis is away", async () => (await refused()).code === 4503);
    await waits(4503, /^retry_after_secs=[1-5]; Redis is unavailable$/);
    await redis.start();
    await eventually("it is back", async () => {
      const client = await Client.connect(proxy.port, "s1").catch(() => undefined);
      await client?.close();
      return client !== undefined;
    });
    await using last = await Client.connect(proxy.port, "s1");
    // It is not quiet, and so it stays for a while.
    const noise = setInterval(() => last.socket.readyState === WebSocket.OPEN && last.send("1"), 100);
    try {
      proxy.signal("SIGTERM");
      await eventually("it drains", async () => (await refused().catch(() => ({ code: 0 }))).code === 4503);
      await waits(4503, /^retry_after_secs=[1-5]; the server is draining$/);
    } finally {
      clearInterval(noise);
    }
  },
);

onEachEngine("What comes on a refused socket is ignored, and the code arrives all the same", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const backend = await Listener.to(redis, "session:s1:up");
  const token = await mint("s1", { exp: nowSecs() - 10 });
  const url = new URL(`ws://127.0.0.1:${proxy.port}/agent/ws/s1?refusal=close`);
  const client = await Client.open(url, { protocols: [resume, "bearer", token] });
  for (const text of ["1", "!ping\n", "!send\na\n1", `!token\n${await mint("s1")}`, "no JSON"]) client.send(text);
  client.send(new Uint8Array(10));
  // A proxy that stands still for longer than the pause after which it closes.
  for (const end = performance.now() + 60; performance.now() < end;);
  assert.deepEqual(await client.ended(), { code: 4401, reason: "the token has expired" });
  assert.deepEqual(client.arrived(), []);
  assert.deepEqual(backend.takeAll(), []);
  await countsNowhere(proxy);
});

/** A handshake by hand that is refused; it answers no close. */
async function silent(port: number, token: string): Promise<[connection: Deno.TcpConn, status: number]> {
  const connection = await Deno.connect({ hostname: "127.0.0.1", port });
  const { Authorization: _, ...headers } = await handshake("s1");
  const protocols = `${resume}, bearer, ${token}`;
  const head = requestHead("/agent/ws/s1?refusal=close", {
    headers: { ...headers, "Sec-WebSocket-Protocol": protocols },
  });
  await writeAll(connection, new TextEncoder().encode(head));
  return [connection, (await soon(readReply(connection), "answer")).status];
}

async function startFor(engine: Env): Promise<[redis: RedisServer, proxy: TestProxy, token: string]> {
  const redis = await RedisServer.start();
  return [redis, await TestProxy.start(redis, engine), await mint("s1", { exp: nowSecs() - 10 })];
}

onEachEngine("So many sockets are refused by a close at once, and all others by a status", async (engine) => {
  const [server, started, token] = await startFor(engine);
  await using _redis = server;
  await using proxy = started;
  const connections: Deno.TcpConn[] = [];
  const statuses: number[] = [];
  for (let n = 0; n < 140; n++) {
    const [connection, status] = await silent(proxy.port, token);
    connections.push(connection);
    statuses.push(status);
  }
  assert.deepEqual(statuses, Array.from(statuses, (_, n) => n < 128 ? 101 : 403));
  for (const connection of connections) connection.close();
  await eventually("there is room again", async () => {
    return await refusal(proxy.port, {}, token).then(({ code }) => code === 4401, () => false);
  });
  await proxy.empty();
});

Deno.test("[ws] A refused peer that answers no close is cut, as one whose session is closed", async () => {
  const [server, started, token] = await startFor({ WS_ENGINE: "ws" });
  await using _redis = server;
  await using proxy = started;
  const [connection, status] = await silent(proxy.port, token);
  using _connection = connection;
  assert.equal(status, 101);
  await writeAll(connection, frame(9, ""));
  await soon(readToEnd(connection), "the end of the connection");
  await countsNowhere(proxy);
});
