/** What torture is made of: proxies that are harmed, backends that count, and clients beside which an oracle sits. */

import { parseArgs, type ParseArgsConfig } from "node:util";
// @ts-types="@types/ws"
import WebSocketOfNpm from "ws";
import { downChannel } from "../../src/redis/link.ts";
import { type Env, ProxyProcess } from "../harness/proxy.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

/** Random numbers that can be repeated (mulberry32). */
export function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = state + 0x6d2b79f5 | 0;
    let mixed = Math.imul(state ^ state >>> 15, 1 | state);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  };
}

/** For harms that last; nothing is awaited by it that could be an event. */
export const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

/** One of some, of which there must be one. */
export const oneOf = <T>(items: readonly T[], random: () => number) => items[Math.floor(random() * items.length)]!;

/** A proxy that is killed and started again. */
export class Victim implements AsyncDisposable {
  #process: ProxyProcess | undefined;
  constructor(readonly redisUrl: string, readonly env: Env) {}
  get port(): number | undefined {
    return this.#process?.port;
  }
  async start(): Promise<void> {
    this.#process = await ProxyProcess.start(this.redisUrl, this.env);
    this.#process.log.drain();
  }
  /** Kills it, or after so long of being left to end by itself. */
  async kill(afterMs = 0): Promise<void> {
    const process = this.#process;
    this.#process = undefined;
    if (afterMs > 0) await pause(afterMs);
    await process?.[Symbol.asyncDispose]();
  }
  signal(signal: Deno.Signal): void {
    this.#process?.signal(signal);
  }
  /** Sessions that it holds, of WebSockets and of streams. */
  async sessions(): Promise<number> {
    return await this.#process?.metric("wsproxy_connections") ?? 0;
  }
  async freeze(ms: number): Promise<void> {
    const process = this.#process;
    process?.signal("SIGSTOP");
    await pause(ms);
    if (process === this.#process) process?.signal("SIGCONT");
  }
  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** How a backend logs a payload to a channel under a nonce. */
export type Send = (channel: string, payload: string, nonce: string) => Promise<unknown>;

/** A backend that logs 1, 2, 3, … to one session, and sends again what it has no answer to. */
export class Backend {
  sent = 0;
  #stopping = false;
  #pause: PromiseWithResolvers<void> | undefined;
  #paused: (() => void) | undefined;
  readonly done: Promise<void>;
  /** `send` logs a payload to a channel under a nonce, once, or throws. */
  constructor(send: Send, session: string, random: () => number) {
    this.done = this.#run(send, downChannel(session), random);
  }
  async #run(send: Send, channel: string, random: () => number): Promise<void> {
    while (!this.#stopping) {
      const next = this.sent + 1;
      const filler = "x".repeat(random() < 0.02 ? 50_000 : Math.floor(random() * 80));
      while (true) {
        try {
          await send(channel, `${next} ${filler}`, `nonce-${next}`);
          break;
        } catch {
          // Redis is away, busy, or has lost its functions: a proxy loads them again.
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
export interface LostTail {
  readonly from: number;
  readonly to: number;
}

/** A client with an oracle: it resumes from its last position, and notes what must not be. */
export class Witness {
  readonly faults: string[] = [];
  /** What a failover has lost: a client that has not seen it cannot be told. */
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
      this.#position = JSON.parse(frame.slice(end + 1)).position;
    } else if (head === "!live") {
      this.#position = frame.slice(end + 1);
      this.live = true;
    } else if (/^\d+-\d+$/.test(head)) {
      const number = parseInt(frame.slice(end + 1));
      const skipped = (lost: LostTail) => this.last >= lost.from && number === lost.to + 1;
      // With the log its last nonce was lost: the backend has sent again what it had no answer to, to a new log.
      const isSentAgain = number === this.last && head.endsWith("-1");
      if (number !== this.last + 1 && !isSentAgain && !this.#toldOfGap && !this.lostTails.some(skipped)) {
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

/** What can be done to a system, by name. */
export type Harms = Record<string, () => unknown>;

/** What a proxy and its clients go through, whatever Redis is. */
export function commonHarms(victims: readonly Victim[], witnesses: readonly Witness[], random: () => number): Harms {
  return {
    drop: () => oneOf(witnesses, random).drop(),
    dropMany: () => witnesses.forEach((witness) => random() < 0.5 && witness.drop()),
    dawdle: () => oneOf(witnesses, random).dawdle(random() * 1500),
    freezeProxy: () => oneOf(victims, random).freeze(random() * 300),
    killProxy: async () => {
      if (random() < 0.6) return;
      const victim = oneOf(victims, random);
      await victim.kill();
      await victim.start();
    },
  };
}

/** What happened. */
export interface TortureReport {
  sent: number;
  received: number;
  connects: number;
  gaps: number;
  harms: Record<string, number>;
}

/** Does harm for a while, then lets all come to rest. @throws what an oracle has seen, or what comes to no rest. */
export async function harass(
  { seconds, seed }: { readonly seconds: number; readonly seed: number },
  random: () => number,
  harms: Harms,
  backends: readonly Backend[],
  witnesses: readonly Witness[],
  rest: () => unknown = () => {},
): Promise<TortureReport> {
  const counts: Record<string, number> = {};
  const endMs = performance.now() + seconds * 1000;
  const faults = () => witnesses.flatMap((witness) => witness.faults);
  while (performance.now() < endMs && faults().length === 0) {
    const name = oneOf(Object.keys(harms), random);
    count(counts, name);
    await Promise.resolve().then(harms[name]).catch(() => {});
    await pause(random() * 150);
  }
  await rest();
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

/**
 * The options of the command line: `--seconds` and `--seed`, and more of them. It prints the seed, which a run that ends
 * before its time needs to be repeated. @throws at an option that is not one of them, and at a number that is none.
 */
export function runOptions<const T extends NonNullable<ParseArgsConfig["options"]>>(seconds: number, more: T) {
  const text = { type: "string" } as const;
  const { values } = parseArgs({ options: { seconds: text, seed: text, ...more } });
  const given = values as { readonly seconds?: string; readonly seed?: string };
  const found = {
    ...values,
    seconds: numberOf("seconds", given.seconds ?? String(seconds)),
    seed: numberOf("seed", given.seed ?? String(Date.now() % 1e9)),
  };
  console.log(`seed ${found.seed}`);
  return found;
}

/** The number that an option is. */
export function numberOf(name: string, value: string): number {
  const number = Number(value);
  if (value === "" || !(number >= 0)) throw new Error(`--${name} must be a number: current value is "${value}"`);
  return number;
}

/** Counts one more of a name. */
export function count(counts: Record<string, number>, name: string): void {
  counts[name] = (counts[name] ?? 0) + 1;
}
