/**
 * `deno task bench:fleet`: several proxies under sentinels, thousands of resuming clients on each, and an inbox. Opens all,
 * measures what an idle one costs, and then does to it what happens to a fleet: a proxy killed, a rolling restart, a Redis
 * restarted, a failover, a broadcast, an agent closed. Whatever is lost without being told is counted, message by message.
 */

import { parseArgs } from "node:util";
import { Redis } from "ioredis";
import { shell } from "../tests/harness/process.ts";
import { SentinelGroup } from "../tests/harness/sentinel.ts";
import { eventually } from "../tests/harness/wait.ts";
import { Histogram } from "./load/histogram.js";
import { sessionName } from "./load/redis.js";
import { linesOf, type Listening, startLoad, startTarget } from "./processes.ts";
import { align, count, ms } from "./table.ts";
import { targets } from "./targets.ts";

/** A command to one herd of clients, a process of its own (bench/load/herd.js). */
export type HerdCommand =
  | {
    readonly do: "start";
    /** Index of the first session, and how many. */
    readonly first: number;
    readonly sessions: number;
    readonly ports: readonly number[];
    /** Another proxy may be tried. */
    readonly hasRoom: boolean;
    readonly secret: string;
  }
  | { readonly do: "open"; readonly connecting: number }
  | { readonly do: "mark"; readonly comesBack: boolean }
  | { readonly do: "report" }
  | { readonly do: "usage"; readonly pids: readonly number[] };

/** What has happened to a herd since the last mark. Times are milliseconds since 1970, latencies a histogram's buckets. */
export interface HerdReport {
  readonly live: number;
  readonly received: number;
  readonly plain: number;
  /** Messages that are missing though no gap was told, and that came again. */
  readonly lost: number;
  readonly repeated: number;
  readonly gaps: number;
  readonly reconnects: number;
  readonly closes: Readonly<Record<string, number>>;
  readonly lastLiveMs: number;
  readonly lastPlainMs: number;
  readonly lastEndMs: number;
  /** Of each session, the number of its last message. */
  readonly last: readonly number[];
  /** Of those that were not cut, and of all. */
  readonly latency: readonly number[];
  readonly allLatency: readonly number[];
}

/** CPU time and resident memory of processes. */
export interface HerdUsage {
  readonly atMs: number;
  readonly of: readonly { readonly cpuUs: number; readonly bytes: number }[];
}

const usage = `Usage: deno task bench:fleet [options]

  --proxies P      proxies, each a process (5)
  --sessions N     sessions on each; a process needs as many file descriptors and 500 (1000)
  --engine E       deno or ws (deno)
  --rate N         messages a second to all sessions together (1000)
  --idle SECONDS   how long idle sockets are measured (60)
  --connecting N   handshakes under way at a time, of each herd (50)
  --json FILE      write what was measured
  --help`;

const { values } = parseArgs({
  options: {
    proxies: { type: "string", default: "5" },
    sessions: { type: "string", default: "1000" },
    engine: { type: "string", default: "deno" },
    rate: { type: "string", default: "1000" },
    idle: { type: "string", default: "60" },
    connecting: { type: "string", default: "50" },
    json: { type: "string" },
    help: { type: "boolean" },
  },
});
if (values.help) {
  console.log(usage);
  Deno.exit(0);
}
const numberOf = (name: "proxies" | "sessions" | "rate" | "idle" | "connecting") => {
  const value = Number(values[name]);
  if (Number.isInteger(value) && value > 0) return value;
  console.error(`--${name} must be a whole number above 0\n\n${usage}`);
  Deno.exit(2);
};
const proxyCount = numberOf("proxies");
const each = numberOf("sessions");
const rate = numberOf("rate");
const idleSecs = numberOf("idle");
const connecting = numberOf("connecting");
const target = targets.find(({ environment }) => environment?.WS_ENGINE === values.engine);
if (target === undefined) {
  console.error(`--engine must be deno or ws\n\n${usage}`);
  Deno.exit(2);
}
const all = proxyCount * each;
/** Beyond it a proxy refuses: one that has no file descriptors left ends. */
const maxConnections = Number(shell("ulimit -n")) - 500;
if (each > maxConnections) {
  console.error(`--sessions must be at most ${maxConnections}, 500 below the limit of file descriptors`);
  Deno.exit(2);
}
/** The others have room for the clients of one proxy. */
const hasRoom = all <= (proxyCount - 1) * maxConnections;
const secret = crypto.randomUUID();
/** How long one step may take, for all sessions. */
const patienceMs = 120_000 + all * 5;
const pause = (forMs: number) => new Promise((resolve) => setTimeout(resolve, forMs));
const nowMs = () => performance.timeOrigin + performance.now();
const sum = (numbers: readonly number[]) => numbers.reduce((before, number) => before + number, 0);
const secs = (forMs: number) => `${(forMs / 1000).toFixed(1)} s`;
const mib = (bytes: number) => `${(bytes / 1024 ** 2).toFixed(0)} MiB`;
const short = (value: number) => value < 10 ? value.toPrecision(2) : count(value);
const gib = (bytes: number) => `${short(bytes / 1024 ** 3)} GiB`;
const say = (line: string) => console.error(`[${(performance.now() / 1000).toFixed(0)} s] ${line}`);

/** A process with clients. */
class Herd {
  readonly #process: Deno.ChildProcess;
  readonly #writer: WritableStreamDefaultWriter<Uint8Array>;
  readonly #answers: AsyncGenerator<string>;
  /** The answer to the last command. */
  #last: Promise<unknown> = Promise.resolve();

  constructor(options: Omit<Extract<HerdCommand, { do: "start" }>, "do">) {
    this.#process = startLoad("herd.js");
    this.#writer = this.#process.stdin.getWriter();
    this.#answers = linesOf(this.#process.stdout);
    // A herd that could not start answers the next command neither.
    this.ask({ do: "start", ...options }).catch(() => {});
  }

  /** Its answers come in the order of the commands. */
  ask<T>(command: HerdCommand): Promise<T> {
    const answer = this.#last.then(async () => {
      await this.#writer.write(new TextEncoder().encode(`${JSON.stringify(command)}\n`));
      const { value, done } = await this.#answers.next();
      if (done) throw new Error("a herd of clients has ended");
      return JSON.parse(value) as T;
    });
    this.#last = answer;
    return answer;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writer.close().catch(() => {});
    await this.#process.status;
  }
}

/** Sends messages to all sessions in turn, and counts what Redis has acknowledged. */
class Backend {
  readonly #redis: Redis;
  /** Of each session, messages that are in its log. */
  readonly sent = new Array<number>(all).fill(0);
  readonly #underWay = new Set<number>();
  #next = 0;
  #timer: ReturnType<typeof setInterval> | undefined;

  constructor(redis: Redis) {
    this.#redis = redis;
  }

  start(): void {
    const since = performance.now();
    let done = 0;
    this.#timer = setInterval(() => {
      const due = Math.floor((performance.now() - since) * rate / 1000);
      for (; done < due; done++) this.#send(this.#next++ % all);
    }, 5);
  }

  /** Resolves when all that was sent is acknowledged. */
  async stop(): Promise<void> {
    this[Symbol.dispose]();
    await eventually("all is acknowledged", () => this.#underWay.size === 0, patienceMs);
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
  }

  #send(session: number): void {
    // Redis is away: a session has one message under way, so that the next one has the next number.
    if (this.#underWay.has(session)) return;
    this.#underWay.add(session);
    const n = this.sent[session]! + 1;
    const payload = JSON.stringify({ n, t: nowMs() });
    // ioredis sends it again when a connection breaks; the nonce keeps it from being logged twice.
    this.#redis.call("FCALL", "wsproxy_send", 1, `session:${sessionName(session)}:down`, payload, String(n)).then(
      () => this.sent[session] = n,
      (error: Error) => failures.set(error.message, (failures.get(error.message) ?? 0) + 1),
    ).finally(() => this.#underWay.delete(session));
  }
}
const failures = new Map<string, number>();

/** Reads the inbox, and counts its entries by type. */
class InboxReader {
  counts: Record<string, number> = {};
  lastAtMs = 0;
  #stopped = false;
  readonly #redis: Redis;
  readonly #done: Promise<void>;

  constructor(redis: Redis) {
    this.#redis = redis;
    this.#done = this.#read();
  }

  async #read(): Promise<void> {
    let from = "0";
    while (!this.#stopped) {
      try {
        const found = await this.#redis.xread("COUNT", 2000, "BLOCK", 500, "STREAMS", "agent:bench:inbox", from);
        for (const [id, fields] of found?.[0]?.[1] ?? []) {
          from = id;
          const of = (name: string) => fields[fields.indexOf(name) + 1];
          const type = of("type") === "disconnected" ? `disconnected ${of("code")}` : of("type")!;
          this.counts[type] = (this.counts[type] ?? 0) + 1;
          this.lastAtMs = nowMs();
        }
      } catch (error) {
        // A Redis that restarts, or was a master a moment ago, has lost the stream.
        from = "0";
        if (this.#stopped) return;
        say(`inbox: ${(error as Error).message}`);
        await pause(500);
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stopped = true;
    this.#redis.disconnect();
    await this.#done;
  }
}

/** All herds, as one. */
class Fleet {
  readonly rows: string[][] = [[
    "",
    "time",
    "what",
    "messages lost",
    "repeated",
    "gaps told",
    "p99 of others",
    "p99 of all",
  ]];

  constructor(readonly herds: readonly Herd[], readonly backend: Backend, readonly inbox: InboxReader) {}

  async mark(comesBack = true): Promise<void> {
    this.inbox.counts = {};
    await Promise.all(this.herds.map((herd) => herd.ask({ do: "mark", comesBack })));
  }

  async reports(): Promise<HerdReport[]> {
    return await Promise.all(this.herds.map((herd) => herd.ask<HerdReport>({ do: "report" })));
  }

  /** Waits until the reports say so. */
  async until(what: string, check: (reports: HerdReport[]) => boolean): Promise<HerdReport[]> {
    let reports: HerdReport[] = [];
    await eventually(what, async () => {
      await pause(200);
      reports = await this.reports();
      return check(reports);
    }, patienceMs).catch((error) => {
      for (const { live, closes } of reports) say(`${live} are live; ended: ${JSON.stringify(closes)}`);
      throw error;
    });
    return reports;
  }

  /** Ends a step: all that was sent has arrived, or is missing. */
  async row(name: string, time: string, what: string): Promise<void> {
    await this.backend.stop();
    let missing = 0;
    try {
      await this.until("all has arrived", (reports) => {
        const last = reports.flatMap((report) => report.last);
        missing = sum(this.backend.sent.map((sent, session) => Math.max(0, sent - last[session]!)));
        return missing === 0;
      });
    } catch {
      say(`${name}: ${missing} messages have not arrived`);
    }
    const reports = await this.reports();
    const total = (field: "lost" | "repeated" | "gaps") => sum(reports.map((report) => report[field]));
    const p99 = (field: "latency" | "allLatency") => {
      const histogram = reports.reduce((joined, report) => joined.add(report[field]), new Histogram());
      const us = histogram.percentile(99);
      return us === undefined ? "-" : `${ms(us / 1000)} ms`;
    };
    const row = [
      name,
      time,
      what,
      count(total("lost") + missing),
      count(total("repeated")),
      count(total("gaps")),
      p99("latency"),
      p99("allLatency"),
    ];
    this.rows.push(row);
    say(row.join(" | "));
  }
}

const lastOf = (reports: readonly HerdReport[], field: "lastLiveMs" | "lastPlainMs" | "lastEndMs") =>
  Math.max(...reports.map((report) => report[field]));
const allLive = (reports: readonly HerdReport[]) => sum(reports.map(({ live }) => live)) === all;

await using stack = new AsyncDisposableStack();
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  Deno.addSignalListener(signal, () => void stack.disposeAsync().finally(() => Deno.exit(1)));
}
const redis = stack.use(await SentinelGroup.start("--client-output-buffer-limit", "pubsub 512mb 256mb 60"));
const sentinels = redis.sentinels.map(({ port }) => ({ host: "127.0.0.1", port }));
const connect = () => {
  const client = new Redis({
    sentinels,
    name: "mymaster",
    maxRetriesPerRequest: null,
    sentinelRetryStrategy: () => 100,
  });
  client.on("error", () => {});
  return client;
};
/** Sentinels take a server for dead after so long. */
const downAfter = (forMs: number) =>
  Promise.all(
    redis.sentinels.map((sentinel) =>
      sentinel.redis.call("SENTINEL", "SET", "mymaster", "down-after-milliseconds", forMs)
    ),
  );
await downAfter(2000);

const environment = {
  ...target.environment,
  INBOX: "true",
  REDIS_URL: redis.url,
  MAX_CONNECTIONS: String(maxConnections),
};
const startProxy = async (port?: number) => {
  const proxy = await startTarget({ ...target, environment }, redis.servers[0]!, secret, port);
  proxy.process.status.then(({ code, signal }) => say(`a proxy has ended: ${signal ?? code}`));
  return proxy;
};
const proxies: Listening[] = [];
stack.defer(async () => {
  for (const proxy of proxies) await proxy[Symbol.asyncDispose]();
});
const [backendRedis, control, inboxRedis] = [connect(), connect(), connect()];
stack.defer(() => {
  backendRedis.disconnect();
  control.disconnect();
});
await Promise.all([backendRedis.ping(), inboxRedis.ping()]);
const masterInfo = async () => {
  const info = await control.info();
  const field = (name: string) => Number(new RegExp(`^${name}:([\\d.]+)`, "m").exec(info)![1]);
  return {
    bytes: field("used_memory"),
    cpuUs: 1e6 * (field("used_cpu_sys_main_thread") + field("used_cpu_user_main_thread")),
    channels: field("pubsub_channels"),
    clients: field("connected_clients"),
  };
};
const { clients: otherClients } = await masterInfo();
for (let n = 0; n < proxyCount; n++) proxies.push(await startProxy());
const ports = proxies.map(({ port }) => port);
const pids = () => proxies.map(({ pid }) => pid);
// Each herd begins with a proxy of its own.
const herds = ports.map((_, n) =>
  new Herd({
    first: n * each,
    sessions: each,
    ports: [...ports.slice(n), ...ports.slice(0, n)],
    hasRoom,
    secret,
  })
);
for (const herd of herds) stack.use(herd);
const fleet = new Fleet(herds, stack.use(new Backend(backendRedis)), stack.use(new InboxReader(inboxRedis)));
const usageNow = () => herds[0]!.ask<HerdUsage>({ do: "usage", pids: pids() });
const costs: string[][] = [["", ""]];
const cost = (name: string, value: string) => {
  costs.push([name, value]);
  say(`${name}: ${value}`);
};
const proxiesOf = (usage: HerdUsage, field: "cpuUs" | "bytes") =>
  sum(usage.of.slice(0, proxyCount).map((one) => one[field]));

/** CPU time of all proxies between two readings. */
const usedUs = (from: HerdUsage, to: HerdUsage) => proxiesOf(to, "cpuUs") - proxiesOf(from, "cpuUs");

// 1. Nobody is there yet.
await pause(5000);
const startedUsage = await usageNow();
await pause(5000);
const fresh = await usageNow();
const emptyRedis = await masterInfo();
const emptyUs = usedUs(startedUsage, fresh) / proxyCount / (fresh.atMs - startedUsage.atMs) * 1000;
const emptyBytes = proxiesOf(fresh, "bytes") / proxyCount;
cost("a proxy without sessions", `${mib(emptyBytes)}, ${(emptyUs / 1e4).toFixed(2)} % of a core`);

// 2. All connect.
const openedFromMs = nowMs();
await Promise.all(herds.map((herd) => herd.ask({ do: "open", connecting })));
let reports = await fleet.until("all are live", allLive);
const openedMs = lastOf(reports, "lastLiveMs") - openedFromMs;
await eventually("the inbox is told of all", () => fleet.inbox.counts["connected"] === all, patienceMs);
const opened = await usageNow();
const fullRedis = await masterInfo();
const connectUs = usedUs(fresh, opened) / all;
const redisConnectUs = (fullRedis.cpuUs - emptyRedis.cpuUs) / all;
cost("all are live after", `${secs(openedMs)} (${count(all / openedMs * 1000)} a second)`);
cost("CPU for each connect", `${connectUs.toFixed(0)} us`);
cost("Redis's CPU for it", `${redisConnectUs.toFixed(0)} us`);

// 3. Nothing happens.
await pause(5000);
const idleFrom = await usageNow();
const idleRedis = await masterInfo();
await pause(idleSecs * 1000);
const idleTo = await usageNow();
const idleRedisTo = await masterInfo();
const idleS = (idleTo.atMs - idleFrom.atMs) / 1000;
const idleUs = usedUs(idleFrom, idleTo) / all / idleS;
const eachBytes = (proxiesOf(idleTo, "bytes") - proxiesOf(fresh, "bytes")) / all;
const redisEachBytes = (idleRedisTo.bytes - emptyRedis.bytes) / all;
const redisIdleUs = (idleRedisTo.cpuUs - idleRedis.cpuUs) / idleS;
const clientsOfProxy = (idleRedisTo.clients - otherClients) / proxyCount;
cost("memory for each", `${(eachBytes / 1024).toFixed(1)} KiB`);
cost("CPU of an idle one", `${idleUs.toFixed(2)} us a second, the proxy's own ${(emptyUs / each).toFixed(2)} included`);
cost("Redis's memory for each", `${(redisEachBytes / 1024).toFixed(2)} KiB`);
cost("Redis's CPU, idle", `${(redisIdleUs / 1e4).toFixed(2)} % of a core`);
cost("Redis's connections of a proxy", clientsOfProxy.toFixed(1));

// 4. Messages to all, for comparison.
await fleet.mark();
const quietRedis = await masterInfo();
fleet.backend.start();
await pause(10_000);
await fleet.row("nothing happens", secs(10_000), `${count(rate)} messages a second`);
const busyRedis = await masterInfo();
const redisMessageUs = (busyRedis.cpuUs - quietRedis.cpuUs - redisIdleUs * 10) / sum(fleet.backend.sent);
cost("Redis's CPU for a message", `${redisMessageUs.toFixed(0)} us`);

/** What more sessions take, if each takes what it took here. */
const sizes = [100_000, 1_000_000, 10_000_000];
const grown = (what: string, of: (sessions: number, proxies: number) => string) => [
  what,
  ...sizes.map((sessions) => of(sessions, Math.ceil(sessions / each) + 1)),
];
const cores = (us: number) => short(us / 1e6);
const derived = [
  grown("", count),
  grown(`proxies of ${count(each)}, and one more`, (_, proxies) => count(proxies)),
  grown("memory of all", (sessions, proxies) => gib(proxies * emptyBytes + sessions * eachBytes)),
  grown("cores, idle", (sessions) => cores(sessions * idleUs)),
  grown("cores, when all connect within a minute", (sessions) => cores(sessions * connectUs / 60)),
  grown("Redis: memory", (sessions) => gib(sessions * redisEachBytes)),
  grown("Redis: connections", (_, proxies) => count(proxies * clientsOfProxy)),
  grown("Redis: cores, idle", (sessions) => cores(sessions * redisIdleUs / all)),
  grown("Redis: cores, when all connect within a minute", (sessions) => cores(sessions * redisConnectUs / 60)),
  grown("Redis: cores, a message each in ten seconds", (sessions) => cores(sessions * redisMessageUs / 10)),
];

console.log(
  `${proxyCount} proxies (${target.name}) with ${count(each)} sessions each, ${count(rate)} messages a second\n`,
);
console.log(`${align(costs)}\n`);
console.log(`${align(derived)}\n`);

// 5. A proxy is killed.
await fleet.mark();
fleet.backend.start();
const killedMs = nowMs();
await proxies[0]![Symbol.asyncDispose]();
if (!hasRoom) proxies[0] = await startProxy(ports[0]);
reports = await fleet.until("all are live again", allLive);
const liveAgainMs = lastOf(reports, "lastLiveMs") - killedMs;
let noted = true;
await eventually("all ends are told", () => (fleet.inbox.counts["disconnected 1006"] ?? 0) >= each, patienceMs)
  .catch(() => noted = false);
await fleet.row(
  "kill -9 of a proxy",
  secs(liveAgainMs),
  noted
    ? `all ${count(each)} live ${hasRoom ? "elsewhere" : "again"}; the last end is told after ${
      secs(fleet.inbox.lastAtMs - killedMs)
    }`
    : `ends told: ${count(fleet.inbox.counts["disconnected 1006"] ?? 0)} of ${count(each)}`,
);
if (hasRoom) proxies[0] = await startProxy(ports[0]);

// 6. Each proxy is replaced.
await fleet.mark();
fleet.backend.start();
const rollingMs = nowMs();
const exits: string[] = [];
for (let n = 0; n < proxyCount; n++) {
  const sinceMs = nowMs();
  proxies[n]!.process.kill("SIGTERM");
  const { code } = await proxies[n]!.process.status;
  exits.push(`${secs(nowMs() - sinceMs)}${code === 0 ? "" : ` exit ${code}`}`);
  proxies[n] = await startProxy(ports[n]);
}
reports = await fleet.until("all are live again", allLive);
await fleet.row(
  "rolling restart",
  secs(lastOf(reports, "lastLiveMs") - rollingMs),
  `each leaves in ${exits.join(", ")}`,
);

// 7. Redis starts again, empty, before a sentinel takes it for dead.
await downAfter(60_000);
await fleet.mark();
fleet.backend.start();
const master = await redis.master();
await master.kill();
await master.forgetDump();
const restartedMs = nowMs();
await master.start();
await eventually("all are subscribed", async () => (await masterInfo()).channels >= all, patienceMs);
const subscribedMs = nowMs() - restartedMs;
await eventually(
  "the inbox is told of all again",
  async () => {
    const entries = await control.xlen("agent:bench:inbox");
    return entries >= Math.min(all, 100_000);
  },
  patienceMs,
);
const toldMs = nowMs() - restartedMs;
await fleet.until("all are live", allLive);
await fleet.row(
  "Redis restarts, empty",
  secs(subscribedMs),
  `all are subscribed; the inbox is told after ${secs(toldMs)}`,
);

// 8. The master dies, and a replica takes its place.
await eventually("the replicas are in step", async () => {
  const client = (await redis.master()).client();
  const [info, acknowledged] = await Promise.all([client.info("replication"), client.wait(2, 1000)]);
  return (info.match(/state=online/g) ?? []).length === 2 && acknowledged === 2;
}, patienceMs);
await downAfter(2000);
await fleet.mark();
fleet.backend.start();
const former = await redis.master();
const failedMs = nowMs();
await former.kill();
const elected = await redis.elected(former);
const electedMs = nowMs() - failedMs;
await eventually("all are subscribed", async () => {
  const info = await elected.client().info("stats");
  return Number(/^pubsub_channels:(\d+)/m.exec(info)![1]) >= all;
}, patienceMs);
const movedMs = nowMs() - failedMs;
await fleet.until("all are live", allLive);
await fleet.row("failover", secs(movedMs), `all are subscribed, ${secs(movedMs - electedMs)} after the election`);

// 9. A word to all.
await fleet.mark();
const broadcastMs = nowMs();
await control.publish("wsproxy:control", JSON.stringify({ command: "broadcast", payload: '{"n":0}' }));
reports = await fleet.until("all have it", (reports) => sum(reports.map(({ plain }) => plain)) >= all);
await fleet.row("broadcast", secs(lastOf(reports, "lastPlainMs") - broadcastMs), "all have it");

// 10. The end of all.
await fleet.mark(false);
const closedMs = nowMs();
await control.publish("wsproxy:control", JSON.stringify({ command: "close", agent_id: "bench", code: 4000 }));
const endsOf = ({ closes }: HerdReport) => sum(Object.values(closes));
reports = await fleet.until("all are closed", (reports) => sum(reports.map(endsOf)) >= all);
const endedMs = lastOf(reports, "lastEndMs") - closedMs;
const without = sum(reports.map((report) => endsOf(report) - (report.closes[4000] ?? 0)));
await eventually("the inbox is told of all", () => (fleet.inbox.counts["disconnected 4000"] ?? 0) >= all, patienceMs);
fleet.rows.push([
  "agent closed",
  secs(endedMs),
  `all are closed${without > 0 ? `, ${without} without the code` : ""}; the inbox is told after ${
    secs(fleet.inbox.lastAtMs - closedMs)
  }`,
  ...["-", "-", "-", "-", "-"],
]);

console.log(`${align(fleet.rows)}\n`);
for (const [message, times] of failures) console.log(`a backend's message failed ${times} times: ${message}`);
if (values.json) {
  await Deno.writeTextFile(values.json, JSON.stringify({ costs, rows: fleet.rows, derived }, undefined, 2));
}
