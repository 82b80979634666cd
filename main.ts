/**
 * wsproxy: a WebSocket proxy that lets backends talk to their clients through Redis Pub/Sub.
 *
 * Run it (`deno task start`) and it serves until SIGTERM or SIGINT, or does what `--help` lists; import it and
 * {@linkcode start} gives a running proxy to a program of yours.
 *
 * @module
 */

// First, so that signals are listened to while the rest is evaluated.
import { type SignalName, type Signals, signals } from "./src/signals.ts";
import { type Config, ConfigError, readConfig, readEnvironment } from "./src/config.ts";
import { createLog, flushLog } from "./src/log.ts";
import { type Proxy, start } from "./src/proxy.ts";
import type { Environment } from "./src/settings.ts";
import { Workers } from "./src/workers.ts";

export { type Config, ConfigError, type InboxSettings, type LogSettings, readConfig } from "./src/config.ts";
export type { Environment } from "./src/settings.ts";
export type { Origins } from "./src/origins.ts";
export type {
  Certificates,
  ClusterAddress,
  RedisAddress,
  RedisIdentity,
  SentinelAddress,
  ServerAddress,
  TcpAddress,
} from "./src/redis_url.ts";
export { createLog, flushLog, type Log } from "./src/log.ts";
export { type Proxy, start } from "./src/proxy.ts";

/** One Ctrl-C comes twice, from the terminal and from `deno task`, which passes on what it gets. */
const sameSignalMs = 300;

/** What runs: one proxy, or the workers that are proxies. */
type Running = Pick<Proxy, "stop" | "finished"> & { replace?(): Promise<void> };

async function main(signals: Signals): Promise<void> {
  const env = readEnvironment();
  const config = readConfigOrExit(env);
  const log = createLog(config.logging);
  async function exit(code: number): Promise<never> {
    await flushLog(log);
    Deno.exit(code);
  }
  function fatal(error: unknown, event: string): Promise<never> {
    log.fatal({ err: error }, event);
    return exit(1);
  }
  addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    void fatal(event.reason, "failed");
  });
  addEventListener("error", (event) => {
    event.preventDefault();
    void fatal(event.error, "failed");
  });
  for (const notice of config.notices) log.warn(notice);

  const stopped = Promise.withResolvers<void>();
  const starting: Promise<Running> = config.workers.count > 1
    ? Workers.start(config, env, log, { stopped: stopped.promise })
    : start(config, log);
  let stoppedAtMs: number | undefined;
  async function stop(signal: SignalName): Promise<void> {
    if (stoppedAtMs !== undefined) {
      if (performance.now() - stoppedAtMs < sameSignalMs) return;
      log.warn({ signal }, "stopped at once by a second signal");
      return exit(0);
    }
    stoppedAtMs = performance.now();
    stopped.resolve();
    await (await starting).stop();
    await exit(0);
  }
  async function replace(signal: SignalName): Promise<void> {
    const running = await starting;
    if (stoppedAtMs !== undefined) return;
    if (running.replace === undefined) {
      return log.warn({ signal }, "signal ignored: it replaces workers, and WORKERS is 1; SIGTERM stops the proxy");
    }
    log.info("workers are replaced");
    await running.replace();
  }
  signals.listen((signal) => void (signal === "SIGHUP" ? replace(signal) : stop(signal)));
  const running = await starting.catch((error) => fatal(error, "could not start"));
  await running.finished.catch((error) => fatal(error, "failed"));
  if (stoppedAtMs === undefined) await fatal(new Error("the listener ended by itself"), "failed");
}

function readConfigOrExit(env: Environment): Config {
  try {
    return readConfig(env);
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    for (const problem of error.problems) console.error(problem);
    Deno.exit(1);
  }
}

if (signals !== undefined) await main(signals);
else if (import.meta.main) {
  const { runCommand } = await import("./src/cli/command_line.ts");
  const [command = "start", ...args] = Deno.args;
  Deno.exit(await runCommand(command, args));
}
