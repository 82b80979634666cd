/** Clients whose token is in a cookie, which a browser sends whatever page asks. */

import assert from "node:assert/strict";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { Client } from "../harness/client.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { soon } from "../harness/wait.ts";
import { handshakeHeaders, readReply, requestHead } from "../harness/wire.ts";

const origin = "https://app.example";
const name = "__Host-token";
const env = { AUTH_COOKIE: name, ALLOWED_ORIGINS: `${origin},https://*.app.example` };

type Headers = Record<string, string>;

/** What a WebSocket, a stream and a post with these headers are answered with. */
async function answers({ port }: TestProxy, headers: Headers): Promise<string[]> {
  const told: string[] = [];
  const length = { "Content-Length": "1" };
  for (
    const [method, path, more, body] of [
      ["GET", "/agent/ws/s1", handshakeHeaders, ""],
      ["GET", "/agent/sse/s1", {}, ""],
      ["POST", "/agent/sse/s1", length, "1"],
    ] as const
  ) {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port });
    const head = requestHead(path, { method, headers: { ...more, ...headers } });
    await connection.write(new TextEncoder().encode(head + body));
    const { status, headers: answer } = await soon(readReply(connection, false), "an answer");
    const credentials = answer.get("access-control-allow-credentials");
    told.push(path.includes("sse") && credentials ? `${status} ${credentials}` : `${status}`);
  }
  return told;
}

onEachEngine(
  "A cookie has the token of a WebSocket, a stream and a post, from pages of allowed origins",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, ...env });
    const Cookie = `theme=dark; ${name}=${await mint("s1")}`;
    const tries = (headers: Headers) => answers(proxy, { Cookie, ...headers });
    const taken = ["101", "200 true", "202 true"];
    const refused = ["403", "403", "403"];
    assert.deepEqual(await tries({ Origin: origin }), taken);
    assert.deepEqual(await tries({ Origin: "https://x.app.example" }), taken);
    for (const foreign of ["https://evil.example", "null", "https://app.example.evil.example", "http://app.example"]) {
      assert.deepEqual(await tries({ Origin: foreign }), refused, foreign);
    }
    assert.deepEqual(await tries({}), refused);
    // A page's GET to its own host has no Origin, and the browser says so itself.
    const own = { Host: "app.example", "Sec-Fetch-Site": "same-origin" };
    assert.deepEqual(await tries(own), ["101", "200", "202"]);
    assert.deepEqual(await tries({ ...own, Host: "evil.example" }), refused);
    for (const site of ["same-site", "cross-site", "none"]) {
      assert.deepEqual(await tries({ ...own, "Sec-Fetch-Site": site }), refused, site);
    }
  },
);

onEachEngine("A token that a client shows comes before its cookie, and two cookies are none", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ...env, ALLOW_QUERY_TOKEN: "true" });
  const good = await mint("s1");
  const wrong = await mint("s2");
  const Origin = origin;
  const socket = async (headers: Headers, query = "") => {
    const options = { headers: { ...handshakeHeaders, ...headers } };
    const { status, body } = await proxy.request(`/agent/ws/s1${query}`, options);
    return `${status} ${body}`.trim();
  };
  const other = "403 the token is not for this session";
  const inHeader = { Authorization: `Bearer ${good}` };
  assert.equal(await socket({ ...inHeader, Cookie: `${name}=${wrong}` }), "101", "no page, and no Origin");
  assert.equal(await socket({ Authorization: `Bearer ${wrong}`, Origin, Cookie: `${name}=${good}` }), other);
  const inProtocol = { "Sec-WebSocket-Protocol": `bearer, ${good}` };
  assert.equal(await socket({ ...inProtocol, Origin, Cookie: `${name}=${wrong}` }), "101");
  assert.equal(await socket({ Origin, Cookie: `${name}=${wrong}` }, `?token=${good}`), "101");
  assert.equal(await socket({ Origin, Cookie: `${name}=${wrong}` }), other);
  const twice = "400 the cookie of AUTH_COOKIE must be sent once";
  assert.equal(await socket({ Origin, Cookie: `${name}=${good}; ${name}=${wrong}` }), twice);
  assert.equal(await socket({ ...inHeader, Cookie: `${name}=${good}; ${name}=${wrong}` }), "101");
  assert.equal(await socket({ Origin, Cookie: `${name.toLowerCase()}=${good}` }), "401 a bearer token is required");
  // In two lines, as a proxy of HTTP/2 may send them.
  assert.equal(await socket({ Origin, Cookie: `a=b\r\nCookie: ${name}=${good}` }), "101");
  assert.equal(await socket({ Origin, Cookie: `${name}=${good}\r\nCookie: ${name}=${good}` }), twice);
  assert.equal(await socket({ Cookie: `${name}=${good}` }), "403 a cookie is taken with an Origin only");
});

Deno.test("Without AUTH_COOKIE no cookie is looked at, and no page may send one", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ALLOWED_ORIGINS: origin });
  const headers = { Origin: origin, Cookie: `${name}=${await mint("s1")}; undefined=${await mint("s1")}` };
  assert.deepEqual(await answers(proxy, headers), ["401", "401", "401"]);
});

Deno.test("A client that came with a cookie renews its token in-band", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, env);
  await proxy.resumable();
  const token = await mint("s1", { exp: Math.floor(Date.now() / 1000) + 60 });
  const url = new URL(`ws://127.0.0.1:${proxy.port}/agent/ws/s1`);
  const headers = { Cookie: `${name}=${token}`, Origin: origin };
  await using client = await Client.open(url, { headers, protocols: ["wsproxy.resume.v1"] });
  assert.match(await client.next(), /^!live/);
  client.send(`!token\n${await mint("s1", { exp: Date.now() / 1000 + 1 })}`);
  assert.match(await client.next(), /^!expiring/);
  assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
});

onEachEngine("A page may ask whether it may post with its cookie", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, ...env });
  const preflight = (Origin: string) => proxy.request("/agent/sse/s1", { method: "OPTIONS", headers: { Origin } });
  const { status, headers } = await preflight(origin);
  assert.deepEqual([status, headers.get("access-control-allow-credentials")], [204, "true"]);
  assert.equal((await preflight("https://evil.example")).status, 403);
});
