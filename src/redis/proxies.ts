/**
 * The proxies' watch over each other. Each of them beats, and sees whether the others do; one whose beats stay out is
 * dead, and the others end its connections. A proxy that was only frozen or cut off, or that Redis has forgotten, finds
 * out at its next beat, and begins a new generation under a new name: what the others still do about the former one does
 * not concern it any more.
 */

import type { Redis } from "ioredis";
import { within } from "../deadline.ts";
import type { Log } from "../log.ts";
import { reasonOf, Unavailable } from "./errors.ts";
import { commandText } from "./publish_batch.ts";
import { shardOf, type Topology } from "./topology.ts";

/** Where the beats of all proxies are: a hash from a proxy's name to a number that changes. */
const proxiesKey = "wsproxy:{proxies}";
/** Names of dead proxies whose connections are being ended. */
const deadKey = `${proxiesKey}:dead`;
/** Agents that no proxy has a session of, by when their inboxes are looked at, in milliseconds since the epoch. */
const idleKey = `${proxiesKey}:idle`;
/** The agents of one proxy. */
const agentsKey = (name: string) => `${proxiesKey}:${name}:agents`;

export const beatMs = 2000;
/** A proxy that has not beaten for so long, as seen by one that beats all that time, is dead. */
const deadAfterMs = 10_000;
/** Each further proxy waits longer by this, so that one of them does the work; and the most proxies that do so. */
const rankMs = 2000;
const maxRank = 5;
/** Names in one command. */
const perCommand = 1000;
/** Agents that are asked for, or about, at once. */
const perTurn = 100;
const timeoutMs = 5000;

/** A generation of a proxy. */
export interface Generation {
  /** The proxy: of all its generations. */
  readonly holder: string;
  readonly number: number;
}

/** A proxy's part in the watch. */
export interface ProxiesOptions {
  /** The proxy's own name, without its generation. */
  readonly holder: string;
  readonly topology: Topology;
  readonly log: Log;
  /** Redis does not know our name: others have taken us for dead, or it has forgotten. */
  readonly onUnknown: () => void;
  /** Redis answers. */
  readonly onBeat: () => void;
  /** Ends what a dead proxy holds of an agent, and says how many connections these were. */
  readonly bury: (agentId: string, dead: Generation) => Promise<number>;
  /** Deletes an agent's inbox that is of no use; returns after how many milliseconds to try that again, if ever. */
  readonly expire: (agentId: string) => Promise<number | undefined>;
}

/** The watch, as one proxy takes part in it. */
export class Proxies {
  readonly #options: ProxiesOptions;
  #generation = 0;
  #beats = 0;
  /** Our name has been written. */
  #registered = false;
  #lastBeatMs = -Infinity;
  /** What others' beats were, and since when; in milliseconds of `performance.now()`. */
  readonly #seen = new Map<string, { beat: string; sinceMs: number }>();
  #working = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #closed = false;

  /** Does nothing before the first {@linkcode Proxies.begin}. */
  constructor(options: ProxiesOptions) {
    this.#options = options;
  }

  /** The present generation. */
  get generation(): number {
    return this.#generation;
  }

  get #name(): string {
    return nameOf(this.#options.holder, this.#generation);
  }

  /** Begins a generation, with these agents. */
  begin(agentIds: readonly string[]): void {
    const former = this.#name;
    this.#generation++;
    const name = this.#name;
    this.#registered = false;
    this.#send(commandText("HSET", proxiesKey, name, 0), (error) => {
      if (name === this.#name) this.#registered = error === undefined;
    });
    this.know(agentIds);
    this.#send(commandText("HDEL", proxiesKey, former));
    this.#send(commandText("DEL", agentsKey(former)));
  }

  /** Beats now, and then every two seconds. */
  beat(): void {
    clearTimeout(this.#timer);
    void this.#beat();
  }

  /** The others must know of these agents, should they find us dead. */
  know(agentIds: readonly string[]): void {
    for (let at = 0; at < agentIds.length; at += perCommand) {
      this.#send(commandText("SADD", agentsKey(this.#name), ...agentIds.slice(at, at + perCommand)));
    }
  }

  /** We have nothing of an agent any more. Its inbox is looked at in `idleMs` milliseconds. */
  forget(agentId: string, idleMs: number): void {
    this.#send(commandText("ZADD", idleKey, Date.now() + idleMs, agentId));
    this.#send(commandText("SREM", agentsKey(this.#name), agentId));
  }

  /** Beats no more, and tells nothing: the other proxies do what there is to do. */
  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }

  get #shard() {
    return shardOf(this.#options.topology, proxiesKey);
  }

  #send(text: string, done: (error: Error | undefined) => void = () => {}): void {
    const tell = (error: Error | undefined) => {
      if (error) this.#options.log.warn({ reason: reasonOf(error) }, "inbox: Redis refused what proxies keep");
      done(error);
    };
    const sent = this.#shard?.publisher.command(proxiesKey, text, { done: tell });
    if (sent !== "taken") tell(new Unavailable("too much is pending"));
  }

  async #beat(): Promise<void> {
    const redis = this.#shard?.writable;
    if (redis !== undefined && this.#generation > 0) {
      try {
        await this.#ask(redis);
      } catch (error) {
        this.#options.log.warn({ reason: reasonOf(error) }, "inbox: no beat");
      }
    }
    if (this.#closed) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.#beat(), beatMs);
  }

  async #ask(redis: Redis): Promise<void> {
    const name = this.#name;
    const registered = this.#registered;
    const [isNew, proxies, dead, idle] = await answered(Promise.all([
      redis.hset(proxiesKey, name, String(++this.#beats)),
      redis.hgetall(proxiesKey),
      redis.smembers(deadKey),
      idleOf(redis),
    ]));
    if (name !== this.#name || this.#closed) return;
    if (isNew === 1 && registered) {
      this.#options.log.warn("inbox: taken for dead, what is held is told again");
      this.#options.onUnknown();
      return;
    }
    this.#options.onBeat();
    const suspects = this.#watch(proxies);
    if (this.#working) return;
    this.#working = true;
    this.#work(redis, suspects, dead, idle)
      .catch((error) => this.#options.log.warn({ reason: reasonOf(error) }, "inbox: a dead proxy is not done with"))
      .finally(() => this.#working = false);
  }

  /** The names that have not beaten for too long. */
  #watch(proxies: Readonly<Record<string, string>>): string[] {
    const nowMs = performance.now();
    // A proxy that has not beaten itself has not seen whether others did.
    if (nowMs - this.#lastBeatMs > deadAfterMs / 2) this.#seen.clear();
    this.#lastBeatMs = nowMs;
    // One that is missing has left, or Redis has lost the names: it is looked at as one that has died.
    for (const [name, beat] of Object.entries(proxies)) {
      if (this.#seen.get(name)?.beat !== beat) this.#seen.set(name, { beat, sinceMs: nowMs });
    }
    const silent = ({ sinceMs }: { sinceMs: number }, ms: number) => nowMs - sinceMs > ms;
    const living = [...this.#seen].filter(([, seen]) => !silent(seen, beatMs * 2)).map(([name]) => name).sort();
    const rank = Math.min(maxRank, Math.max(0, living.indexOf(this.#name)));
    return [...this.#seen].filter(([, seen]) => silent(seen, deadAfterMs + rank * rankMs)).map(([name]) => name);
  }

  /** Ends the connections of the dead. Another proxy may do so at the same time: each connection is told once. */
  async #work(
    redis: Redis,
    suspects: readonly string[],
    dead: readonly string[],
    idle: readonly string[],
  ): Promise<void> {
    const { bury, expire, log } = this.#options;
    for (const name of suspects) {
      // In this order, so that the name is in one of them at any time. A proxy that lives notices when it is out of the second.
      await answered(redis.sadd(deadKey, name));
      await answered(redis.hdel(proxiesKey, name));
    }
    for (const name of new Set([...suspects, ...dead])) {
      let connections = 0;
      const agents = await answered(redis.smembers(agentsKey(name)));
      await forAll(agents, async (agentId) => {
        connections += await bury(agentId, generationOf(name));
      });
      await answered(redis.del(agentsKey(name)));
      await answered(redis.srem(deadKey, name));
      this.#seen.delete(name);
      if (agents.length > 0) log.info({ connections }, "inbox: the connections of a silent proxy have ended");
    }
    for (let some = idle; some.length > 0 && !this.#closed;) {
      await forAll(some, async (agentId) => {
        const againMs = await expire(agentId);
        if (againMs === undefined) await answered(redis.zrem(idleKey, agentId));
        else await answered(redis.zadd(idleKey, Date.now() + againMs, agentId));
      });
      some = some.length === perTurn ? await answered(idleOf(redis)) : [];
    }
  }
}

/** Agents whose inboxes are to be looked at. */
const idleOf = (redis: Redis) => redis.zrangebyscore(idleKey, "-inf", Date.now(), "LIMIT", 0, perTurn);

const nameOf = (holder: string, generation: number) => `${holder}:${generation}`;

function generationOf(name: string): Generation {
  const [, holder = name, number = "0"] = /^(.*):(\d+)$/.exec(name) ?? [];
  return { holder, number: Number(number) };
}

/** Does something for each agent, for some of them at once: there may be as many agents as connections. */
export async function forAll<T>(agents: readonly T[], action: (agent: T) => Promise<void>): Promise<void> {
  for (let at = 0; at < agents.length; at += perTurn) await Promise.all(agents.slice(at, at + perTurn).map(action));
}

/** What Redis answers, in time. */
export function answered<T>(promise: Promise<T>): Promise<T> {
  return within(timeoutMs, promise, () => {
    throw new Unavailable(`no answer within ${timeoutMs} ms`);
  });
}
