/**
 * The inbox of an agent: a stream in which its backends read all that happens to its sessions. Here are its entries,
 * and the proxies' watch over each other.
 *
 * Messages are entries of their own, written with the PUBLISH. The life of a connection is told by inbox.lua, which
 * keeps who is connected beside the stream: saying a thing twice writes it once, so what may not have arrived is said
 * again. Whoever has lost its connection to Redis, or was taken for dead, takes a new name, and brings what it still
 * holds along. A proxy whose name has not beaten for some seconds is dead, and the others say so for its connections.
 */

import { createHash } from "node:crypto";
import type { Redis } from "ioredis";
import { after, within } from "../deadline.ts";
import type { InboxSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { reasonOf, Unavailable } from "./errors.ts";
import script from "./inbox.lua" with { type: "text" };
import { bulk, commandText } from "./publish_batch.ts";
import type { Issuer, Source } from "./publisher.ts";
import { prefixOf } from "./slot.ts";
import type { Topology } from "./topology.ts";

/** What SCRIPT LOAD makes of it: done for each connection, so that each call is short. */
const scriptHash = createHash("sha1").update(script).digest("hex");

/** The stream of an agent. */
export const inboxKey = (agentId: string): string => `agent:${agentId}:inbox`;

/** Where the beats of all proxies are: a hash from a proxy's name to a number that changes. */
const proxiesKey = "wsproxy:{proxies}";
/** Names of dead proxies whose connections are being ended. */
const deadKey = `${proxiesKey}:dead`;
/** The agents of one proxy. */
const agentsKey = (name: string) => `${proxiesKey}:${name}:agents`;

const beatMs = 2000;
/** A proxy that has not beaten for so long, as somebody sees it who beats all that time, is dead. */
const deadAfterMs = 10_000;
/** How much longer each of the next ones waits, so that one of them does the work; the longest of that. */
const rankMs = 2000;
const maxRank = 5;
/** Connections in one call of the script, and sessions told vacant in one. */
const perCall = 100;
/** Departures that Redis has not taken yet. */
const maxLeft = 100_000;
const timeoutMs = 5000;
/** Time between two lines that tell of lost entries. */
const lossLogMs = 1000;

/** What an inbox is made of. */
export interface InboxOptions {
  readonly settings: InboxSettings;
  readonly topology: Topology;
  readonly log: Log;
  /** So many entries have been written. */
  readonly onEntries: (count: number) => void;
  /** So many entries will never be. */
  readonly onLost: (count: number) => void;
}

/** Whose inbox a connection is in, and the trace that it belongs to. */
interface Who {
  readonly agentId: string;
  readonly traceparent: string;
}

/** A departure that Redis has not confirmed. */
interface Departure {
  readonly connection: string;
  readonly name: string;
  readonly fields: readonly (string | number)[];
  refused: boolean;
}

/** All agents' inboxes: each on the shard of its name, and the watch on that of its own. */
export class Inbox implements Source {
  readonly #options: InboxOptions;
  readonly #agents = new Map<string, Agent>();
  /** The name under which we beat; a new one whenever Redis has been connected to. */
  #name: string = crypto.randomUUID();
  #formerName = this.#name;
  #beats = 0;
  /** Our name has been written. */
  #registered = false;
  #lastBeatMs = -Infinity;
  /** What others' beats were, and since when; in milliseconds of `performance.now()`. */
  readonly #seen = new Map<string, { beat: string; sinceMs: number }>();
  #reaping = false;
  /** Something is to be said again. */
  #refused = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #sweepTimer: ReturnType<typeof setTimeout> | undefined;
  #sweepAtMs = Infinity;
  #closed = false;
  #lost = { entries: 0, loggedAtMs: -Infinity };
  /** See {@linkcode Source}; lifecycle entries are bounded by their own number. */
  pendingCost = 0;
  /** See {@linkcode Source}. */
  readonly discarded = false;
  /** See {@linkcode Source}. */
  entered = true;

  /** Beats from the first connection on. */
  constructor(options: InboxOptions) {
    this.#options = options;
  }

  /** Where an inbox lives: see {@linkcode Topology}. */
  slotOf(key: string): number {
    return this.#options.topology.slotOf(key);
  }

  /** A connection that is about to open. */
  member(who: Who, sessionId: string, connection: string, source: Source): Member {
    return new Member(this, who, sessionId, connection, source);
  }

  /** The connection to Redis serves: what we hold is told again under a new name. */
  resume(): void {
    this.#takeNewName();
    clearTimeout(this.#timer);
    void this.#beat();
  }

  /** Ends the beats, without a word: who still waits for a vacancy is left to the other proxies. */
  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
    clearTimeout(this.#sweepTimer);
  }

  /** A message that no connection sent, as one entry in RESP. */
  posted(agentId: string, sessionId: string, text: string): string {
    return this.entryPrefix(agentId, sessionId, "") + entryEnd(text);
  }

  /** What all entries of a connection's messages begin with. */
  entryPrefix(agentId: string, sessionId: string, connection: string): string {
    const { maxEntries } = this.#options.settings;
    const words = ["XADD", inboxKey(agentId), "MAXLEN", "~", String(maxEntries), "*"];
    words.push("type", "message", "session", sessionId, "connection", connection, "at");
    // Three words more come with each message.
    return `*${words.length + 3}\r\n${words.map(bulk).join("")}`;
  }

  /** The entry of a message has been written, or will never be. */
  told(error: Error | undefined): void {
    if (error === undefined) this.#options.onEntries(1);
    else this.lose(1, error);
  }

  /** Entries will never be written. */
  lose(entries: number, error: Error): void {
    this.#options.onLost(entries);
    const lost = this.#lost;
    lost.entries += entries;
    const nowMs = performance.now();
    if (nowMs - lost.loggedAtMs < lossLogMs) return;
    this.#options.log.error({ entries: lost.entries, reason: reasonOf(error) }, "inbox entries lost");
    this.#lost = { entries: 0, loggedAtMs: nowMs };
  }

  /** A member's socket has opened. */
  connected(member: Member): void {
    const agent = this.#agent(member.agentId);
    agent.members.set(member.connection, member);
    agent.count(member.sessionId, 1);
    this.#announce(agent, [member], undefined);
  }

  /** A member's socket has ended. */
  disconnected(member: Member, code: number, position: string): void {
    const agent = this.#agent(member.agentId);
    agent.members.delete(member.connection);
    const sockets = agent.count(member.sessionId, -1);
    const { connection } = member;
    const fields = [connection, Date.now(), code, sockets, position];
    const departure = { connection, name: this.#name, fields, refused: false };
    agent.left.set(connection, departure);
    if (agent.left.size > maxLeft) {
      agent.left.delete(agent.left.keys().next().value!);
      this.lose(1, new Error("too many wait"));
    }
    this.#depart(agent, departure);
  }

  /** See {@linkcode Source}: commands are told of by their own. */
  lost(): void {}

  /** See {@linkcode Source}. */
  unheard(): void {}

  #agent(id: string): Agent {
    let agent = this.#agents.get(id);
    if (agent === undefined) {
      this.#agents.set(id, agent = new Agent(id));
      this.#know(agent);
    }
    return agent;
  }

  /** Whoever finds us dead must know whom we had. */
  #know(agent: Agent): void {
    this.#send(agentsKey(this.#name), commandText("SADD", agentsKey(this.#name), agent.id), () => {});
  }

  #shard(key: string) {
    const { topology } = this.#options;
    return topology.at(topology.slotOf(key));
  }

  #send(key: string, text: string, done: (error: Error | undefined) => void): void {
    const issuer: Issuer = { done };
    if (!this.#shard(key)?.publisher.command(key, text, this, issuer)) done(new Unavailable("too much is pending"));
  }

  #announce(agent: Agent, members: readonly Member[], formerName: string | undefined): void {
    const keys = agent.keys(this.#name);
    if (formerName !== undefined) keys.push(agent.held(formerName));
    const fields = members.flatMap(({ sessionId, connection, atMs, traceparent }) => [
      ...[sessionId, connection, atMs, agent.sockets.get(sessionId) ?? 0, traceparent],
    ]);
    const words = this.#words("connected", keys, 0, fields);
    this.#send(agent.key, commandText(...words), (error) => {
      for (const member of members) member.refused = error !== undefined;
      if (error === undefined) this.#options.onEntries(members.length);
      else this.#complain(error);
    });
  }

  #depart(agent: Agent, departure: Departure): void {
    const { vacatedGraceMs } = this.#options.settings;
    const words = this.#words("disconnected", agent.keys(departure.name), vacatedGraceMs, departure.fields);
    departure.refused = false;
    this.#send(agent.key, commandText(...words), (error) => {
      departure.refused = error !== undefined;
      if (error !== undefined) return this.#complain(error);
      agent.left.delete(departure.connection);
      this.#options.onEntries(1);
      this.#sweepLater(agent, vacatedGraceMs);
    });
  }

  #words(what: string, keys: readonly string[], number: number, fields: readonly (string | number)[]) {
    const { maxEntries } = this.#options.settings;
    return ["EVALSHA", scriptHash, keys.length, ...keys, what, maxEntries, number, ...fields];
  }

  /** Redis refuses what will be said again. */
  #complain(error: Error): void {
    this.#refused = true;
    this.#options.log.warn({ reason: reasonOf(error) }, "Redis refused an inbox entry: it is tried again");
  }

  #takeNewName(): void {
    this.#formerName = this.#name;
    const name = this.#name = crypto.randomUUID();
    this.#registered = false;
    this.#send(proxiesKey, commandText("HSET", proxiesKey, name, 0), (error) => {
      if (name === this.#name) this.#registered = error === undefined;
    });
    this.#loadScript();
    for (const agent of this.#agents.values()) {
      this.#know(agent);
      const members = [...agent.members.values()];
      for (let at = 0; at < members.length; at += perCall) {
        this.#announce(agent, members.slice(at, at + perCall), this.#formerName);
      }
      this.#sweepLater(agent, 0);
    }
  }

  #loadScript(): void {
    const done = (error: Error | undefined) => error && this.#complain(error);
    const text = commandText("SCRIPT", "LOAD", script);
    for (const { publisher } of this.#options.topology.shards) publisher.command(undefined, text, this, { done });
  }

  /** Says again what Redis has refused. */
  #retry(): void {
    if (!this.#refused) return;
    this.#refused = false;
    this.#loadScript();
    for (const agent of this.#agents.values()) {
      const refused = [...agent.members.values()].filter((member) => member.refused);
      for (let at = 0; at < refused.length; at += perCall) {
        this.#announce(agent, refused.slice(at, at + perCall), this.#formerName);
      }
      for (const departure of agent.left.values()) if (departure.refused) this.#depart(agent, departure);
    }
  }

  async #beat(): Promise<void> {
    const redis = this.#shard(proxiesKey)?.writable;
    if (redis !== undefined) {
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
    const [isNew, proxies, dead] = await answered(Promise.all([
      redis.hset(proxiesKey, name, String(++this.#beats)),
      redis.hgetall(proxiesKey),
      redis.smembers(deadKey),
    ]));
    if (name !== this.#name || this.#closed) return;
    if (isNew === 1 && registered) {
      // Others took us for dead, or Redis has forgotten.
      this.#options.log.warn("inbox: taken for dead, what is held is told again");
      this.#takeNewName();
      return await this.#ask(redis);
    }
    this.#retry();
    const suspects = this.#watch(proxies);
    if (this.#reaping) return;
    this.#reaping = true;
    this.#reap(redis, suspects, dead)
      .catch((error) => this.#options.log.warn({ reason: reasonOf(error) }, "inbox: a dead proxy is not done with"))
      .finally(() => this.#reaping = false);
  }

  /** The names that have not beaten for too long. */
  #watch(proxies: Readonly<Record<string, string>>): string[] {
    const nowMs = performance.now();
    // Whoever has not beaten itself has not seen whether others did.
    if (nowMs - this.#lastBeatMs > deadAfterMs / 2) this.#seen.clear();
    this.#lastBeatMs = nowMs;
    for (const name of this.#seen.keys()) if (!(name in proxies)) this.#seen.delete(name);
    for (const [name, beat] of Object.entries(proxies)) {
      if (this.#seen.get(name)?.beat !== beat) this.#seen.set(name, { beat, sinceMs: nowMs });
    }
    const silent = ({ sinceMs }: { sinceMs: number }, ms: number) => nowMs - sinceMs > ms;
    const living = [...this.#seen].filter(([, seen]) => !silent(seen, beatMs * 2)).map(([name]) => name).sort();
    const rank = Math.min(maxRank, Math.max(0, living.indexOf(this.#name)));
    return [...this.#seen].filter(([, seen]) => silent(seen, deadAfterMs + rank * rankMs)).map(([name]) => name);
  }

  /** Ends the connections of the dead. Somebody else may do so at the same time: each is told once. */
  async #reap(redis: Redis, suspects: readonly string[], dead: readonly string[]): Promise<void> {
    for (const name of suspects) {
      // It finds out by this when it lives.
      await answered(redis.multi().hdel(proxiesKey, name).sadd(deadKey, name).exec());
    }
    for (const name of new Set([...suspects, ...dead])) {
      let connections = 0;
      for (const id of await answered(redis.smembers(agentsKey(name)))) {
        const agent = this.#agent(id);
        connections += await this.#endAll(agent, name);
        this.#sweepLater(agent, 0);
      }
      await answered(redis.multi().del(agentsKey(name)).srem(deadKey, name).exec());
      this.#options.log.info({ connections }, "inbox: the connections of a silent proxy have ended");
    }
  }

  async #endAll(agent: Agent, name: string): Promise<number> {
    let ended = 0;
    let cursor = "0";
    do {
      const redis = this.#shard(agent.key)?.writable;
      if (redis === undefined) throw new Unavailable("not connected");
      // A page may be empty, or hold what an earlier one held: only the cursor says where the end is.
      const [next, pairs] = await answered(redis.hscan(agent.held(name), cursor, "COUNT", perCall));
      for (let at = 0; at < pairs.length; at += 2 * perCall) {
        const fields = pairs.slice(at, at + 2 * perCall).flatMap((connection, i) =>
          i % 2 === 0 ? [connection, Date.now(), 1006, 0, ""] : []
        );
        const words = this.#words("disconnected", agent.keys(name), this.#options.settings.vacatedGraceMs, fields);
        const count = Number(await answered(redis.call(words[0] as string, ...words.slice(1))));
        this.#options.onEntries(count);
        ended += count;
      }
      cursor = next;
    } while (cursor !== "0");
    return ended;
  }

  /** The agent may have been forgotten while Redis was asked for something of it. */
  #sweepLater({ id }: Agent, delayMs: number): void {
    const agent = this.#agent(id);
    const atMs = performance.now() + delayMs;
    agent.sweepAtMs = Math.min(agent.sweepAtMs, atMs);
    if (atMs >= this.#sweepAtMs || this.#closed) return;
    this.#sweepAtMs = atMs;
    clearTimeout(this.#sweepTimer);
    this.#sweepTimer = after(delayMs, () => void this.#sweepDue());
  }

  async #sweepDue(): Promise<void> {
    this.#sweepAtMs = Infinity;
    const nowMs = performance.now();
    for (const agent of this.#agents.values()) {
      if (agent.sweepAtMs > nowMs + 1) {
        if (agent.sweepAtMs < Infinity) this.#sweepLater(agent, agent.sweepAtMs - nowMs);
        continue;
      }
      agent.sweepAtMs = Infinity;
      const delayMs = await this.#sweep(agent);
      if (delayMs !== undefined) this.#sweepLater(agent, delayMs);
      else if (agent.isIdle) this.#forget(agent);
    }
  }

  /** Tells of an agent's vacant sessions; returns when to do so again, in milliseconds. */
  async #sweep(agent: Agent): Promise<number | undefined> {
    const redis = this.#shard(agent.key)?.writable;
    if (redis === undefined) return beatMs;
    try {
      const words = this.#words("vacated", agent.keys(this.#name), perCall, []);
      const [count, nextMs] = await answered(redis.call(words[0] as string, ...words.slice(1))) as [number, number];
      this.#options.onEntries(count);
      // Redis cuts the milliseconds off, as our timers do.
      return nextMs < 0 ? undefined : nextMs + 1;
    } catch (error) {
      this.#complain(error as Error);
      return beatMs;
    }
  }

  #forget(agent: Agent): void {
    this.#agents.delete(agent.id);
    this.#send(agentsKey(this.#name), commandText("SREM", agentsKey(this.#name), agent.id), () => {});
  }
}

/** One agent's, on this proxy. */
class Agent {
  readonly #prefix: string;
  /** The stream. */
  readonly key: string;
  /** Open sockets, by connection. */
  readonly members = new Map<string, Member>();
  /** What has ended, and Redis has not confirmed it. */
  readonly left = new Map<string, Departure>();
  /** Open sockets of each session on this proxy. */
  readonly sockets = new Map<string, number>();
  /** When its vacant sessions are looked at next, in milliseconds of `performance.now()`. */
  sweepAtMs = Infinity;

  constructor(readonly id: string) {
    this.key = inboxKey(id);
    // The script needs all keys of an agent in one slot.
    this.#prefix = prefixOf(this.key);
  }

  get isIdle(): boolean {
    return this.members.size === 0 && this.left.size === 0 && this.sweepAtMs === Infinity;
  }

  held(name: string): string {
    return `${this.#prefix}:held:${name}`;
  }

  keys(name: string): string[] {
    return [this.key, `${this.#prefix}:sockets`, `${this.#prefix}:vacant`, this.held(name)];
  }

  count(sessionId: string, change: 1 | -1): number {
    const count = (this.sockets.get(sessionId) ?? 0) + change;
    if (count === 0) this.sockets.delete(sessionId);
    else this.sockets.set(sessionId, count);
    return count;
  }
}

/** One connection, as the inbox knows it. */
export class Member implements Issuer {
  readonly #inbox: Inbox;
  readonly #source: Source;
  readonly #prefix: string;
  /** Whose inbox. */
  readonly agentId: string;
  /** Of its handshake; empty for none. */
  readonly traceparent: string;
  /** The inbox. */
  readonly key: string;
  /** Where it lives. */
  readonly slot: number;
  /** When it opened, in milliseconds since the epoch. */
  atMs = 0;
  /** Redis has refused to take it in: its messages are no entries either, as `connected` is the first. */
  refused = false;
  #isOpen = false;

  /** Made by {@linkcode Inbox.member}. */
  constructor(
    inbox: Inbox,
    { agentId, traceparent }: Who,
    readonly sessionId: string,
    readonly connection: string,
    source: Source,
  ) {
    this.agentId = agentId;
    this.traceparent = traceparent;
    this.key = inboxKey(agentId);
    this.slot = inbox.slotOf(this.key);
    this.#inbox = inbox;
    this.#source = source;
    this.#prefix = inbox.entryPrefix(agentId, sessionId, connection);
  }

  /** The socket has opened. */
  opened(): void {
    this.#isOpen = true;
    this.atMs = Date.now();
    this.#inbox.connected(this);
  }

  /** The socket has ended; `position` is the last one that was sent to a resuming client, or empty. */
  ended(code: number, position: string): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#inbox.disconnected(this, code, position);
  }

  /** The entry of a message, in RESP; undefined when there can be none. */
  entry(text: string): string | undefined {
    if (!this.refused) return this.#prefix + entryEnd(text);
    this.done(new Unavailable("its connection could not be told"));
    return undefined;
  }

  /** The entry of a message has been written, or will never be. */
  done(error: Error | undefined): void {
    this.#source.entered = error === undefined;
    this.#inbox.told(error);
  }
}

const dataWord = bulk("data");

/** The end of a message's entry: when, and what. */
const entryEnd = (text: string) => bulk(String(Date.now())) + dataWord + bulk(text);

/** What Redis answers, in time. */
function answered<T>(promise: Promise<T>): Promise<T> {
  return within(timeoutMs, promise, () => {
    throw new Unavailable(`no answer within ${timeoutMs} ms`);
  });
}
