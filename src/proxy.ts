/** One proxy: its parts put together, started, and stopped in order. */

import type { Config } from "./config.ts";
import { within } from "./deadline.ts";
import type { Engine, EngineOptions } from "./engine/engine.ts";
import { Admission } from "./http/admission.ts";
import type { Handle } from "./http/exchange.ts";
import { RefusalLog } from "./http/refusal_log.ts";
import { Operator } from "./http/operator.ts";
import { createRouter } from "./http/router.ts";
import { createVerifier } from "./http/token.ts";
import type { Log } from "./log.ts";
import { createMetrics, type Metrics } from "./metrics.ts";
import { Bridge } from "./redis/bridge.ts";
import { Revocations } from "./revocations.ts";
import { Commander } from "./session/control.ts";
import { Registry } from "./session/registry.ts";

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
  /** Drains: refuses new clients, closes sessions with 1001, publishes what is pending, and leaves Redis. */
  stop(): Promise<void>;
}

/** Part of the grace period that is kept for Redis and the listener, after the sessions have gone. */
const closingShare = 0.2;

/**
 * Starts a proxy. It listens at once, also while Redis cannot be reached: clients are refused with 503 until it can.
 * @throws What the operating system says when it cannot listen, such as `Deno.errors.AddrInUse`.
 */
export async function start(config: Config, log: Log): Promise<Proxy> {
  const revocations = new Revocations();
  const verify = await createVerifier(config.auth.secrets, config.auth.leewayMs, revocations);
  const registry = new Registry();
  const entries = { written: 0, lost: 0 };
  const commander: Commander = new Commander({
    registry,
    revocations,
    // Made below, from what the bridge counts; no command comes before.
    get metrics() {
      return metrics;
    },
    log,
  });
  const bridge = commander.bridge = new Bridge({
    address: config.redis.address,
    log,
    outageGraceMs: config.redis.outageGraceMs,
    maxPendingCost: config.limits.maxBufferBytes,
    logs: config.logs,
    inbox: config.inbox,
    onEntries: (count) => entries.written += count,
    onEntriesLost: (count) => entries.lost += count,
    control: commander,
    onOutage: (server) => registry.outage(server),
    onRecovery: (server) => registry.recovered(server),
  });
  const traffic = { down: 0, up: 0 };
  const metrics: Metrics = createMetrics({
    connections: () => registry.open,
    subscriptions: () => bridge.subscriptions,
    redisUp: () => Number(bridge.available),
    redisConnectFailures: () => bridge.connectFailures,
    residentMemory: () => Deno.memoryUsage().rss,
    messagesDown: () => traffic.down,
    messagesUp: () => traffic.up,
    inboxEntries: () => entries.written,
    inboxLost: () => entries.lost,
  });
  const refusals = new RefusalLog(log);
  const handle = createRouter({
    admission: new Admission({ config, bridge, registry, metrics, traffic, log, verify }),
    operator: new Operator({ bridge, registry, metrics }),
    metrics,
    log,
    refusals,
  });
  let engine: Engine;
  try {
    engine = await listen(config, handle, () => {
      metrics.relistened.inc();
      log.warn("listener had gone deaf, and was opened again");
    });
  } catch (error) {
    await bridge.close(0);
    refusals.close();
    throw error;
  }
  const { hostname, port, finished } = engine;
  log.info({ hostname, port, engine: config.listen.engine, settings: config.shown }, "listening");

  async function stop(): Promise<void> {
    const graceMs = config.timing.shutdownGraceMs;
    const closingMs = graceMs * closingShare;
    log.info({ sessions: registry.size, graceMs }, "draining");
    await registry.drain(graceMs - closingMs);
    await Promise.all([bridge.close(closingMs), within(closingMs, engine.close())]);
    refusals.close();
    log.info({ sessions: registry.size }, "stopped");
  }

  return {
    hostname,
    port,
    finished,
    stop,
    get sessions() {
      return registry.size;
    },
    get subscriptions() {
      return bridge.subscriptions;
    },
  };
}

/** Starts the engine that was chosen; the other one is not even loaded. */
async function listen(
  { listen, timing, limits }: Config,
  handle: Handle,
  onRelisten: () => void,
): Promise<Engine> {
  const options: EngineOptions = { ...listen, ...timing, ...limits, onRelisten };
  if (listen.engine === "ws") return await (await import("./engine/ws.ts")).listenWs(handle, options);
  return (await import("./engine/deno.ts")).listenDeno(handle, options);
}
