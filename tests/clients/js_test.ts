/** The JavaScript client against the real proxy. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { Connection, type Options } from "../../clients/js/wsproxy.js";
import { Inbox } from "../harness/inbox.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

const down = "session:s1:down";

async function send(redis: Redis, text: string): Promise<string> {
  const [position] = await redis.call("FCALL", "wsproxy_send", 1, down, text) as [string];
  return position;
}

/** A connection that notes all it is told, and is closed with the scope. */
class Watched implements Disposable {
  readonly messages = new Inbox();
  readonly events = new Inbox();
  tokens = 0;
  readonly connection: Connection;
  constructor(port: number, options: Partial<Options> = {}) {
    this.connection = new Connection({
      url: `ws://127.0.0.1:${port}/agent/ws/s1`,
      token: () => {
        this.tokens++;
        return mint("s1");
      },
      onMessage: (text) => this.messages.add(text),
      onGap: (reason) => this.events.add(`gap ${reason}`),
      onUnheard: (messages) => this.events.add(`unheard ${messages}`),
      onState: (state, close) => state === "closed" && this.events.add(`closed ${close!.code}`),
      ...options,
    });
  }
  [Symbol.dispose](): void {
    this.connection.close();
  }
}

async function loaded(redis: Redis): Promise<void> {
  await eventually("the functions are loaded", async () => {
    return (await redis.call("FUNCTION", "LIST", "LIBRARYNAME", "wsproxy") as unknown[]).length > 0;
  });
}

onEachEngine("The client misses nothing while its connection breaks again and again", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, engine);
  using relay = new Relay(proxy.port);
  const control = redis.client();
  await loaded(control);
  using client = new Watched(relay.port);
  const texts: string[] = [];
  for (let n = 0; n < 100; n++) {
    texts.push(`message ${n}`);
    await send(control, texts.at(-1)!);
    if (n % 20 === 10) relay.cut();
  }
  assert.deepEqual(await client.messages.take(100), texts);
  assert.equal(client.events.size, 0);
  const backend = await Listener.to(redis, "session:s1:up");
  await eventually("it can send", () => client.connection.send('"up"'));
  assert.deepEqual(await backend.take(1), ['"up"']);
  const { position } = client.connection;
  client.connection.close();
  await send(control, "after a reload");
  using again = new Watched(proxy.port, { position });
  assert.deepEqual(await again.messages.take(1), ["after a reload"]);
});

onEachEngine("The client is told of gaps, of the unheard, and of a close for good", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, engine);
  const control = redis.client();
  await loaded(control);
  const position = await send(control, "gone");
  await control.del(down);
  using client = new Watched(proxy.port, { position });
  assert.deepEqual(await client.events.take(1), ["gap lost"]);
  await eventually("it is open", () => client.connection.open);
  client.connection.send('"to nobody"');
  assert.deepEqual(await client.events.take(1), ["unheard 1"]);
  await control.call("FCALL", "wsproxy_close", 1, down, 4403, "banned");
  assert.deepEqual(await client.events.take(1), ["closed 4403"]);
  assert(!client.connection.send('"nothing"'));
});

onEachEngine("The client renews its token before the end, and stays connected", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await loaded(redis.client());
  let exp = Math.floor(Date.now() / 1000) + 3;
  let tokens = 0;
  const token = () => {
    tokens++;
    const minted = mint("s1", { exp });
    exp += 3600;
    return minted;
  };
  {
    using client = new Watched(proxy.port, { token });
    await eventually("it has renewed it", () => tokens === 2);
    await eventually("the first one is over", () => Date.now() / 1000 > exp - 7200 + 1);
    assert(client.connection.open);
    await proxy.counts("wsproxy_opened_total", 1);
  }
});

onEachEngine("Without functions in Redis the client is a bare one", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.call("ACL", "SETUSER", "proxy", "on", ">password", "+@all", "-function", "~*", "&*");
  await using proxy = await TestProxy.start(redis.url.replace("redis://", "redis://proxy:password@"), engine);
  {
    using client = new Watched(proxy.port);
    await eventually("it is open", () => client.connection.open);
    await control.publish(down, "bare");
    assert.deepEqual(await client.messages.take(1), ["bare"]);
  }
});

onEachEngine("Where no WebSocket can pass, the client takes Server-Sent Events", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await loaded(control);
  await send(control, "first");
  /** A WebSocket behind something that does not know them. */
  class Blocked extends EventTarget {
    onclose: ((event: { code: number; reason: string }) => void) | undefined;
    constructor() {
      super();
      setTimeout(() => this.onclose?.({ code: 1006, reason: "" }), 0);
    }
    close(): void {}
  }
  const backend = await Listener.to(redis, "session:s1:up");
  {
    using client = new Watched(proxy.port, { WebSocket: Blocked as unknown as typeof WebSocket });
    assert.deepEqual(await client.messages.take(1), ["first"]);
    await send(control, "two\nlines");
    assert.deepEqual(await client.messages.take(1), ["two\nlines"]);
    assert(client.connection.send('"up"'));
    assert.deepEqual(await backend.take(1), ['"up"']);
  }
});
