/**
 * The contract from outside, against whatever WSPROXY_URL and REDIS_URL name: containers, a balancer, a deployment.
 * JWT_SECRET must be theirs, and ALLOW_QUERY_TOKEN too where it is set. Without WSPROXY_URL the tests start a proxy, as
 * the start task does, and a Redis of their own, once for each topology.
 */

import assert from "node:assert/strict";
import { Redis } from "ioredis";
import { slotOf } from "../src/redis/slot.ts";
import { parseRedisUrl, type RedisAddress, type TcpAddress } from "../src/redis_url.ts";
import { complaints } from "../src/session/frames.ts";
import { Client } from "./harness/client.ts";
import { Inbox } from "./harness/inbox.ts";
import { ProxyProcess } from "./harness/proxy.ts";
import { TestCluster } from "./harness/cluster.ts";
import { RedisServer } from "./harness/redis.ts";
import { SentinelGroup } from "./harness/sentinel.ts";
import { mint, secret } from "./harness/token.ts";
import { soon } from "./harness/wait.ts";
import { handshakeHeaders, readReply, type Reply, requestHead, writeAll } from "./harness/wire.ts";

/** The proxy and the Redis under test; `stop` ends what was started here. */
interface Stack {
  readonly proxyUrl: URL;
  readonly redisUrl: string;
  readonly secret: string;
  readonly allowsQueryToken: boolean;
  stop(): Promise<void>;
}

/** What runs already. */
function givenStack(proxyUrl: string): Promise<Stack> {
  const names = ["REDIS_URL", "JWT_SECRET"];
  const missing = names.filter((name) => !Deno.env.get(name));
  if (missing.length > 0) throw new Error(`WSPROXY_URL is set, so ${missing.join(" and ")} must be set as well`);
  return Promise.resolve({
    proxyUrl: new URL(proxyUrl),
    redisUrl: Deno.env.get("REDIS_URL")!,
    secret: Deno.env.get("JWT_SECRET")!,
    allowsQueryToken: Deno.env.get("ALLOW_QUERY_TOKEN") === "true",
    stop: async () => {},
  });
}

async function startStack(starting: Promise<{ readonly url: string } & AsyncDisposable>): Promise<Stack> {
  const redis = await starting;
  const proxy = await ProxyProcess.start(redis.url, { ALLOW_QUERY_TOKEN: "true", LOG_LEVEL: "info" });
  proxy.log.drain();
  return {
    proxyUrl: new URL(`http://127.0.0.1:${proxy.port}`),
    redisUrl: redis.url,
    secret,
    allowsQueryToken: true,
    stop: async () => {
      await proxy[Symbol.asyncDispose]();
      await redis[Symbol.asyncDispose]();
    },
  };
}

/**
 * A backend that talks and listens, as the topology wants it. In a Cluster it asks for the server of each channel and
 * connects to that: no client library's cluster class listens reliably to sharded channels once a server is gone.
 */
class Backend implements AsyncDisposable {
  readonly #url: string;
  readonly #address: RedisAddress;
  /** By server, and whether it listens. */
  readonly #connections = new Map<string, Redis>();
  /** The Cluster's servers, by slot. */
  readonly #owners = new Map<number, Promise<TcpAddress>>();
  readonly #heard = new Inbox();

  constructor(url: string) {
    this.#url = url;
    this.#address = parseRedisUrl(url);
  }

  async listen(sessionId: string): Promise<void> {
    const channel = `session:${sessionId}:up`;
    const ear = await this.#connectionFor(channel, "listens");
    ear.removeAllListeners("message").removeAllListeners("smessage");
    ear.on("message", (_channel, text) => this.#heard.add(text));
    ear.on("smessage", (_channel, text) => this.#heard.add(text));
    await (this.#sharded ? ear.ssubscribe(channel) : ear.subscribe(channel));
  }

  async publish(sessionId: string, text: string): Promise<number> {
    const channel = `session:${sessionId}:down`;
    const talker = await this.#connectionFor(channel, "talks");
    return Number(await (this.#sharded ? talker.spublish(channel, text) : talker.publish(channel, text)));
  }

  hear(count: number): Promise<string[]> {
    return this.#heard.take(count);
  }

  get #sharded(): boolean {
    return "nodes" in this.#address;
  }

  async #connectionFor(channel: string, role: "talks" | "listens"): Promise<Redis> {
    const server = this.#sharded ? await this.#ownerOf(channel) : undefined;
    const key = `${role} ${server?.host} ${server?.port}`;
    let connection = this.#connections.get(key);
    if (connection === undefined) {
      connection = this.#connect(server);
      this.#connections.set(key, connection);
    }
    return connection;
  }

  #connect(server: TcpAddress | undefined): Redis {
    const { username, password } = this.#address;
    const who = { ...username ? { username } : {}, ...password ? { password } : {} };
    if (server) return new Redis({ ...who, ...server, family: 0 });
    if (!("sentinels" in this.#address)) return new Redis(this.#url);
    const { sentinels, masterName } = this.#address;
    return new Redis({ ...who, sentinels: [...sentinels], name: masterName });
  }

  #ownerOf(channel: string): Promise<TcpAddress> {
    const slot = slotOf(channel);
    const owner = this.#owners.get(slot) ?? this.#findOwner(slot);
    this.#owners.set(slot, owner);
    return owner;
  }

  async #findOwner(slot: number): Promise<TcpAddress> {
    for (const node of "nodes" in this.#address ? this.#address.nodes : []) {
      const control = this.#connect(node);
      control.on("error", () => {});
      try {
        const ranges = await soon(control.cluster("SLOTS"), `slots of ${node.host}`);
        const [, , [host, port] = []] = ranges.find(([first, last]) => first <= slot && slot <= last) ?? [];
        if (host !== undefined) return { host: String(host), port: Number(port) };
      } catch {
        // That one is away.
      } finally {
        control.disconnect();
      }
    }
    throw new Error(`no server of the Cluster serves slot ${slot}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const redis of this.#connections.values()) {
      const ended = new Promise((resolve) => redis.once("end", resolve));
      redis.disconnect();
      await ended;
    }
  }
}

function socketUrl(stack: Stack, sessionId: string): URL {
  const url = new URL(`/agent/ws/${encodeURIComponent(sessionId)}`, stack.proxyUrl);
  url.protocol = url.protocol.replace("http", "ws");
  return url;
}

async function openClient(stack: Stack, sessionId: string): Promise<Client> {
  const token = await mint(sessionId, {}, stack.secret);
  return await Client.open(socketUrl(stack, sessionId), { headers: { Authorization: `Bearer ${token}` } });
}

/** One request on a connection of its own, so that handshake headers can be sent without a WebSocket client. */
async function ask(stack: Stack, path: string, headers: Record<string, string> = {}): Promise<Reply> {
  const { protocol, hostname, port, host } = stack.proxyUrl;
  const tls = protocol === "https:" || protocol === "wss:";
  const address = { hostname, port: Number(port || (tls ? 443 : 80)) };
  using connection = tls ? await Deno.connectTls(address) : await Deno.connect(address);
  await writeAll(connection, new TextEncoder().encode(requestHead(path, { headers: { Host: host, ...headers } })));
  return await soon(readReply(connection), `answer to ${path}`);
}

/** A session id that no other run of the tests uses. */
const newSession = () => `e2e-${crypto.randomUUID()}`;
const numbers = (count: number) => Array.from({ length: count }, (_, i) => String(i));

const given = Deno.env.get("WSPROXY_URL");
if (given) endToEnd("what WSPROXY_URL names", () => givenStack(given));
else {
  endToEnd("one server", () => startStack(RedisServer.start()));
  endToEnd("a master that sentinels name", () => startStack(SentinelGroup.start()));
  endToEnd("a Cluster", () => startStack(TestCluster.start(3)));
}

function endToEnd(where: string, start: () => Promise<Stack>): void {
  Deno.test(`End to end: ${where}`, async (t) => {
    const stack = await start();
    try {
      await relays(t, stack);
    } finally {
      await stack.stop();
    }
  });
}

async function relays(t: Deno.TestContext, stack: Stack): Promise<void> {
  await using backend = new Backend(stack.redisUrl);
  const session = newSession();
  const token = await mint(session, {}, stack.secret);

  await t.step("/health, /ready and /metrics answer", async () => {
    const health = await ask(stack, "/health");
    assert.equal(health.status, 200, health.body);
    const { active_connections, ...rest } = JSON.parse(health.body);
    assert.deepEqual(rest, { status: "healthy", redis: "connected" });
    assert.equal(typeof active_connections, "number");
    assert.deepEqual(JSON.parse((await ask(stack, "/ready")).body), { status: "ready" });
    assert.match((await ask(stack, "/metrics")).body, /^wsproxy_redis_up 1$/m);
  });

  await t.step("A token in the Authorization header opens a socket that relays both ways", async () => {
    await using client = await Client.open(socketUrl(stack, session), {
      headers: { Authorization: `Bearer ${token}` },
    });
    await relaysBothWays(client, backend, session);
  });

  await t.step("A token in the subprotocol list opens one, and `bearer` is selected", async () => {
    await using client = await Client.open(socketUrl(stack, session), { protocols: ["bearer", token] });
    assert.equal(client.socket.protocol, "bearer");
    await relaysBothWays(client, backend, session);
  });

  await t.step("A token in the query opens one only where ALLOW_QUERY_TOKEN is on", async () => {
    const url = socketUrl(stack, session);
    url.searchParams.set("token", token);
    if (!stack.allowsQueryToken) {
      assert.equal((await ask(stack, url.pathname + url.search, handshakeHeaders)).status, 401);
      return;
    }
    await using client = await Client.open(url, {});
    await relaysBothWays(client, backend, session);
  });

  await t.step("1,000 messages arrive in order, down and up", async () => {
    const ordered = newSession();
    await backend.listen(ordered);
    await using client = await openClient(stack, ordered);
    const sent = numbers(1000);
    const published = sent.map((text) => backend.publish(ordered, text));
    for (const text of sent) client.socket.send(text);
    assert.deepEqual(await client.take(1000), sent);
    assert.deepEqual(await backend.hear(1000), sent);
    assert.deepEqual(new Set(await Promise.all(published)), new Set([1]));
  });

  await t.step("Two sockets of one session get every message; another session gets none", async () => {
    const [shared, alone] = [newSession(), newSession()];
    await using first = await openClient(stack, shared);
    await using second = await openClient(stack, shared);
    await using other = await openClient(stack, alone);
    await backend.publish(shared, '"for both"');
    await backend.publish(alone, '"for the other"');
    for (const client of [first, second]) assert.deepEqual(await client.take(1), ['"for both"']);
    assert.deepEqual(await other.take(1), ['"for the other"']);
  });

  await t.step("What is not JSON is answered in-band, and the socket goes on", async () => {
    const strict = newSession();
    await backend.listen(strict);
    await using client = await openClient(stack, strict);
    client.socket.send("{not JSON");
    assert.deepEqual(await client.take(1), [complaints.invalidJson.json]);
    client.socket.send('{"fine":true}');
    assert.deepEqual(await backend.hear(1), ['{"fine":true}']);
  });

  const path = socketUrl(stack, session).pathname;
  const forged = await mint(session, {}, "another-secret-that-is-32-bytes-long!");
  const refusals: [string, number, string, Record<string, string>][] = [
    ["An unknown path", 404, "/nowhere", {}],
    ["A plain GET", 426, path, {}],
    ["No token", 401, path, handshakeHeaders],
    ["A forged token", 403, path, { ...handshakeHeaders, Authorization: `Bearer ${forged}` }],
    ["A token of another session", 403, socketUrl(stack, newSession()).pathname, {
      ...handshakeHeaders,
      Authorization: `Bearer ${token}`,
    }],
  ];
  for (const [what, status, target, headers] of refusals) {
    await t.step(`${what} is refused with ${status}`, async () => {
      const reply = await ask(stack, target, headers);
      assert.equal(reply.status, status, reply.body);
      if (status === 401) assert.equal(reply.headers.get("www-authenticate"), "Bearer");
    });
  }
}

async function relaysBothWays(client: Client, backend: Backend, session: string): Promise<void> {
  await backend.listen(session);
  const down = JSON.stringify({ down: "é 🙂", at: crypto.randomUUID() });
  const up = JSON.stringify({ up: "é 🙂", at: crypto.randomUUID() });
  await backend.publish(session, down);
  assert.deepEqual(await client.take(1), [down]);
  client.socket.send(up);
  assert.deepEqual(await backend.hear(1), [up]);
}
