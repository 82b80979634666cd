/**
 * wsproxy: a WebSocket proxy that lets backends talk to their clients through Redis Pub/Sub.
 *
 * Run it (`deno task start`) and it serves until SIGTERM or SIGINT; import it and {@linkcode start} gives a running
 * proxy to a program of yours.
 *
 * @module
 */

import { Bridge } from "./src/bridge.ts";
import { type Config, ConfigError, readConfig, readEnvironment } from "./src/config.ts";
import type { Engine, EngineOptions } from "./src/engine.ts";
import { createLog, type Log } from "./src/log.ts";
import { createMetrics } from "./src/metrics.ts";
import { Server } from "./src/server.ts";
import { createVerifier } from "./src/token.ts";

/** A running proxy. */
export interface Proxy {
  /** The address it listens on. */
  readonly hostname: string;
  /** The port it listens on: the one taken where PORT is 0. */
  readonly port: number;
  /** Sessions that something is left of. */
  readonly sessions: number;
  /** Redis channels subscribed to, the canary included. */
  readonly subscriptions: number;
  /** Resolves when the listener has ended; outside {@linkcode Proxy.stop} that is a failure. */
  readonly finished: Promise<void>;
  /** Drains: refuses new clients, closes sessions with 1001, publishes what is queued, and leaves Redis. */
  stop(): Promise<void>;
}

/** Part of the grace period that is kept for Redis and the listener, after the sessions have gone. */
const closingShare = 0.2;

/**
 * Starts a proxy. It listens at once, also while Redis cannot be reached: clients are refused with 503 until it can.
 * @throws What the operating system says when it cannot listen, such as `Deno.errors.AddrInUse`.
 */
export async function start(config: Config, log: Log): Promise<Proxy> {
  const secrets = [config.JWT_SECRET, config.JWT_SECRET_PREVIOUS].filter((secret) => secret !== undefined);
  const verify = await createVerifier(secrets);
  const bridge = new Bridge({
    redisUrl: config.REDIS_URL,
    log,
    outageGraceMs: config.REDIS_OUTAGE_GRACE_SECS * 1000,
    onOutage: () => server.outage(),
  });
  const metrics = createMetrics({
    connections: () => server.connections,
    subscriptions: () => bridge.subscriptions,
    redisUp: () => Number(bridge.available),
  });
  const server = new Server({ config, bridge, metrics, log, verify });
  let engine: Engine;
  try {
    engine = await listen(config, server);
  } catch (error) {
    await bridge.close(0);
    throw error;
  }
  const { hostname, port, finished } = engine;
  log.info({ hostname, port, engine: config.WS_ENGINE }, "listening");

  async function stop(): Promise<void> {
    const graceMs = config.SHUTDOWN_GRACE_PERIOD_SECS * 1000;
    const closingMs = graceMs * closingShare;
    log.info({ sessions: server.sessions, graceMs }, "draining");
    await server.drain(graceMs - closingMs);
    await Promise.all([bridge.close(closingMs), within(closingMs, engine.close())]);
    log.info({ sessions: server.sessions }, "stopped");
  }

  return {
    hostname,
    port,
    finished,
    stop,
    get sessions() {
      return server.sessions;
    },
    get subscriptions() {
      return bridge.subscriptions;
    },
  };
}

/** Starts the engine that was chosen; the other one is not even loaded. */
async function listen(config: Config, server: Server): Promise<Engine> {
  const options: EngineOptions = {
    hostname: config.HOST,
    port: config.PORT,
    pingIntervalMs: config.WS_PING_INTERVAL_SECS * 1000,
    pingTimeoutMs: config.WS_PING_TIMEOUT_SECS * 1000,
    handshakeTimeoutMs: config.HANDSHAKE_TIMEOUT_SECS * 1000,
    maxMessageBytes: config.MAX_MESSAGE_SIZE_BYTES,
    maxConnections: config.MAX_CONNECTIONS,
  };
  if (config.WS_ENGINE === "ws") return await (await import("./src/engine_ws.ts")).listenWs(server, options);
  return (await import("./src/engine_deno.ts")).listenDeno(server, options);
}

/** Waits for a promise, but at most so many milliseconds. */
async function within(ms: number, promise: Promise<unknown>): Promise<void> {
  const { promise: late, resolve } = Promise.withResolvers<void>();
  const timer = setTimeout(resolve, ms);
  await Promise.race([promise, late]);
  clearTimeout(timer);
}

/** One Ctrl-C comes twice, from the terminal and from `deno task`, which passes on what it gets. */
const sameSignalMs = 300;

async function main(): Promise<void> {
  const config = readConfigOrExit();
  const log = createLog(config);
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
