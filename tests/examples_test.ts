import assert from "node:assert/strict";
import { sparePort } from "../scripts/spare_port.ts";
import { closes } from "../src/replies.ts";
import { lines } from "./harness/process.ts";
import { ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer, subscribers } from "./harness/redis.ts";
import { mint, secret } from "./harness/token.ts";
import { eventually, soon } from "./harness/wait.ts";
import { testBackend, testWorkers, WorkerProcess } from "./harness/workers.ts";

/** A task of deno.json as a child process, with the task's own permissions, until the end of its scope. */
class Task implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly output: ReturnType<typeof lines>;
  readonly errors: ReturnType<typeof lines>;

  constructor(name: string, taskArgs: readonly string[], env: Record<string, string> = {}) {
    const { tasks } = JSON.parse(Deno.readTextFileSync(new URL("../deno.json", import.meta.url)));
    const [deno, ...args] = String(tasks[name].command).split(" ");
    assert.equal(deno, "deno");
    this.#child = new Deno.Command(Deno.execPath(), {
      // A .env of the developer's own must not matter.
      args: [...args.filter((arg) => arg !== "--env-file"), ...taskArgs],
      env: { ...env, NO_COLOR: "1" },
      stdin: "piped",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.#stdin = this.#child.stdin.getWriter();
    this.output = lines(this.#child.stdout);
    this.errors = lines(this.#child.stderr);
  }

  async type(line: string): Promise<void> {
    await this.#stdin.write(new TextEncoder().encode(`${line}\n`));
  }

  signal(signal: Deno.Signal): void {
    this.#child.kill(signal);
  }

  exit(): Promise<Deno.CommandStatus> {
    return soon(this.#child.status, "exit");
  }

  /** Up to the line of its output that is, or begins with, this text. */
  prints(start: string): Promise<string> {
    return soon(this.output.until((line) => line.startsWith(start)), `output ${start}`);
  }

  /** Up to the line of its error output that begins with this text. */
  tells(start: string): Promise<string> {
    return soon(this.errors.until((line) => line.startsWith(start)), `error output ${start}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      // Not SIGKILL: the dev task has children of its own to end.
      this.#child.kill("SIGTERM");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // it has ended already
    }
    await this.#child.status;
    await this.#stdin.close().catch(() => {});
    await this.output.rest();
    await this.errors.rest();
  }
}

/** The arguments of the `./dev client` line that a program printed. */
function clientArgs(line: string): string[] {
  const [, args] = /\.\/dev client (.*)$/.exec(line) ?? [];
  assert(args, line);
  return args.split(" ");
}

Deno.test("The example backend answers the example client word by word, and stops when no client listens", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const env = { JWT_SECRET: secret, REDIS_URL: redis.url, PORT: String(proxy.port) };
  await using backend = new Task("backend", ["s 1"], env);
  const args = clientArgs(await backend.prints("./dev client"));
  {
    await using client = new Task("client", args);
    await client.tells("connected");
    await client.type("a question");
    await backend.prints('heard "a question"');
    for (const word of ["You", "said", "and"]) await client.prints(`{"type":"word","text":"${word}"}`);
    await client.prints('{"type":"end"}');
    await backend.prints("answered");
    await client.type('{"another":"question"}');
    await backend.prints('heard {"another":"question"}');
    await client.prints('{"type":"word","text":"You"}');
  }
  await backend.prints("stopped: no client listens");
  const control = redis.client();
  await eventually("unsubscribed", async () => await subscribers(control, "session:s 1:down") === 0);
});

Deno.test("The example client reconnects to a new proxy, and sends what it was given meanwhile", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const heard = Promise.withResolvers<string>();
  control.on("message", (_channel, text) => heard.resolve(text));
  await control.subscribe("session:s1:up");
  const port = sparePort();
  const url = `ws://127.0.0.1:${port}/agent/ws/s1`;
  await using former = await ProxyProcess.start(redis, { PORT: String(port) });
  await using client = new Task("client", [url, await mint("s1")]);
  await client.tells("connected");
  former.signal("SIGTERM");
  await client.tells("disconnected (1001 server is going away), connecting again in ");
  await former.exit();
  await client.type("later");
  await using _next = await ProxyProcess.start(redis, { PORT: String(port) });
  await client.tells("connected");
  assert.equal(await soon(heard.promise, "message from the client"), '"later"');
});

Deno.test("The example client tells of a gap", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  await using client = new Task("client", [`ws://127.0.0.1:${proxy.port}/agent/ws/s1`, await mint("s1")]);
  await client.tells("connected");
  const publisher = redis.client();
  await publisher.publish("session:s1:down", '{"type":"control","command":"gap"}');
  await client.tells("gap: ");
  await publisher.publish("session:s1:down", "no JSON at all");
  await client.prints('"no JSON at all"');
});

Deno.test("The example client stops at 1009 and at an expired token that it cannot renew", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { MAX_MESSAGE_SIZE_BYTES: "10" });
  const url = `ws://127.0.0.1:${proxy.port}/agent/ws/s1`;
  await using tooBig = new Task("client", [url, await mint("s1")]);
  await tooBig.tells("connected");
  await tooBig.type("more than ten bytes");
  await tooBig.tells("stopped (1009 message too large)");
  assert.equal((await tooBig.exit()).code, 1);
  const exp = Math.floor(Date.now() / 1000) + 2;
  await using expiring = new Task("client", [url, await mint("s1", { exp })]);
  await expiring.tells("stopped (4401 token expired)");
});

Deno.test("The example client stays away after a backend has closed it for good", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  await using client = new Task("client", [`ws://127.0.0.1:${proxy.port}/agent/ws/s1`, await mint("s1")]);
  await client.tells("connected");
  await redis.client().fcall("wsproxy_close", 1, "session:s1:down", 4403, "banned");
  await client.tells("stopped (4403 banned)");
  assert.equal((await client.exit()).code, 1);
});

Deno.test("Every client of ours stays away after the same closes, those of the table", () => {
  // 1007 has no row of its own: it is told with 1002.
  const final = new Set([1007]);
  for (const { code, advice } of Object.values(closes)) if (advice.startsWith("stop")) final.add(code);
  const expected = [...final].sort((a, b) => a - b);
  for (
    const path of [
      "examples/client.ts",
      "examples/index.html",
      "clients/js/wsproxy.js",
      "clients/python/wsproxy_client/client.py",
    ]
  ) {
    const text = Deno.readTextFileSync(new URL(`../${path}`, import.meta.url));
    const [, list = ""] = /final_?codes = \w[\w ]*\([\[{]([\d, ]+)[\]}]\)/i.exec(text) ?? [];
    assert.deepEqual(list.split(", ").map(Number), expected, path);
  }
});

Deno.test("The example client gets a new token where it has a token service", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  let made = 0;
  await using service = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    assert.equal(request.method, "POST");
    const exp = Math.floor(Date.now() / 1000) + (made++ === 0 ? 2 : 3600);
    return Response.json({ token: await mint("s1", { exp }) });
  });
  const url = `ws://127.0.0.1:${proxy.port}/agent/ws/s1`;
  await using client = new Task("client", [url, `http://127.0.0.1:${service.addr.port}/`]);
  await client.tells("connected");
  await client.tells("disconnected (4401 token expired), connecting again in ");
  await client.tells("connected");
  assert.equal(made, 2);
});

Deno.test('"deno task dev" prints two lines that work, and ends Redis and proxy with itself', async () => {
  await using dev = new Task("dev", [], { PORT: String(sparePort()) });
  await using client = new Task("client", clientArgs(await dev.prints("  ./dev client")));
  await client.tells("connected");
  const publish = (await dev.prints("  redis-cli")).trim();
  const [, port] = /^redis-cli -p (\d+) publish session:demo:down '"hello"'$/.exec(publish) ?? [];
  const done = await new Deno.Command("sh", { args: ["-c", publish] }).output();
  assert.equal(new TextDecoder().decode(done.stdout).trim(), "1");
  await client.prints('"hello"');
  dev.signal("SIGTERM");
  await client.tells("disconnected (1001");
  assert.equal((await dev.exit()).code, 0);
  await assert.rejects(Deno.connect({ hostname: "127.0.0.1", port: Number(port) }), Deno.errors.ConnectionRefused);
});

Deno.test('"deno task dev" uses the Redis at REDIS_URL, and fails with a clear line when the proxy cannot start', async () => {
  await using redis = await RedisServer.start();
  {
    await using dev = new Task("dev", [], { ...testEnv(redis), PORT: String(sparePort()) });
    await dev.prints("  ./dev client");
    assert.match(await dev.prints("  redis-cli"), new RegExp(`^  redis-cli -u '${redis.url}' publish `));
    dev.signal("SIGINT");
    assert.equal((await dev.exit()).code, 0);
  }
  {
    const env = { ...testEnv(redis), REDIS_URL: `redis://127.0.0.1:${sparePort()}` };
    await using dev = new Task("dev", [], { ...env, PORT: String(sparePort()) });
    await dev.tells("Redis cannot be used yet: not connected. It is waited for");
    dev.signal("SIGINT");
    assert.equal((await dev.exit()).code, 0);
  }
  await using dev = new Task("dev", [], { ...testEnv(redis), PORT: String(sparePort()), VALIDATE_JSON: "2" });
  await dev.tells("VALIDATE_JSON must be true or false");
  await dev.tells("wsproxy ended by itself, with exit code 1");
  assert.equal((await dev.exit()).code, 1);
});

Deno.test('"deno task token" prints a token that the proxy takes, and nothing else', async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  await using token = new Task("token", ["s1", "--agent", "agent", "--ttl", "15m"], { JWT_SECRET: secret });
  const text = (await token.output.rest()).trim();
  const [, payload] = text.split(".");
  const claims = JSON.parse(new TextDecoder().decode(Uint8Array.fromBase64(payload!, { alphabet: "base64url" })));
  assert.equal(claims.exp - claims.iat, 900);
  assert.deepEqual({ ...claims, iat: 0, exp: 0 }, { session_id: "s1", agent_id: "agent", iat: 0, exp: 0 });
  await using client = new Task("client", [`ws://127.0.0.1:${proxy.port}/agent/ws/s1`, text]);
  await client.tells("connected");
});

Deno.test('"deno task token" explains what is wrong with a command line, a secret or a duration', async () => {
  for (
    const [args, env, message] of [
      [[], {}, "usage: wsproxy token"],
      [["a", "b"], {}, "usage: wsproxy token"],
      [["a", "--ttl", "1x"], {}, '--ttl must be seconds, or a number with s, m, h or d: current value is "1x"'],
      [["a"], { JWT_SECRET: "" }, "JWT_SECRET is not set"],
      [["a"], { JWT_SECRET: "short" }, "JWT_SECRET must be 32 bytes or more"],
    ] as const
  ) {
    await using token = new Task("token", args, env);
    await token.tells(message);
    assert.equal((await token.exit()).code, 1);
  }
});

/** Starts a task of deno.json, without a .env of the developer's own. */
function startTask(task: string, name: string, env: Record<string, string>): WorkerProcess {
  const { tasks } = JSON.parse(Deno.readTextFileSync(new URL("../deno.json", import.meta.url)));
  const [, ...args] = String(tasks[task].command).split(" ");
  return new WorkerProcess(Deno.execPath(), [...args.filter((arg) => arg !== "--env-file"), name], env);
}

Deno.test("The example worker is killed in the middle of an answer, and another one goes on", () =>
  testWorkers((name, env) => startTask("worker", name, env)));

Deno.test("The example backend is there before Redis is, and outlives a restart of it, what is no JSON and its own death", () =>
  testBackend((session, env) => startTask("backend", session, env)));
