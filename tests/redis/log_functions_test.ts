/** What backends and proxies get from the functions in src/redis/log.lua, on a real server. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import { Redis } from "ioredis";
import { parseEnvelope, parsePosition } from "../../src/redis/log_entry.ts";
import { type LibraryOptions, renderLibrary } from "../../src/redis/log_library.ts";
import { kept, Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually, soon } from "../harness/wait.ts";
import { writeAll } from "../harness/wire.ts";

const settings = { maxMessages: 4096, ttlMs: 3_600_000, maxMessageBytes: 1_048_576, sharded: false, startedMs: 0 };
const key = "session:s1:down";

type Sent = [position: string, receivers: number];
type Text = string | Buffer;
/** Whatever sends commands: a connection, or a pipeline of one. */
type Commands = { call(command: string, ...args: (Text | number)[]): unknown };

const send = (redis: Redis, payload: Text, nonce?: string, to = key) =>
  redis.call("FCALL", "wsproxy_send", 1, to, payload, ...nonce === undefined ? [] : [nonce]) as Promise<Sent>;
/** As a writer of an epoch. */
const write = (redis: Redis, payload: Text, nonce: string, epoch: Text | number, to = key) =>
  redis.call("FCALL", "wsproxy_send", 1, to, payload, nonce, epoch) as Promise<Sent>;
type Begun = [position: string, receivers: number, epoch: number];
const begin = (redis: Redis, payload: Text, nonce: string, ...epoch: (Text | number)[]) =>
  redis.call("FCALL", "wsproxy_begin", 1, key, payload, nonce, ...epoch) as Promise<Begun>;
const open = (redis: Redis, to = key) => redis.call("FCALL", "wsproxy_open", 1, to) as Promise<string>;
const close = (redis: Redis, code: Text | number, reason: Text, to = key) =>
  redis.call("FCALL", "wsproxy_close", 1, to, code, reason) as Promise<number>;

async function load(redis: Redis, changes: Partial<LibraryOptions> = {}): Promise<void> {
  await redis.call("FUNCTION", "LOAD", "REPLACE", renderLibrary({ ...settings, ...changes }));
}

/** A server with the library, and a connection to it. */
async function start(changes: Partial<LibraryOptions> = {}, ...args: string[]) {
  const redis = await RedisServer.start(...args);
  const client = redis.client();
  await load(client, changes);
  return { redis, client, [Symbol.asyncDispose]: () => redis[Symbol.asyncDispose]() };
}

/** The whole log: ids and payloads, a byte in each character. */
async function entries(redis: Redis, of = key): Promise<[id: string, payload: string][]> {
  const rows = await redis.xrangeBuffer(of, "-", "+");
  return rows.map(([id, fields]) => [id.toString(), fields[1]!.toString("latin1")]);
}

/** Whether the log has that very position: what a reader looks for first. */
const has = async (redis: Redis, position: string) => (await redis.xrange(key, position, position)).length > 0;
const at = (position: string) => parsePosition(position)!;
const numbers = (count: number) => Array.from({ length: count }, (_, i) => i + 1);
const bytes = (text: string) => Buffer.from(text, "latin1");

/** What a listener heard: an envelope, taken apart. */
function unwrap(heard: string): [position: string, payload: string] {
  const envelope = parseEnvelope(bytes(heard));
  assert(envelope?.kind === "logged");
  return [`${envelope.position.ms}-${envelope.position.n}`, heard.slice(envelope.payloadAt)];
}

/** What a listener heard: a command, taken apart. */
function order(heard: string): [name: string, data: unknown] {
  const envelope = parseEnvelope(bytes(heard));
  assert(envelope?.kind === "command");
  return [envelope.name, JSON.parse(envelope.json)];
}

/** The time on the server, in milliseconds. */
async function serverMs(redis: Redis): Promise<number> {
  const [seconds, micros] = await redis.time();
  return Number(seconds) * 1000 + Math.floor(Number(micros) / 1000);
}

Deno.test("A message is logged and published under one position, which counts from 1", async () => {
  await using server = await start();
  const { redis, client } = server;
  const before = await serverMs(client);
  const first = await send(client, "one");
  const backend = await Listener.to(redis, key, "latin1");
  const second = await send(client, "two");
  const after = await serverMs(client);
  assert.deepEqual([first[1], second[1]], [0, 1], "receivers");
  const [one, two] = [at(first[0]), at(second[0])];
  assert.deepEqual([one.n, two.n], [1, 2]);
  assert(before <= one.ms && one.ms <= two.ms && two.ms <= after + 1);
  assert.deepEqual(await backend.take(1), [`\xff${second[0]}\ntwo`]);
  assert.deepEqual(await client.xrange(key, "-", "+"), [[first[0], ["d", "one"]], [second[0], [
    "d",
    "two",
  ]]]);
});

Deno.test("A payload arrives and is kept to the byte, whatever it is", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const texts = ["", "\0", "\xff", "\xff\xff!close\n{}", "\n", "\r\n$1", "\xc3", "é", "x".repeat(100_000)];
  const check = async (payload: Uint8Array) => {
    const [position] = await send(client, Buffer.from(payload));
    const expected = [position, Buffer.from(payload).toString("latin1")];
    const [heard = ""] = await listener.take(1);
    assert.deepEqual(unwrap(heard), expected);
    assert.deepEqual((await entries(client)).at(-1), expected);
    await client.del(key);
  };
  for (const text of texts) await check(bytes(text));
  await fc.assert(fc.asyncProperty(fc.uint8Array({ maxLength: 300 }), check), { numRuns: 200 });
});

Deno.test("The largest message is taken, and one byte more is refused before anything is written", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  await assert.rejects(send(client, Buffer.alloc(1_048_577)), {
    message: "ERR wsproxy_send: a payload may have 1048576 bytes (LOG_MAX_MESSAGE_BYTES): this one has 1048577",
  });
  assert.equal(await client.exists(key), 0);
  const [position] = await send(client, Buffer.alloc(1_048_576, 7));
  await load(client, { maxMessageBytes: 8_000_000 });
  await send(client, Buffer.alloc(8_000_000, 7));
  const [first = "", second = ""] = await listener.take(2);
  assert.equal(unwrap(first)[0], position);
  assert.deepEqual([first, second].map((heard) => unwrap(heard)[1].length), [1_048_576, 8_000_000]);
});

Deno.test("A message that is sent again with its nonce is neither logged nor published again", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const [position] = await send(client, "one", "a");
  assert.deepEqual(await send(client, "one", "a"), [position, 0]);
  assert.equal((await send(client, "two", "b"))[1], 1);
  assert.equal((await send(client, "two", ""))[1], 1, "an empty nonce is none");
  assert.equal((await send(client, "two", ""))[1], 1);
  assert.equal((await send(client, "three", "b"))[1], 1, "only the last message counts");
  const heard = await listener.take(5);
  assert.equal(listener.waiting, 0);
  assert.deepEqual(heard.map(unwrap), await entries(client));
  await client.del(key);
  await open(client);
  assert.equal(at((await send(client, "one", "b"))[0]).n, 1, "the mark has no nonce");
});

Deno.test("A begin opens the next epoch, every entry carries the one in force, and epoch 0 costs no field", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  await send(client, "before", "a");
  assert.deepEqual((await begin(client, "first", "b")).slice(1), [1, 1]);
  await send(client, "no nonce, no epoch");
  await write(client, "a writer", "c", 1);
  await write(client, "a writer without a nonce", "", 1);
  const [position, receivers, epoch] = await begin(client, "second", "d");
  assert.deepEqual([receivers, epoch], [1, 2]);
  await send(client, "after", "e");
  const log = await client.xrange(key, "-", "+");
  assert.deepEqual(log.map(([, fields]) => fields), [
    ["d", "before", "k", "a"],
    ["d", "first", "k", "b", "e", "1"],
    ["d", "no nonce, no epoch", "k", "", "e", "1"],
    ["d", "a writer", "k", "c", "e", "1"],
    ["d", "a writer without a nonce", "k", "", "e", "1"],
    ["d", "second", "k", "d", "e", "2"],
    ["d", "after", "k", "e", "e", "2"],
  ]);
  assert.equal(log[5]![0], position);
  assert.deepEqual((await listener.take(7)).map(unwrap), await entries(client));
});

Deno.test("A writer of another epoch is refused, and nothing is written or published", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const fenced = (what: string, inForce: number, writers: number | string) => ({
    message: `FENCED wsproxy_${what}: the epoch in force is ${inForce}: this writer's is ${writers}`,
  });
  await assert.rejects(write(client, "x", "a", 1), fenced("send", 0, 1));
  assert.equal(await client.exists(key), 0);
  await write(client, "in epoch 0", "a", 0);
  const [, , first] = await begin(client, "first", "b");
  await write(client, "one", "c", first);
  const [, , second] = await begin(client, "second", "d");
  for (const [epoch, nonce] of [[first, "e"], [first, ""], [0, "e"], [3, "e"], [20, "e"]] as const) {
    await assert.rejects(write(client, "x", nonce, epoch), fenced("send", second, epoch));
  }
  await assert.rejects(write(client, "x", "d", first), fenced("send", second, first), "the nonce of another epoch");
  await assert.rejects(begin(client, "x", "f", first), fenced("begin", second, first));
  assert.equal((await send(client, "no epoch"))[1], 1, "is never refused");
  assert.equal((await write(client, "two", "g", second))[1], 1);
  assert.equal((await begin(client, "third", "h", second))[2], 3);
  const heard = (await listener.take(7)).map(unwrap);
  assert.equal(listener.waiting, 0);
  assert.deepEqual(heard, await entries(client));
});

Deno.test("What is sent again with its nonce has the answer that it had, and does nothing", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  await begin(client, "first", "a");
  for (const epoch of [[], [1]]) {
    const nonce = `b${epoch}`;
    const [position, , begun] = await begin(client, "second", nonce, ...epoch.map(() => 2));
    assert.deepEqual(await begin(client, "second", nonce, ...epoch.map(() => 2)), [position, 0, begun]);
    const [sent] = await write(client, "word", "c", begun);
    assert.deepEqual(await write(client, "word", "c", begun), [sent, 0]);
  }
  assert.equal((await entries(client)).length, 5);
  assert.equal((await listener.take(5)).length, 5);
  assert.equal(listener.waiting, 0);
});

Deno.test("A begin whose answer is lost with the connection opens one epoch", async () => {
  await using server = await start();
  const { redis, client } = server;
  using relay = new Relay(redis.port);
  relay.budgets = [{ down: 4 }];
  const backend = new Redis(relay.url, { enableReadyCheck: false, disableClientInfo: true });
  backend.on("error", () => {});
  try {
    const [position, , epoch] = await soon(begin(backend, "once", "a"), "an answer");
    assert.equal(relay.accepted, 2);
    assert.deepEqual([at(position).n, epoch], [1, 1]);
    assert.equal(await client.xlen(key), 1);
  } finally {
    const ended = new Promise((resolve) => backend.once("end", resolve));
    backend.disconnect();
    await ended;
  }
});

Deno.test("Begins at once open one epoch each, and of those that name the epoch in force one wins", async () => {
  await using server = await start();
  const { redis, client } = server;
  const writers = numbers(8).map(() => redis.client());
  const begun = await Promise.all(numbers(400).map((i) => begin(writers[i % 8]!, "x", `n${i}`)));
  assert.deepEqual(begun.map(([, , epoch]) => epoch).sort((a, b) => a - b), numbers(400));
  const log = await client.xrange(key, "-", "+");
  assert.deepEqual(log.map(([, fields]) => Number(fields[5])), numbers(400));
  const races = await Promise.allSettled(writers.map((writer, i) => begin(writer, "x", `race ${i}`, 400)));
  const won = races.filter(({ status }) => status === "fulfilled");
  assert.equal(won.length, 1);
});

Deno.test("An epoch is that of the last entry: it outlives a trim, and neither the end of its log nor a mark", async () => {
  await using server = await start({ maxMessages: 5, ttlMs: 60_000 });
  const { client } = server;
  await open(client);
  assert.equal((await begin(client, "on a mark", "a"))[2], 1);
  await Promise.all(numbers(500).map((i) => write(client, String(i), "", 1)));
  assert(await client.xlen(key) < 200, "the begin has been trimmed away");
  assert.equal((await begin(client, "second", "b"))[2], 2);
  await client.del(key);
  await assert.rejects(write(client, "x", "c", 2), /^ReplyError: FENCED /);
  assert.equal(await client.exists(key), 0);
  await open(client);
  await assert.rejects(write(client, "x", "c", 2), /^ReplyError: FENCED /);
  assert.equal((await write(client, "a new log", "", 0))[1], 0);
  await client.xtrim(key, "MAXLEN", 0);
  await assert.rejects(write(client, "x", "c", 2), /^ReplyError: FENCED /);
  assert.equal((await begin(client, "anew", "d"))[2], 1);
});

Deno.test("A nonce may have any bytes, but not more than 128", async () => {
  await using server = await start();
  const { client } = server;
  await fc.assert(
    fc.asyncProperty(fc.uint8Array({ minLength: 1, maxLength: 128 }), async (nonce) => {
      const once = () => client.call("FCALL", "wsproxy_send", 1, key, "x", Buffer.from(nonce)) as Promise<Sent>;
      const [position] = await once();
      assert.equal((await once())[0], position);
      assert.notEqual((await send(client, "x"))[0], position);
    }),
    { numRuns: 50 },
  );
  await send(client, "x", "n".repeat(128));
  await assert.rejects(send(client, "x", "n".repeat(129)), {
    message: "ERR wsproxy_send: a nonce may have 128 bytes: this one has 129",
  });
});

Deno.test("A message whose answer is lost with the connection is logged once with a nonce, and twice without", async () => {
  await using server = await start();
  const { redis, client } = server;
  for (const nonce of ["a", undefined]) {
    using relay = new Relay(redis.port);
    // The first connection is cut within the first answer; ioredis connects again, and sends again.
    relay.budgets = [{ down: 4 }];
    const backend = new Redis(relay.url, { enableReadyCheck: false, disableClientInfo: true });
    backend.on("error", () => {});
    try {
      const [position] = await soon(send(backend, "once", nonce), "an answer");
      assert.equal(relay.accepted, 2);
      assert.equal(at(position).n, nonce ? 1 : 2);
      assert.equal(await client.xlen(key), nonce ? 1 : 2);
    } finally {
      const ended = new Promise((resolve) => backend.once("end", resolve));
      backend.disconnect();
      await ended;
    }
    await client.del(key);
  }
});

Deno.test("Many senders at once leave no hole, and what is published has the order of the log", async () => {
  await using server = await start({ maxMessages: 100_000 });
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const senders = numbers(16).map(() => redis.client());
  await Promise.all(
    senders.map(async (sender, name) => {
      for (const batch of numbers(10)) await Promise.all(numbers(20).map((i) => send(sender, `${name} ${batch} ${i}`)));
    }),
  );
  const log = await entries(client);
  assert.deepEqual(log.map(([position]) => at(position).n), numbers(16 * 10 * 20));
  assert.deepEqual((await listener.take(log.length)).map(unwrap), log);
  // Of one sender, in the order in which it has sent.
  const own = log.map(([, payload]) => payload).filter((payload) => payload.startsWith("3 "));
  assert.deepEqual(own, numbers(10).flatMap((batch) => numbers(20).map((i) => `3 ${batch} ${i}`)));
});

Deno.test("Each of many sessions counts for itself", async () => {
  await using server = await start();
  const { client } = server;
  const keys = numbers(200).map((i) => `session:${i}:down`);
  const sent = await Promise.all(numbers(4000).map((i) => send(client, String(i), undefined, keys[i % 200])));
  assert.deepEqual(sent.map(([position]) => at(position).n), numbers(4000).map((i) => Math.floor((i - 1) / 200) + 1));
  for (const of of keys) assert.deepEqual((await entries(client, of)).map(([id]) => at(id).n), numbers(20));
});

Deno.test("A log is trimmed to its size and up to a hundred more, and goes on counting", async () => {
  await using server = await start({ maxMessages: 200 });
  const { client } = server;
  await Promise.all(numbers(1000).map((i) => send(client, String(i))));
  const log = await entries(client);
  assert(log.length >= 200 && log.length < 300, `${log.length} messages`);
  assert.deepEqual(log.map(([id]) => at(id).n), numbers(1000).slice(-log.length));
});

/** Puts an entry into the log by hand, as if it had been sent at that time. */
async function sentAt(redis: Redis, ms: number, n: number): Promise<void> {
  await redis.xadd(key, `${ms}-${n}`, "d", "by hand");
}

Deno.test("A log's life is prolonged when a 16th of it has passed since the last message, and by each opening", async () => {
  const ttlMs = 1e9;
  await using server = await start({ ttlMs });
  const { client } = server;
  const whole = (left: number) => left > ttlMs && left <= ttlMs * 5 / 4 + 1;
  await send(client, "one");
  assert(whole(await client.pttl(key)), "for the first message");
  await client.pexpire(key, 1000_000);
  await send(client, "two");
  assert(await client.pttl(key) <= 1000_000, "not for each");
  await open(client);
  assert(whole(await client.pttl(key)), "opened");
  await client.del(key);
  await sentAt(client, await serverMs(client) - ttlMs / 8, 7);
  await client.pexpire(key, 1000_000);
  await send(client, "three");
  assert(whole(await client.pttl(key)), "an eighth later");
});

Deno.test("A log that has expired, or was deleted, begins anew: n is 1 again, and the time is newer", async () => {
  await using server = await start({ ttlMs: 100 });
  const { client } = server;
  await send(client, "one");
  const [old] = await send(client, "two");
  await eventually("expired", async () => await client.exists(key) === 0);
  const [expired] = await send(client, "one");
  await client.flushall();
  const [flushed] = await send(client, "one");
  const positions = [old, expired, flushed].map(at);
  assert.deepEqual(positions.map(({ n }) => n), [2, 1, 1]);
  assert(positions[0]!.ms < positions[1]!.ms && positions[1]!.ms < positions[2]!.ms);
});

Deno.test("A log that begins anew in the same millisecond has none of its former positions", async () => {
  await using server = await start();
  const { client } = server;
  const lives = 5;
  const transaction = client.multi();
  for (let life = 0; life < lives; life++) {
    const commands = transaction as unknown as Commands;
    if (life % 2 === 0) commands.call("FCALL", "wsproxy_open", 1, key);
    for (let i = 0; i < 3; i++) commands.call("FCALL", "wsproxy_send", 1, key, "x");
    transaction.del(key);
  }
  const answers = await transaction.exec() as [Error | null, unknown][];
  const positions = answers.flatMap(([error, answer]) => {
    assert.equal(error, null);
    return typeof answer === "number" ? [] : [at(typeof answer === "string" ? answer : (answer as Sent)[0])];
  });
  const ns = numbers(lives).flatMap((life) => life % 2 === 1 ? [0, 1, 2, 3] : [1, 2, 3]);
  assert.deepEqual(positions.map(({ n }) => n), ns);
  positions.reduce((last, next) => {
    assert(next.n > last.n ? next.ms >= last.ms : next.ms > last.ms, "each life is newer than the one before");
    return next;
  });
});

Deno.test("Time does not go back with the clock: not in a log, nor from one log to the next", async () => {
  await using server = await start();
  const { client } = server;
  const hourMs = 3_600_000;
  const ahead = await serverMs(client) + hourMs;
  await sentAt(client, ahead, 7);
  assert.equal((await send(client, "x"))[0], `${ahead}-8`);
  assert.equal((await send(client, "x"))[0], `${ahead}-9`);
  await client.pexpire(key, 1000);
  await send(client, "x");
  assert(await client.pttl(key) > hourMs - 60_000, "its life is prolonged with each message meanwhile");
  let last = ahead;
  for (let life = 0; life < 40; life++) {
    await client.del(key);
    const { ms, n } = at((await send(client, "x"))[0]);
    assert.equal(n, 1);
    assert(ms > last);
    last = ms;
  }
});

Deno.test("A log that was emptied by hand begins anew, after the last position that it had", async () => {
  await using server = await start();
  const { client } = server;
  const ahead = await serverMs(client) + 3_600_000;
  for (const begin of [async () => (await send(client, "x"))[0], () => open(client)]) {
    await sentAt(client, ahead, 7);
    await client.xtrim(key, "MAXLEN", 0);
    assert(at(await begin()).ms > ahead);
    await client.del(key);
    // Without what the functions remember of the time.
    await load(client);
  }
});

Deno.test("A thousand logs that begin at once do not run ahead of the clock", async () => {
  await using server = await start();
  const { client } = server;
  const sent = await Promise.all(numbers(1000).map((i) => send(client, "x", undefined, `session:${i}:down`)));
  const now = await serverMs(client);
  for (const [position] of sent) assert(at(position).ms <= now + 16);
});

Deno.test("Opening makes a mark where no log is, and tells the end of the log where one is", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const mark = await open(client);
  assert.equal(at(mark).n, 0);
  assert.equal(await open(client), mark);
  assert.deepEqual(await client.xrange(key, "-", "+"), [[mark, ["m", ""]]]);
  const [position] = await send(client, "one");
  assert.equal(at(position).n, 1);
  assert.equal(await open(client), position);
  assert.equal(await client.xlen(key), 2);
  assert.deepEqual((await listener.take(1)).map(unwrap), [[position, "one"]], "the mark is not published");
  assert(await has(client, mark));
  await client.flushall();
  await open(client);
  assert(!await has(client, mark), "an empty log that was lost is missed");
});

Deno.test("A log outlives a restart with an append-only file, functions and all", async () => {
  await using folder = await makeFolder();
  await using server = await start({ maxMessages: 100 }, ...kept, "--dir", folder.path);
  const { redis, client } = server;
  await open(client);
  await Promise.all(numbers(500).map((i) => send(client, String(i), `n${i}`)));
  const [position] = await send(client, "last", "n");
  const log = await entries(client);
  const life = await client.pexpiretime(key);
  await redis.kill();
  await redis.start();
  await eventually("connected again", () => client.status === "ready");
  assert.deepEqual(await entries(client), log);
  assert.equal(await client.pexpiretime(key), life);
  assert.deepEqual(await send(client, "last", "n"), [position, 0]);
  assert.equal(at((await send(client, "next"))[0]).n, 502);
});

/** A folder for what servers write: a replica keeps there what it was sent. */
async function makeFolder() {
  const path = await Deno.makeTempDir();
  return { path, [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }) };
}

/** A server that has caught up with the first one, its log and its functions. */
async function startReplica(of: RedisServer, folder: string): Promise<RedisServer> {
  const replica = await RedisServer.start("--dir", folder, "--replicaof", `127.0.0.1 ${of.port}`);
  const client = replica.client();
  await eventually("synchronized", async () => (await client.info("replication")).includes("master_link_status:up"));
  return replica;
}

Deno.test("A replica has the same log, hears the same messages, takes none itself, and goes on when it is promoted", async () => {
  await using folder = await makeFolder();
  await using server = await start({ maxMessages: 100 }, "--repl-diskless-sync-delay", "0");
  const { redis, client } = server;
  await send(client, "before");
  await using replica = await startReplica(redis, folder.path);
  const other = replica.client();
  const listener = await Listener.to(replica, key, "latin1");
  await open(client, "session:s2:down");
  await Promise.all(numbers(500).map((i) => send(client, String(i), `n${i}`)));
  const [position] = await send(client, "last", "n");
  assert.equal(await client.wait(1, 20_000), 1);
  const log = await entries(client);
  assert.deepEqual(await entries(other), log);
  assert.equal(await other.pexpiretime(key), await client.pexpiretime(key));
  assert.equal(await other.xlen("session:s2:down"), 1);
  const heard = (await listener.take(501)).map(unwrap);
  assert.deepEqual(heard.slice(-log.length), log);
  for (const refused of [send(other, "x"), open(other), close(other, 1000, "")]) {
    await assert.rejects(refused, { message: /^READONLY / });
  }
  await other.call("REPLICAOF", "NO", "ONE");
  assert.deepEqual(await send(other, "last", "n"), [position, 0]);
  assert.equal(at((await send(other, "next"))[0]).n, 503);
});

Deno.test("A promoted replica that has not heard the last messages counts on from its own, and a reader can tell", async () => {
  await using folder = await makeFolder();
  await using server = await start({}, "--repl-diskless-sync-delay", "0");
  const { redis, client } = server;
  await send(client, "one");
  await using replica = await startReplica(redis, folder.path);
  const other = replica.client();
  await other.call("REPLICAOF", "NO", "ONE");
  const [lost] = await send(client, "two");
  await eventually("a millisecond later", async () => await serverMs(other) > at(lost).ms);
  const [next] = await send(other, "another two");
  assert.deepEqual([at(lost).n, at(next).n], [2, 2]);
  assert(!await has(other, lost));
});

Deno.test("A key of another type is refused, and nothing is published", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  await client.set(key, "text");
  const refused = (what: string) => ({
    message: `WRONGTYPE wsproxy_${what}: a log is a stream: ${key} is a key of another type`,
  });
  await assert.rejects(send(client, "x"), refused("send"));
  await assert.rejects(begin(client, "x", "n"), refused("begin"));
  await assert.rejects(open(client), refused("open"));
  assert.equal(await client.get(key), "text");
  await client.del(key);
  await send(client, "after");
  assert.equal((await listener.take(1)).map(unwrap)[0]![1], "after");
});

Deno.test("What is called wrongly is refused with the reason, and nothing is written or published", async () => {
  await using server = await start();
  const { redis, client } = server;
  const channels = [key, "session::down", "session:s1:up", "s1"];
  const listeners = await Promise.all(channels.map((channel) => Listener.to(redis, channel)));
  const calls: [call: (Text | number)[], reason: string][] = [
    [["wsproxy_send", 0], "wsproxy_send: one key is needed, the session's down channel: there are 0"],
    [["wsproxy_send", 2, key, key, "x"], "wsproxy_send: one key is needed, the session's down channel: there are 2"],
    [
      ["wsproxy_send", 1, key],
      "wsproxy_send: a payload is needed, and a nonce and an epoch at most: there are 0 arguments",
    ],
    [
      ["wsproxy_send", 1, key, "x", "y", "0", "z"],
      "wsproxy_send: a payload is needed, and a nonce and an epoch at most: there are 4 arguments",
    ],
    ...["s1", "session:s1:up", "session::down", "xsession:s1:down", "session:s1:down "].map((wrong) =>
      [
        ["wsproxy_send", 1, wrong, "x"],
        `wsproxy_send: the key must be the session's down channel, session:{id}:down: it is ${wrong}`,
      ] as [string[], string]
    ),
    ...["", "-1", "x", "1.0", " 1", "02", "00"].map((epoch) =>
      [
        ["wsproxy_send", 1, key, "x", "", epoch],
        `wsproxy_send: an epoch is a number that wsproxy_begin has returned: this one is ${epoch}`,
      ] as [string[], string]
    ),
    [["wsproxy_begin", 0, "x", "n"], "wsproxy_begin: one key is needed, the session's down channel: there are 0"],
    ...[[], ["x"], ["x", "n", "0", "y"]].map((args) =>
      [
        ["wsproxy_begin", 1, key, ...args],
        `wsproxy_begin: a payload and a nonce are needed, and an epoch at most: there are ${args.length} arguments`,
      ] as [(string | number)[], string]
    ),
    [["wsproxy_begin", 1, key, "x", ""], "wsproxy_begin: the nonce must not be empty"],
    [
      ["wsproxy_begin", 1, "s1", "x", "n"],
      "wsproxy_begin: the key must be the session's down channel, session:{id}:down: it is s1",
    ],
    [["wsproxy_begin", 1, key, "x", "n".repeat(129)], "wsproxy_begin: a nonce may have 128 bytes: this one has 129"],
    [["wsproxy_open", 0], "wsproxy_open: one key is needed, the session's down channel: there are 0"],
    [["wsproxy_open", 1, key, "x"], "wsproxy_open: no arguments are taken: there are 1"],
    [
      ["wsproxy_open", 1, "s1"],
      "wsproxy_open: the key must be the session's down channel, session:{id}:down: it is s1",
    ],
    [["wsproxy_close", 1, key], "wsproxy_close: a code is needed, and a reason at most: there are 0 arguments"],
    [
      ["wsproxy_close", 1, key, "1000", "", ""],
      "wsproxy_close: a code is needed, and a reason at most: there are 3 arguments",
    ],
    [
      ["wsproxy_close", 1, "s1", "1000", ""],
      "wsproxy_close: the key must be the session's down channel, session:{id}:down: it is s1",
    ],
    ...["", "999", "1001", "2999", "5000", "4000.0", "0x1000", " 4000", "44000", "code", "40\n00"].map((code) =>
      [
        ["wsproxy_close", 1, key, code, ""],
        `wsproxy_close: the code must be 1000, or from 3000 to 4999: it is ${code.replace("\n", " ")}`,
      ] as [string[], string]
    ),
    [
      ["wsproxy_close", 1, key, "1000", "é".repeat(62)],
      "wsproxy_close: a reason may have 123 bytes: this one has 124",
    ],
    [["wsproxy_close", 1, key, "1000", bytes("\xff")], "wsproxy_close: the reason must be UTF-8"],
  ];
  for (const [call, reason] of calls) {
    await assert.rejects(client.call("FCALL", ...call as [string]), { message: `ERR ${reason}` }, String(call));
  }
  assert.equal(await client.dbsize(), 0);
  for (const [i, channel] of channels.entries()) await client.publish(channel, `to ${i}`);
  for (const [i, listener] of listeners.entries()) assert.deepEqual(await listener.take(1), [`to ${i}`]);
  await send(client, "x");
  await assert.rejects(client.call("FCALL", "wsproxy_send", 2, key, key, "x") as Promise<Sent>, /one key is needed/);
});

Deno.test("Closing publishes a command after what was sent before it, and leaves the log alone", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  const reason = 'moved: "é日𝄞" \\ / \0\x01\n\x7f';
  const [sent, receivers] = await Promise.all([send(client, "one"), close(client, 4403, reason)]);
  assert.equal(receivers, 1);
  await client.call("FCALL", "wsproxy_close", 1, key, "1000");
  const [one = "", first = "", second = ""] = await listener.take(3);
  assert.deepEqual(unwrap(one), [sent[0], "one"]);
  assert.deepEqual(order(first), ["close", { code: 4403, reason }]);
  assert.deepEqual(order(second), ["close", { code: 1000, reason: "" }]);
  assert.deepEqual((await entries(client)).length, 1);
  assert.equal(await close(client, 3000, "", "session:nobody:down"), 0);
  assert.equal(await client.exists("session:nobody:down"), 0);
});

Deno.test("A reason is taken exactly when it is UTF-8", async () => {
  await using server = await start();
  const { client } = server;
  const isUtf8 = (reason: Uint8Array) => {
    try {
      new TextDecoder("utf-8", { fatal: true }).decode(reason);
      return true;
    } catch {
      return false;
    }
  };
  const agrees = async (reason: Uint8Array) => {
    const taken = close(client, 1000, Buffer.from(reason)).then(() => true, () => false);
    assert.equal(await taken, isUtf8(reason), Buffer.from(reason).toString("hex"));
  };
  // Each first byte with each second one at which a range begins or ends, and with no more, as many, or too many others.
  const seconds = [0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff];
  const firsts = Array.from({ length: 256 }, (_, first) => first);
  for (const first of firsts) {
    const tails = [
      [],
      ...seconds.flatMap((second) => [[], [0x80], [0x80, 0xbf], [0xbf, 0x80, 0x80]].map((rest) => [second, ...rest])),
    ];
    await Promise.all(tails.map((tail) => agrees(Uint8Array.from([first, ...tail]))));
  }
  await fc.assert(fc.asyncProperty(fc.string({ unit: "binary", maxLength: 30 }), (text) => agrees(Buffer.from(text))));
  await fc.assert(fc.asyncProperty(fc.uint8Array({ maxLength: 20 }), agrees));
});

Deno.test("A full Redis refuses messages with its own error, and still opens logs and closes sessions", async () => {
  await using server = await start();
  const { redis, client } = server;
  const listener = await Listener.to(redis, key, "latin1");
  await client.config("SET", "maxmemory", 1);
  await assert.rejects(send(client, "x"), { message: /^OOM / });
  await assert.rejects(begin(client, "x", "n"), { message: /^OOM / });
  const mark = await open(client);
  assert(await has(client, mark));
  assert.equal(await close(client, 4000, "full"), 1);
  assert.deepEqual(order((await listener.take(1))[0]!), ["close", { code: 4000, reason: "full" }]);
  await client.config("SET", "maxmemory", 0);
  assert.equal(at((await send(client, "x"))[0]).n, 1);
});

Deno.test("In a Cluster a message goes to the sharded channel, whose slot is the log's", async () => {
  await using folder = await makeFolder();
  await using redis = await RedisServer.start("--cluster-enabled", "yes", "--dir", folder.path);
  const client = redis.client();
  await client.call("CLUSTER", "ADDSLOTSRANGE", 0, 16383);
  await eventually("the cluster is whole", async () => (await client.cluster("INFO")).includes("cluster_state:ok"));
  await load(client, { sharded: true });
  const plain = await Listener.to(redis, key, "latin1");
  const subscriber = redis.client();
  const heard: string[] = [];
  subscriber.on("smessageBuffer", (_channel: Buffer, message: Buffer) => heard.push(message.toString("latin1")));
  await subscriber.ssubscribe(key);
  const [position, receivers] = await send(client, "one");
  assert.equal(receivers, 1);
  assert.equal(await close(client, 4000, "x"), 1);
  const [begun, heardBy, epoch] = await begin(client, "two", "a");
  assert.deepEqual([heardBy, epoch], [1, 1]);
  await assert.rejects(write(client, "x", "b", 0), /^ReplyError: FENCED /);
  await eventually("all three", () => heard.length === 3);
  assert.deepEqual(unwrap(heard[0]!), [position, "one"]);
  assert.equal(order(heard[1]!)[0], "close");
  assert.deepEqual(unwrap(heard[2]!), [begun, "two"]);
  await client.publish(key, "plain");
  assert.deepEqual(await plain.take(1), ["plain"]);
});

Deno.test("The answer has the same shape in RESP3", async () => {
  await using server = await start();
  using connection = await Deno.connect({ hostname: "127.0.0.1", port: server.redis.port });
  const command = (...words: string[]) =>
    `*${words.length}\r\n${words.map((word) => `$${word.length}\r\n${word}\r\n`).join("")}`;
  const mark = await open(server.client);
  await writeAll(
    connection,
    new TextEncoder().encode(
      command("HELLO", "3") + command("FCALL", "wsproxy_open", "1", key) +
        command("FCALL", "wsproxy_send", "1", key, "x") + command("FCALL", "wsproxy_close", "1", key, "1000", "") +
        command("ECHO", "done"),
    ),
  );
  let text = "";
  const chunk = new Uint8Array(4096);
  while (!text.endsWith("done\r\n")) {
    text += new TextDecoder().decode(chunk.subarray(0, await soon(connection.read(chunk), "an answer") ?? 0));
  }
  const [position] = (await entries(server.client)).at(-1)!;
  const bulk = (text: string) => `$${text.length}\r\n${text}\r\n`;
  assert(text.endsWith(`${bulk(mark)}*2\r\n${bulk(position)}:0\r\n:0\r\n${bulk("done")}`), text);
});
