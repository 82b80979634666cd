/**
 * Everything at once: several proxies on one Redis, backends that log numbered messages, clients that resume, and a
 * devil who kills, freezes, cuts, trims and flushes. An oracle beside each client checks what it sees: every message
 * once and in order, or a gap told before anything newer.
 */

import { Redis } from "ioredis";
// @ts-types="@types/ws"
import WebSocketOfNpm from "ws";
import { downChannel } from "../../src/redis/bridge.ts";
import { type Env, ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

/** What is tortured, and for how long. */
export interface TortureOptions {
  readonly seconds: number;
  /** The same seed does the same things, as far as clocks and the kernel do. */
  readonly seed: number;
  readonly engine: string;
  readonly sessions: number;
  /** Redis keeps what it had when it is killed. */
  readonly persistent: boolean;
}

/** What happened. */
export interface TortureReport {
  sent: number;
  received: number;
  connects: number;
  gaps: number;
  harms: Record<string, number>;
}

/** Random numbers that can be repeated (mulberry32). */
function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = state + 0x6d2b79f5 | 0;
    let mixed = Math.imul(state ^ state >>> 15, 1 | state);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** A proxy that is killed and started again, reached by Redis through a relay that cuts. */
class Victim {
  #process: ProxyProcess | undefined;
  readonly relay: Relay;
  constructor(redis: RedisServer, readonly env: Env) {
    this.relay = new Relay(redis.port);
  }
  get port(): number | undefined {
    return this.#process?.port;
  }
  async start(): Promise<void> {
    this.#process = await ProxyProcess.start(this.relay.url, this.env);
    this.#process.log.drain();
  }
  async kill(): Promise<void> {
    const process = this.#process;
    this.#process = undefined;
    await process?.[Symbol.asyncDispose]();
  }
  async freeze(ms: number): Promise<void> {
    const process = this.#process;
    process?.signal("SIGSTOP");
    await pause(ms);
    if (process === this.#process) process?.signal("SIGCONT");
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
    this.relay[Symbol.dispose]();
  }
}

/** A backend that logs 1, 2, 3, … to one session, and sends again what it has no answer to. */
class Backend {
  sent = 0;
  #stopping = false;
  #pause: PromiseWithResolvers<void> | undefined;
  #paused: (() => void) | undefined;
  readonly done: Promise<void>;
  constructor(redis: Redis, session: string, random: () => number) {
    this.done = this.#run(redis, downChannel(session), random);
  }
  async #run(redis: Redis, channel: string, random: () => number): Promise<void> {
    while (!this.#stopping) {
      const next = this.sent + 1;
      const filler = "x".repeat(random() < 0.02 ? 50_000 : Math.floor(random() * 80));
      while (true) {
        try {
          await redis.call("FCALL", "wsproxy_send", 1, channel, `${next} ${filler}`, `nonce-${next}`);
          break;
        } catch {
          // Redis is away, busy, or has lost its functions: whoever connects next loads them.
          await pause(20);
        }
      }
      this.sent = next;
      this.#paused?.();
      await this.#pause?.promise;
      if (random() < 0.3) await pause(Math.floor(random() * 20));
    }
  }
  /** Resolves when no message is under way; none is sent until `go`. */
  hold(): Promise<void> {
    this.#pause = Promise.withResolvers<void>();
    return new Promise((resolve) => this.#paused = resolve);
  }
  go(): void {
    this.#pause?.resolve();
    this.#pause = this.#paused = undefined;
  }
  stop(): Promise<void> {
    this.#stopping = true;
    return this.done;
  }
}

/** Messages that Redis had acknowledged, and that its replica lacked: after `from`, up to `to`. */
interface LostTail {
  readonly from: number;
  readonly to: number;
}

/** A client with an oracle: it resumes from its last position, and notes what must not be. */
class Witness {
  readonly faults: string[] = [];
  /** What a failover has lost: whoever has not seen it cannot be told. */
  readonly lostTails: LostTail[] = [];
  last = 0;
  live = false;
  received = 0;
  gaps = 0;
  connects = 0;
  #position = "0";
  #toldOfGap = true;
  #stopping = false;
  #socket: WebSocketOfNpm | undefined;
  readonly done: Promise<void>;

  constructor(readonly session: string, readonly victims: readonly Victim[], readonly random: () => number) {
    this.done = this.#run();
  }

  async #run(): Promise<void> {
    while (!this.#stopping) {
      const { port } = this.victims[Math.floor(this.random() * this.victims.length)]!;
      if (port === undefined) await pause(20);
      else await this.#connect(port);
      await pause(Math.floor(this.random() * 30));
    }
  }

  async #connect(port: number): Promise<void> {
    const url = `ws://127.0.0.1:${port}/agent/ws/${this.session}?resume=${this.#position}`;
    const protocols = ["wsproxy.resume.v1", "bearer", await mint(this.session)];
    const socket = this.#socket = new WebSocketOfNpm(url, protocols);
    this.live = false;
    const closed = new Promise<void>((resolve) => socket.on("close", () => resolve()));
    socket.on("error", () => {});
    socket.on("open", () => {
      this.connects++;
      if (socket.protocol !== "wsproxy.resume.v1") socket.close();
    });
    socket.on("message", (data: unknown) => {
      if (socket === this.#socket && socket.protocol === "wsproxy.resume.v1") this.#see(String(data));
    });
    await closed;
    if (socket === this.#socket) this.#socket = undefined;
  }

  #see(frame: string): void {
    const end = frame.indexOf("\n");
    const head = frame.slice(0, end);
    if (head === "!gap") {
      this.#toldOfGap = true;
      this.gaps++;
    } else if (head === "!live") {
      this.#position = frame.slice(end + 1);
      this.live = true;
    } else if (/^\d+-\d+$/.test(head)) {
      const number = parseInt(frame.slice(end + 1));
      const skipped = (lost: LostTail) => this.last >= lost.from && number === lost.to + 1;
      if (number !== this.last + 1 && !this.#toldOfGap && !this.lostTails.some(skipped)) {
        this.faults.push(`${this.session}: ${number} after ${this.last}, at ${head} after ${this.#position}`);
      }
      this.#toldOfGap = false;
      this.last = number;
      this.received++;
      this.#position = head;
    }
  }

  /** Leaves, to come back at once. */
  drop(): void {
    const socket = this.#socket;
    this.#socket = undefined;
    socket?.terminate();
  }

  /** Reads nothing for a while. */
  async dawdle(ms: number): Promise<void> {
    const socket = this.#socket;
    socket?.pause();
    await pause(ms);
    socket?.resume();
  }

  async stop(): Promise<void> {
    this.#stopping = true;
    this.#socket?.terminate();
    await this.done;
  }
}

/** Tortures for a while. @throws what an oracle has seen, or what does not come to rest. */
export async function torture(options: TortureOptions): Promise<TortureReport> {
  const { seconds, seed, engine, sessions, persistent } = options;
  const random = createRandom(seed);
  const persistence = persistent ? ["--appendonly", "yes"] : [];
  await using redis = await RedisServer.start("--enable-debug-command", "yes", ...persistence);
  await using replica = await RedisServer.start(...persistence);
  let master = redis;
  let standby = replica;
  await standby.client().replicaof("127.0.0.1", master.port);
  // Backends and ourselves reach Redis as the proxies do: by a name that leads to the master.
  using name = new Relay(master.port);
  const clients: Redis[] = [];
  const connect = () => {
    const client = new Redis(name.url, { retryStrategy: () => 50, maxRetriesPerRequest: 0, commandTimeout: 2000 });
    client.on("error", () => {});
    clients.push(client);
    return client;
  };
  const control = connect();
  const env = { WS_ENGINE: engine, REDIS_OUTAGE_GRACE_SECS: "3600", MAX_BUFFER_SIZE_BYTES: "4000000" };
  await using one = new Victim(redis, env);
  await using two = new Victim(redis, env);
  const victims = [one, two];
  await Promise.all(victims.map((victim) => victim.start()));
  const names = Array.from({ length: sessions }, (_, n) => `s${n}`);
  const backends = names.map((name) => new Backend(connect(), name, random));
  const witnesses = names.map((name) => new Witness(name, victims, random));
  const some = <T>(items: readonly T[]) => items[Math.floor(random() * items.length)]!;
  const harms: Record<string, () => unknown> = {
    drop: () => some(witnesses).drop(),
    dropMany: () => witnesses.forEach((witness) => random() < 0.5 && witness.drop()),
    cut: () => some(victims).relay.cut(),
    cutSoon: () => {
      const { relay } = some(victims);
      relay.budgets = Array.from({ length: 4 }, () => ({ down: Math.floor(random() * 3000) }));
      relay.cut();
    },
    killPubSub: () => control.client("KILL", "TYPE", "pubsub"),
    pauseWrites: () => control.call("CLIENT", "PAUSE", Math.floor(random() * 300), "WRITE"),
    freezeProxy: () => some(victims).freeze(random() * 300),
    trim: () => control.xtrim(downChannel(some(names)), "MAXLEN", Math.floor(random() * 20)),
    delete: () => control.del(downChannel(some(names))),
    flush: () => random() < 0.2 && control.flushall(),
    killProxy: async () => {
      if (random() < 0.6) return;
      const victim = some(victims);
      await victim.kill();
      await victim.start();
    },
    killRedis: async () => {
      if (random() < 0.6) return;
      await master.kill();
      if (!persistent) await master.forgetDump();
      await master.start();
    },
    dawdle: () => some(witnesses).dawdle(random() * 1500),
    // The replica that takes over lacks what came while it was cut off.
    failOver: async () => {
      if (random() < 0.5) return;
      const [old, next] = [master.client(), standby.client()];
      await next.replicaof("127.0.0.1", 1);
      await pause(random() * 200);
      await Promise.all(backends.map((backend) => backend.hold()));
      await next.replicaof("NO", "ONE");
      for (const [n, session] of names.entries()) {
        const [entry] = await next.xrevrange(downChannel(session), "+", "-", "COUNT", 1);
        witnesses[n]!.lostTails.push({ from: parseInt(entry?.[1][1] || "0"), to: backends[n]!.sent });
      }
      [master, standby] = [standby, master];
      for (const relay of [name, ...victims.map((victim) => victim.relay)]) {
        relay.target = master.port;
        relay.cut();
      }
      for (const backend of backends) backend.go();
      await old.replicaof("127.0.0.1", master.port);
      await eventually(
        "the old master follows",
        async () => /master_link_status:up/.test(await old.info("replication")),
      );
    },
  };
  const counts: Record<string, number> = {};
  const endMs = performance.now() + seconds * 1000;
  const faults = () => witnesses.flatMap((witness) => witness.faults);
  while (performance.now() < endMs && faults().length === 0) {
    const name = some(Object.keys(harms));
    counts[name] = (counts[name] ?? 0) + 1;
    await Promise.resolve().then(harms[name]).catch(() => {});
    await pause(random() * 150);
  }
  for (const { relay } of victims) relay.budgets = [];
  await Promise.all(backends.map((backend) => backend.stop()));
  try {
    await eventually(
      "every client has the last message, or was told why not",
      () => faults().length > 0 || witnesses.every(({ live, last }, n) => live && last === backends[n]!.sent),
    );
  } catch (error) {
    const states = witnesses.map(({ session, live, last }, n) => `${session} ${live} ${last}/${backends[n]!.sent}`);
    throw new Error(`${(error as Error).message}: ${states.join(", ")} (seed ${seed})`);
  } finally {
    for (const client of clients) client.disconnect();
    await Promise.all(witnesses.map((witness) => witness.stop()));
  }
  if (faults().length > 0) throw new Error(`seed ${seed}: ${faults().slice(0, 5).join("; ")}`);
  const sum = (numbers: readonly number[]) => numbers.reduce((total, number) => total + number, 0);
  return {
    sent: sum(backends.map(({ sent }) => sent)),
    received: sum(witnesses.map(({ received }) => received)),
    connects: sum(witnesses.map(({ connects }) => connects)),
    gaps: sum(witnesses.map(({ gaps }) => gaps)),
    harms: counts,
  };
}

if (import.meta.main) {
  const value = (name: string, fallback: string) =>
    Deno.args[Deno.args.indexOf(`--${name}`) + 1 || Infinity] ?? fallback;
  const seconds = Number(value("seconds", "60"));
  const seed = Number(value("seed", String(Date.now() % 1e9)));
  for (const engine of ["deno", "ws"]) {
    for (const persistent of [true, false]) {
      const options = { seconds: seconds / 4, seed, engine, sessions: 20, persistent };
      console.log(JSON.stringify({ ...options, ...await torture(options) }));
    }
  }
  Deno.exit();
}
