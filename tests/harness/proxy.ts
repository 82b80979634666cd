/** A proxy, in this process or as a child, gone with the test's scope. */

import assert from "node:assert/strict";
import { type Proxy, start } from "../../main.ts";
import { readConfig } from "../../src/config.ts";
import { createLog, type Log } from "../../src/log.ts";
import { startWords } from "../../scripts/start_flags.ts";
import { Client, type ConnectOptions } from "./client.ts";
import { lines, shell } from "./process.ts";
import type { RedisServer } from "./redis.ts";
import { secret } from "./token.ts";
import { eventually, soon } from "./wait.ts";
import { handshakeHeaders, type Reply, request, type RequestOptions } from "./wire.ts";

const denoJson = Deno.readTextFileSync(new URL("../../deno.json", import.meta.url));

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
    JWT_LEEWAY_SECS: "0",
    LOG_LEVEL: "silent",
    ...env,
  };
}

/** A proxy behind a port, in whichever process. */
export abstract class Metered {
  abstract readonly port: number;

  /** Messages flow through every server. */
  async isHealthy(): Promise<boolean> {
    return JSON.parse((await request(this.port, "/health")).body).status === "healthy";
  }

  /** Waits until clients can resume: only then is a position looked at, and that is before the token. */
  async resumable(session = "s1"): Promise<void> {
    const headers = { ...handshakeHeaders, "Sec-WebSocket-Protocol": "wsproxy.resume.v1" };
    await eventually("clients can resume", async () => {
      const { status } = await request(this.port, `/agent/ws/${session}?resume=malformed`, { headers });
      if (status !== 401) assert.equal(status, 400);
      return status === 400;
    });
  }

  /** The number behind a metric's name (with its labels) at `/metrics`; 0 when there is none. */
  async metric(name: string): Promise<number> {
    const { body } = await request(this.port, "/metrics");
    const line = body.split("\n").find((line) => line.startsWith(`${name} `));
    return line === undefined ? 0 : Number(line.slice(name.length + 1));
  }

  /** Waits until a metric has this value: what a test has seen of an event may come before its count. */
  async counts(name: string, value: number): Promise<void> {
    let found = NaN;
    await eventually(`${name} is ${value}`, async () => (found = await this.metric(name)) === value).catch((error) => {
      throw new Error(`${error.message}: it is ${found}`);
    });
  }
}

/** A proxy in this process, composed as `deno task start` does. */
export class TestProxy extends Metered implements AsyncDisposable {
  private constructor(readonly proxy: Proxy, readonly idleSubscriptions: number) {
    super();
  }

  /**
   * Starts one and waits until it takes clients; `ready: false` does not wait. Without clients it has
   * `idleSubscriptions`: a canary for each server, and the one for control. It writes into `log`, if there is one.
   */
  static async start(
    redis: RedisServer | string,
    env: Env = {},
    { ready = true, idleSubscriptions = 2, log = undefined as Log | undefined } = {},
  ): Promise<TestProxy> {
    const config = readConfig(testEnv(redis, env));
    const proxy = new TestProxy(await start(config, log ?? createLog(config.logging)), idleSubscriptions);
    if (ready) await eventually("proxy healthy", () => proxy.isHealthy());
    return proxy;
  }

  get port(): number {
    return this.proxy.port;
  }

  request(path: string, options: RequestOptions = {}): Promise<Reply> {
    return request(this.port, path, options);
  }

  connect(sessionId: string, options: ConnectOptions = {}): Promise<Client> {
    return Client.connect(this.port, sessionId, options);
  }

  /** Waits until no session and no subscription of one is left. */
  async empty(): Promise<void> {
    await eventually("no sessions left", () => this.proxy.sessions === 0);
    await eventually("no subscriptions left", () => this.proxy.subscriptions === this.idleSubscriptions);
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

/** A proxy as `deno task start` runs it: a child process, with the task's own permissions. */
export class ProxyProcess extends Metered implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly log: ReturnType<typeof lines>;
  readonly errors: Promise<string>;
  port = 0;

  private constructor(
    env: Env,
    denoArgs: readonly string[],
    maxDescriptors: number | "unlimited",
    main = "main.ts",
    under: readonly string[] = [],
  ) {
    super();
    const [run = "run", ...words] = startWords(denoJson, "--env-file");
    const args = [...words.slice(0, -1), main];
    const limited = maxDescriptors === "unlimited"
      ? []
      : ["sh", "-c", `ulimit -n ${maxDescriptors} && exec "$@"`, "sh"];
    const [command = "", ...commandArgs] = [...under, ...limited, Deno.execPath(), run, ...denoArgs, ...args];
    this.#child = new Deno.Command(command, {
      args: commandArgs,
      env: { ...env, NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    this.log = lines(this.#child.stdout);
    this.errors = lines(this.#child.stderr).rest();
  }

  /**
   * Starts one without waiting, with these settings only; for starts that are no ordinary ones, another `main`, or one
   * `under` another command.
   */
  static spawn(env: Env, denoArgs: readonly string[] = [], main?: string, under?: readonly string[]): ProxyProcess {
    return new ProxyProcess(env, denoArgs, "unlimited", main, under);
  }

  /** Starts one, and waits until it is connected to Redis. */
  static async start(
    redis: RedisServer | string,
    env: Env = {},
    { maxDescriptors = "unlimited" as number | "unlimited", denoArgs = [] as readonly string[] } = {},
  ): Promise<ProxyProcess> {
    const proxy = new ProxyProcess(testEnv(redis, { LOG_LEVEL: "info", ...env }), denoArgs, maxDescriptors);
    const listening = await soon(proxy.log.until((line) => line.includes('"listening"')), "proxy listening");
    proxy.port = JSON.parse(listening).port;
    await eventually("proxy healthy", () => proxy.isHealthy());
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
