/** Limits of each session and each address, at one more than each, for all workers of a proxy together. */

import assert from "node:assert/strict";
import { type Client as Counted, type QuotaLimits, Quotas } from "../src/quotas.ts";
import { Client } from "./harness/client.ts";
import { type Env, onEachEngine, ProxyProcess, TestProxy } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { mint } from "./harness/token.ts";
import { eventually, soon } from "./harness/wait.ts";
import { handshake, readUntil, request, requestHead, writeAll } from "./harness/wire.ts";

const none: QuotaLimits = { maxConnectionsPerSession: 0, maxConnectionsPerAddress: 0, maxConnectsPerAddressPerSec: 0 };
const of = (site: string, session = "s1"): Counted => ({ session, site });

Deno.test("A session and an address have so many connections, whichever worker holds them", () => {
  const quotas = new Quotas<number>({ ...none, maxConnectionsPerSession: 3, maxConnectionsPerAddress: 4 });
  for (const holder of [0, 1, 0]) assert.equal(quotas.enter(holder, of("a")), undefined);
  assert.equal(quotas.enter(1, of("a")), "tooManyOfSession");
  assert.equal(quotas.enter(1, of("a", "s2")), undefined);
  assert.equal(quotas.enter(0, of("a", "s2")), "tooManyOfAddress");
  assert.equal(quotas.enter(0, of("b", "s2")), undefined);
  quotas.release(0, of("a"));
  assert.equal(quotas.enter(1, of("a")), undefined);
  assert.equal(quotas.enter(1, of("a")), "tooManyOfSession");
  // Two of the session are with the second worker, and one with the first.
  quotas.forget(1);
  quotas.release(1, of("a"));
  for (const holder of [1, 2]) assert.equal(quotas.enter(holder, of("a")), undefined);
  assert.equal(quotas.enter(0, of("a")), "tooManyOfSession");
});

Deno.test("Of 20,001 addresses each has its own limits, and none is remembered without a connection", () => {
  const quotas = new Quotas<number>({ ...none, maxConnectionsPerAddress: 2, maxConnectsPerAddressPerSec: 3 });
  const sites = Array.from({ length: 20_001 }, (_, n) => `10.${n >> 16}.${n >> 8 & 255}.${n & 255}`);
  for (const outcome of [undefined, undefined, "tooManyOfAddress"]) {
    for (const site of sites) assert.equal(quotas.enter(0, of(site)), outcome, site);
  }
  for (const site of sites) for (const _ of [1, 2]) quotas.release(0, of(site));
  assert.equal(quotas.enter(0, of(sites[0]!)), undefined);
});

Deno.test("An address makes so many connects at once, and no more until time has passed", () => {
  for (const perSec of [1, 3, 7, 1000]) {
    const quotas = new Quotas<number>({ ...none, maxConnectsPerAddressPerSec: perSec });
    const startMs = performance.now();
    const take = (site: string) => {
      let taken = 0;
      for (let n = 0; n < 2 * perSec + 10; n++) if (quotas.enter(n % 2, of(site)) === undefined) taken++;
      return taken;
    };
    for (const site of ["a", "b"]) {
      const taken = take(site);
      const elapsedMs = performance.now() - startMs;
      assert(taken >= perSec && taken <= perSec + 1 + elapsedMs * perSec / 1000, `${taken} of ${perSec}`);
    }
  }
});

Deno.test("However many addresses knock, a bounded number is remembered, and a second later none", async () => {
  const quotas = new Quotas<number>({ ...none, maxConnectsPerAddressPerSec: 1 });
  let most = 0;
  for (let n = 0; n < 100_000; n++) {
    assert.equal(quotas.enter(0, of(String(n))), undefined);
    most = Math.max(most, quotas.remembered);
  }
  assert(most <= 65_536, String(most));
  let n = 0;
  await eventually("they are forgotten", () => {
    quotas.enter(0, of(`later ${n++}`));
    return quotas.remembered < 1000;
  });
});

/** How a handshake of a client behind a balancer of the loopback is answered; its socket is hung up on. */
async function statusOf(port: number, session: string, address: string): Promise<number> {
  const headers = { ...await handshake(session), "X-Forwarded-For": `6.6.6.6, ${address}` };
  return (await request(port, `/agent/ws/${session}`, { headers })).status;
}

const open = (port: number, session: string, address: string, lie = "6.6.6.6") =>
  Client.connect(port, session, { headers: { "X-Forwarded-For": `${lie}, ${address}` } });

/** Opens so many at the same moment, each with another lie; those that are admitted. */
async function storm(port: number, count: number, session: (n: number) => string, address: (n: number) => string) {
  const opened = await Promise.allSettled(
    Array.from({ length: count }, (_, n) => open(port, session(n), address(n), `6.6.6.${n}, 127.0.0.1`)),
  );
  const clients: Client[] = [];
  for (const outcome of opened) {
    if (outcome.status === "fulfilled") clients.push(outcome.value);
    else assert.match(String(outcome.reason), /429/);
  }
  return clients;
}

for (const WORKERS of ["1", "3"]) {
  onEachEngine(
    `With ${WORKERS} workers a session and an address have their connections, and no more`,
    async (engine) => {
      await using redis = await RedisServer.start();
      const env: Env = { ...engine, WORKERS, TRUSTED_PROXIES: "127.0.0.1" };
      const limits = { MAX_CONNECTIONS_PER_SESSION: "3", MAX_CONNECTIONS_PER_ADDRESS: "5" };
      await using proxy = await ProxyProcess.start(redis, { ...env, ...limits });
      for (let round = 0; round < 3; round++) {
        // Each from an address of its own.
        const ofSession = await storm(proxy.port, 40, () => "s", (n) => `192.0.2.${n}`);
        assert.equal(ofSession.length, 3);
        const [one, ...others] = [
          ...await storm(proxy.port, 40, (n) => `a${n}`, (n) => n % 2 ? "2001:db8::1" : "2001:db8:0:0:ffff::2"),
          ...await storm(proxy.port, 40, (n) => `b${n}`, (n) => n % 2 ? "198.51.100.1" : "::ffff:198.51.100.1"),
        ];
        assert.equal(others.length, 9);
        assert.equal(await statusOf(proxy.port, "c", "198.51.100.1"), 429);
        assert.equal(await statusOf(proxy.port, "c", "2001:db8:0:0:1::"), 429);
        assert.equal(await statusOf(proxy.port, "c", "2001:db8:0:1::"), 101);
        await one!.close();
        await eventually("its place is free", async () => {
          const client = await open(proxy.port, "c", "2001:db8:0:0:9::").catch(() => undefined);
          if (client) others.push(client);
          return client !== undefined;
        });
        assert.equal(await statusOf(proxy.port, "d", "2001:db8::"), 429);
        await Promise.all([...ofSession, ...others].map((client) => client.close()));
        await proxy.counts("wsproxy_connections", 0);
      }
      for (const reason of ["tooManyOfSession", "tooManyOfAddress"]) {
        const refused = await proxy.metric(`wsproxy_refused_total{status="429",reason="${reason}"}`);
        assert(refused >= 3 * 37, `${refused}`);
      }
    },
  );
}

onEachEngine(
  "An address makes so many connects a second; a refusal says when to come back, also as a close",
  async (engine) => {
    await using redis = await RedisServer.start();
    const env = { WORKERS: "2", TRUSTED_PROXIES: "127.0.0.1", MAX_CONNECTS_PER_ADDRESS_PER_SEC: "5" };
    await using proxy = await ProxyProcess.start(redis, { ...engine, ...env });
    const startMs = performance.now();
    const clients = await storm(proxy.port, 60, (n) => `s${n}`, () => "192.0.2.7");
    const atMost = 6 + (performance.now() - startMs) / 200;
    assert(clients.length >= 5 && clients.length <= atMost, `${clients.length}, ${atMost}`);
    const others = await storm(proxy.port, 30, (n) => `t${n}`, (n) => `198.51.100.${n}`);
    assert.equal(others.length, 30);
    const url = `http://127.0.0.1:${proxy.port}/agent/sse/s1`;
    const headers = { Authorization: `Bearer ${await mint("s1")}`, "X-Forwarded-For": "192.0.2.7" };
    // What is posted is no connection.
    for (let n = 0; n < 20; n++) {
      const response = await fetch(url, { method: "POST", headers, body: "1" });
      await response.body?.cancel();
      assert.equal(response.status, 202);
    }
    const streams: Response[] = [];
    const stream = async () => {
      const response = await fetch(url, { headers });
      if (response.status === 200) streams.push(response);
      else await response.body?.cancel();
      return response;
    };
    let refused: Response | undefined;
    await eventually("a stream is one too many", async () => (refused = await stream()).status === 429);
    assert.match(refused!.headers.get("retry-after")!, /^[1-5]$/);
    const closing = () =>
      Client.open(new URL(`ws://127.0.0.1:${proxy.port}/agent/ws/s1?refusal=close`), {
        headers,
        protocols: ["wsproxy.resume.v1"],
      });
    for (let isRefused = false; !isRefused;) {
      const client = await closing();
      clients.push(client);
      isRefused = await Promise.race([client.closed, soon(client.next(), "a first frame").catch(() => undefined)])
        .then((end) => typeof end === "object");
      if (!isRefused) continue;
      const { code, reason } = await client.ended();
      assert.equal(code, 4429);
      assert.match(reason, /^retry_after_secs=[1-5]; too many new connections from this address$/);
    }
    await Promise.all(streams.map((response) => response.body!.cancel()));
    await Promise.all([...clients, ...others].map((client) => client.close()));
  },
);

onEachEngine(
  "A stream is a connection, as a socket is, and neither is a client that went while it connected",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, MAX_CONNECTIONS_PER_ADDRESS: "2" });
    const headers = { Authorization: `Bearer ${await mint("s1")}` };
    const stream = () => fetch(`http://127.0.0.1:${proxy.port}/agent/sse/s1`, { headers });
    const first = await stream();
    await using _socket = await proxy.connect("s1");
    // Without TRUSTED_PROXIES no header counts.
    const lying = { ...await handshake("s1"), "X-Forwarded-For": "192.0.2.1", Forwarded: "for=192.0.2.1" };
    const { status, headers: answer } = await proxy.request("/agent/ws/s1", { headers: lying });
    assert.equal(status, 429);
    assert.match(answer.get("retry-after")!, /^[1-5]$/);
    await first.body!.cancel();
    const again = async () => {
      const response = await stream();
      await response.body!.cancel();
      return response.status === 200;
    };
    await eventually("its place is free", again);
    for (let n = 0; n < 20; n++) {
      const connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
      await writeAll(
        connection,
        new TextEncoder().encode(requestHead("/agent/ws/s1", { headers: await handshake("s1") })),
      );
      connection.close();
    }
    await eventually("their places are free", again);
  },
);

Deno.test("20,001 addresses that knock on a full proxy leave nothing behind", async () => {
  await using redis = await RedisServer.start();
  const env = { MAX_CONNECTIONS: "1", MAX_CONNECTIONS_PER_ADDRESS: "1", MAX_CONNECTS_PER_ADDRESS_PER_SEC: "1" };
  await using proxy = await TestProxy.start(redis, { ...env, TRUSTED_PROXIES: "127.0.0.1" });
  const only = await open(proxy.port, "s1", "192.0.2.7");
  const connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  const token = await mint("s1");
  const heads = Array.from({ length: 20_001 }, (_, n) => {
    const headers = { Authorization: `Bearer ${token}`, "X-Forwarded-For": `10.${n >> 16}.${n >> 8 & 255}.${n & 255}` };
    return requestHead("/agent/sse/s1", { headers });
  });
  for (let at = 0; at < heads.length; at += 50) {
    const some = heads.slice(at, at + 50);
    await writeAll(connection, new TextEncoder().encode(some.join("")));
    for (let left = some.length; left > 0;) {
      const answers = await readUntil(connection, /too many connections\n$/);
      assert.doesNotMatch(answers, /^HTTP\/1\.1 (?!503 )/m);
      left -= answers.match(/too many connections\n/g)!.length;
    }
  }
  connection.close();
  assert.equal(await statusOf(proxy.port, "s1", "192.0.2.7"), 429);
  await only.close();
  await proxy.empty();
  const next = await open(proxy.port, "s1", "10.0.0.0");
  await next.close();
});
