/** ResumingWebSocket in real libraries that take a WebSocket: they talk as ever, and connections break beneath them. */

import assert from "node:assert/strict";
import { createClient } from "graphql-ws";
import type { Redis } from "ioredis";
import { WebSocket as PartySocket } from "partysocket";
import exported from "reconnecting-websocket";
import { gapCode, ResumingWebSocket } from "../../clients/js/websocket.js";
import { serveGraphql, Told } from "../harness/graphql.ts";
import { Inbox } from "../harness/inbox.ts";
import { TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

/** It is what the CommonJS module exports, which its types do not know. */
const ReconnectingWebSocket = exported as unknown as typeof exported.default;

const down = "session:s1:down";
const up = "session:s1:up";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

const log = (redis: Redis, text: string) => redis.call("FCALL", "wsproxy_send", 1, down, text);

/** A proxy behind a relay, and a class for libraries. */
class Site implements AsyncDisposable {
  readonly #stack = new AsyncDisposableStack();
  readonly options = { token: () => mint("s1") };
  proxy!: TestProxy;
  relay!: Relay;
  redis!: RedisServer;
  control!: Redis;
  static async start(): Promise<Site> {
    const site = new Site();
    site.redis = site.#stack.use(await RedisServer.start());
    site.proxy = site.#stack.use(await TestProxy.start(site.redis));
    await site.proxy.resumable();
    site.relay = site.#stack.use(new Relay(site.proxy.port));
    site.control = site.redis.client();
    return site;
  }
  get url(): string {
    return `ws://127.0.0.1:${this.relay.port}/agent/ws/s1`;
  }
  /** While no connection is there, the log is lost, and another one begun. */
  async lose(): Promise<void> {
    this.relay.hangsUp = true;
    this.relay.cut();
    await this.control.del(down);
    await log(this.control, '{"type":"pong"}');
    this.relay.hangsUp = false;
  }
  [Symbol.asyncDispose](): Promise<void> {
    return this.#stack.disposeAsync();
  }
}

Deno.test("A subscription of graphql-ws has each value once while connections break, and is made anew after a gap", async () => {
  await using site = await Site.start();
  const told = new Told();
  await serveGraphql(site.redis, "s1", told);
  const events = new Inbox();
  const client = createClient({
    url: site.url,
    webSocketImpl: ResumingWebSocket.with({
      ...site.options,
      begins: (text) => JSON.parse(text).type === "connection_ack",
    }),
    keepAlive: 20,
    retryWait: () => Promise.resolve(),
    on: {
      connected: () => events.add("connected"),
      closed: (event) => events.add(`closed ${(event as CloseEvent).code}`),
    },
  });
  site.relay.budgets = Array.from({ length: 5 }, () => ({ down: 2000 }));
  const counted: unknown[] = [];
  for await (const { data } of client.iterate<{ counted: number }>({ query: "subscription { counted(to: 200) }" })) {
    counted.push(data!.counted);
  }
  assert.deepEqual(counted, Array.from({ length: 200 }, (_, n) => n));
  await eventually("it has left", () => events.size === 2);
  assert.deepEqual(events.takeAll(), ["connected", "closed 1000"]);
  assert(site.relay.accepted > 5, `${site.relay.accepted} connections`);
  const seen = new Inbox();
  const leave = client.subscribe<{ told: string }>({ query: "subscription { told }" }, {
    next: ({ data }) => seen.add(data!.told),
    error: (error) => events.add(String(error)),
    complete() {},
  });
  assert.deepEqual(await events.take(1), ["connected"]);
  const hears = async (text: string) => {
    await eventually(`it is told ${text}`, () => (told.tell(text), seen.takeAll().includes(text)));
  };
  await hears("one");
  await site.lose();
  assert.deepEqual(await events.take(2), [`closed ${gapCode}`, "connected"]);
  await hears("two");
  leave();
  await client.dispose();
  told.end();
  // What was sent before a close is answered first.
  await site.proxy.empty();
});

const reconnecting = {
  "reconnecting-websocket": (url: string, WebSocket: unknown) =>
    new ReconnectingWebSocket(url, ["a"], { WebSocket, minReconnectionDelay: 10 }),
  "partysocket": (url: string, WebSocket: unknown) =>
    new PartySocket(url, ["a"], { WebSocket, minReconnectionDelay: 10 }),
};

for (const [name, make] of Object.entries(reconnecting)) {
  Deno.test(`A socket of ${name} loses nothing while connections break, and comes back after a gap`, async () => {
    await using site = await Site.start();
    const backend = await Listener.to(site.redis, up);
    const events = new Inbox();
    await log(site.control, "one");
    const socket = make(site.url, ResumingWebSocket.with(site.options));
    socket.addEventListener("open", () => events.add("open"));
    socket.addEventListener("message", ({ data }: MessageEvent) => events.add(data));
    socket.addEventListener("close", (event: unknown) => events.add(`close ${(event as CloseEvent).code}`));
    assert.deepEqual(await events.take(2), ["open", "one"]);
    assert.equal(socket.readyState, WebSocket.OPEN);
    site.relay.cut();
    socket.send('"up"');
    await log(site.control, "two");
    assert.deepEqual(await events.take(1), ["two"]);
    assert.deepEqual(await backend.take(1), ['"up"']);
    await site.lose();
    await log(site.control, "three");
    const back = await events.take(4);
    assert.deepEqual(back.slice(0, 2), [`close ${gapCode}`, "open"]);
    assert.equal(back.at(-1), "three");
    socket.send('"and goodbye"');
    socket.close();
    // What was under way at a cut may come twice.
    await eventually("the goodbye has come", () => backend.takeAll().at(-1) === '"and goodbye"');
    assert.deepEqual(await events.take(1), ["close 1000"]);
    // What was sent before a close is answered first.
    await site.proxy.empty();
  });
}
