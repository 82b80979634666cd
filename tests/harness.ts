/**
 * Real parts for tests, as `await using` values: a redis-server on a spare port, a proxy in this process or as a
 * child, and clients. Whatever a test starts here is gone when its scope ends. Waiting is for events, with a generous
 * limit only so that a failure is reported instead of hanging.
 */

import { Redis } from "ioredis";
import { SignJWT } from "jose";
import { type Proxy, start } from "../main.ts";
import { readConfig } from "../src/config.ts";
import { createLog } from "../src/log.ts";

/** How long an event may take before a test gives up on it. These machines stall, so it is long. */
export const patienceMs = 20_000;

/** The secret of every proxy here, unless a test sets another. */
export const secret = "a-secret-of-the-tests-32-bytes-long!";

/** The promise, or an error that names what did not happen. */
export async function soon<T>(promise: Promise<T>, what: string): Promise<T> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(new Error(`${what}: not within ${patienceMs} ms`)), patienceMs);
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Asks until the answer is yes, for what has no event: state inside Redis or the proxy. */
export async function eventually(what: string, check: () => boolean | Promise<boolean>): Promise<void> {
  const end = performance.now() + patienceMs;
  while (!await check()) {
    if (performance.now() > end) throw new Error(`${what}: not within ${patienceMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A TCP port that nobody listens on now. */
export function sparePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** A redis-server of the test's own, which can be killed, frozen and started again on the same port. */
export class RedisServer implements AsyncDisposable {
  #process: Deno.ChildProcess | undefined;
  #clients: Redis[] = [];
  readonly url: string;

  private constructor(readonly port: number, readonly args: readonly string[]) {
    this.url = `redis://127.0.0.1:${port}`;
  }

  /** Starts one; `args` are redis-server's own. Resolves when it accepts connections. */
  static async start(...args: string[]): Promise<RedisServer> {
    const server = new RedisServer(sparePort(), args);
    await server.start();
    return server;
  }

  async start(): Promise<void> {
    const child = new Deno.Command("redis-server", {
      args: ["--port", String(this.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", ...this.args],
      stdin: "null",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    this.#process = child;
    const output = lines(child.stdout);
    await soon(output.until((line) => line.includes("Ready to accept connections")), "redis-server start");
    output.drain();
  }

  /** An ordinary connection for the test, closed with the server. */
  client(): Redis {
    const client = new Redis(this.url, { retryStrategy: () => 50, maxRetriesPerRequest: null });
    client.on("error", () => {});
    this.#clients.push(client);
    return client;
  }

  /** Sends a signal to the process: SIGSTOP freezes it, SIGCONT wakes it. */
  signal(signal: Deno.Signal): void {
    this.#process?.kill(signal);
  }

  /** Kills it with SIGKILL and waits until it is dead. */
  async kill(): Promise<void> {
    this.#process?.kill("SIGKILL");
    await this.#process?.status;
    this.#process = undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.#clients) await disconnect(client);
    if (this.#process) await this.kill();
    await eventually("redis-parser's interval has ended", () => intervals.size === 0);
  }
}

/**
 * After a large reply redis-parser shrinks its buffer by and by, on an interval of its own that nobody can stop: a
 * test that provokes it has to wait for its end.
 */
const intervals = new Set<unknown>();
const { setInterval, clearInterval } = globalThis;
globalThis.setInterval = ((...args: Parameters<typeof setInterval>) => {
  const interval = setInterval(...args);
  intervals.add(interval);
  return interval;
}) as typeof setInterval;
globalThis.clearInterval = (interval) => {
  intervals.delete(interval);
  clearInterval(interval);
};

async function disconnect(client: Redis): Promise<void> {
  if (client.status === "end") return;
  const ended = new Promise((resolve) => client.once("end", resolve));
  client.disconnect();
  await ended;
}

interface Relayed {
  readonly ends: Deno.TcpConn[];
  seen: string;
  thaw: PromiseWithResolvers<void> | undefined;
}

/** A TCP relay in front of a server, whose connections can be frozen one by one: the half-open ones of real life. */
export class Relay implements Disposable {
  readonly #listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly #connections: Relayed[] = [];
  readonly url = `redis://127.0.0.1:${this.#listener.addr.port}`;

  constructor(port: number) {
    (async () => {
      for await (const client of this.#listener) {
        const server = await Deno.connect({ hostname: "127.0.0.1", port });
        const connection: Relayed = { ends: [client, server], seen: "", thaw: undefined };
        this.#connections.push(connection);
        this.#pump(connection, client, server);
        this.#pump(connection, server, client);
      }
    })();
  }

  /** Freezes the newest connection that has sent a text: from now on nothing crosses it, either way. */
  freeze(text: string): void {
    const connection = this.#connections.findLast(({ seen }) => seen.includes(text));
    if (connection === undefined) throw new Error(`no connection has sent ${text}`);
    connection.thaw = Promise.withResolvers<void>();
  }

  async #pump(connection: Relayed, from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
    const chunk = new Uint8Array(65_536);
    try {
      while (true) {
        const count = await from.read(chunk);
        await connection.thaw?.promise;
        if (count === null) break;
        if (connection.seen.length < 4096) connection.seen += new TextDecoder().decode(chunk.subarray(0, count));
        await writeAll(to, chunk.subarray(0, count));
      }
    } catch {
      // Either end broke: the other one learns it below.
    }
    for (const end of connection.ends.splice(0)) end.close();
  }

  [Symbol.dispose](): void {
    this.#listener.close();
    for (const { ends, thaw } of this.#connections) {
      thaw?.resolve();
      for (const end of ends.splice(0)) end.close();
    }
  }
}

/** Settings by name, as in the environment. */
export type Env = Record<string, string>;

/** The WebSocket engines: what a client sees must be the same on each. */
export const engines = ["deno", "ws"] as const;

/** A test of what every engine must do, run on each. */
export function onEachEngine(name: string, test: (engine: Env) => Promise<void>): void {
  for (const WS_ENGINE of engines) Deno.test(`[${WS_ENGINE}] ${name}`, () => test({ WS_ENGINE }));
}

/** Settings for a proxy under test: quiet, on a free port of the loopback, stopping fast. */
export function testEnv(redis: RedisServer | string, env: Env = {}): Env {
  return {
    HOST: "127.0.0.1",
    PORT: "0",
    REDIS_URL: typeof redis === "string" ? redis : redis.url,
    JWT_SECRET: secret,
    SHUTDOWN_GRACE_PERIOD_SECS: "5",
    LOG_LEVEL: "silent",
    ...env,
  };
}

/** A proxy in this process, composed as `deno task start` does. */
export class TestProxy implements AsyncDisposable {
  private constructor(readonly proxy: Proxy) {}

  /** Starts one and waits until it takes clients; `ready: false` does not wait. */
  static async start(redis: RedisServer | string, env: Env = {}, { ready = true } = {}): Promise<TestProxy> {
    const config = readConfig(testEnv(redis, env));
    const proxy = new TestProxy(await start(config, createLog(config)));
    if (ready) await eventually("proxy healthy", async () => (await proxy.request("/health")).status === 200);
    return proxy;
  }

  get port(): number {
    return this.proxy.port;
  }

  request(path: string, options: RequestOptions = {}): Promise<Reply> {
    return request(this.port, path, options);
  }

  /** The number behind a metric's name (with its labels) at `/metrics`; 0 when there is none. */
  metric(name: string): Promise<number> {
    return metric(this.port, name);
  }

  connect(sessionId: string, options: ConnectOptions = {}): Promise<Client> {
    return Client.connect(this.port, sessionId, options);
  }

  /** Waits until no session and no subscription but the canary's is left. */
  async empty(): Promise<void> {
    await eventually("no sessions left", () => this.proxy.sessions === 0);
    await eventually("no subscriptions left", () => this.proxy.subscriptions === 1);
  }

  /** Whatever a test did, once its clients are gone nothing may be left of them. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.empty();
    } finally {
      await this.proxy.stop();
    }
  }
}

async function metric(port: number, name: string): Promise<number> {
  const { body } = await request(port, "/metrics");
  const line = body.split("\n").find((line) => line.startsWith(`${name} `));
  return line === undefined ? 0 : Number(line.slice(name.length + 1));
}

/** Claims to sign; `iat` is now unless given. */
export type Claims = Record<string, unknown>;

/** A token for a session, signed with HS256. */
export function mint(sessionId: string, claims: Claims = {}, key = secret, header: object = {}): Promise<string> {
  return new SignJWT({ session_id: sessionId, iat: Math.floor(Date.now() / 1000), ...claims })
    .setProtectedHeader({ alg: "HS256", ...header })
    .sign(new TextEncoder().encode(key));
}

/** What `request` sends besides the path. */
export interface RequestOptions {
  method?: string;
  headers?: Record<string, string>;
}

/** An HTTP answer, as it came. */
export interface Reply {
  status: number;
  headers: Headers;
  body: string;
}

/** The headers of a correct opening handshake; "" takes one away. */
export const handshakeHeaders: Record<string, string> = {
  Upgrade: "websocket",
  Connection: "Upgrade",
  "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
  "Sec-WebSocket-Version": "13",
};

/** The text of a request's head. */
export function requestHead(path: string, { method = "GET", headers = {} }: RequestOptions = {}): string {
  const lines = Object.entries({ Host: "127.0.0.1", ...headers }).filter(([, value]) => value !== "");
  return `${method} ${path} HTTP/1.1\r\n${lines.map(([name, value]) => `${name}: ${value}\r\n`).join("")}\r\n`;
}

/** One request over a TCP connection of its own, so that any header can be sent. A 101 is returned and hung up on. */
export async function request(port: number, path: string, options: RequestOptions = {}): Promise<Reply> {
  using connection = await Deno.connect({ hostname: "127.0.0.1", port });
  await writeAll(connection, new TextEncoder().encode(requestHead(path, options)));
  return await soon(readReply(connection), `answer to ${options.method ?? "GET"} ${path.slice(0, 100)}`);
}

/** The headers of a correct opening handshake with a token for the session. */
export async function handshake(sessionId: string, claims: Claims = {}): Promise<Record<string, string>> {
  return { ...handshakeHeaders, Authorization: `Bearer ${await mint(sessionId, claims)}` };
}

/** A WebSocket down to the bytes: opened by hand, and from then on it does nothing by itself, not even answer a ping. */
export async function openRaw(port: number, sessionId: string, claims: Claims = {}): Promise<Deno.TcpConn> {
  const connection = await Deno.connect({ hostname: "127.0.0.1", port });
  const head = requestHead(`/agent/ws/${sessionId}`, { headers: await handshake(sessionId, claims) });
  await writeAll(connection, new TextEncoder().encode(head));
  const { status } = await soon(readReply(connection), "101");
  if (status !== 101) throw new Error(`handshake was answered with ${status}`);
  return connection;
}

/** One frame of a client, masked with zeros unless told otherwise (RFC 6455, section 5.2). */
export function frame(
  opcode: number,
  payload: string | Uint8Array,
  { fin = true, reserved = 0, masked = true, claimedBytes = -1 } = {},
): Uint8Array {
  const body = typeof payload === "string" ? new TextEncoder().encode(payload) : payload;
  const size = claimedBytes < 0 ? body.length : claimedBytes;
  const head = [(fin ? 0x80 : 0) | reserved << 4 | opcode];
  const mask = masked ? 0x80 : 0;
  if (size < 126) head.push(mask | size);
  else if (size < 65_536) head.push(mask | 126, size >> 8, size & 255);
  else head.push(mask | 127, 0, 0, 0, 0, size >>> 24, size >> 16 & 255, size >> 8 & 255, size & 255);
  return new Uint8Array([...head, ...masked ? [0, 0, 0, 0] : [], ...body]);
}

/** Writes all of it. */
export async function writeAll(connection: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await connection.write(bytes.subarray(at));
}

/** Reads one answer with a Content-Length, or without a body. */
export async function readReply(connection: Deno.Conn): Promise<Reply> {
  const decoder = new TextDecoder();
  const chunk = new Uint8Array(65_536);
  let text = "";
  const read = async () => {
    const count = await connection.read(chunk);
    if (count === null) throw new Error(`connection ended after ${JSON.stringify(text)}`);
    text += decoder.decode(chunk.subarray(0, count), { stream: true });
  };
  while (!text.includes("\r\n\r\n")) await read();
  const [head = "", ...rest] = text.split("\r\n\r\n");
  const [statusLine = "", ...fields] = head.split("\r\n");
  const headers = new Headers(fields.map((field): [string, string] => {
    const colon = field.indexOf(":");
    return [field.slice(0, colon), field.slice(colon + 1).trim()];
  }));
  const status = Number(statusLine.split(" ")[1]);
  text = rest.join("\r\n\r\n");
  while (status !== 101 && text.length < Number(headers.get("content-length") ?? 0)) await read();
  return { status, headers, body: text };
}

/** How a client connects. */
export interface ConnectOptions {
  agent?: string;
  claims?: Claims;
  /** Instead of one minted from the claims. */
  token?: string;
  headers?: Record<string, string>;
}

/** What has arrived, kept until the test asks for it. */
export class Inbox {
  readonly #arrived: string[] = [];
  #ended = false;
  #waiting: (() => void) | undefined;

  /** How many have arrived and were not taken. */
  get size(): number {
    return this.#arrived.length;
  }

  add(text: string): void {
    this.#arrived.push(text);
    this.#waiting?.();
  }

  /** Nothing more will come. */
  end(): void {
    this.#ended = true;
    this.#waiting?.();
  }

  /** The next `count`, in the order of their arrival. Rejects when the inbox ends before. */
  async take(count: number): Promise<string[]> {
    const wait = async () => {
      while (this.#arrived.length < count) {
        if (this.#ended) throw new Error(`ended after ${this.#arrived.length} of ${count} messages`);
        await new Promise<void>((resolve) => this.#waiting = resolve);
      }
    };
    await soon(wait(), `${count} messages`);
    return this.#arrived.splice(0, count);
  }

  /** All that has arrived and was not taken. */
  takeAll(): string[] {
    return this.#arrived.splice(0);
  }
}

/** A WebSocket client that keeps what it gets until the test asks for it. */
export class Client implements AsyncDisposable {
  readonly socket: WebSocket;
  /** Resolves when the socket has closed. */
  readonly closed: Promise<{ code: number; reason: string }>;
  readonly #inbox = new Inbox();

  private constructor(socket: WebSocket) {
    this.socket = socket;
    socket.addEventListener("message", ({ data }) => this.#inbox.add(data));
    this.closed = new Promise((resolve) => {
      socket.addEventListener("close", ({ code, reason }) => {
        resolve({ code, reason });
        this.#inbox.end();
      });
    });
  }

  /** Connects to a proxy of the loopback, with a token. */
  static async connect(port: number, sessionId: string, options: ConnectOptions = {}): Promise<Client> {
    const token = options.token ?? await mint(sessionId, options.claims);
    const path = `/${encodeURIComponent(options.agent ?? "agent")}/ws/${encodeURIComponent(sessionId)}`;
    const headers = { Authorization: `Bearer ${token}`, ...options.headers };
    return await Client.open(new URL(`ws://127.0.0.1:${port}${path}`), { headers });
  }

  /** Connects and waits for the open. Rejects when it is refused. */
  static async open(url: URL, options: WebSocketOptions): Promise<Client> {
    const client = new Client(new WebSocket(url, options));
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    client.socket.addEventListener("open", () => resolve());
    client.socket.addEventListener("error", (event) => {
      event.preventDefault();
      reject(new Error((event as ErrorEvent).message));
    });
    await soon(promise, `open of ${url.pathname}`);
    return client;
  }

  send(data: string | Uint8Array<ArrayBuffer>): void {
    this.socket.send(data);
  }

  /** The next `count` messages. Rejects when the socket closes before. */
  take(count: number): Promise<string[]> {
    return this.#inbox.take(count);
  }

  /** The next message. */
  async next(): Promise<string> {
    return (await this.take(1))[0]!;
  }

  /** All that has arrived and was not taken. */
  arrived(): string[] {
    return this.#inbox.takeAll();
  }

  /** How the socket ends. */
  ended(): Promise<{ code: number; reason: string }> {
    return soon(this.closed, "close");
  }

  /** Closes and waits for the end. */
  async close(): Promise<void> {
    this.socket.close();
    await this.ended();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** A backend's ear: what is published to one channel, kept until the test asks for it. */
export class Listener {
  readonly #inbox = new Inbox();

  private constructor(redis: Redis) {
    redis.on("message", (_channel, text) => this.#inbox.add(text));
  }

  /** Subscribes. */
  static async to(redis: RedisServer, channel: string): Promise<Listener> {
    const client = redis.client();
    const listener = new Listener(client);
    await client.subscribe(channel);
    return listener;
  }

  /** How many have arrived and were not taken. */
  get waiting(): number {
    return this.#inbox.size;
  }

  /** The next `count` messages. */
  take(count: number): Promise<string[]> {
    return this.#inbox.take(count);
  }
}

/** Subscribers of a channel, as Redis itself counts them. */
export async function subscribers(redis: Redis, channel: string): Promise<number> {
  const [, count] = await redis.pubsub("NUMSUB", channel) as [string, number];
  return Number(count);
}

/** A child process's output, line by line. */
export function lines(stream: ReadableStream<Uint8Array<ArrayBuffer>>) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  return {
    /** Reads up to the line that fits, and returns it. */
    async until(fits: (line: string) => boolean): Promise<string> {
      while (true) {
        const end = rest.indexOf("\n");
        if (end >= 0) {
          const line = rest.slice(0, end);
          rest = rest.slice(end + 1);
          if (fits(line)) return line;
          continue;
        }
        const { value, done } = await reader.read();
        if (done) throw new Error(`output ended; last: ${JSON.stringify(rest)}`);
        rest += value;
      }
    },
    /** Reads and forgets the rest, so that the process never waits for us. */
    drain(): void {
      (async () => {
        while (!(await reader.read()).done);
      })();
    },
    /** All the rest. */
    async rest(): Promise<string> {
      while (true) {
        const { value, done } = await reader.read();
        if (done) return rest;
        rest += value;
      }
    },
  };
}

/** A proxy as `deno task start` runs it: a child process, with the task's own permissions. */
export class ProxyProcess implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly log: ReturnType<typeof lines>;
  readonly errors: Promise<string>;
  port = 0;

  private constructor(env: Env, denoArgs: readonly string[], maxDescriptors: number | "unlimited") {
    const [run = "run", ...args] = startArgs();
    const limited = ["-c", `ulimit -n ${maxDescriptors} && exec "$@"`, "sh"];
    this.#child = new Deno.Command(maxDescriptors === "unlimited" ? Deno.execPath() : "sh", {
      args: [...maxDescriptors === "unlimited" ? [] : [...limited, Deno.execPath()], run, ...denoArgs, ...args],
      env: { ...env, NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.log = lines(this.#child.stdout);
    this.errors = lines(this.#child.stderr).rest();
  }

  /** Starts one without waiting, with these settings only; for starts that are no ordinary ones. */
  static spawn(env: Env, denoArgs: readonly string[] = []): ProxyProcess {
    return new ProxyProcess(env, denoArgs, "unlimited");
  }

  /** Starts one, and waits until it is connected to Redis. */
  static async start(
    redis: RedisServer | string,
    env: Env = {},
    { maxDescriptors = "unlimited" as number | "unlimited" } = {},
  ): Promise<ProxyProcess> {
    const proxy = new ProxyProcess(testEnv(redis, { LOG_LEVEL: "info", ...env }), [], maxDescriptors);
    const listening = await soon(proxy.log.until((line) => line.includes('"listening"')), "proxy listening");
    proxy.port = JSON.parse(listening).port;
    await eventually("proxy healthy", async () => (await request(proxy.port, "/health")).status === 200);
    return proxy;
  }

  get pid(): number {
    return this.#child.pid;
  }

  /** Open file descriptors, as Linux counts them; 0 on other systems. */
  get descriptors(): number {
    return Number(shell(`ls /proc/${this.pid}/fd | wc -l`));
  }

  /** The most memory that was ever resident, in bytes, as Linux counts it; 0 on other systems. */
  get peakBytes(): number {
    return Number(shell(`awk '/VmHWM/ { print $2 }' /proc/${this.pid}/status`)) * 1024;
  }

  /** The number behind a metric's name (with its labels) at `/metrics`; 0 when there is none. */
  metric(name: string): Promise<number> {
    return metric(this.port, name);
  }

  signal(signal: Deno.Signal): void {
    this.#child.kill(signal);
  }

  /** Its exit status, when it ends. */
  exit(): Promise<Deno.CommandStatus> {
    return soon(this.#child.status, "exit");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#child.kill("SIGKILL");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // it has ended already
    }
    await this.#child.status;
    await this.log.rest();
    await this.errors;
  }
}

/** What a command prints. Deno itself may read /proc only with all permissions. */
function shell(command: string): string {
  if (Deno.build.os !== "linux") return "0";
  return new TextDecoder().decode(new Deno.Command("sh", { args: ["-c", command] }).outputSync().stdout);
}

/** The start task's own command, without looking for a .env file. */
function startArgs(): string[] {
  const { tasks } = JSON.parse(Deno.readTextFileSync(new URL("../deno.json", import.meta.url)));
  const [deno, ...args] = String(tasks.start.command).split(" ");
  if (deno !== "deno") throw new Error("the start task must be a plain deno command");
  return args.filter((arg) => arg !== "--env-file");
}
