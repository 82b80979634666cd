/** The processes of a run, as `await using` values: Redis, the server under test, the load generator. */

import { sparePort } from "../scripts/spare_port.ts";
import type { Event, Order, Outcome } from "./outcome.ts";
import type { Target } from "./targets.ts";

/** How long a server may take to listen. */
const startTimeoutMs = 20_000;
const pollMs = 20;
const repository = new URL("..", import.meta.url).pathname;

/** A child process that listens on a port. */
export class Listening implements AsyncDisposable {
  private constructor(readonly process: Deno.ChildProcess, readonly port: number) {}

  get pid(): number {
    return this.process.pid;
  }

  /** Starts a command; resolves when its port is open. @throws when it ends before, or takes too long. */
  static async start(command: readonly string[], port: number, options: Deno.CommandOptions): Promise<Listening> {
    const [program, ...args] = command;
    const process = new Deno.Command(program!, { ...options, args, stdin: "null", stdout: "null" }).spawn();
    let ended: Deno.CommandStatus | undefined;
    process.status.then((status) => ended = status);
    const listening = new Listening(process, port);
    const deadlineMs = performance.now() + startTimeoutMs;
    while (!await isOpen(port)) {
      if (ended) throw new Error(`${program} ended with exit code ${ended.code} instead of listening on port ${port}`);
      if (performance.now() > deadlineMs) {
        await listening[Symbol.asyncDispose]();
        throw new Error(`${program} did not listen on port ${port} within ${startTimeoutMs} ms`);
      }
      await new Promise((resolve) => setTimeout(resolve, pollMs));
    }
    return listening;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.process.kill("SIGKILL");
    } catch (error) {
      // It has ended by itself.
      if (!(error instanceof TypeError)) throw error;
    }
    await this.process.status;
  }
}

async function isOpen(port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname: "127.0.0.1", port })).close();
    return true;
  } catch {
    return false;
  }
}

/**
 * A redis-server without persistence. Its limit for subscribers is raised: what is measured is the server under test,
 * and by default Redis cuts off a subscriber that is 8 MB behind for a minute. With `cpus` it has no other cores.
 */
export function startRedis(cpus?: string): Promise<Listening> {
  const port = sparePort();
  const args = ["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
  const limit = ["--client-output-buffer-limit", "pubsub 512mb 256mb 60"];
  return Listening.start([...pinnedTo(cpus), "redis-server", ...args, ...limit], port, { stderr: "inherit" });
}

/** What stands in front of a command that may run on these cores only. */
export const pinnedTo = (cpus: string | undefined) => cpus === undefined ? [] : ["taskset", "--cpu-list", cpus];

/** Installs what a target needs, once. */
export async function prepare(target: Target): Promise<void> {
  if (!target.npmInstall) return;
  const modules = await Deno.stat(`${target.directory}/node_modules`).catch(() => undefined);
  if (modules) return;
  const { success, stderr } = await new Deno.Command("npm", {
    args: ["install", "--no-audit", "--no-fund", "--silent"],
    cwd: target.directory,
    stdout: "null",
    stderr: "piped",
  }).output();
  if (!success) throw new Error(`npm install for ${target.name} failed: ${new TextDecoder().decode(stderr)}`);
}

/** Starts a target. Its log level is "warn", as of a server in production that has nothing to say. */
export function startTarget(
  target: Target,
  redis: Pick<Listening, "port">,
  secret: string,
  port = sparePort(),
): Promise<Listening> {
  return Listening.start(target.command, port, {
    cwd: target.directory ?? repository,
    env: {
      HOST: "127.0.0.1",
      PORT: String(port),
      REDIS_URL: `redis://127.0.0.1:${redis.port}`,
      JWT_SECRET: secret,
      LOG_LEVEL: "warn",
      NODE_ENV: "production",
      ...target.environment,
    },
    stderr: "inherit",
  });
}

/** Starts a program of bench/load, in Node. */
export function startLoad(name: string): Deno.ChildProcess {
  return new Deno.Command("node", {
    args: [new URL(`load/${name}`, import.meta.url).pathname],
    stdin: "piped",
    stdout: "piped",
    stderr: "inherit",
  }).spawn();
}

/** Gives a program its one order, as JSON on its standard input. */
export async function giveOrder(process: Deno.ChildProcess, order: unknown): Promise<void> {
  const writer = process.stdin.getWriter();
  await writer.write(new TextEncoder().encode(JSON.stringify(order)));
  await writer.close();
}

/** Runs the load generator with an order. `onProgress` hears a line from time to time. */
export async function generate(order: Order, onProgress: (line: string) => void): Promise<Outcome> {
  const process = startLoad("main.js");
  await giveOrder(process, order);
  let outcome: Outcome | undefined;
  for await (const line of linesOf(process.stdout)) {
    const event: Event = JSON.parse(line);
    if ("outcome" in event) outcome = event.outcome;
    else onProgress(event.progress);
  }
  const { code } = await process.status;
  if (code !== 0 || !outcome) throw new Error(`the load generator ended with exit code ${code}`);
  return outcome;
}

/** The lines of a stream; each must have its end. */
export async function* linesOf(stream: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncGenerator<string> {
  let rest = "";
  for await (const chunk of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + chunk).split("\n");
    rest = lines.pop()!;
    yield* lines;
  }
}
