/**
 * The JavaScript client against the real proxy, on each engine. What no proxy of today does on demand (close at once, be
 * of an older version, hang) is done by a few lines of a server.
 */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { type Close, Connection, type Options, UnsentError } from "../../clients/js/wsproxy.js";
import { Inbox } from "../harness/inbox.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { WsServer } from "../harness/ws_server.ts";

const down = "session:s1:down";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

async function send(redis: Redis, text: string): Promise<string> {
  const [position] = (await redis.call("FCALL", "wsproxy_send", 1, down, text)) as [string];
  return position;
}

/** A connection that notes all it is told, and is closed with the scope. */
class Watched implements Disposable {
  readonly messages = new Inbox();
  readonly events = new Inbox();
  readonly states = new Inbox();
  readonly errors: unknown[] = [];
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
      onError: (error) => this.errors.push(error),
      onState: (state, close) => {
        this.states.add(`${state} ${close?.code ?? ""}`.trim());
        if (state === "closed") this.events.add(`closed ${close!.code}`);
      },
      ...options,
    });
  }
  opens(): Promise<void> {
    return eventually("it is open", () => this.connection.open);
  }
  [Symbol.dispose](): void {
    this.connection.close();
  }
}

/** A WebSocket behind something that does not know them. */
class Blocked {
  onclose: ((event: Close) => void) | null = null;
  onopen = null;
  onmessage = null;
  onerror = null;
  protocol = "";
  readyState = 0;
  constructor() {
    setTimeout(() => this.onclose?.({ code: 1006, reason: "" }), 0);
  }
  send(): void {}
  close(): void {}
}

/** Both ways that a connection may go. */
const ways: readonly (readonly [string, Partial<Options>])[] = [
  ["WebSocket", {}],
  ["SSE", { WebSocket: Blocked }],
];

onEachEngine("The client misses nothing while its connection breaks again and again", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, engine);
  using relay = new Relay(proxy.port);
  const control = redis.client();
  await proxy.resumable();
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
  await proxy.resumable();
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
  await proxy.resumable();
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
  await proxy.resumable();
  await send(control, "first");
  const backend = await Listener.to(redis, "session:s1:up");
  {
    using client = new Watched(proxy.port, { WebSocket: Blocked });
    assert.deepEqual(await client.messages.take(1), ["first"]);
    await send(control, "two\nlines");
    assert.deepEqual(await client.messages.take(1), ["two\nlines"]);
    assert(client.connection.send('"up"'));
    assert.deepEqual(await backend.take(1), ['"up"']);
  }
});

onEachEngine(
  "Whatever event a failing connection fires, and none at all, leads on; so does a token that never comes",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    await send(redis.client(), "first");
    // The kernel accepts connections for it, and nobody answers.
    using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    using refusing = new Relay(proxy.port);
    using hanging = new Relay(silent.addr.port);
    refusing.hangsUp = true;
    /** That of Node 22: a connection that fails is told of as an error, and not as a close. */
    class Untold extends WebSocket {
      constructor(url: string | URL, protocols?: string[]) {
        super(url, protocols);
        this.addEventListener("error", () => (this.onclose = null));
      }
    }
    {
      const options = { timeoutMs: 500, sse: false };
      using failing = new Watched(refusing.port, { ...options, WebSocket: Untold });
      using unanswered = new Watched(hanging.port, options);
      let tokens = 0;
      const token = () => (tokens++ === 0 ? new Promise<string>(() => {}) : mint("s1"));
      using tokenless = new Watched(proxy.port, { ...options, token });
      await eventually("it has tried again", () => refusing.accepted > 1);
      refusing.hangsUp = false;
      await eventually("it has tried again", () => hanging.accepted > 1);
      hanging.target = proxy.port;
      for (const { messages } of [failing, unanswered, tokenless]) assert.deepEqual(await messages.take(1), ["first"]);
      const reasons = unanswered.states.takeAll();
      assert.deepEqual([...new Set(reasons)], ["connecting", "connecting 1006", "open"]);
    }
  },
);

onEachEngine(
  "A token that is about to run out is asked for again once in a while, and not at each word of the proxy",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    let tokens = 0;
    const same = await mint("s1", { exp: Math.floor(Date.now() / 1000) + 20 });
    const others = () => mint("s1", { exp: Math.floor(Date.now() / 1000) + 20, jti: `${tokens}` });
    for (const token of [() => same, others]) {
      tokens = 0;
      using client = new Watched(proxy.port, { token: () => (tokens++, token()) });
      await client.opens();
      for (let n = 0; n < 30; n++) await send(control, `${n}`);
      await client.messages.take(30);
      assert(tokens <= 3, `${tokens} tokens`);
    }
  },
);

Deno.test("A proxy that says at each new token that it runs out does not have the client ask for one after the other", async () => {
  let frames = 0;
  const expiring = '!expiring\n{"in_secs":20}';
  await using server = WsServer.start((socket) => {
    socket.onmessage = () => {
      frames++;
      socket.send(expiring);
    };
    socket.send("!live\n1-0");
    for (let n = 0; n < 50; n++) socket.send(expiring);
    for (let n = 0; n < 50; n++) socket.send(`1-${n + 1}\n${n}`);
    setTimeout(() => socket.send("1-51\nlater"), 200);
  }, { protocol: "wsproxy.resume.v1" });
  let tokens = 0;
  using client = new Watched(server.port, { token: () => mint("s1", { jti: `${tokens++}` }) });
  assert.equal((await client.messages.take(51)).at(-1), "later");
  // One to connect with, and one to renew it; the frames are a ping and that.
  assert(tokens <= 2 && frames <= 2, `${tokens} tokens, ${frames} frames`);
});

Deno.test("A connection that is dead without a word is found out, and replaced at once: a socket by !ping, a stream by its comments", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_PING_INTERVAL_SECS: "1", WS_PING_TIMEOUT_SECS: "60" });
  const control = redis.client();
  await proxy.resumable();
  using relays = new DisposableStack();
  {
    using clients = new DisposableStack();
    const watch = (options: Partial<Options>) => {
      const relay = relays.use(new Relay(proxy.port));
      return { relay, client: clients.use(new Watched(relay.port, options)) };
    };
    const silent = watch({ silenceMs: 100 });
    const woken = watch({});
    const stream = watch({ WebSocket: Blocked });
    for (const { client } of [silent, woken, stream]) await client.opens();
    for (const { relay } of [silent, woken, stream]) relay.freezeAll();
    globalThis.dispatchEvent(new Event("online"));
    await send(control, "meanwhile");
    for (const { client } of [silent, woken, stream]) {
      assert.deepEqual(await client.messages.take(1), ["meanwhile"]);
      assert.deepEqual(client.events.takeAll(), []);
    }
  }
});

onEachEngine("A handler that throws is told of, and skips and repeats nothing, over both ways", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  const positions = [await send(control, "one"), await send(control, "two"), await send(control, "three")];
  for (const [way, options] of ways) {
    const seen: string[] = [];
    const stored: string[] = [];
    using client = new Watched(proxy.port, {
      ...options,
      onMessage(text) {
        seen.push(text);
        throw new Error(`cannot handle ${text}`);
      },
      onPosition: (position) => stored.push(position),
    });
    await eventually("all have come", () => seen.length >= 3);
    await eventually("it is live", () => client.connection.position === positions[2]);
    assert.deepEqual([seen, stored], [["one", "two", "three"], positions], way);
    assert.deepEqual(
      client.errors.map(String),
      seen.map((text) => `Error: cannot handle ${text}`),
      way,
    );
    assert.equal(proxy.proxy.sessions, 1);
  }
});

onEachEngine(
  "After close() inside a handler nothing is delivered, and that message is still to come",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    const positions = [await send(control, "one"), await send(control, "two"), await send(control, "three")];
    for (const [way, options] of ways) {
      const told: string[] = [];
      const client: Watched = new Watched(proxy.port, {
        ...options,
        onMessage(text) {
          told.push(text);
          if (text === "two") client.connection.close();
        },
        onPosition: (position) => told.push(position),
        onLive: () => told.push("live"),
      });
      assert.deepEqual(await client.events.take(1), ["closed 1000"]);
      await proxy.empty();
      assert.deepEqual(told, ["one", positions[0]!, "two"], way);
      assert.equal(client.connection.position, positions[0]);
      assert(client.connection.closed && !client.connection.send('"too late"'));
      using again = new Watched(proxy.port, { ...options, position: client.connection.position });
      assert.deepEqual(await again.messages.take(2), ["two", "three"], way);
    }
  },
);

Deno.test("A server that closes each connection as it opens is dialed ever more slowly, as one that refuses", async () => {
  await using server = WsServer.start((socket) => socket.close(1013, "try again later"));
  // Each wait is a hundredth of what it may be at most.
  const { random } = Math;
  Math.random = () => 0.01;
  try {
    const since = performance.now();
    using _client = new Watched(server.port);
    await eventually("it has dialed eight times", () => server.accepted >= 8);
    // 5, 10, 20, 40, 80, 160 and 300 ms; at the first step alone it would be 35.
    assert(performance.now() - since >= 600, `${performance.now() - since} ms`);
  } finally {
    Math.random = random;
  }
});

Deno.test("A position is a history's until the log has given another one", async () => {
  const urls = new Inbox();
  const protocol = "wsproxy.resume.v1";
  // The connection breaks between a message and `!live`.
  await using server = WsServer.start((socket) => {
    socket.send("2-1\nmessage");
    socket.close(1001, "server is going away");
  }, { protocol });
  class Recording extends WebSocket {
    constructor(url: string | URL, protocols?: string[]) {
      super(url, protocols);
      urls.add(new URL(url).search);
    }
  }
  using client = new Watched(server.port, { position: "1-7", historyLoaded: true, WebSocket: Recording });
  const [first, second] = await urls.take(2);
  assert.match(first!, /resume=1-7&from=history/);
  assert.match(second!, /resume=2-1/);
  assert.doesNotMatch(second!, /history/);
  assert.equal(client.connection.position, "2-1");
});

onEachEngine("A refusal that does not change is told of, and ends it", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await proxy.resumable();
  const wrong = { token: () => mint("another session") };
  const forged = { token: () => mint("s1", {}, "x".repeat(32)) };
  const cases: [string, Partial<Options>, string[]][] = [
    ["a token of another session", wrong, ["closed 4403"]],
    ["a forged token", forged, ["connecting 4401", "closed 4401"]],
    // Nothing there has a close to tell it by: three sockets that do not open lead to a stream, which is refused.
    ["a path that is none", { url: `ws://127.0.0.1:${proxy.port}/agent/none/s1` }, [
      "connecting 4404",
      "closed 4404",
    ]],
    ["a token of another session, over SSE", { ...wrong, WebSocket: Blocked }, ["connecting 4401", "closed 4401"]],
  ];
  for (const [what, options, states] of cases) {
    using client = new Watched(proxy.port, options);
    await client.events.take(1);
    const seen = client.states.takeAll().filter((state) => state !== "connecting" && state !== "connecting 1006");
    assert.deepEqual(seen, states, what);
  }
  // One that another token heals is none of these.
  let tokens = 0;
  using client = new Watched(proxy.port, {
    token: () => (tokens++ === 0 ? forged : { token: () => mint("s1") }).token(),
  });
  await client.opens();
});

onEachEngine(
  "What is submitted is kept until a backend has it: before the open, through cuts, over both ways",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    const backend = await Listener.to(redis, "session:s1:up");
    for (const [way, options] of ways) {
      using relay = new Relay(proxy.port);
      using client = new Watched(relay.port, options);
      const receipts = [client.connection.submit('"before the open"', { id: "first" })];
      assert.deepEqual(await receipts[0], { id: "first", receivers: 1, entered: false }, way);
      await client.opens();
      for (let n = 0; n < 20; n++) {
        receipts.push(client.connection.submit(`${n}`));
        if (n % 7 === 3) {
          relay.cut();
          const before = relay.accepted;
          // It may be open again before a look sees that it was not.
          await eventually("it has come back", () => relay.accepted > before && client.connection.open);
        }
      }
      const ids = (await soon(Promise.all(receipts), "all receipts")).map(({ id }) => id);
      assert.equal(new Set(ids).size, 21);
      assert.equal(client.connection.pending, 0);
      const heard = backend.takeAll();
      for (let n = 0; n < 20; n++) assert(heard.includes(`${n}`), `${way}: ${n} of ${heard}`);
      // What came twice came again in order.
      const once = [...new Set(heard)];
      assert.deepEqual(once, ['"before the open"', ...Array.from({ length: 20 }, (_, n) => `${n}`)], way);
    }
  },
);

onEachEngine("What is not taken rejects with the reason", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await proxy.resumable();
  for (const [way, options] of ways) {
    const client = new Watched(proxy.port, { ...options, maxPending: 1 });
    const reason = (sent: Promise<unknown>) =>
      sent.then(
        () => "taken",
        (error: UnsentError) => error.reason,
      );
    const first = reason(client.connection.submit('"to nobody"'));
    assert.equal(await reason(client.connection.submit('"one too many"')), "full", way);
    assert.equal(await soon(first, "an answer"), "unheard", way);
    assert.equal(await soon(reason(client.connection.submit("no JSON")), "an answer"), "invalid", way);
    assert.equal(await reason(client.connection.submit("{}", { id: "no id" })), "invalid", way);
    const left = reason(client.connection.submit('"left"'));
    client.connection.close();
    assert.equal(await left, "closed", way);
    assert.equal(await reason(client.connection.submit('"too late"')), "closed", way);
    await proxy.empty();
  }
});

Deno.test("An older proxy gets what is submitted by POST, and so does one that is bare", async () => {
  for (const protocol of ["wsproxy.resume.v1", "bearer"]) {
    const posted = new Inbox();
    let refusals = 1;
    await using server = WsServer.start(
      (socket) => {
        socket.onmessage = () => socket.send('!error\n{"error":"Unknown command"}');
        if (protocol === "wsproxy.resume.v1") socket.send("!live\n1-0");
      },
      {
        protocol,
        async post(request) {
          if (refusals-- > 0) return new Response("Redis is unavailable", { status: 503 });
          posted.add(await request.text());
          return Response.json({ receivers: 1 }, { status: 202 });
        },
      },
    );
    using client = new Watched(server.port);
    const sent = ["1", "2", "3"].map((text) => client.connection.submit(text));
    assert.deepEqual(await posted.take(3), ["1", "2", "3"]);
    assert.equal((await soon(Promise.all(sent), "receipts")).length, 3);
    assert.match(String(client.errors), /not sent yet: 503 Redis is unavailable/);
  }
});

Deno.test("A post that is not answered is told of, and tried again", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const backend = await Listener.to(redis, "session:s1:up");
  let posts = 0;
  const hangsOnce: typeof fetch = (url, init) => {
    if (init?.method !== "POST" || posts++ > 0) return fetch(url, init);
    return new Promise((_, reject) => init.signal?.addEventListener("abort", () => reject(init.signal?.reason)));
  };
  {
    using client = new Watched(proxy.port, { WebSocket: Blocked, fetch: hangsOnce, timeoutMs: 300 });
    const { receivers } = await soon(client.connection.submit('"up"'), "a receipt");
    assert.equal(receivers, 1);
    assert.deepEqual(await backend.take(1), ['"up"']);
    assert.match(String(client.errors), /no answer to a post/);
  }
});

onEachEngine(
  "A page that is loaded again for each gap is loaded again once, and goes on from where the log does",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    for (const [way, options] of ways) {
      const stored = { position: await send(control, "of a former log") };
      await control.del(down);
      if (way === "SSE") await send(control, "of the present one");
      const visits: Watched[] = [];
      const { promise: live, resolve } = Promise.withResolvers<void>();
      const load = () => {
        visits.at(-1)?.connection.close();
        const visit = visits.length;
        visits.push(
          new Watched(proxy.port, {
            ...options,
            position: stored.position,
            onPosition: (position) => (stored.position = position),
            onGap: () => visits.length < 20 && load(),
            onLive: () => visit === visits.length - 1 && resolve(),
          }),
        );
      };
      load();
      await soon(live, "it is live");
      assert.equal(visits.length, 2, way);
      if (way === "SSE") assert.deepEqual(await visits.at(-1)!.messages.take(1), ["of the present one"]);
      visits.at(-1)!.connection.close();
      await control.del(down);
    }
  },
);

onEachEngine(
  "The position of a history that was just loaded is no gap when its log has expired, and one when it goes on",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    for (const [way, options] of ways) {
      const position = await send(control, "yesterday");
      await control.del(down);
      {
        using client = new Watched(proxy.port, { ...options, position, historyLoaded: true });
        await client.opens();
        await eventually("it has the new log's position", () => client.connection.position !== position);
        await send(control, "today");
        assert.deepEqual(await client.messages.take(1), ["today"]);
        assert.deepEqual(client.events.takeAll(), [], way);
      }
      await control.del(down);
    }
  },
);

Deno.test("A runtime without WebSocket says so, and takes Server-Sent Events where it may", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  await proxy.resumable();
  await send(redis.client(), "first");
  const { WebSocket } = globalThis;
  Reflect.deleteProperty(globalThis, "WebSocket");
  try {
    using client = new Watched(proxy.port);
    assert.deepEqual(await client.messages.take(1), ["first"]);
    assert.match(String(client.errors), /no WebSocket: give one as the option WebSocket/);
    using other = new Watched(proxy.port, { sse: false });
    assert.deepEqual(await other.events.take(1), ["closed 1006"]);
    assert.equal(other.errors.length, 1);
  } finally {
    globalThis.WebSocket = WebSocket;
  }
});
