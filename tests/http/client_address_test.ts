/** Where a request comes from, as trusted proxies tell it, and as clients lie about it. */

import assert from "node:assert/strict";
import fc from "fast-check";
import { clientAddress, type ForwardingSettings } from "../../src/http/client_address.ts";
import type { Request } from "../../src/http/exchange.ts";
import { Networks } from "../../src/ip.ts";
import { Client } from "../harness/client.ts";
import { entriesWith, inboxEnv } from "../harness/entries.ts";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";

type Header = ForwardingSettings["header"];

const trusted = new Networks("10.0.0.0/8,fd00::/8,127.0.0.1");

/** The address of a request from `peer` with this header. */
function addressOf(value: string | undefined, { peer = "10.0.0.1", header = "x-forwarded-for" as Header } = {}) {
  const request = { peer, header: (name: string) => name === header ? value : undefined } as Partial<Request>;
  return String(clientAddress(request as Request, { trusted, header }));
}

Deno.test("Proxies are believed from the right, as far as they are trusted", () => {
  for (
    const [value, address] of [
      [undefined, "10.0.0.1"],
      ["192.0.2.7", "192.0.2.7"],
      ["6.6.6.6, 192.0.2.7", "192.0.2.7"],
      ["192.0.2.7,10.1.2.3", "192.0.2.7"],
      ["6.6.6.6, 192.0.2.7, 10.9.9.9 ,fd00::1", "192.0.2.7"],
      ["10.0.0.2, 10.0.0.3", "10.0.0.2"],
      ["2001:db8::1", "2001:db8::1"],
      ["[2001:db8::1]:4711", "2001:db8::1"],
      ["192.0.2.7:4711", "192.0.2.7"],
      ["::ffff:192.0.2.7", "192.0.2.7"],
      // What a trusted proxy does not know stands for itself.
      ["6.6.6.6, unknown", "10.0.0.1"],
      ["6.6.6.6, unknown, 10.2.2.2", "10.2.2.2"],
      ["6.6.6.6,", "10.0.0.1"],
      ["", "10.0.0.1"],
      ["[192.0.2.7]", "10.0.0.1"],
    ] as const
  ) assert.equal(addressOf(value), address, String(value));
  assert.equal(addressOf("6.6.6.6", { peer: "192.0.2.1" }), "192.0.2.1");
  assert.equal(addressOf("6.6.6.6", { peer: "::ffff:10.0.0.1" }), "6.6.6.6");
});

Deno.test("Forwarded is read as RFC 7239 writes it, and no other way", () => {
  for (
    const [value, address] of [
      ["for=192.0.2.7", "192.0.2.7"],
      ['For="[2001:db8::1]:4711";proto=https;by=10.0.0.9', "2001:db8::1"],
      ['for="192.0.2.7:80"', "192.0.2.7"],
      ["for=6.6.6.6, for=192.0.2.7;host=example.com", "192.0.2.7"],
      ["for=192.0.2.7, for=10.0.0.5", "192.0.2.7"],
      ["for=_hidden", "10.0.0.1"],
      ["for=unknown, for=10.0.0.5", "10.0.0.5"],
      ["proto=https", "10.0.0.1"],
      ["192.0.2.7", "10.0.0.1"],
      ["for=192.0.2.7;for=6.6.6.6", "10.0.0.1"],
      // A client that leaves a quote open, or has the proxy write its words in quotes.
      ['for="6.6.6.6, for=192.0.2.7', "192.0.2.7"],
      ['for=192.0.2.7;host="x,for=6.6.6.6"', "10.0.0.1"],
      ['for=192.0.2.7;host="x,for=6.6.6.6;a=\\""', "10.0.0.1"],
    ] as const
  ) assert.equal(addressOf(value, { header: "forwarded" }), address, value);
});

Deno.test("Whatever a client writes, what trusted proxies have added counts", () => {
  const lie = fc.oneof(
    fc.string(),
    fc.array(fc.constantFrom("6.6.6.6", "10.0.0.1", ",", " ", '"', "for=", ";", "\\", "[", "unknown")).map((parts) =>
      parts.join("")
    ),
  );
  const hops = fc.array(fc.constantFrom("10.1.1.1", "fd00::5"), { maxLength: 3 });
  fc.assert(
    fc.property(lie, hops, (said, proxies) => {
      const seen = ["192.0.2.7", ...proxies];
      assert.equal(addressOf([said, ...seen].join(", ")), "192.0.2.7");
      const pairs = seen.map((node) => node.includes(":") ? `for="[${node}]"` : `for=${node};proto=http`);
      assert.equal(addressOf([said, ...pairs].join(", "), { header: "forwarded" }), "192.0.2.7");
    }),
    { numRuns: 3000 },
  );
});

Deno.test("A long entry is no address, and is not pondered on", () => {
  for (const header of ["x-forwarded-for", "forwarded"] as const) {
    // Patterns that look for an address in these take a minute, if each character may end what stands in the brackets.
    for (const long of [":", "1:", "1.", "a=b;", "::1%x"].map((text) => text.repeat(200_000))) {
      for (const entry of [long, `[${long}`, `[${long}]:`, `for="[${long}"`, `for="[${long}]"`, `for=${long}`]) {
        assert.equal(addressOf(`192.0.2.7, ${entry}`, { header }), "10.0.0.1");
      }
    }
  }
  const host = "x".repeat(253);
  assert.equal(addressOf(`for=192.0.2.7;host=${host}`, { header: "forwarded" }), "192.0.2.7");
});

Deno.test("A chain without an end is given up", () => {
  const chain = Array.from({ length: 8000 }, (_, n) => `10.0.${n >> 8}.${n & 255}`).join(",");
  assert.equal(addressOf(`192.0.2.7,${chain}`), "10.0.31.32");
});

onEachEngine(
  "Backends read the claims and the address of each connection, and of each posted message",
  async (engine) => {
    await using redis = await RedisServer.start();
    const env = { INBOX_CLAIMS: "sub,role", INBOX_ADDRESS: "true", TRUSTED_PROXIES: "127.0.0.1" };
    await using proxy = await TestProxy.start(redis, { ...engine, ...inboxEnv, ...env });
    const claims = { sub: 'a "user"', role: ["admin", 1], email: "a@example" };
    const headers = { "X-Forwarded-For": "6.6.6.6, 192.0.2.7", Forwarded: "for=6.6.6.6" };
    const client = await proxy.connect("s1", { claims, headers });
    client.send('"one"');
    const url = `http://127.0.0.1:${proxy.port}/agent/sse/s1`;
    const authorization = `Bearer ${await mint("s1", claims)}`;
    const stream = await fetch(url, { headers: { ...headers, Authorization: authorization } });
    const post = { method: "POST", body: '"two"', headers: { ...headers, Authorization: authorization } };
    assert.equal((await (await fetch(url, post)).json()).entered, true);
    const bare = await proxy.connect("s1");
    await client.close();
    await bare.close();
    await stream.body!.cancel();
    const entries = await entriesWith(redis.client(), "disconnected", 3);
    const who = { claims: '{"sub":"a \\"user\\"","role":["admin",1]}', address: "192.0.2.7" };
    const told = (kind: string) =>
      entries.filter(({ type, data }) => (data ?? type) === kind).map(({ claims, address }) => ({ claims, address }));
    const nobody = { claims: undefined, address: undefined };
    assert.deepEqual(told('"one"'), [nobody]);
    assert.deepEqual(told('"two"'), [who]);
    assert.deepEqual(told("connected"), [who, who, { ...nobody, address: "127.0.0.1" }]);
  },
);

Deno.test("By default backends read the subject, and no address; a claim that is too large is null", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, inboxEnv);
  await using large = await TestProxy.start(redis, { ...inboxEnv, INBOX_CLAIMS: "a,b,c" });
  await using none = await TestProxy.start(redis, { ...inboxEnv, INBOX_CLAIMS: "-" });
  const [a, b] = ["x".repeat(1016), "y".repeat(1017)];
  const clients: Client[] = [];
  for (
    const [port, claims] of [
      [proxy.port, { sub: "me", role: "x" }],
      [proxy.port, {}],
      [none.port, { sub: "me" }],
      // {"a":"…"} has 1024 bytes.
      [large.port, { a }],
      [large.port, { a: b, c: "ü" }],
      [large.port, { a, b, c: { __proto__: null } }],
    ] as const
  ) clients.push(await Client.connect(port, `s${clients.length}`, { claims }));
  const expected = {
    s0: '{"sub":"me"}',
    s1: undefined,
    s2: undefined,
    s3: JSON.stringify({ a }),
    s4: '{"a":null,"c":"ü"}',
    s5: JSON.stringify({ a, b: null, c: null }),
  };
  const control = redis.client();
  const told = async () => {
    const entries = await entriesWith(control, "connected", clients.length);
    return entries.map(({ session, claims, address }) => [session, claims, address]).sort();
  };
  const all = Object.entries(expected).map(([session, claims]) => [session, claims, undefined]);
  assert.deepEqual(await told(), all);
  // What Redis has lost is told again, in full.
  await control.flushall();
  assert.deepEqual(await told(), all);
  for (const client of clients) await client.close();
});
