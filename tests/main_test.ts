import assert from "node:assert/strict";
import { Client } from "./harness/client.ts";
import { onEachEngine, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer, subscribers } from "./harness/redis.ts";
import { shell } from "./harness/process.ts";
import { mint, secret } from "./harness/token.ts";
import { eventually, soon } from "./harness/wait.ts";
import { handshake, handshakeHeaders, openRaw, request } from "./harness/wire.ts";

for (const signal of ["SIGTERM", "SIGINT"] as const) {
  Deno.test(`${signal} closes sessions with 1001 and Redis connections, and exits with 0`, async () => {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis);
    const control = redis.client();
    const clients = await Promise.all(["s1", "s2", "s2"].map((session) => Client.connect(proxy.port, session)));
    proxy.signal(signal);
    for (const client of clients) {
      assert.deepEqual(await client.ended(), { code: 1001, reason: "server is going away" });
    }
    assert.equal((await proxy.exit()).code, 0);
    assert.equal(await subscribers(control, "session:s1:down"), 0);
    await eventually("Redis has only us", async () => {
      const list = await control.client("LIST") as string;
      return !list.includes("wsproxy-");
    });
  });
}

Deno.test("A peer that answers no close delays the exit, but not beyond the grace period", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { SHUTDOWN_GRACE_PERIOD_SECS: "5" });
  using _stuck = await openRaw(proxy.port, "s1");
  proxy.signal("SIGTERM");
  await eventually("draining", async () => (await request(proxy.port, "/ready")).status === 503);
  assert.equal((await request(proxy.port, "/ready")).body, '{"status":"draining"}');
  const refused = await request(proxy.port, "/agent/ws/s2", { headers: await handshake("s2") });
  assert.equal(refused.status, 503);
  assert.match(refused.body, /draining/);
  assert.equal((await proxy.exit()).code, 0);
});

Deno.test("A second signal exits at once", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { SHUTDOWN_GRACE_PERIOD_SECS: "3600" });
  using _stuck = await openRaw(proxy.port, "s1");
  proxy.signal("SIGTERM");
  // Signals within a moment are one, as a Ctrl-C that comes from the terminal and from deno task.
  proxy.signal("SIGTERM");
  await eventually("draining", async () => (await request(proxy.port, "/ready")).status === 503);
  const again = setInterval(() => {
    try {
      proxy.signal("SIGTERM");
    } catch (error) {
      // It has ended just now.
      if (!(error instanceof TypeError)) throw error;
    }
  }, 100);
  const { code } = await proxy.exit();
  clearInterval(again);
  assert.equal(code, 0);
  assert.match(await proxy.log.rest(), /second signal/);
});

Deno.test("Three wrong settings are three clear lines and exit code 1", async () => {
  await using proxy = ProxyProcess.spawn({ JWT_SECRET: "short", PORT: "http", VALIDATE_JSON: "2" });
  assert.equal((await proxy.exit()).code, 1);
  assert.equal(
    await proxy.errors,
    'PORT must be an integer from 0 to 65535: current value is "http"\n' +
      "JWT_SECRET must be 32 bytes or more\n" +
      'VALIDATE_JSON must be true or false: current value is "2"\n',
  );
});

Deno.test("A start without JWT_SECRET says how to make one", async () => {
  await using proxy = ProxyProcess.spawn({});
  assert.equal((await proxy.exit()).code, 1);
  assert.match(await proxy.errors, /^JWT_SECRET is required .*"openssl rand -hex 32"\n$/);
});

Deno.test("A port in use stops the start with exit code 1", async () => {
  await using redis = await RedisServer.start();
  await using proxy = ProxyProcess.spawn({ JWT_SECRET: secret, HOST: "127.0.0.1", PORT: String(redis.port) });
  const line = JSON.parse(await proxy.log.until((line) => line.includes("could not start")));
  assert.match(line.err.message, /in use/);
  assert.equal((await proxy.exit()).code, 1);
});

Deno.test("A start without Redis says so, and serves as soon as Redis is there", async () => {
  const redis = await RedisServer.start();
  await redis.kill();
  await using proxy = ProxyProcess.spawn({
    JWT_SECRET: secret,
    HOST: "127.0.0.1",
    PORT: "0",
    REDIS_URL: redis.url,
    LOG_LEVEL: "info",
  });
  const { port } = JSON.parse(await proxy.log.until((line) => line.includes('"listening"')));
  const warning = JSON.parse(await proxy.log.until((line) => line.includes("could not be reached")));
  assert.equal(warning.level, "warn");
  assert.equal((await request(port, "/health")).status, 503);
  await redis.start();
  await eventually("healthy", async () => (await request(port, "/health")).status === 200);
  await using _client = await Client.connect(port, "s1");
  await redis[Symbol.asyncDispose]();
});

Deno.test("Settings come from a .env file, and the environment wins over it", async () => {
  await using redis = await RedisServer.start();
  const folder = await Deno.makeTempDir();
  const file = `${folder}/.env`;
  await Deno.writeTextFile(file, `JWT_SECRET="${secret}"\nHOST=127.0.0.1\nREDIS_URL=${redis.url}\nPORT=1\n`);
  await using proxy = ProxyProcess.spawn({ PORT: "0", LOG_LEVEL: "info" }, [`--env-file=${file}`]);
  const { port } = JSON.parse(await proxy.log.until((line) => line.includes('"listening"')));
  assert.notEqual(port, 1);
  await eventually("healthy", async () => (await request(port, "/health")).status === 200);
  await using _client = await Client.connect(port, "s1");
  await Deno.remove(folder, { recursive: true });
});

Deno.test("No token, secret or payload is ever logged", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { LOG_LEVEL: "trace" });
  const client = await Client.connect(proxy.port, "s1");
  client.send('"precious payload"');
  client.send("broken precious payload");
  await client.next();
  const token = await refusedToken(proxy.port);
  await client.close();
  proxy.signal("SIGTERM");
  await proxy.exit();
  const log = await proxy.log.rest() + await proxy.errors;
  assert.match(log, /request refused/);
  for (const precious of [secret, token, "precious payload"]) assert(!log.includes(precious), precious);
});

/** Offers a token that is refused, in every way a token can come, and returns it. */
async function refusedToken(port: number): Promise<string> {
  const token = await mint("s1", {}, "some other secret, 32 bytes or more");
  for (
    const [path, headers] of [
      ["/agent/ws/s1", { Authorization: `Bearer ${token}` }],
      ["/agent/ws/s1", { "Sec-WebSocket-Protocol": `bearer, ${token}` }],
      [`/agent/ws/s1?token=${token}`, {}],
      [`/agent/${token}?token=${token}`, {}],
    ] as [string, Record<string, string>][]
  ) {
    const { status } = await request(port, path, { headers: { ...handshakeHeaders, ...headers } });
    assert(status > 400, String(status));
  }
  return token;
}

onEachEngine("A drain closes a session in a quiet moment, and a busy one when the grace runs out", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { ...engine, SHUTDOWN_GRACE_PERIOD_SECS: "5" });
  const control = redis.client();
  await using quiet = await Client.connect(proxy.port, "quiet");
  await using busy = await Client.connect(proxy.port, "busy");
  await using answered = await Client.connect(proxy.port, "answered");
  let sent = 0;
  const stream = setInterval(() => control.publish("session:busy:down", String(sent++)), 20);
  await eventually("it is busy", async () => await proxy.metric("wsproxy_messages_down_total") > 0);
  // An answer under way is streamed to its end, and the session closed after it.
  await control.publish("session:answered:down", "word");
  assert.equal(await answered.next(), "word");
  proxy.signal("SIGTERM");
  await eventually("draining", async () => (await request(proxy.port, "/ready")).status === 503);
  assert.equal((await request(proxy.port, "/health")).status, 200);
  await control.publish("session:answered:down", "end");
  assert.equal(await answered.next(), "end");
  assert.equal((await quiet.ended()).code, 1001);
  assert.equal((await answered.ended()).code, 1001);
  const before = sent;
  assert.equal((await busy.ended()).code, 1001);
  clearInterval(stream);
  assert(sent > before, "the busy one was closed later than the quiet ones");
  assert.equal((await proxy.exit()).code, 0);
  // Until its close it has missed nothing.
  const got = busy.arrived();
  assert.deepEqual(got, got.map((_, n) => String(n)));
  assert(got.length >= before, `${got.length} of ${before}`);
});

onEachEngine("A rolling restart behind two instances loses nothing that a client was told it had", async (engine) => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  let old = await ProxyProcess.start(redis, engine);
  await using rest = new AsyncDisposableStack();
  rest.use(old);
  const sessions = Array.from({ length: 10 }, (_, i) => `s${i}`);
  const heard = new Map<string, string[]>();
  const backend = redis.client();
  backend.on("message", (channel, text) => heard.get(channel)?.push(text));
  for (const session of sessions) heard.set(`session:${session}:up`, []);
  await backend.subscribe(...heard.keys());
  const clients = new Map<string, Client>();
  for (const session of sessions) clients.set(session, await Client.connect(old.port, session));
  for (let round = 0; round < 2; round++) {
    const next = await ProxyProcess.start(redis, engine);
    rest.use(next);
    old.signal("SIGTERM");
    // Each client talks until it is told to leave, and comes back to the other instance.
    await Promise.all(sessions.map(async (session) => {
      const client = clients.get(session)!;
      client.send(`"${session} ${round}"`);
      assert.equal((await client.ended()).code, 1001);
      clients.set(session, await Client.connect(next.port, session));
      // It has been told that it is open: from here on nothing may be lost.
      assert.equal(await control.publish(`session:${session}:down`, `welcome ${round}`) >= 1, true);
      assert.equal(await clients.get(session)!.next(), `welcome ${round}`);
    }));
    assert.equal((await old.exit()).code, 0);
    old = next;
  }
  // Redis has all of it; the backend may not have read the last ones.
  await eventually("all is heard", () => [...heard.values()].every(({ length }) => length >= 2));
  for (const session of sessions) {
    assert.deepEqual(heard.get(`session:${session}:up`), [`"${session} 0"`, `"${session} 1"`]);
    await clients.get(session)!.close();
  }
});

Deno.test("The unexpected end of the listener ends the process with 1 and one clear line", async () => {
  await using redis = await RedisServer.start();
  // Without descriptors Deno.serve stops listening for good.
  await using proxy = await ProxyProcess.start(redis, { WS_ENGINE: "deno" }, { maxDescriptors: 60 });
  const crowd: Deno.TcpConn[] = [];
  try {
    while (crowd.length < 100) crowd.push(await Deno.connect({ hostname: "127.0.0.1", port: proxy.port }));
  } catch {
    // It has stopped already.
  }
  const line = JSON.parse(await soon(proxy.log.until((line) => line.includes('"fatal"')), "a fatal line"));
  assert.match(line.err.message, /listener|too many open files/i);
  assert.equal((await proxy.exit()).code, 1);
  for (const connection of crowd) connection.close();
});

for (
  const [what, program] of [
    ["error", 'setTimeout(() => { throw new Error("a bug") }, 300).unref()'],
    ["rejection", 'setTimeout(() => Promise.reject(new Error("a bug")), 300).unref()'],
  ] as const
) {
  Deno.test(`An unhandled ${what} ends the process with 1 and one clear line`, async () => {
    await using redis = await RedisServer.start();
    const folder = await Deno.makeTempDir();
    await Deno.writeTextFile(`${folder}/bug.ts`, program);
    const env = { JWT_SECRET: secret, HOST: "127.0.0.1", PORT: "0", REDIS_URL: redis.url };
    await using proxy = ProxyProcess.spawn(env, [`--preload=${folder}/bug.ts`]);
    const line = JSON.parse(await soon(proxy.log.until((line) => line.includes('"fatal"')), "a fatal line"));
    assert.equal(line.err.message, "a bug");
    assert.equal((await proxy.exit()).code, 1);
    assert.equal(await proxy.errors, "");
    await Deno.remove(folder, { recursive: true });
  });
}

onEachEngine("A client whose 101 is as old as the signal is told to leave, too", async (engine) => {
  await using redis = await RedisServer.start();
  for (let round = 0; round < 2; round++) {
    await using proxy = await ProxyProcess.start(redis, engine);
    // The last ones are answered just before it.
    const connections = await Promise.all(Array.from({ length: 10 }, (_, n) => openRaw(proxy.port, `s${n}`)));
    proxy.signal("SIGTERM");
    for (const connection of connections) {
      const head = new Uint8Array(4);
      const count = await soon(connection.read(head), "a close frame");
      assert.deepEqual([count, head[0], head[2]! << 8 | head[3]!], [4, 0x88, 1001]);
      connection.close();
    }
  }
});

Deno.test("A flood of refusals is ten lines a second of a kind, and one that says how many more there were", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const answers = await Promise.all(Array.from({ length: 50 }, () => request(proxy.port, "/agent/ws/s1")));
  assert(answers.every(({ status }) => status === 426));
  const told: string[] = [];
  await proxy.log.until((line) => told.push(line) > 0 && line.includes("more requests refused"));
  const lines = told.map((line) => JSON.parse(line)).filter(({ msg }) => /requests? refused$/.test(msg));
  assert.equal(lines.length, 11);
  assert.deepEqual([lines[10].refusal, lines[10].more], ["notUpgrade", 40]);
});

Deno.test("The first line has all settings and no secret; every line of a session names its connection", async () => {
  await using redis = await RedisServer.start();
  await using proxy = ProxyProcess.spawn(testEnv(redis, { LOG_LEVEL: "debug", MAX_CONNECTIONS: "7" }));
  const first = await proxy.log.until((line) => line.includes('"listening"'));
  const { port, settings } = JSON.parse(first);
  assert.deepEqual([settings.MAX_CONNECTIONS, settings.JWT_SECRET], ["7", "(set)"]);
  assert(!first.includes(secret));
  await eventually("healthy", async () => (await request(port, "/health")).status === 200);
  await (await Client.connect(port, "s1")).close();
  const told: string[] = [];
  await proxy.log.until((line) => told.push(line) > 0 && line.includes("session closed"));
  const lines = told.map((line) => JSON.parse(line)).filter(({ session }) => session === "s1");
  assert.equal(lines.length, 2);
  assert(lines[0].connection);
  assert.equal(lines[0].connection, lines[1].connection);
});

for (const WORKERS of ["1", "3"]) {
  Deno.test(`SIGTERM is taken from the first moment on, with WORKERS=${WORKERS}`, async () => {
    await using redis = await RedisServer.start();
    // Its notice is the first line, and comes before anything is started.
    await using proxy = ProxyProcess.spawn(testEnv(redis, { WORKERS, PUBSUB_POOL_SIZE: "1", LOG_LEVEL: "info" }));
    await soon(proxy.log.until((line) => line.includes("PUBSUB_POOL_SIZE")), "the first line");
    proxy.signal("SIGTERM");
    const { code, signal } = await proxy.exit();
    assert.deepEqual([code, signal], [0, null]);
    assert.equal(await proxy.errors, "");
  });
}

onEachEngine(
  "SIGTERM drains the workers that serve while others start, and SIGHUP ends none of them",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = ProxyProcess.spawn(testEnv(redis, { ...engine, WORKERS: "3", PORT: "0", LOG_LEVEL: "info" }));
    await soon(proxy.log.until((line) => line.includes("worker listening")), "the first worker");
    proxy.signal("SIGHUP");
    const { port } = JSON.parse(await soon(proxy.log.until((line) => line.includes('"listening"')), "all workers"));
    await soon(proxy.log.until((line) => line.includes("workers are replaced")), "the replacement");
    await using client = await Client.connect(port, "s1");
    proxy.signal("SIGTERM");
    assert.deepEqual(await client.ended(), { code: 1001, reason: "server is going away" });
    assert.equal((await proxy.exit()).code, 0);
  },
);

const canUnshare = Deno.build.os === "linux" && shell("unshare --fork --pid true 2>&1 && echo yes") === "yes\n";

Deno.test({
  name: "As PID 1, as in a container without an init, the first SIGTERM ends it",
  ignore: !canUnshare,
  async fn() {
    await using redis = await RedisServer.start();
    const env = testEnv(redis, { WORKERS: "2", PUBSUB_POOL_SIZE: "1", LOG_LEVEL: "info" });
    await using proxy = ProxyProcess.spawn(env, [], undefined, ["unshare", "--fork", "--pid", "--kill-child"]);
    await soon(proxy.log.until((line) => line.includes("PUBSUB_POOL_SIZE")), "the first line");
    Deno.kill(Number(shell(`cat /proc/${proxy.pid}/task/${proxy.pid}/children`)), "SIGTERM");
    assert.equal((await proxy.exit()).code, 0);
  },
});

onEachEngine("SIGHUP with one worker changes nothing, and says what would", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, engine);
  await using client = await Client.connect(proxy.port, "s1");
  proxy.signal("SIGHUP");
  const line = JSON.parse(await soon(proxy.log.until((line) => line.includes("SIGHUP")), "a line"));
  assert.deepEqual([line.level, line.signal], ["warn", "SIGHUP"]);
  assert.match(line.msg, /ignored.*SIGTERM/);
  await redis.client().publish("session:s1:down", "still here");
  assert.equal(await client.next(), "still here");
});
