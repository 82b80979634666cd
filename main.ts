/**
 * wsproxy: a WebSocket proxy that lets backends talk to their clients through Redis Pub/Sub.
 *
 * Run it (`deno task start`) and it serves until SIGTERM or SIGINT; import it and {@linkcode start} gives a running
 * proxy to a program of yours.
 *
 * @module
 */

import { type Config, ConfigError, readConfig, readEnvironment } from "./src/config.ts";
import { createLog } from "./src/log.ts";
import { start } from "./src/proxy.ts";

export { type Config, ConfigError, type InboxSettings, type LogSettings, readConfig } from "./src/config.ts";
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
export { createLog, type Log } from "./src/log.ts";
export { type Proxy, start } from "./src/proxy.ts";

/** One Ctrl-C comes twice, from the terminal and from `deno task`, which passes on what it gets. */
const sameSignalMs = 300;

async function main(): Promise<void> {
  const config = readConfigOrExit();
  const log = createLog(config.log);
  const fatal = (error: unknown, event: string) => {
    log.fatal({ err: error }, event);
    Deno.exit(1);
  };
  addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    fatal(event.reason, "failed");
  });
  addEventListener("error", (event) => {
    event.preventDefault();
    fatal(event.error, "failed");
  });
  for (const notice of config.notices) log.warn(notice);

  const proxy = await start(config, log).catch((error) => fatal(error, "could not start"));
  let stopping = false;
  let stoppedAtMs = 0;
  for (const signal of ["SIGTERM", "SIGINT"] as const) {
    Deno.addSignalListener(signal, async () => {
      if (stopping) {
        if (performance.now() - stoppedAtMs < sameSignalMs) return;
        log.warn({ signal }, "stopped at once by a second signal");
        Deno.exit(0);
      }
      stopping = true;
      stoppedAtMs = performance.now();
      await proxy.stop();
      Deno.exit(0);
    });
  }
  await proxy.finished.catch((error) => fatal(error, "failed"));
  if (!stopping) fatal(new Error("the listener ended by itself"), "failed");
}

function readConfigOrExit(): Config {
  try {
    return readConfig(readEnvironment());
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    for (const problem of error.problems) console.error(problem);
    Deno.exit(1);
  }
}

if (import.meta.main) await main();
