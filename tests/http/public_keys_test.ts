/** Clients whose tokens an identity provider has signed. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { Operator } from "../../src/http/operator.ts";
import { certify } from "../harness/certificate.ts";
import { Client } from "../harness/client.ts";
import { createKeyPair, jwks, KeyServer } from "../harness/key_server.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { handshakeHeaders, request } from "../harness/wire.ts";

const [rsa, pss, ec, ed, later] = await Promise.all([
  createKeyPair("RS256", "rsa"),
  createKeyPair("PS256", "pss"),
  createKeyPair("ES256", "ec"),
  createKeyPair("EdDSA", "ed"),
  createKeyPair("ES256", "later"),
]);

const everyAlgorithm = "HS256,RS256,PS256,ES256,EdDSA";

/** What a handshake with a token is answered. */
async function tries(port: number, token: string): Promise<string> {
  const headers = { ...handshakeHeaders, Authorization: `Bearer ${token}` };
  const { status, body } = await request(port, "/agent/ws/s1", { headers });
  return `${status} ${body}`.trim();
}

onEachEngine("A token of any algorithm that is listed connects, and none by a key of another one", async (engine) => {
  await using redis = await RedisServer.start();
  await using server = new KeyServer(jwks(rsa, pss, ec, ed));
  const env = { ...engine, JWT_ALGORITHM: everyAlgorithm, JWKS_URL: server.url };
  await using proxy = await TestProxy.start(redis, env);
  await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
  for (const token of [await mint("s1"), ...await Promise.all([rsa, pss, ec, ed].map((pair) => pair.sign("s1")))]) {
    await using _client = await Client.connect(proxy.port, "s1", { token });
  }
  // A public key is no secret: a client that has read it cannot sign.
  for (const text of [rsa.pem, rsa.pem.trim(), JSON.stringify(rsa.jwk), jwks(rsa, pss, ec, ed)]) {
    const forged = await mint("s1", {}, text, { kid: "rsa" });
    assert.equal(await tries(proxy.port, forged), "403 the token's signature does not match");
  }
  // What a header says of keys is not looked at.
  await using attacker = new KeyServer(jwks(later));
  for (const header of [{ jku: attacker.url, x5u: attacker.url }, { jwk: later.jwk }, { x5c: ["MIIB"] }]) {
    const forged = await later.sign("s1", {}, { kid: "ec", ...header });
    assert.equal(await tries(proxy.port, forged), "403 the token's signature does not match");
    assert.equal(await tries(proxy.port, await ec.sign("s1", {}, header)), "101");
  }
  assert.equal(attacker.asked, 0);
  assert.equal(await tries(proxy.port, await ec.sign("s2")), "403 the token is not for this session");
  assert.equal(await tries(proxy.port, await ec.sign("s1", {}, { kid: "rsa" })), "403 no key fits the token");
  const hs512 = await mint("s1", {}, undefined, { alg: "HS512" });
  const listed = "HS256, RS256, PS256, ES256, EdDSA";
  assert.equal(await tries(proxy.port, hs512), `403 the token's algorithm is none of ${listed}`);
});

onEachEngine("Without HS256 in the list no secret signs, not even JWT_SECRET", async (engine) => {
  await using redis = await RedisServer.start();
  await using server = new KeyServer(jwks(ec));
  await using proxy = await TestProxy.start(redis, { ...engine, JWT_ALGORITHM: "ES256", JWKS_URL: server.url });
  await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
  assert.equal(await tries(proxy.port, await mint("s1")), "403 the token's algorithm is none of ES256");
  assert.equal(await tries(proxy.port, await ec.sign("s1")), "101");
});

onEachEngine(
  "Until the first keys have come, /ready says so and their tokens get 503; those of a secret are taken",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using server = new KeyServer(jwks(ec));
    const release = Promise.withResolvers<void>();
    server.answer = async () => {
      await release.promise;
      return new Response(jwks(ec));
    };
    await using proxy = await TestProxy.start(redis, { ...engine, JWT_ALGORITHM: "HS256,ES256", JWKS_URL: server.url });
    const { status, body } = await proxy.request("/ready");
    assert.deepEqual([status, JSON.parse(body)], [503, { status: "starting", waiting_for: "JWKS_URL" }]);
    const headers = { ...handshakeHeaders, Authorization: `Bearer ${await ec.sign("s1")}` };
    const refused = await proxy.request("/agent/ws/s1", { headers });
    assert.deepEqual([refused.status, refused.body.trim()], [503, "the keys of tokens cannot be read now"]);
    assert.match(refused.headers.get("retry-after") ?? "", /^[1-5]$/);
    assert.equal(await tries(proxy.port, await mint("s1")), "101");
    release.resolve();
    await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
    assert.equal(await tries(proxy.port, await ec.sign("s1")), "101");
    await proxy.counts('wsproxy_refused_total{status="503",reason="keysUnavailable"}', 1);
    await proxy.counts('wsproxy_key_reads_total{result="changed"}', 1);
  },
);

onEachEngine("A new key connects and renews as soon as the identity provider has it", async (engine) => {
  await using redis = await RedisServer.start();
  await using server = new KeyServer(jwks(ec));
  await using proxy = await TestProxy.start(redis, { ...engine, JWT_ALGORITHM: "ES256", JWKS_URL: server.url });
  await proxy.resumable();
  await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
  const exp = Math.floor(Date.now() / 1000) + 60;
  await using client = await Client.connect(proxy.port, "s1", { token: await ec.sign("s1", { exp }), resume: "0" });
  assert.match(await client.next(), /^!live/);
  const asked = Promise.withResolvers<void>();
  const release = Promise.withResolvers<void>();
  server.answer = async () => {
    asked.resolve();
    await release.promise;
    return new Response(jwks(ec, later));
  };
  // While the first one waits for its key, a newer one takes its place, and other frames are answered.
  client.send(`!token\n${await later.sign("s2")}`);
  await asked.promise;
  client.send(`!token\n${await later.sign("s3")}`);
  client.send("!ping\n1");
  assert.equal(await client.next(), "!pong\n1");
  const connecting = tries(proxy.port, await later.sign("s1"));
  release.resolve();
  assert.equal(await connecting, "101");
  assert.equal(await client.next(), '!error\n{"error":"Invalid token","reason":"the token is not for this session"}');
  client.send(`!token\n${await later.sign("s1", { exp: Date.now() / 1000 + 1 })}`);
  assert.match(await client.next(), /^!expiring/);
  assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
});

Deno.test("Keys come from the loopback itself, and not from the proxy that HTTP_PROXY names", async () => {
  await using redis = await RedisServer.start();
  await using server = new KeyServer(jwks(ec));
  await using between = new KeyServer(jwks(later));
  const asked: string[] = [];
  between.answer = ({ url }) => {
    asked.push(url);
    return new Response(jwks(later));
  };
  const forward = new URL(between.url).origin;
  const env = { JWT_ALGORITHM: "ES256", JWKS_URL: server.url, HTTP_PROXY: forward, ALL_PROXY: forward };
  await using proxy = await ProxyProcess.start(redis, env);
  await eventually("ready", async () => (await request(proxy.port, "/ready")).status === 200);
  assert.equal(await tries(proxy.port, await ec.sign("s1")), "101");
  // Deno itself asks there whether it is the latest.
  assert.deepEqual(asked.filter((url) => url.includes("jwks")), []);
});

Deno.test("A page reads that its key is unknown, or cannot be had, from the close that it asks for", async () => {
  await using redis = await RedisServer.start();
  await using server = new KeyServer(jwks(ec));
  const env = { WS_ENGINE: "ws", JWT_ALGORITHM: "ES256", JWKS_URL: server.url };
  await using proxy = await TestProxy.start(redis, env);
  await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
  const refusedAs = async (token: string) => {
    const url = new URL(`ws://127.0.0.1:${proxy.port}/agent/ws/s1?refusal=close`);
    await using client = await Client.open(url, { protocols: ["wsproxy.resume.v1", "bearer", token] });
    return await client.ended();
  };
  assert.deepEqual(await refusedAs(await later.sign("s1")), { code: 4401, reason: "no key fits the token" });
  const { code, reason } = await refusedAs(await later.sign("s1", {}, { kid: "other" }));
  assert.equal(code, 4503);
  assert.match(reason, /^retry_after_secs=[1-5]; the keys of tokens cannot be read now$/);
});

Deno.test("A worker that can admit clients is ready without asking the others, of which one may hang", async () => {
  let isMissing = true;
  const asked: string[] = [];
  const operator = new Operator({
    draining: () => false,
    canAdmit: () => !isMissing,
    ask: ({ kind }) => (asked.push(kind), Promise.resolve([])),
  });
  assert.equal((await operator.ready()).status, 503);
  assert.deepEqual(asked, ["missing"]);
  isMissing = false;
  assert.equal((await operator.ready()).status, 200);
  assert.deepEqual(asked, ["missing"]);
});

Deno.test("Workers read keys over https from a provider whose authority DENO_CERT names, and tell it once", async () => {
  await using redis = await RedisServer.start();
  const dir = await Deno.makeTempDir();
  try {
    const authority = await certify("authority", { authority: true });
    const certified = await certify("keys", { issuer: authority });
    await Deno.writeTextFile(`${dir}/ca.pem`, authority.certificatePem);
    await using server = new KeyServer("", { certified });
    const release = Promise.withResolvers<void>();
    server.answer = async () => {
      await release.promise;
      return new Response(jwks(ec));
    };
    const admin = sparePort();
    const starting = ProxyProcess.start(redis, {
      ADMIN_PORT: String(admin),
      ...{ WORKERS: "2", JWT_SECRET: "", JWT_ALGORITHM: "ES256", JWKS_URL: server.url },
      ...{ JWKS_REFRESH_SECS: "1", DENO_CERT: `${dir}/ca.pem` },
    });
    const ready = async () => (await request(admin, "/ready").catch(() => undefined))?.body ?? "";
    await eventually("a worker that waits", async () => (await ready()).includes('"waiting_for":"JWKS_URL"'));
    release.resolve();
    await using proxy = await starting;
    await eventually("ready", async () => await ready() === '{"status":"ready"}');
    const token = await ec.sign("s1");
    const clients = await Promise.all(Array.from({ length: 8 }, () => Client.connect(proxy.port, "s1", { token })));
    for (const client of clients) await client[Symbol.asyncDispose]();
    server.serve(jwks(ec, later));
    const told = await proxy.log.until((line) => line.includes("public keys"));
    assert.match(told, /"keys":\["ec ES256","later ES256"\]/);
    await eventually("both have read it", async () => {
      const { body } = await request(admin, "/metrics");
      return body.includes('wsproxy_key_reads_total{result="changed"} 4');
    });
    proxy.signal("SIGTERM");
    await proxy.exit();
    assert.doesNotMatch(await proxy.log.rest(), /public keys/);
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("A file of keys needs the permission to read it and nothing more, and is changed while clients stay", async () => {
  await using redis = await RedisServer.start();
  const dir = await Deno.makeTempDir();
  try {
    const path = `${dir}/keys.pem`;
    await Deno.writeTextFile(path, ec.pem);
    const env = { JWT_SECRET: "", JWT_ALGORITHM: "ES256", JWT_PUBLIC_KEY_FILE: path };
    await using proxy = await ProxyProcess.start(redis, env, { denoArgs: [`--allow-read=${path}`] });
    await using client = await Client.connect(proxy.port, "s1", { token: await ec.sign("s1") });
    await Deno.writeTextFile(path, later.pem);
    await eventually("the new key", async () => await tries(proxy.port, await later.sign("s1")) === "101");
    assert.equal(await tries(proxy.port, await ec.sign("s1")), "403 the token's signature does not match");
    await redis.client().publish("session:s1:down", '"still here"');
    assert.equal(await client.next(), '"still here"');
    await Deno.writeTextFile(path, "oh no");
    await proxy.log.until((line) => line.includes("public keys cannot be read: those read before stay in force"));
    assert.equal(await tries(proxy.port, await later.sign("s1")), "101");
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});
