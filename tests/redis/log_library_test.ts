/** How the functions of src/redis/log.lua get into a real Redis, and what is said about it. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { pino } from "pino";
import { type LibraryOptions, LogLibrary, renderLibrary } from "../../src/redis/log_library.ts";
import { RedisServer } from "../harness/redis.ts";

const options = {
  maxMessages: 100,
  ttlMs: 60_000,
  maxMessageBytes: 1000,
  sharded: false,
  startedMs: 1_764_000_000_000,
};
const key = "session:s1:down";

/** A proxy's library, and what it has logged. */
function library(changes: Partial<LibraryOptions> = {}) {
  const logged: Record<string, unknown>[] = [];
  const log = pino({ base: undefined, timestamp: false }, { write: (line: string) => logged.push(JSON.parse(line)) });
  return Object.assign(new LogLibrary({ ...options, ...changes }, log), { logged });
}

/** What `wsproxy_settings` returns, as names and values. */
async function settings(redis: Redis): Promise<Record<string, unknown>> {
  const flat = await redis.call("FCALL", "wsproxy_settings", 0) as unknown[];
  return Object.fromEntries(Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]));
}

const send = (redis: Redis) => redis.call("FCALL", "wsproxy_send", 1, key, "x");

/** How often the server was asked to load functions. */
async function loads(redis: Redis): Promise<number> {
  const stats = await redis.info("commandstats");
  return Number(/cmdstat_function\|load:calls=(\d+)/.exec(stats)?.[1] ?? 0);
}

Deno.test("Functions that are missing are loaded, with the settings in them, and once", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const proxy = library({ maxMessages: 1234, ttlMs: 16_000, maxMessageBytes: 2 ** 26 });
  assert(await proxy.load(client));
  await send(client);
  const { version, ...rest } = await settings(client);
  assert.deepEqual(rest, {
    started_ms: options.startedMs,
    max_messages: 1234,
    ttl_ms: 16_000,
    max_message_bytes: 2 ** 26,
    sharded: 0,
  });
  assert.deepEqual(proxy.logged, [{ level: 30, version, msg: "Session log's functions loaded" }]);
  const another = library({ maxMessages: 1234, ttlMs: 16_000, maxMessageBytes: 2 ** 26, startedMs: 0 });
  assert(await proxy.load(client) && await another.load(client));
  assert.equal(await loads(client), 1);
  assert.deepEqual(another.logged, []);
});

Deno.test("Of many proxies that find none at once, one loads them, and the others are content", async () => {
  await using redis = await RedisServer.start();
  const clients = Array.from({ length: 8 }, () => redis.client());
  const proxies = clients.map(() => library());
  const answers = await Promise.all(proxies.map((proxy, i) => proxy.load(clients[i]!)));
  assert.deepEqual(answers, clients.map(() => true));
  assert.equal(proxies.flatMap(({ logged }) => logged).length, 1);
});

Deno.test("Proxies with different settings say so with both values, and the one that was started last wins", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const first = library();
  const last = library({ maxMessages: 200, ttlMs: 90_000, sharded: true, startedMs: options.startedMs + 1 });
  const difference = (inForce: string, loaded: unknown, ours: unknown) => {
    const msg = "Session log's settings differ from those that another proxy has loaded";
    return { level: 40, loaded, ours, inForce, msg };
  };
  const [old, young] = [
    { LOG_MAX_MESSAGES: 100, LOG_TTL_SECS: 60, sharded: false },
    { LOG_MAX_MESSAGES: 200, LOG_TTL_SECS: 90, sharded: true },
  ];
  await first.load(client);
  assert(await last.load(client));
  const { version } = await settings(client);
  assert.deepEqual(last.logged, [
    { level: 30, version, replaced: version, msg: "Session log's functions replaced" },
    difference("ours", old, young),
  ]);
  // The first one connects again.
  assert(await first.load(client));
  assert.deepEqual(first.logged.slice(1), [difference("loaded", young, old)]);
  assert.equal((await settings(client)).max_messages, 200);
});

Deno.test("Functions of another version are replaced by a proxy that was started later, without a warning", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const other = renderLibrary(options).replace(/^local VERSION = .*$/m, 'local VERSION = "other"');
  await client.call("FUNCTION", "LOAD", other);
  const earlier = library({ startedMs: options.startedMs - 1 });
  assert(await earlier.load(client));
  assert.equal((await settings(client)).version, "other");
  const later = library();
  assert(await later.load(client));
  const { version } = await settings(client);
  assert.notEqual(version, "other");
  assert.deepEqual(earlier.logged, []);
  assert.deepEqual(later.logged, [{ level: 30, version, replaced: "other", msg: "Session log's functions replaced" }]);
});

Deno.test("In a rolling deploy epochs are there once a proxy that knows them has loaded its functions, and stay", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const begin = (nonce: string) => client.call("FCALL", "wsproxy_begin", 1, key, "x", nonce) as Promise<unknown[]>;
  const older = renderLibrary(options).replace(/^local VERSION = .*$/m, 'local VERSION = "older"')
    .replace(/^redis.register_function\("wsproxy_begin".*$/m, "");
  await client.call("FUNCTION", "LOAD", older);
  await assert.rejects(begin("a"), { message: /^ERR Function not found/ });
  // One that was started before the older one leaves it alone; one that was started later does not.
  await library({ startedMs: options.startedMs - 1 }).load(client);
  await assert.rejects(begin("a"), { message: /^ERR Function not found/ });
  await library({ startedMs: options.startedMs + 1 }).load(client);
  assert.equal((await begin("a"))[2], 1);
  await library({ startedMs: options.startedMs }).load(client);
  assert.equal((await begin("b"))[2], 2);
});

const unavailable = (reason: string | RegExp, logged: Record<string, unknown>[]) => {
  assert.equal(logged.length, 1, "said once");
  assert.equal(logged[0]!.msg, "Redis keeps no session logs: clients cannot resume");
  assert.match(String(logged[0]!.reason), new RegExp(reason));
};

Deno.test("A Redis without functions is told of once, and is no error", async () => {
  // As before Redis 7: neither command is known.
  await using redis = await RedisServer.start("--rename-command", "FUNCTION", "", "--rename-command", "FCALL", "");
  const proxy = library();
  for (let connect = 0; connect < 3; connect++) assert.equal(await proxy.load(redis.client()), false);
  unavailable(/^it needs Redis 7 or Valkey$/, proxy.logged);
});

Deno.test("A proxy that may not load functions says so, and is content with those that an operator has loaded", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.call("ACL", "SETUSER", "default", "-function");
  const proxy = library();
  assert.equal(await proxy.load(control), false);
  assert.equal(await proxy.load(control), false);
  unavailable(/^NOPERM .*function/, proxy.logged);
  await control.call("ACL", "SETUSER", "default", "+function");
  await library({ maxMessages: 5 }).load(control);
  await control.call("ACL", "SETUSER", "default", "-function");
  assert(await proxy.load(control));
  const { level, loaded, ours, inForce } = proxy.logged[1]!;
  assert.deepEqual([level, loaded, ours, inForce], [40, { LOG_MAX_MESSAGES: 5 }, { LOG_MAX_MESSAGES: 100 }, "loaded"]);
});

Deno.test("A server whose FUNCTION has another name keeps logs with the functions that an operator has loaded", async () => {
  await using redis = await RedisServer.start("--rename-command", "FUNCTION", "OPERATOR_FUNCTION");
  const client = redis.client();
  const other = renderLibrary(options).replace(/^local VERSION = .*$/m, 'local VERSION = "other"');
  await client.call("OPERATOR_FUNCTION", "LOAD", other);
  const proxy = library();
  assert(await proxy.load(client));
  assert.equal((await settings(client)).version, "other");
  assert.deepEqual(proxy.logged, []);
});

Deno.test("A right that logs need and that is missing is told once, in Redis's own words, until it is there", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await library().load(control);
  for (
    const [what, named, ...rules] of [
      ["a command", /'xrange'/, "-xrange"],
      ["a command", /'xrevrange'/, "-xrevrange"],
      ["a command", /'xadd'/, "-xadd"],
      ["a command", /'pexpire'/, "-pexpire"],
      ["a command", /'exists'/, "-exists"],
      ["a command", /'time'/, "-time"],
      ["a subcommand", /'xinfo\|stream'/, "-xinfo|stream"],
      ["functions", /'fcall'/, "-fcall"],
      ["two commands", /'xrange'.*; .*'pexpire'/, "-xrange", "-pexpire"],
      ["keys", /^NOPERM [^;]* \(session:\*:down\)$/, "resetkeys", "~wsproxy:*"],
    ] as const
  ) {
    await control.call("ACL", "SETUSER", "default", ...rules);
    const proxy = library();
    for (let time = 0; time < 2; time++) assert.equal(await proxy.load(control), false, what);
    unavailable(named, proxy.logged);
    await control.call("ACL", "SETUSER", "default", "+@all", "~*");
    assert(await proxy.load(control));
  }
});

Deno.test("A command that was taken away is told as a right that is missing", async () => {
  await using redis = await RedisServer.start("--rename-command", "XREVRANGE", "");
  const proxy = library();
  assert.equal(await proxy.load(redis.client()), false);
  unavailable(/^ERR unknown command .XREVRANGE/, proxy.logged.slice(1));
});

Deno.test("Functions that are flushed are loaded again, and one difference of settings is told once", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  await library({ maxMessages: 5 }).load(client);
  const proxy = library({ startedMs: options.startedMs - 1 });
  for (let time = 0; time < 3; time++) await proxy.keep(client);
  assert.equal(proxy.logged.length, 1);
  await client.call("FUNCTION", "FLUSH");
  await proxy.keep(client);
  assert.equal((await settings(client)).max_messages, options.maxMessages);
  assert.equal(proxy.logged.length, 2);
});

Deno.test("A library of that name which is not ours is left alone", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const theirs = "#!lua name=wsproxy\nredis.register_function('theirs', function() return 'x' end)";
  await client.call("FUNCTION", "LOAD", theirs);
  const proxy = library();
  assert.equal(await proxy.load(client), false);
  unavailable(/already exists/, proxy.logged);
  assert.equal(await client.call("FCALL", "theirs", 0), "x");
});

Deno.test("What passes is worth another try: a full Redis, a connection that breaks", async () => {
  await using redis = await RedisServer.start();
  const client = redis.client();
  const proxy = library();
  await client.config("SET", "maxmemory", 1);
  await assert.rejects(proxy.load(client), /^ReplyError: OOM /);
  await client.config("SET", "maxmemory", 0);
  assert(await proxy.load(client));
  await client.config("SET", "maxmemory", 1);
  assert(await proxy.load(client), "what is loaded serves while Redis is full");
  const gone = redis.client();
  await gone.quit();
  await assert.rejects(proxy.load(gone), { message: "Connection is closed." });
  assert.equal(proxy.logged.length, 1);
});

Deno.test("Each constant of log.lua is where the loader writes it", () => {
  const values = { maxMessages: 1, ttlMs: 2, maxMessageBytes: 3, sharded: true, startedMs: 4 };
  const lines = renderLibrary(values).split("\n");
  assert.equal(lines[0], "#!lua name=wsproxy");
  for (
    const line of [
      "local STARTED_MS = 4",
      "local MAX_MESSAGES = 1",
      "local TTL_MS = 2",
      "local MAX_MESSAGE_BYTES = 3",
      "local SHARDED = true",
    ]
  ) assert(lines.includes(line), line);
  assert(lines.some((line) => /^local VERSION = "[0-9a-f]{12}"$/.test(line)));
});
