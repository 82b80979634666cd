/**
 * `deno task dev`: a whole wsproxy on this machine, until Ctrl-C.
 *
 * It uses the Redis at `REDIS_URL`, or starts one of its own; makes a `JWT_SECRET` where there is none; runs
 * the start task with both; and prints one line that connects a client and one that publishes to it. Whatever it
 * started ends with it, and it ends, with exit code 1, when something that it started does.
 */

import { settings } from "../src/config.ts";
import { mintToken } from "./token.ts";

/** Ends `deno task dev` with one line and exit code 1. */
class Failure extends Error {
  override readonly name = "Failure";
}

const sessionId = "demo";
const tokenTtlSecs = 86_400;
const redisTimeoutMs = 10_000;

/** A child process that ends with the scope it is started in. */
class Child implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  #ended = false;
  /** Resolves when it has ended. */
  readonly ended: Promise<string>;

  constructor(readonly name: string, command: string, options: Deno.CommandOptions) {
    try {
      // In a process group of its own: Ctrl-C goes to the whole group of the terminal, and would end Redis before the
      // proxy, and the proxy twice.
      this.#process = new Deno.Command(command, { ...options, stdin: "null", detached: true }).spawn();
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotCapable)) throw error;
      throw new Failure(`${command} is not on PATH: "./dev up" installs it`);
    }
    this.ended = this.#process.status.then(({ code, signal }) => {
      this.#ended = true;
      return `${name} ended by itself, with ${signal ?? `exit code ${code}`}`;
    });
  }

  get stdout(): ReadableStream<Uint8Array<ArrayBuffer>> {
    return this.#process.stdout;
  }

  terminate(): void {
    if (!this.#ended) this.#process.kill("SIGTERM");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.terminate();
    await this.ended;
  }
}

/** The first signal to stop, and what to do at a second one. */
class Interrupt {
  readonly #first = Promise.withResolvers<void>();
  #firstAt: number | undefined;
  onSecond = () => {};

  constructor() {
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) Deno.addSignalListener(signal, () => this.#take());
  }

  get received(): Promise<void> {
    return this.#first.promise;
  }

  #take(): void {
    this.#firstAt ??= performance.now();
    this.#first.resolve();
    // One Ctrl-C arrives twice: from the terminal, and from `deno task`, which passes on what it gets.
    if (performance.now() - this.#firstAt > 500) this.onSecond();
  }
}

/**
 * A port to listen on: the one that `PORT` names, or the default, or a free one where that is taken.
 * @throws {Failure} when `PORT` is taken, or `hostname` is beyond this task's permissions.
 */
function choosePort(hostname: string, given: string | undefined): number {
  const wanted = settings.PORT.parse(given ?? settings.PORT.default!);
  if (typeof wanted !== "number") throw new Failure(`PORT ${wanted.rule}: current value is "${given}"`);
  try {
    return freePort(hostname, wanted);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) {
      throw new Failure(`HOST must be 127.0.0.1, localhost, ::1, 0.0.0.0 or :: here: current value is "${hostname}"`);
    }
    if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    if (given) throw new Failure(`PORT must be free: something listens on ${given}`);
    return freePort(hostname, 0);
  }
}

/** The port, or any free one for 0. Throws when it is taken. */
function freePort(hostname: string, port: number): number {
  using listener = Deno.listen({ hostname, port });
  return listener.addr.port;
}

/** A Redis that keeps nothing. */
async function startRedis(port: number): Promise<Child> {
  const redis = new Child("redis-server", "redis-server", {
    args: [
      ...["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
      // The default cuts a subscriber off that is 32 MB behind: a burst to many sessions gets there.
      ...["--client-output-buffer-limit", "pubsub 256mb 128mb 60"],
    ],
    stdout: "piped",
  });
  let ready: () => void;
  const output = readLines(redis.stdout, (line) => line.includes("Ready to accept connections") && ready());
  const started = await Promise.race([
    new Promise<true>((resolve) => ready = () => resolve(true)),
    output.then((lastLine) => lastLine),
  ]);
  if (started === true) return redis;
  await redis.ended;
  throw new Failure(`redis-server could not start: ${started}`);
}

/** Hands on each line, and resolves with the last one at the end. */
async function readLines(stream: ReadableStream<Uint8Array<ArrayBuffer>>, take: (line: string) => void) {
  let rest = "";
  let last = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      last = line;
      take(line);
    }
  }
  return last;
}

/** Waits until messages flow. Asked for, not read from the log, which may be silent. */
async function waitUntilHealthy(origin: string): Promise<void> {
  let end = Infinity;
  while (true) {
    const problem = await askHealth(origin);
    if (problem === undefined) return;
    // The first start fetches packages and may take long; once it answers, only Redis is waited for.
    if (problem !== notListening && end === Infinity) end = performance.now() + redisTimeoutMs;
    if (performance.now() > end) throw new Failure(`Redis cannot be used: ${problem}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const notListening = "not listening yet";

async function askHealth(origin: string): Promise<string | undefined> {
  try {
    const response = await fetch(`${origin}/health`);
    const { error } = await response.json();
    return response.ok ? undefined : error;
  } catch (error) {
    if (error instanceof TypeError || error instanceof SyntaxError) return notListening;
    throw error;
  }
}

/** The redis-cli options that reach a Redis. A URL with a password is named, not shown. */
function redisCliOptions(redisUrl: string): string {
  const { username, password } = new URL(redisUrl);
  return username || password ? '-u "$REDIS_URL"' : `-u '${redisUrl}'`;
}

/** The start task's own command, so that its permissions hold here too. */
function startArgs(): string[] {
  const { tasks } = JSON.parse(Deno.readTextFileSync("deno.json"));
  const [deno, ...args] = String(tasks.start.command).split(" ");
  if (deno !== "deno") throw new Failure("the start task of deno.json must be a plain deno command");
  // This process has read .env already, and hands it on; Deno would warn where there is none.
  return args.filter((arg) => arg !== "--env-file");
}

/** Runs everything until it is interrupted. Throws when something ends by itself. */
async function run(interrupt: Interrupt): Promise<void> {
  const host = Deno.env.get("HOST") || "127.0.0.1";
  const port = choosePort(host, Deno.env.get("PORT") || undefined);
  const givenRedisUrl = Deno.env.get("REDIS_URL");
  const redisPort = freePort("127.0.0.1", 0);
  const secret = Deno.env.get("JWT_SECRET") || crypto.randomUUID() + crypto.randomUUID();

  await using redis = givenRedisUrl ? undefined : await startRedis(redisPort);
  await using proxy = new Child("wsproxy", "deno", {
    args: startArgs(),
    env: {
      HOST: host,
      PORT: String(port),
      REDIS_URL: givenRedisUrl || `redis://127.0.0.1:${redisPort}`,
      JWT_SECRET: secret,
      LOG_FORMAT: Deno.env.get("LOG_FORMAT") || "text",
    },
  });
  interrupt.onSecond = () => proxy.terminate();

  const visibleHost = host === "0.0.0.0"
    ? "127.0.0.1"
    : host === "::"
    ? "[::1]"
    : host.includes(":")
    ? `[${host}]`
    : host;
  const ends = [redis, proxy].flatMap((child) => child ? [child.ended] : []);
  const healthy = waitUntilHealthy(`http://${visibleHost}:${port}`);
  const first = await Promise.race([healthy, interrupt.received.then(() => "interrupted"), ...ends]);
  if (first === "interrupted") return;
  if (first !== undefined) throw new Failure(first);

  const token = await mintToken(secret, { sessionId, ttlSecs: tokenTtlSecs });
  const cli = givenRedisUrl ? redisCliOptions(givenRedisUrl) : `-p ${redisPort}`;
  console.log(`
Connect a client, in another terminal:
  ./dev client ws://${visibleHost}:${port}/agent/ws/${sessionId} ${token}
Publish to it, in a third:
  redis-cli ${cli} publish session:${sessionId}:down '"hello"'
Ctrl-C ends all of it.
`);
  const end = await Promise.race([interrupt.received, ...ends]);
  if (end !== undefined) throw new Failure(end);
}

try {
  await run(new Interrupt());
  Deno.exit(0);
} catch (error) {
  if (!(error instanceof Failure)) throw error;
  console.error(error.message);
  Deno.exit(1);
}
