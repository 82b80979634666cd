/** Clients that resume from a session's log. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import type { Client } from "../harness/client.ts";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { handshake } from "../harness/wire.ts";

const down = (session: string) => `session:${session}:down`;
const nowSecs = () => Math.floor(Date.now() / 1000);

/** What a backend calls in place of PUBLISH. */
async function send(redis: Redis, session: string, ...args: string[]): Promise<[position: string, receivers: number]> {
  return await redis.call("FCALL", "wsproxy_send", 1, down(session), ...args) as [string, number];
}

/** Sends so many messages, and returns the frames that a resuming client gets. */
async function sendMany(redis: Redis, session: string, count: number, first = 0): Promise<string[]> {
  const frames: string[] = [];
  for (let n = first; n < first + count; n++) frames.push(`${(await send(redis, session, `m${n}`))[0]}\nm${n}`);
  return frames;
}

const positionOf = (frame: string) => frame.slice(0, frame.indexOf("\n"));

/** The frames up to `!live`, without it. */
async function untilLive(client: Client): Promise<string[]> {
  const frames: string[] = [];
  while (true) {
    const frame = await client.next();
    if (frame.startsWith("!live\n")) return frames;
    frames.push(frame);
  }
}

onEachEngine(
  "What came before the client, or while it was away, is read from the log, once and in order",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    const before = await sendMany(control, "s1", 50);
    let last: string;
    {
      await using client = await proxy.connect("s1", { resume: "0" });
      assert.equal(client.socket.protocol, "wsproxy.resume.v1");
      assert.deepEqual(await untilLive(client), before);
      const live = await sendMany(control, "s1", 10, 50);
      assert.deepEqual(await client.take(10), live);
      last = positionOf(live.at(-1)!);
    }
    const away = await sendMany(control, "s1", 500, 60);
    await using client = await proxy.connect("s1", { resume: last });
    assert.deepEqual(await untilLive(client), away);
    const live = await sendMany(control, "s1", 3, 560);
    assert.deepEqual(await client.take(3), live);
    await proxy.counts('wsproxy_resumes_total{result="complete"}', 2);
  },
);

onEachEngine("A new session has an empty log, whose first message is no hole", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  await using client = await proxy.connect("s1", { resume: "0" });
  const live = await client.next();
  assert.match(live, /^!live\n\d+-0$/);
  const frames = await sendMany(control, "s1", 2);
  assert.match(frames[0]!, /^\d+-1\nm0$/);
  assert.deepEqual(await client.take(2), frames);
  await using again = await proxy.connect("s1", { resume: live.slice("!live\n".length) });
  assert.deepEqual(await untilLive(again), frames);
});

onEachEngine(
  "A bare client gets the payloads, and a resuming one is told which messages are in no log",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    await using bare = await proxy.connect("s1");
    await using resuming = await proxy.connect("s1", { resume: "0" });
    await untilLive(resuming);
    const [frame] = await sendMany(control, "s1", 1);
    await control.publish(down("s1"), "plain");
    const texts = ["", "grüße 💡", "\n", "!live\n1-1", "a\u0000b"];
    const logged: string[] = [];
    for (const text of texts) logged.push(`${(await send(control, "s1", text))[0]}\n${text}`);
    assert.deepEqual(await bare.take(2 + texts.length), ["m0", "plain", ...texts]);
    assert.deepEqual(await resuming.take(2 + texts.length), [frame, "\nplain", ...logged]);
    // What only looks like an envelope is the backend's business.
    for (const bytes of [[0xff], [0xff, 10], [0xff, 0x31, 10], [0xff, 0x31, 0x2d, 0x31], [0xff, 0x30, 10, 0x61]]) {
      await control.publish(down("s1"), Buffer.from(bytes));
      const text = new TextDecoder().decode(new Uint8Array(bytes));
      assert.equal(await bare.next(), text);
      assert.equal(await resuming.next(), `\n${text}`);
    }
  },
);

for (
  const [what, harm, reason] of [
    ["trimmed", (redis: Redis) => redis.xtrim(down("s1"), "MAXLEN", 3), "trimmed"],
    ["deleted", (redis: Redis) => redis.del(down("s1")), "lost"],
    ["flushed", (redis: Redis) => redis.flushall(), "lost"],
    ["emptied", (redis: Redis) => redis.xtrim(down("s1"), "MAXLEN", 0), "lost"],
  ] as const
) {
  onEachEngine(
    `A log that was ${what} while the client was away is a gap, told before what it still holds`,
    async (engine) => {
      await using redis = await RedisServer.start();
      await using proxy = await TestProxy.start(redis, engine);
      const control = redis.client();
      await proxy.resumable();
      const frames = await sendMany(control, "s1", 20);
      await harm(control);
      const after = await sendMany(control, "s1", 2, 20);
      await using client = await proxy.connect("s1", { resume: positionOf(frames[4]!) });
      const { position, ...gap } = gapOf(await client.next());
      assert.deepEqual(gap, { reason });
      const kept = reason === "trimmed" ? frames.slice(-3) : [];
      assert.deepEqual(await untilLive(client), [...kept, ...after]);
      const live = await sendMany(control, "s1", 2, 22);
      assert.deepEqual(await client.take(2), live);
      await proxy.counts(`wsproxy_resumes_total{result="${reason}"}`, 1);
      // The position that the gap names is one from which there is no gap, and the same messages follow.
      await using again = await proxy.connect("s1", { resume: position });
      assert.deepEqual(await untilLive(again), [...kept, ...after, ...live]);
    },
  );
}

/** What a gap says. */
function gapOf(frame: string): { reason: string; position: string } {
  assert(frame.startsWith("!gap\n"), frame);
  return JSON.parse(frame.slice("!gap\n".length));
}

/** A page that stores each position it is told, and loads itself again at a gap. */
async function page(proxy: TestProxy, stored: string, query = ""): Promise<{ loads: number; frames: string[] }> {
  for (let loads = 1;; loads++) {
    assert(loads < 5, "it loads itself again and again");
    await using client = await proxy.connect("s1", { resume: `${stored}${query}` });
    const frames: string[] = [];
    let frame = await client.next();
    for (; !/^!(live|gap)\n/.test(frame); frame = await client.next()) {
      frames.push(frame);
      stored = positionOf(frame);
    }
    if (frame.startsWith("!live\n")) return { loads, frames };
    stored = gapOf(frame).position;
  }
}

for (
  const [what, harm, kept] of [
    ["trimmed", (redis: Redis) => redis.xtrim(down("s1"), "MAXLEN", 3), 3],
    ["deleted", (redis: Redis) => redis.del(down("s1")), 0],
    ["deleted, and has a mark by now", async (redis: Redis) => {
      await redis.del(down("s1"));
      await redis.call("FCALL", "wsproxy_open", 1, down("s1"));
    }, 0],
  ] as const
) {
  for (const more of [0, 2]) {
    onEachEngine(
      `A page that loads itself again at a gap does so once: the log was ${what}, and has ${more} more`,
      async (engine) => {
        await using redis = await RedisServer.start();
        await using proxy = await TestProxy.start(redis, engine);
        const control = redis.client();
        await proxy.resumable();
        const sent = await sendMany(control, "s1", 10);
        await harm(control);
        const after = await sendMany(control, "s1", more, 10);
        const { loads, frames } = await page(proxy, positionOf(sent[2]!));
        assert.equal(loads, 2);
        assert.deepEqual(frames, [...kept > 0 ? sent.slice(-kept) : [], ...after]);
      },
    );
  }
}

onEachEngine(
  "A position of a history is none of a gap when its log has expired, and is one when it was trimmed",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    const yesterday = await sendMany(control, "s1", 10);
    const stored = positionOf(yesterday.at(-1)!);
    // Of a log that still has it, it is a position as any other.
    assert.deepEqual(await page(proxy, positionOf(yesterday[7]!), "&from=history"), {
      loads: 1,
      frames: yesterday.slice(8),
    });
    await control.del(down("s1"));
    // There is no log, then one with a mark only.
    for (let n = 0; n < 2; n++) {
      assert.deepEqual(await page(proxy, stored, "&from=history"), { loads: 1, frames: [] });
    }
    // Then one with a mark and messages, and one that has lost its mark.
    const today = await sendMany(control, "s1", 5, 10);
    for (let n = 0; n < 2; n++) {
      assert.deepEqual(await page(proxy, stored, "&from=history"), { loads: 1, frames: today });
      await control.xtrim(down("s1"), "MAXLEN", 5);
    }
    {
      await using client = await proxy.connect("s1", { resume: stored });
      gapOf(await client.next());
    }
    await control.xtrim(down("s1"), "MAXLEN", 4);
    assert.deepEqual(await page(proxy, stored, "&from=history"), { loads: 2, frames: today.slice(1) });
    // Only the first time: what vanishes under the connection itself is a gap.
    await using client = await proxy.connect("s1", { resume: `${positionOf(today.at(-1)!)}&from=history` });
    await untilLive(client);
    await control.multi().client("KILL", "TYPE", "pubsub").flushall().exec();
    assert.equal(gapOf(await client.next()).reason, "lost");
    const headers = { ...await handshake("s1"), "Sec-WebSocket-Protocol": "wsproxy.resume.v1" };
    assert.equal((await proxy.request("/agent/ws/s1?resume=0&from=yesterday", { headers })).status, 400);
  },
);

onEachEngine("An entry that was taken out of a log is a gap where it was", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  const frames = await sendMany(control, "s1", 10);
  await control.xdel(down("s1"), positionOf(frames[5]!));
  await using client = await proxy.connect("s1", { resume: "0" });
  const [ms] = positionOf(frames[6]!).split("-");
  const position = `${ms}-6`;
  const gap = `!gap\n{"reason":"trimmed","position":"${position}"}`;
  assert.deepEqual(await untilLive(client), [...frames.slice(0, 5), gap, ...frames.slice(6)]);
  await using again = await proxy.connect("s1", { resume: position });
  assert.deepEqual(await untilLive(again), frames.slice(6));
});

for (
  const [what, harm] of [
    ["expires", (redis: Redis) => redis.pexpire(down("s1"), 1)],
    ["is deleted", (redis: Redis) => redis.del(down("s1"))],
    ["is flushed", (redis: Redis) => redis.flushall()],
    ["is emptied", (redis: Redis) => redis.xtrim(down("s1"), "MAXLEN", 0)],
  ] as const
) {
  onEachEngine(`A log that ${what} under a live client, which has missed nothing, is no gap`, async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    await using client = await proxy.connect("s1", { resume: "0" });
    await untilLive(client);
    const before = await sendMany(control, "s1", 3);
    assert.deepEqual(await client.take(3), before);
    await harm(control);
    await eventually("it is gone", async () => await control.xlen(down("s1")) === 0);
    const after = await sendMany(control, "s1", 2, 3);
    assert.match(after[0]!, /^\d+-1\n/);
    assert.deepEqual(await client.take(2), after);
    // The same again, with another client that opens the new log before anything is in it.
    await harm(control);
    await eventually("it is gone again", async () => await control.xlen(down("s1")) === 0);
    await using other = await proxy.connect("s1", { resume: "0" });
    assert.deepEqual(await untilLive(other), []);
    const last = await sendMany(control, "s1", 2, 5);
    for (const each of [client, other]) assert.deepEqual(await each.take(2), last);
    // From where it is now it can resume.
    await using again = await proxy.connect("s1", { resume: positionOf(last[0]!) });
    assert.deepEqual(await untilLive(again), last.slice(1));
  });
}

onEachEngine(
  "A log that vanishes while the proxy is not subscribed is a gap: something may be missing",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    await using client = await proxy.connect("s1", { resume: "0" });
    await untilLive(client);
    const before = await sendMany(control, "s1", 1);
    assert.deepEqual(await client.take(1), before);
    await control.multi().client("KILL", "TYPE", "pubsub").flushall().exec();
    assert.equal(gapOf(await client.next()).reason, "lost");
    assert.deepEqual(await untilLive(client), []);
    const after = await sendMany(control, "s1", 2, 1);
    assert.deepEqual(await client.take(2), after);
  },
);

onEachEngine(
  "After a break in the connection to Redis a client gets what was logged meanwhile, and no notice",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    await proxy.resumable();
    await using client = await proxy.connect("s1", { resume: "0" });
    await untilLive(client);
    const sent: string[] = [];
    for (let round = 0; round < 5; round++) {
      await control.client("KILL", "TYPE", "pubsub");
      sent.push(...await sendMany(control, "s1", 20, round * 20));
    }
    const got: string[] = [];
    while (got.length < sent.length) {
      const frame = await client.next();
      if (!frame.startsWith("!live")) got.push(frame);
    }
    assert.deepEqual(got, sent);
  },
);

onEachEngine("A message that is sent again with its nonce is logged and delivered once", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  await using client = await proxy.connect("s1", { resume: "0" });
  await untilLive(client);
  const [position, receivers] = await send(control, "s1", "once", "nonce-1");
  assert.equal(receivers, 1);
  assert.deepEqual(await send(control, "s1", "once", "nonce-1"), [position, 0]);
  const [next] = await send(control, "s1", "next", "nonce-2");
  assert.deepEqual(await client.take(2), [`${position}\nonce`, `${next}\nnext`]);
});

onEachEngine("wsproxy_close ends a session's sockets after what was sent before it", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  const before = await sendMany(control, "s1", 100);
  const [bare, resuming] = [await proxy.connect("s1"), await proxy.connect("s1", { resume: "0" })];
  const [last] = await sendMany(control, "s1", 1, 100);
  assert.equal(await control.call("FCALL", "wsproxy_close", 1, down("s1"), 4403, "banned"), 1);
  for (const client of [bare, resuming]) assert.deepEqual(await client.ended(), { code: 4403, reason: "banned" });
  assert.deepEqual(bare.arrived(), ["m100"]);
  assert.deepEqual(resuming.arrived().filter((frame) => !frame.startsWith("!live")), [...before, last]);
  for (const args of [["1001", ""], ["5000", ""], ["x", ""], ["4000", "x".repeat(124)], []]) {
    await assert.rejects(control.call("FCALL", "wsproxy_close", 1, down("s1"), ...args), /ERR/);
  }
});

onEachEngine(
  "A resuming client hears of mistakes, and of messages that no backend took",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    await using client = await proxy.connect("s1", { resume: "0" });
    assert.match(await client.next(), /^!live\n/);
    client.send('"to nobody"');
    assert.equal(await client.next(), '!unheard\n{"messages":1}');
    const backend = await Listener.to(redis, "session:s1:up");
    client.send('"heard"');
    assert.deepEqual(await backend.take(1), ['"heard"']);
    client.send("no JSON");
    assert.equal(await client.next(), '!error\n{"error":"Invalid JSON format"}');
    client.send("!what\n");
    assert.equal(await client.next(), '!error\n{"error":"Unknown command"}');
    client.send(`!token\n${await mint("s2")}`);
    assert.equal(await client.next(), '!error\n{"error":"Invalid token","reason":"the token is not for this session"}');
  },
);

onEachEngine(
  "A client is told once of each end that its token has, when half of a short one is over",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    const expiry = async (client: Client) => {
      const [, secs] = /^!expiring\n\{"in_secs":(\d+)\}$/.exec(await client.next()) ?? [];
      return Number(secs);
    };
    const startMs = Date.now();
    await using client = await proxy.connect("s1", { resume: "0", claims: { exp: nowSecs() + 3 } });
    await untilLive(client);
    // What comes at once is the pong, and nothing of an end.
    client.send("!ping\n1");
    assert.equal(await client.next(), "!pong\n1");
    assert([1, 2].includes(await expiry(client)));
    assert(Date.now() - startMs > 800);
    // The same end again is none that is told, and the socket's end is still the token's.
    const exp = nowSecs() + 3;
    const token = await mint("s1", { exp });
    for (let n = 0; n < 20; n++) client.send(`!token\n${token}`);
    assert([1, 2].includes(await expiry(client)));
    for (let n = 0; n < 20; n++) client.send(`!token\n${token}`);
    client.send("!ping\n2");
    assert.equal(await client.next(), "!pong\n2");
    assert.deepEqual(await client.ended(), { code: 4401, reason: "token expired" });
    assert.deepEqual(client.arrived(), []);
    assert(Date.now() >= exp * 1000);
  },
);

onEachEngine("A ping is answered at once, also while Redis is away", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, REDIS_OUTAGE_GRACE_SECS: "30" });
  await proxy.resumable();
  await using client = await proxy.connect("s1", { resume: "0" });
  await using bare = await proxy.connect("s2");
  await untilLive(client);
  redis.signal("SIGSTOP");
  for (const text of ["", "1", "a\nb", "💡".repeat(32), "x".repeat(64)]) {
    client.send(`!ping\n${text}`);
    assert.equal(await client.next(), `!pong\n${text}`);
  }
  client.send("!ping");
  assert.equal(await client.next(), "!pong\n");
  client.send(`!ping\n${"x".repeat(65)}`);
  assert.equal(await client.next(), '!error\n{"error":"A ping is too long","max_length":64}');
  for (const unknown of ["!pings\nx", "!", "!\nping", "!PING\n"]) {
    client.send(unknown);
    assert.equal(await client.next(), '!error\n{"error":"Unknown command"}');
  }
  // To a bare client it is a message as any other, and this one is no JSON.
  bare.send("!ping\nx");
  assert.equal(await bare.next(), '{"error":"Invalid JSON format"}');
  redis.signal("SIGCONT");
});

onEachEngine("A ping counts for the rate limit", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_MESSAGES_PER_SEC: "5" });
  await proxy.resumable();
  await using client = await proxy.connect("s1", { resume: "0" });
  for (let n = 0; n < 50; n++) client.send("!ping\n");
  assert.deepEqual(await client.ended(), { code: 1008, reason: "client too fast" });
});

onEachEngine("A malformed position is a 400, and without functions a resuming client is a bare one", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  {
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    const headers = { ...await handshake("s1"), "Sec-WebSocket-Protocol": "wsproxy.resume.v1" };
    for (const resume of ["x", "1", "-1", "1-", "1-2-3", "1.5-2", "9".repeat(40)]) {
      assert.equal((await proxy.request(`/agent/ws/s1?resume=${resume}`, { headers })).status, 400, resume);
    }
    await proxy.empty();
  }
  await control.call("ACL", "SETUSER", "proxy", "on", ">password", "+@all", "-fcall", "~*", "&*");
  await using proxy = await TestProxy.start(redis.url.replace("redis://", "redis://proxy:password@"), engine);
  await using client = await proxy.connect("s1", { protocols: ["wsproxy.resume.v1", "bearer", await mint("s1")] });
  assert.equal(client.socket.protocol, "bearer");
  await send(control, "s1", "hello");
  assert.equal(await client.next(), "hello");
});

onEachEngine("A log of large messages is read in pages that a slow client's buffer holds", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "2000000" });
  const control = redis.client();
  await proxy.resumable();
  const texts: string[] = [];
  for (let n = 0; n < 100; n++) {
    texts.push(`${n} ${"x".repeat(200_000)}`);
    await send(control, "s1", texts.at(-1)!);
  }
  await using client = await proxy.connect("s1", { resume: "0" });
  const frames = await untilLive(client);
  assert.deepEqual(frames.map((frame) => frame.slice(frame.indexOf("\n") + 1)), texts);
  assert.equal(await proxy.metric('wsproxy_closed_total{code="1008"}'), 0);
});
