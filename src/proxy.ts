/** One proxy: its parts put together, started, and stopped in order. */

import project from "../deno.json" with { type: "json" };
import type { Config, PublicKeySettings } from "./config.ts";
import { Deadlines, within } from "./deadline.ts";
import type { Engine, EngineOptions } from "./engine/engine.ts";
import { createShared, Limits } from "./limits.ts";
import type { Answers, Ask, Kind, Question, Reports } from "./report.ts";
import { Admission } from "./http/admission.ts";
import { createClaimsText } from "./http/claims.ts";
import type { Handle } from "./http/exchange.ts";
import { keyFile, Keys, type KeysListener, keyUrl } from "./http/keys.ts";
import { RefusalLog } from "./http/refusal_log.ts";
import { Operator } from "./http/operator.ts";
import { createRouter } from "./http/router.ts";
import { createVerifier } from "./http/token.ts";
import { listenAdmin } from "./engine/admin.ts";
import { droppedLines, type Log } from "./log.ts";
import { createMetrics, type Metrics } from "./metrics.ts";
import { Bridge } from "./redis/bridge.ts";
import { closes } from "./replies.ts";
import { logTold, type Told } from "./told.ts";
import { createQuota, hasQuotas, type Quota } from "./quotas.ts";
import { Revocations } from "./revocations.ts";
import { Commander } from "./session/control.ts";
import { Registry } from "./session/registry.ts";
import { Traffic } from "./session/traffic.ts";

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

/** A proxy's place among others of the same process. */
export interface Place {
  /** The port of all. */
  readonly port: number;
  /** What all of them count in, and its own place in it. */
  readonly limits: SharedArrayBuffer;
  readonly index: number;
  /** Counts by session and by address for all of them; undefined when it is alone. */
  readonly quota?: Quota;
  /** How many share the port; 1 is alone. */
  readonly workers: number;
  /** Names the process that has all of them; undefined when it is alone. */
  readonly process?: string;
  /** It listens before it is connected to Redis, as no other one would answer. */
  readonly listensAtOnce: boolean;
  /** Tells once what all of them may have heard, and has one of them count it; undefined when it is alone. */
  readonly tell?: (told: Told) => void;
  /** Asks each of them; undefined when it is alone. */
  readonly askAll?: Ask;
}

/** A proxy as its own process sees it. */
export interface Composed extends Proxy {
  /** What it says of itself. */
  report<K extends Kind>(question: Question<K>): Promise<Reports[K]>;
  /** Counts what was told for all workers. */
  count(told: Told): void;
  /** What might make it too heavy to be kept. */
  load(): Promise<{ heapBytes: number; unopened: number }>;
  /** Leaves the port to others, then does as {@linkcode Proxy.stop}, and refuses no client on the way. */
  leave(): Promise<void>;
}

/** A health probe's share of the second that a health check may take. */
const probeTimeoutMs = 900;
/** How long a worker waits for Redis until it listens without. */
const connectTimeoutMs = 5000;
/** How long what was accepted by a listener that is closed may take until it is a session. */
const handOverMs = 1000;

/** Time between two looks at the event loop and at the clocks. */
const lookMs = 100;
/** How far the wall clock may drift from the monotonic one until that is a jump. */
const clockJumpMs = 1000;

/** Part of the grace period that is kept for Redis and the listener, after the sessions have gone. */
const closingShare = 0.2;
/**
 * Part of it in which a worker that leaves closes sessions in quiet moments, where its listener stays open meanwhile.
 */
const thinningShare = 0.6;

/**
 * Starts a proxy. It listens at once, also while Redis cannot be reached: clients are refused with 503 until it can.
 * @throws What the operating system says when it cannot listen, such as `Deno.errors.AddrInUse`.
 */
export async function start(config: Config, log: Log): Promise<Proxy> {
  const proxy = await compose(config, log, {
    port: config.listen.port,
    limits: createShared(1),
    index: 0,
    workers: 1,
    listensAtOnce: true,
  });
  const { hostname, port } = proxy;
  log.info({ hostname, port, engine: config.listen.engine, settings: config.shown }, "listening");
  return proxy;
}

/** Puts a proxy together, alone or among others, and starts it. @throws as {@linkcode start} does. */
export async function compose(config: Config, log: Log, place: Place): Promise<Composed> {
  const revocations = new Revocations(config.auth.leewayMs);
  const deadlines = new Deadlines();
  const registry = new Registry();
  const entries = { written: 0, lost: 0 };
  const connected = Promise.withResolvers<void>();
  const bridge = new Bridge({
    address: config.redis.address,
    log,
    outageGraceMs: config.redis.outageGraceMs,
    maxPendingCost: config.limits.maxBufferBytes,
    sessionLogs: config.sessionLogs,
    inbox: config.inbox,
    lastSocket: config.limits.sessionSockets === "last",
    process: place.process,
    onEntries: (count) => entries.written += count,
    onEntriesLost: (count) => entries.lost += count,
    revocations,
    timings: {
      down: (seconds) => metrics.downLatency.observe(seconds),
      up: (seconds) => metrics.upLatency.observe(seconds),
      roundTrip: (seconds) => metrics.redisRoundTrip.observe(seconds),
    },
    onOutage: (server) => registry.outage(server),
    onRecovery(server) {
      registry.recovered(server);
      if (bridge.available) connected.resolve();
    },
  });
  let heldBytes = 0;
  const traffic = new Traffic(config.metricsAgents);
  // Others have the port: what it has counted is still to be told, but whether the process serves is theirs to say.
  let leaving = false;
  const metrics: Metrics = createMetrics({
    workers: () => Number(!leaving),
    workersConfigured: () => place.workers,
    connections: () => traffic.total("open"),
    maxConnections: () => config.limits.maxConnections,
    subscriptions: () => bridge.subscriptions,
    redisUp: () => Number(leaving || bridge.available),
    heap: () => Deno.memoryUsage().heapUsed,
    buffered: () => registry.bufferedBytes + heldBytes,
    pending: () => bridge.pending,
    redisConnects: () => bridge.connects,
    redisConnectFailures: () => bridge.connectFailures,
    residentMemory: () => Deno.memoryUsage().rss,
    messagesDown: () => traffic.total("down"),
    messagesLogged: () => traffic.total("logged"),
    messagesUp: () => traffic.total("up"),
    agentConnections: () => traffic.byAgent("open"),
    agentMessagesDown: () => traffic.byAgent("down"),
    agentMessagesUp: () => traffic.byAgent("up"),
    inboxEntries: () => entries.written,
    inboxLost: () => entries.lost,
    logLinesDropped: () => droppedLines(log),
  });
  const tell = place.tell ?? ((told: Told) => {
    logTold(log, told);
    count(told);
  });
  const count = ({ counted }: Told) => counted && metrics.commands.inc(counted);
  bridge.listenToControl(new Commander({ registry, revocations, revoked: bridge.revoked, log, tell }));
  metrics.buildInfo.set({ version: project.version, deno: Deno.version.deno, engine: config.listen.engine }, 1);
  const stopWatch = watchClocks({
    onLate: (seconds) => metrics.eventLoopLag.observe(seconds),
    onJump(jumpMs) {
      log.warn({ jumpMs, sessions: registry.size }, "clock jumped: tokens that have run out are looked for");
      registry.clockJumped(jumpMs);
    },
  });
  const refusals = new RefusalLog(log);
  const limits = new Limits(config.limits, place.limits, place.index);
  const quota = hasQuotas(config.limits) ? place.quota ?? createQuota(config.limits) : undefined;

  const answers: Answers = {
    async health() {
      const servers = leaving ? [] : [...await bridge.probe(probeTimeoutMs)];
      return {
        connections: traffic.total("open"),
        servers: Object.fromEntries(servers.map(([name, error]) => [name, error?.message ?? null])),
      };
    },
    metrics: () => metrics.report(),
    missing: () => keys?.missing ?? null,
    busiest: () => registry.busiest(),
    session: ({ sessionId }) => registry.sockets(sessionId),
    end: ({ sessionId }) => registry.end(closes.endedByOperator, (session) => session.sessionId === sessionId),
  };
  const report = async <K extends Kind>(question: Question<K>): Promise<Reports[K]> =>
    await answers[question.kind](question);

  const ask: Ask = place.askAll ?? (async (question) => [await report(question)]);
  const { publicKeys } = config.auth;
  const keys = publicKeys && startKeys(publicKeys, { tell, onRead: (result) => metrics.keyReads.inc({ result }) });
  const operator = new Operator({
    draining: () => registry.draining && !leaving,
    canAdmit: () => keys?.missing === undefined,
    ask,
  });
  const claimsText = config.inbox && createClaimsText(config.inbox.claims);
  const algorithms = publicKeys?.algorithms;
  const verify = createVerifier({ ...config.auth, publicAlgorithms: algorithms, keys, revocations, claimsText });
  const awaitKey = keys && ((token: string) => keys.awaits(token));
  const shared = { config, deadlines, bridge, registry, limits, quota, metrics, traffic, log };
  const admission = new Admission({ ...shared, verify, awaitKey });
  const handle = createRouter({
    admission,
    operator,
    metrics,
    log,
    refusals,
    tracing: config.tracing ? new (await import("./http/tracing.ts")).Tracing(project.version) : undefined,
    hidesMetrics: config.admin !== undefined,
  });
  let closeAdmin: (() => Promise<void>) | undefined;
  let engine: Engine;
  try {
    if (config.admin && place.askAll === undefined) {
      closeAdmin = listenAdmin(config.admin, { operator, ask, log, forwarding: config.forwarding });
    }
    if (!place.listensAtOnce) {
      await within(connectTimeoutMs, Promise.all([connected.promise, keys?.available]));
    }
    engine = await listen(config, place, deadlines, handle, {
      onHeld: (bytes) => heldBytes += bytes,
      onRelisten() {
        metrics.relistened.inc();
        log.warn("listener had gone deaf, and was opened again");
      },
    });
  } catch (error) {
    await Promise.all([bridge.close(0), closeAdmin?.(), keys?.close()]);
    refusals.close();
    stopWatch();
    throw error;
  }
  const { hostname, port, finished } = engine;
  /** Also while it leaves, and then no second time. */
  let stopping: Promise<void> | undefined;
  const { shutdownGraceMs } = config.timing;
  const stop = (graceMs = shutdownGraceMs) => stopping ??= drainAndClose(graceMs);
  async function drainAndClose(graceMs: number): Promise<void> {
    const closingMs = graceMs * closingShare;
    log.info({ sessions: registry.size, graceMs }, "draining");
    await registry.drain(graceMs - closingMs);
    admission.close();
    await keys?.close();
    await Promise.all([bridge.close(closingMs), within(closingMs, engine.close())]);
    await within(closingMs, closeAdmin?.() ?? Promise.resolve());
    refusals.close();
    stopWatch();
    log.info({ sessions: registry.size }, "stopped");
  }

  return {
    hostname,
    port,
    finished,
    stop() {
      leaving = false;
      return stop();
    },
    report,
    count,
    async load() {
      const { values: [unopened] } = await metrics.unopened.get();
      return { heapBytes: Deno.memoryUsage().heapUsed, unopened: unopened?.value ?? 0 };
    },
    async leave() {
      leaving = true;
      if (engine.leave === undefined) {
        log.info({ sessions: registry.size, graceMs: shutdownGraceMs }, "leaving");
        await registry.thinOut(shutdownGraceMs * thinningShare);
        return await stop(shutdownGraceMs * (1 - thinningShare));
      }
      engine.leave();
      await new Promise((resolve) => setTimeout(resolve, handOverMs));
      await stop();
    },
    get sessions() {
      return registry.size;
    },
    get subscriptions() {
      return bridge.subscriptions;
    },
  };
}

/** The public keys of tokens, which are read again and again until they are closed. */
function startKeys({ algorithms, source }: PublicKeySettings, listener: KeysListener): Keys {
  if (source.setting === "JWKS_URL") return new Keys(keyUrl(source.url, source.refreshMs), algorithms, listener);
  return new Keys(keyFile(source.path), algorithms, listener, source.keys);
}

/** Starts the engine that was chosen; the other one is not even loaded. */
async function listen(
  { listen, timing, limits }: Config,
  { port, workers }: Place,
  deadlines: Deadlines,
  handle: Handle,
  listeners: Pick<EngineOptions, "onHeld" | "onRelisten">,
): Promise<Engine> {
  const options: EngineOptions = { ...listen, ...timing, ...limits, port, workers, deadlines, ...listeners };
  if (listen.engine === "ws") return await (await import("./engine/ws.ts")).listenWs(handle, options);
  return (await import("./engine/deno.ts")).listenDeno(handle, options);
}

/**
 * Tells how late a timer is, several times a second, until it is stopped; and when the wall clock has been set, or has
 * gone on while the machine was asleep: timers follow the monotonic clock, and tokens the other one.
 */
function watchClocks(
  { onLate, onJump }: { onLate: (lateSeconds: number) => void; onJump: (jumpMs: number) => void },
): () => void {
  let dueMs = performance.now() + lookMs;
  let apartMs = Date.now() - performance.now();
  const timer = setInterval(() => {
    const nowMs = performance.now();
    onLate(Math.max(0, nowMs - dueMs) / 1000);
    dueMs = nowMs + lookMs;
    const jumpMs = Math.round(Date.now() - nowMs - apartMs);
    if (Math.abs(jumpMs) < clockJumpMs) return;
    apartMs += jumpMs;
    onJump(jumpMs);
  }, lookMs);
  return () => clearInterval(timer);
}
