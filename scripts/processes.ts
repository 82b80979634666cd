/** Processes that a task of deno.json runs together, until it ends. */

import { get } from "../src/cli/healthcheck.ts";
import { sparePort } from "./spare_port.ts";
import { startWords } from "./start_flags.ts";

const redisTimeoutMs = 10_000;
/** A Redis that is well has been connected to by then. */
const tellAfterMs = 1000;

/** Ends the task with one line and exit code 1. */
export class Failure extends Error {
  override readonly name = "Failure";
}

/** A child process that ends with the scope it is started in. */
export class Child implements AsyncDisposable {
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

  /** Without a word, as a crash. */
  kill(): void {
    if (!this.#ended) this.#process.kill("SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.terminate();
    await this.ended;
  }
}

/** The first signal to stop, and what to do at a second one. */
export class Interrupt {
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

/** The port, or a spare one for 0. Throws when it is taken. */
export function freePort(hostname: string, port: number): number {
  if (port === 0) return sparePort(hostname);
  Deno.listen({ hostname, port }).close();
  return port;
}

/** A Redis that keeps nothing. */
export async function startRedis(port: number): Promise<Child> {
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
export async function readLines(stream: ReadableStream<Uint8Array<ArrayBuffer>>, take: (line: string) => void) {
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
export async function waitUntilHealthy(origin: string): Promise<void> {
  let sinceMs = Infinity;
  let told = false;
  while (true) {
    const problem = await askHealth(origin);
    if (problem === undefined) return;
    // The first start fetches packages and may take long; once it answers, only Redis is waited for.
    if (problem !== notListening && sinceMs === Infinity) sinceMs = performance.now();
    const waitedMs = performance.now() - sinceMs;
    if (waitedMs > redisTimeoutMs) throw new Failure(`Redis cannot be used: ${problem}`);
    if (waitedMs > tellAfterMs && !told) {
      console.error(`Redis cannot be used yet: ${problem}. It is waited for, ${redisTimeoutMs / 1000} s at most.`);
      told = true;
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

const notListening = "not listening yet";

async function askHealth(origin: string): Promise<string | undefined> {
  try {
    const { status, body } = await get(`${origin}/health`, AbortSignal.timeout(redisTimeoutMs));
    const { error } = JSON.parse(body);
    return status === 200 ? undefined : error;
  } catch (error) {
    if (error instanceof Error) return notListening; // refused, cut, or no answer of the proxy's
    throw error;
  }
}

/** Starts the proxy with the start task's own command, so that its permissions hold here too. */
export function startProxy(env: Record<string, string>): Child {
  // This process has read .env already, and hands it on; Deno would warn where there is none.
  return new Child("wsproxy", "deno", { args: startWords(Deno.readTextFileSync("deno.json"), "--env-file"), env });
}

/** Runs until it is interrupted; exits with 1 and one line when something ends by itself. */
export async function runUntilInterrupted(run: (interrupt: Interrupt) => Promise<void>): Promise<never> {
  try {
    await run(new Interrupt());
    Deno.exit(0);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    console.error(error.message);
    Deno.exit(1);
  }
}
