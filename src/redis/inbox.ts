/**
 * The inbox of an agent: a stream in which its backends read all that happens to its sessions.
 *
 * A message is an entry, written along with its PUBLISH. The opening and the end of a connection are told by inbox.lua,
 * which keeps the open connections beside the stream: what is told twice is written once, so what may not have arrived
 * is told again. Many connections are told of in one call.
 *
 * When a connection to Redis has ended, or the other proxies have taken the proxy for dead, a new generation begins: all
 * its open connections are told again, before anything else. When Redis has lost something of an agent, all of that
 * agent are, and those that have ended lately; each proxy looks for that, as no other may know of its connections.
 */

import type { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { after } from "../deadline.ts";
import type { InboxSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { isPassing, isReply, reasonOf, Unavailable } from "./errors.ts";
import script from "./inbox.lua" with { type: "text" };
import { answered, beatMs, forAll, type Generation, Proxies } from "./proxies.ts";
import { bulk, commandText } from "./publish_batch.ts";
import type { Issuer, Publisher, Source } from "./publisher.ts";
import { prefixOf } from "./slot.ts";
import type { Room } from "./subscriptions.ts";
import { shardOf, type Topology } from "./topology.ts";

/** What SCRIPT LOAD makes of it, so that each call is short. */
const scriptHash = createHash("sha1").update(script).digest("hex");
const scriptLoad = commandText("SCRIPT", "LOAD", script);

/** The stream of an agent. */
export const inboxKey = (agentId: string): string => `agent:${agentId}:inbox`;

/** Events in one call of the script, and sessions told vacant in one. */
const perCall = 100;
/** What happens within this time is told in one call: a call costs Redis more than what it tells. */
const gatherMs = 25;
/** Departures that Redis has not taken yet. */
const maxDepartures = 100_000;
/** How long a proxy that was taken for dead may still speak of the connections that others have ended. */
const buriedMs = 3_600_000;
/** Each agent is looked at once in so many beats, or more often where there are few: inbox.lua waits longer than that. */
const beatsPerLook = 5;
const leastLooks = 100;
/** Time between two lines that tell of lost entries. */
const lossLogMs = 1000;

/** What an inbox is made of. */
export interface InboxOptions {
  readonly settings: InboxSettings;
  readonly topology: Topology;
  readonly log: Log;
  /** Names the process when several workers have one, whose sockets are counted together. */
  readonly process?: string | undefined;
  /** So many entries have been written. */
  readonly onEntries: (count: number) => void;
  /** So many entries will never be. */
  readonly onLost: (count: number) => void;
}

/** Whose connection it is. */
export interface Who {
  /** In its inbox the connection is; of the path, decoded. */
  readonly agentId: string;
  /** What a backend's trace goes on from; empty while none are exported. */
  readonly traceparent: string;
  /** What backends may read of its token, as JSON; empty for nothing. */
  readonly claims: string;
  /** Where its client is; empty when backends are not told. */
  readonly address: string;
}

type Words = readonly (string | number)[];

/** An event, and the connection that it is about. */
interface Event {
  readonly words: Words;
  readonly of: Member | Departure;
}

/** Entries that a call has written, and the last of them; nothing for none. */
type Told = readonly [entries: number, newest: Buffer];

/** What has become of an event: Redis has not answered yet, has refused it, or has it. */
type State = "pending" | "refused" | "told";

/** A departure that Redis has not confirmed, or may still forget. */
interface Departure {
  readonly member: Member;
  readonly words: Words;
  state: State;
  /** When its session is vacant, and Redis has told of it, in milliseconds of `performance.now()`. */
  vacantAtMs: number;
}

/** All agents' inboxes: each on the shard of its name. */
export class Inbox {
  readonly #options: InboxOptions;
  readonly #holder: string;
  readonly #proxies: Proxies;
  readonly #agents = new Map<string, Agent>();
  /** Agents of which something is to be told in the next call. */
  readonly #untold = new Set<Agent>();
  #tellTimer: ReturnType<typeof setTimeout> | undefined;
  #toldAtMs = -Infinity;
  /** Calls of the script that tell something; each has its number. */
  #calls = 0;
  /** When a line last told that Redis has lost something. */
  #lossLoggedAtMs = -Infinity;
  /** Agents that are still to be looked at in this round. */
  #round: Iterator<Agent> = [].values();
  /** Something is to be said again. */
  #refused = false;
  #sweepTimer: ReturnType<typeof setTimeout> | undefined;
  #sweepAtMs = Infinity;
  #closed = false;
  #losses = { entries: 0, loggedAtMs: -Infinity };
  /** Redis can be told not to make a stream that is gone: before version 6.2 it could not. */
  #noMakeStream = true;

  /** Beats from the first connection on. */
  constructor(options: InboxOptions) {
    this.#options = options;
    const { process, topology, log } = options;
    this.#holder = (process === undefined ? "" : `${process}.`) + crypto.randomUUID();
    this.#proxies = new Proxies({
      ...{ holder: this.#holder, topology, log },
      onUnknown: () => this.#begin(),
      onBeat: () => {
        this.#retry();
        this.#look();
      },
      bury: (agentId, dead) => this.#bury(this.#agent(agentId), dead),
      expire: (agentId) => this.#expire(agentId),
    });
  }

  /** Where an inbox lives: see {@linkcode Topology}. */
  slotOf(key: string): number {
    return this.#options.topology.slotOf(key);
  }

  /** A connection that is about to open. */
  member(who: Who, sessionId: string, connection: string, source: Source): Member {
    return new Member(this, who, sessionId, connection, source);
  }

  /** The connection to Redis serves: what we hold is told again. */
  resume(): void {
    this.#begin();
    this.#proxies.beat();
  }

  /** Nothing more comes: what is still to be told is sent. */
  flush(): void {
    clearTimeout(this.#tellTimer);
    this.#tell();
  }

  /** Ends the beats, without a word: sessions that are about to be vacant are left to the other proxies. */
  close(): void {
    this.#closed = true;
    this.#proxies.close();
    clearTimeout(this.#tellTimer);
    clearTimeout(this.#sweepTimer);
  }

  /** A message that no connection sent, as one entry in RESP. */
  posted(
    { agentId, claims, address }: Omit<Who, "traceparent">,
    sessionId: string,
    text: string,
    id: string | undefined,
  ): string {
    // Should nothing else ever happen to the agent, its inbox expires.
    this.#sweepLater(this.#agent(agentId), this.#options.settings.vacatedGraceMs);
    // No `connected` says whose it is.
    const who = [...claims === "" ? [] : ["claims", claims], ...address === "" ? [] : ["address", address]];
    return this.entryPrefix(agentId, sessionId, "", id !== undefined, true, who) + entryEnd(text, id);
  }

  /**
   * What all entries of a connection's messages begin with, of those with an id or of those without. One that does not
   * make a stream that is gone tells so.
   */
  entryPrefix(
    agentId: string,
    sessionId: string,
    connection: string,
    hasId: boolean,
    makesStream = !this.#noMakeStream,
    who: readonly string[] = [],
  ): string {
    const { maxEntries } = this.#options.settings;
    const words = ["XADD", inboxKey(agentId), ...makesStream ? [] : ["NOMKSTREAM"], "MAXLEN", "~", String(maxEntries)];
    words.push("*", "type", "message", "session", sessionId, "connection", connection, ...who, "at");
    // Three words more come with each message, and two with an id.
    return `*${words.length + (hasId ? 5 : 3)}\r\n${words.map(bulk).join("")}`;
  }

  /** The entry of a message has been written, or will never be. */
  told(error: Error | undefined): void {
    if (error === undefined) this.#options.onEntries(1);
    else this.countLost(1, error);
  }

  /** The entry of a message has not been written, as there is no stream; or as Redis is too old for NOMKSTREAM. */
  missing(agentId: string, outcome: unknown): boolean {
    if (outcome === null) this.#bringAgain(this.#agent(agentId));
    else if (isReply(outcome) && /Invalid stream ID/i.test(outcome.message)) this.#noMakeStream = false;
    else return false;
    return true;
  }

  /** Entries will never be written. */
  countLost(entries: number, error: Error): void {
    this.#options.onLost(entries);
    const losses = this.#losses;
    losses.entries += entries;
    const nowMs = performance.now();
    if (nowMs - losses.loggedAtMs < lossLogMs) return;
    this.#options.log.error({ entries: losses.entries, reason: reasonOf(error) }, "inbox entries lost");
    this.#losses = { entries: 0, loggedAtMs: nowMs };
  }

  /** A member's socket has opened. */
  connected(member: Member): void {
    const agent = this.#agent(member.agentId);
    agent.members.set(member.connection, member);
    member.agent = agent;
    member.sockets = agent.count(member.sessionId, 1);
    this.#tellSoon(agent, member, { words: member.words("connected"), of: member });
  }

  /** A member's socket has ended, if it was open. */
  disconnected(member: Member, code: number, position: string): void {
    const { agent, connection } = member;
    if (!agent?.members.delete(connection)) return;
    const sockets = agent.count(member.sessionId, -1);
    const words = ["disconnected", connection, Date.now(), code, sockets, position];
    const departure: Departure = { member, words, state: "pending", vacantAtMs: Infinity };
    agent.departures.set(connection, departure);
    if (agent.departures.size > maxDepartures) {
      const [oldest, { state }] = agent.departures.entries().next().value!;
      agent.departures.delete(oldest);
      if (state === "refused") this.countLost(1, new Error("too many wait"));
    }
    this.#tellSoon(agent, member, { words, of: departure });
  }

  /** Tells at once what is still to be told of an agent, as a message of one of these sessions comes next. */
  tellNow(agent: Agent): void {
    if (this.#untold.delete(agent)) this.#tellOf(agent);
  }

  #agent(id: string): Agent {
    let agent = this.#agents.get(id);
    if (agent === undefined) {
      this.#agents.set(id, agent = new Agent(id));
      this.#proxies.know([id]);
    }
    return agent;
  }

  #shard(key: string) {
    return shardOf(this.#options.topology, key);
  }

  #tellSoon(agent: Agent, { sessionId }: Member, ...events: readonly Event[]): void {
    agent.untold.push(...events);
    agent.untoldSessions.add(sessionId);
    this.#untold.add(agent);
    if (this.#tellTimer !== undefined || this.#closed) return;
    const delayMs = this.#toldAtMs + gatherMs - performance.now();
    this.#tellTimer = after(delayMs, () => this.#tell());
  }

  #tell(): void {
    this.#tellTimer = undefined;
    this.#toldAtMs = performance.now();
    const agents = [...this.#untold];
    this.#untold.clear();
    for (const agent of agents) this.#tellOf(agent);
  }

  #tellOf(agent: Agent): void {
    const events = agent.untold.splice(0);
    agent.untoldSessions.clear();
    for (let at = 0; at < events.length; at += perCall) {
      const some = events.slice(at, at + perCall);
      const part = agent.standing === "new" ? "begin end" : "";
      if (part !== "") agent.standing = "begun";
      const words = this.#callOf(agent, some, ++this.#calls, part);
      const issuer = this.#issuer(agent, some, part);
      const sent = this.#shard(agent.key)?.publisher.command(agent.key, words, issuer);
      if (sent !== "taken") issuer.done(new Unavailable("too much is pending"));
    }
  }

  /** Whatever is pending for Redis comes after what we hold: entries of messages after their connection's. */
  #begin(): void {
    this.#proxies.begin([...this.#agents.keys()]);
    for (const { publisher } of this.#options.topology.shards) this.#loadScript(publisher);
    for (const agent of this.#agents.values()) this.#bring(agent);
    for (const { publisher } of this.#options.topology.shards) publisher.resume();
  }

  /** Tells all of an agent in a generation that begins. Of what Redis knows already, nothing is written. */
  #bring(agent: Agent): void {
    const departures = [...agent.departures.values()];
    const events: Event[] = [
      // What is pending of those that have left comes later, also that they had come.
      ...departures.filter(({ member, state }) => member.isWritten || state !== "pending").map((departure) => ({
        words: openingOf(departure),
        of: departure,
      })),
      ...[...agent.members.values()].map((member) => ({ words: member.opening, of: member })),
      ...departures.filter(({ state }) => state !== "pending").map((departure) => ({
        words: departure.words,
        of: departure,
      })),
    ];
    for (const member of agent.members.values()) member.state = "pending";
    agent.standing = "begun";
    const calls = Math.max(1, Math.ceil(events.length / perCall));
    for (let call = 0; call < calls; call++) {
      const some = events.slice(call * perCall, (call + 1) * perCall);
      const part = [call === 0 ? "begin" : "", call === calls - 1 ? "end" : ""].join(" ").trim();
      const issuer = this.#issuer(agent, some, part, true);
      agent.bringing++;
      const words = this.#callOf(agent, some, 0, part);
      const sent = this.#shard(agent.key)?.publisher.commandFirst(agent.key, words, issuer);
      if (sent !== "taken") issuer.done(new Unavailable("too much is pending"));
    }
    this.#sweepLater(agent, 0);
  }

  #callOf(agent: Agent, events: readonly Event[], call: number, part: string): string {
    const { vacatedGraceMs } = this.#options.settings;
    const words = [this.#proxies.generation, call, part, vacatedGraceMs, agent.newest];
    for (const event of events) words.push(...event.words);
    return this.#textOf(agent, "tell", words);
  }

  #textOf(agent: Agent, what: string, words: Words): string {
    return commandText("EVALSHA", ...this.#words(agent.keys(this.#holder), what, words));
  }

  /**
   * The owner of a call, which is told what became of it. What was to be told in a generation is of no use in the next
   * one.
   */
  #issuer(agent: Agent, events: readonly Event[], part: string, isOfGeneration = false): Issuer {
    const startedIn = this.#proxies.generation;
    const isPast = () => isOfGeneration && startedIn !== this.#proxies.generation;
    return {
      get discarded() {
        return isPast();
      },
      again: (text, outcome) => {
        if (isPast()) return undefined;
        // What brings all is of no use when it has to be brought anew.
        if (mustBegin(outcome)) return this.#bringAgain(agent, isOfGeneration) && !isOfGeneration ? text : undefined;
        return this.#loadAgain(agent, text, outcome);
      },
      done: (error, reply) => {
        if (isOfGeneration) agent.bringing--;
        if (isPast()) return;
        if (error === undefined && !mustBegin(reply)) return this.#confirm(agent, events, reply as Told);
        if (error === undefined && isOfGeneration && agent.standing === "begun") return;
        error ??= new Unavailable("it loses what it was told");
        if (part !== "") agent.standing = "lost";
        for (const { of } of events) {
          if (of instanceof Member) of.passes = isPassing(error);
          if (of instanceof Member || !isOfGeneration) of.state = "refused";
        }
        this.#complain(error);
      },
    };
  }

  #loadScript(publisher: Publisher): Room {
    return publisher.commandFirst(undefined, scriptLoad, { done: (error) => error && this.#complain(error) });
  }

  /** See {@linkcode Issuer}: a script that Redis has flushed is loaded before what is to be sent again. */
  #loadAgain(agent: Agent, text: string, outcome: unknown): string | undefined {
    const publisher = isScriptGone(outcome) ? this.#shard(agent.key)?.publisher : undefined;
    return publisher && this.#loadScript(publisher) === "taken" ? text : undefined;
  }

  #confirm(agent: Agent, events: readonly Event[], [entries, newest]: Told): void {
    this.#options.onEntries(entries);
    if (newest.length > 0) agent.newest = newest.toString();
    const { vacatedGraceMs } = this.#options.settings;
    const vacantAtMs = performance.now() + vacatedGraceMs;
    let hasLeft = false;
    for (const { of, words } of events) {
      if (of instanceof Member) {
        of.state = "told";
        of.isWritten = true;
      } else if (words[0] === "disconnected") {
        of.state = "told";
        of.vacantAtMs = vacantAtMs;
        hasLeft = true;
      } else of.member.isWritten = true;
    }
    if (hasLeft) this.#sweepLater(agent, vacatedGraceMs);
  }

  #words(keys: readonly string[], what: string, words: Words): Words {
    return [scriptHash, keys.length, ...keys, what, this.#options.settings.maxEntries, ...words];
  }

  /** Redis refuses what will be said again. */
  #complain(error: Error): void {
    this.#refused = true;
    this.#options.log.warn({ reason: reasonOf(error) }, "Redis refused an inbox entry: it is tried again");
  }

  /**
   * Redis has lost something of an agent: all that is held is told again, before what is pending. False when that was
   * done just now, as it may lose it again and again: then it is done at the next beat. While that is on its way already,
   * what was refused had been sent before it; except for the calls that it is made of itself.
   */
  #bringAgain(agent: Agent, isOfThese = false): boolean {
    if (agent.bringing > 0 && !isOfThese) return true;
    const nowMs = performance.now();
    if (agent.standing === "lost" || nowMs - agent.broughtAtMs < beatMs) {
      agent.standing = "lost";
      this.#refused = true;
      return false;
    }
    agent.broughtAtMs = nowMs;
    if (nowMs - this.#lossLoggedAtMs > lossLogMs) {
      this.#lossLoggedAtMs = nowMs;
      this.#options.log.warn("inbox: forgotten by Redis, what is held is told again");
    }
    this.#bring(agent);
    this.#shard(agent.key)?.publisher.resume();
    return true;
  }

  /** Asks Redis whether it still knows what is held of some agents. */
  #look(): void {
    const ids: string[] = [];
    const looks = Math.max(leastLooks, Math.ceil(this.#agents.size / beatsPerLook));
    for (let n = 0; n < looks; n++) {
      const { value: agent } = this.#round.next();
      if (agent === undefined) {
        this.#round = this.#agents.values();
        break;
      }
      ids.push(agent.id);
      if (agent.standing !== "begun") continue;
      const text = this.#textOf(agent, "check", [this.#options.settings.vacatedGraceMs, agent.newest]);
      this.#shard(agent.key)?.publisher.command(agent.key, text, {
        again: (text, outcome) => this.#loadAgain(agent, text, outcome),
        done: (error, reply) => {
          if (error) this.#complain(error);
          else if (mustBegin(reply)) this.#bringAgain(agent);
        },
      });
    }
    this.#proxies.know(ids);
  }

  /** Says again what Redis has refused. */
  #retry(): void {
    if (!this.#refused) return;
    this.#refused = false;
    for (const agent of this.#agents.values()) {
      if (agent.standing !== "begun") {
        this.#bring(agent);
        this.#shard(agent.key)?.publisher.resume();
        continue;
      }
      for (const member of agent.members.values()) {
        if (member.state !== "refused") continue;
        // What it sends from now on comes after this, as if it had just opened.
        member.state = "pending";
        this.#tellSoon(agent, member, { words: member.opening, of: member });
      }
      for (const departure of agent.departures.values()) {
        if (departure.state !== "refused") continue;
        departure.state = "pending";
        const { member, words } = departure;
        this.#tellSoon(agent, member, { words: openingOf(departure), of: departure }, { words, of: departure });
      }
    }
  }

  /** Asks for something of the script at once, beside the queue. */
  async #call(agent: Agent, holder: string, what: string, ...words: Words): Promise<unknown> {
    const redis = this.#shard(agent.key)?.writable;
    if (redis === undefined) throw new Unavailable("not connected");
    const ask = () => answered(redis.call("EVALSHA", ...this.#words(agent.keys(holder), what, words)));
    try {
      return await ask();
    } catch (error) {
      if (!isScriptGone(error)) throw error;
      await answered(redis.script("LOAD", script));
      return await ask();
    }
  }

  /** Ends what a dead proxy holds of an agent, and says how many connections these were. */
  async #bury(agent: Agent, { holder, number }: Generation): Promise<number> {
    const { vacatedGraceMs } = this.#options.settings;
    let ended = 0;
    let cursor = "0";
    do {
      const redis = this.#shard(agent.key)?.writable;
      if (redis === undefined) throw new Unavailable("not connected");
      // A page may be empty, or hold what an earlier one held: only the cursor says where the end is.
      const [next, pairs] = await answered(redis.hscan(agent.held(holder), cursor, "COUNT", perCall));
      const connections = pairs.filter((_, i) => i % 2 === 0);
      for (let at = 0; at < connections.length; at += perCall) {
        const some = connections.slice(at, at + perCall);
        const count = Number(await this.#call(agent, holder, "bury", number, vacatedGraceMs, Date.now(), ...some));
        if (count < 0) return ended; // it lives
        this.#options.onEntries(count);
        ended += count;
      }
      cursor = next;
    } while (cursor !== "0");
    await this.#call(agent, holder, "buried", number, vacatedGraceMs, buriedMs);
    this.#sweepLater(agent, 0);
    return ended;
  }

  /** The agent may have been forgotten while Redis was asked for something of it. */
  #sweepLater({ id }: Agent, delayMs: number): void {
    const agent = this.#agent(id);
    agent.sweepAtMs = Math.min(agent.sweepAtMs, performance.now() + delayMs);
    if (agent.sweepAtMs < this.#sweepAtMs) this.#sweepAt(agent.sweepAtMs);
  }

  #sweepAt(atMs: number): void {
    this.#sweepAtMs = atMs;
    clearTimeout(this.#sweepTimer);
    if (atMs === Infinity || this.#closed) return;
    this.#sweepTimer = after(atMs - performance.now(), () => void this.#sweepDue());
  }

  async #sweepDue(): Promise<void> {
    const nowMs = performance.now();
    const due: Agent[] = [];
    let nextAtMs = Infinity;
    for (const agent of this.#agents.values()) {
      if (agent.sweepAtMs <= nowMs + 1) {
        agent.sweepAtMs = Infinity;
        due.push(agent);
      } else if (agent.sweepAtMs < nextAtMs) nextAtMs = agent.sweepAtMs;
    }
    this.#sweepAt(nextAtMs);
    await forAll(due, async (agent) => {
      const delayMs = await this.#sweep(agent);
      if (delayMs !== undefined) this.#sweepLater(agent, delayMs);
      else if (agent.isIdle && this.#agents.get(agent.id) === agent) this.#forget(agent);
    });
  }

  /** Tells of an agent's vacant sessions; returns when to do so again, in milliseconds. */
  async #sweep(agent: Agent): Promise<number | undefined> {
    if (this.#shard(agent.key)?.writable === undefined) return beatMs;
    try {
      const nowMs = performance.now();
      const words = [perCall, this.#options.settings.vacatedGraceMs, agent.newest];
      const [count, nextMs] = await this.#call(agent, this.#holder, "vacated", ...words) as [number, number];
      // Something was lost: first all proxies tell again what they hold.
      if (count < 0) return nextMs + 1;
      this.#options.onEntries(count);
      // With the last of the vacant ones, all have been told that were vacant before.
      if (count < perCall) agent.forgetVacated(nowMs);
      // Redis cuts the milliseconds off, as our timers do.
      const delayMs = Math.min(nextMs < 0 ? Infinity : nextMs, agent.nextVacantAtMs - performance.now());
      return delayMs === Infinity ? undefined : delayMs + 1;
    } catch (error) {
      this.#complain(error as Error);
      return beatMs;
    }
  }

  #forget(agent: Agent): void {
    this.#agents.delete(agent.id);
    this.#shard(agent.key)?.publisher.command(agent.key, this.#textOf(agent, "forget", []), {
      again: (text, outcome) => this.#loadAgain(agent, text, outcome),
      done: (error) => error && this.#complain(error),
    });
    this.#proxies.forget(agent.id, this.#options.settings.unreadTtlMs);
  }

  async #expire(agentId: string): Promise<number | undefined> {
    const againMs = await this.#call(new Agent(agentId), this.#holder, "expire", this.#options.settings.unreadTtlMs);
    return Number(againMs) < 0 ? undefined : Number(againMs);
  }
}

/** What Redis must know of a departure before it is told. */
function openingOf({ member, state }: Departure): Words {
  if (!member.isWritten) return member.words("connected");
  return member.words(state === "told" ? "left" : "leaving");
}

const isScriptGone = (outcome: unknown) => isReply(outcome) && outcome.message.startsWith("NOSCRIPT");

/** Redis has refused what was told, as it does not know all that the proxy holds. */
const mustBegin = (outcome: unknown) => Array.isArray(outcome) && outcome[0] === -1;

/** The inbox of one agent, as this proxy knows it. */
class Agent {
  readonly #prefix: string;
  /** The stream. */
  readonly key: string;
  /** Open sockets, by connection. */
  readonly members = new Map<string, Member>();
  /** What has ended, until Redis has confirmed it and told the session vacant, or could have. */
  readonly departures = new Map<string, Departure>();
  /** What has happened and has not been told yet. */
  readonly untold: Event[] = [];
  /** The sessions that it is about: their next message must come after it. */
  readonly untoldSessions = new Set<string>();
  /** Whether it was begun in this generation, or never; lost is what must be told again, at the next beat. */
  standing: "new" | "begun" | "lost" = "new";
  /** Calls on their way that tell all that is held. */
  bringing = 0;
  /** When Redis was last found to have lost something, in milliseconds of `performance.now()`. */
  broughtAtMs = -Infinity;
  /** The last entry that is known to have been written of its connections. */
  newest = "";
  /** When its vacant sessions are looked at next, in milliseconds of `performance.now()`. */
  sweepAtMs = Infinity;
  /** Open sockets of each session on this proxy. */
  readonly #sockets = new Map<string, number>();

  constructor(readonly id: string) {
    this.key = inboxKey(id);
    // The script needs all keys of an agent in one slot.
    this.#prefix = prefixOf(this.key);
  }

  get isIdle(): boolean {
    return this.members.size === 0 && this.departures.size === 0 && this.sweepAtMs === Infinity;
  }

  /** What a proxy holds. */
  held(holder: string): string {
    return `${this.#prefix}:held:${holder}`;
  }

  /** All that the script is given, for a proxy. */
  keys(holder: string): string[] {
    const beside = ["sockets", "vacant", `held:${holder}`, `known:${holder}`, "epoch"];
    return [this.key, ...beside.map((name) => `${this.#prefix}:${name}`)];
  }

  count(sessionId: string, change: 1 | -1): number {
    const count = (this.#sockets.get(sessionId) ?? 0) + change;
    if (count === 0) this.#sockets.delete(sessionId);
    else this.#sockets.set(sessionId, count);
    return count;
  }

  /** When the session of the first departure that Redis has confirmed is vacant; `Infinity` for none. */
  get nextVacantAtMs(): number {
    for (const { vacantAtMs } of this.departures.values()) if (vacantAtMs < Infinity) return vacantAtMs;
    return Infinity;
  }

  /** Drops the departures whose sessions were vacant by then: backends have been told that. */
  forgetVacated(atMs: number): void {
    for (const [connection, { vacantAtMs }] of this.departures) {
      if (vacantAtMs <= atMs) this.departures.delete(connection);
      // Those behind it are due later; one that was tried again may hold them up for as long as it stays itself.
      else if (vacantAtMs < Infinity) return;
    }
  }
}

/** One connection, as the inbox knows it. */
export class Member implements Issuer {
  readonly #inbox: Inbox;
  readonly #source: Source;
  readonly #who: Who;
  /** Of entries without an id, and of those with one. */
  #prefix: string;
  #prefixWithId: string | undefined;
  /** The agent that the inbox belongs to. */
  readonly agentId: string;
  /** The inbox. */
  readonly key: string;
  /** Where it lives. */
  readonly slot: number;
  /** When it opened, in milliseconds since the epoch. */
  #atMs = 0;
  /** Its agent, from when it has opened. */
  agent: Agent | undefined;
  /** Sockets of its session on this proxy when it had opened. */
  sockets = 0;
  /** Of its opening, in this generation. While that is refused its messages are no entries, as `connected` is the first. */
  state: State = "pending";
  /** Redis has had its opening, in any generation. */
  isWritten = false;
  /** See {@linkcode Issuer}: why it could not be told is no word of Redis's, or one that passes. */
  passes = false;
  /** See {@linkcode Issuer}. */
  pendingCost = 0;

  /** Made by {@linkcode Inbox.member}. */
  constructor(
    inbox: Inbox,
    who: Who,
    readonly sessionId: string,
    readonly connection: string,
    source: Source,
  ) {
    const agentId = this.agentId = who.agentId;
    this.#who = who;
    this.key = inboxKey(agentId);
    this.slot = inbox.slotOf(this.key);
    this.#inbox = inbox;
    this.#source = source;
    this.#prefix = inbox.entryPrefix(agentId, sessionId, connection, false);
  }

  /** The socket has opened. */
  opened(): void {
    this.#atMs = Date.now();
    this.#inbox.connected(this);
  }

  /** The socket has ended; `position` is the last one that was sent to a resuming client, or empty. */
  ended(code: number, position: string): void {
    this.#inbox.disconnected(this, code, position);
  }

  /** The event of its opening. */
  words(kind: "connected" | "open" | "leaving" | "left"): Words {
    const { traceparent, claims, address } = this.#who;
    return [kind, this.sessionId, this.connection, this.#atMs, this.sockets, traceparent, claims, address];
  }

  /** The same, when it may have been written. */
  get opening(): Words {
    return this.words(this.isWritten ? "open" : "connected");
  }

  /** The entry of a message, in RESP; undefined when there can be none. */
  entry(text: string, id: string | undefined): string | undefined {
    if (this.agent?.untoldSessions.has(this.sessionId)) this.#inbox.tellNow(this.agent);
    if (this.state !== "refused") {
      if (id === undefined) return this.#prefix + entryEnd(text, id);
      this.#prefixWithId ??= this.#inbox.entryPrefix(this.agentId, this.sessionId, this.connection, true);
      return this.#prefixWithId + entryEnd(text, id);
    }
    this.done(new Unavailable("its connection could not be told"));
    return undefined;
  }

  /** See {@linkcode Issuer}: an entry of a connection that is not told comes after what tells it, or not at all. */
  get waits(): boolean {
    return this.state !== "told";
  }

  /** See {@linkcode Issuer}. */
  get discarded(): boolean {
    return this.#source.discarded || this.state === "refused";
  }

  /** See {@linkcode Issuer}: the stream has gone. */
  again(text: string, outcome: unknown): string | undefined {
    const hasId = !text.startsWith(this.#prefix);
    const former = hasId ? this.#prefixWithId : this.#prefix;
    if (former === undefined || !text.startsWith(former) || !this.#inbox.missing(this.agentId, outcome)) {
      return undefined;
    }
    const makesStream = this.#inbox.entryPrefix(this.agentId, this.sessionId, this.connection, hasId, true);
    // Where Redis is too old to be told, this connection need not try again.
    if (outcome !== null) {
      if (hasId) this.#prefixWithId = makesStream;
      else this.#prefix = makesStream;
    }
    return makesStream + text.slice(former.length);
  }

  /** The entry of a message has been written, or will never be. */
  done(error: Error | undefined): void {
    this.#source.entered = error === undefined;
    this.#inbox.told(error);
  }
}

const dataWord = bulk("data");
const idWord = bulk("id");

/** The end of a message's entry: when, what, and by which id. */
const entryEnd = (text: string, id: string | undefined) =>
  bulk(String(Date.now())) + dataWord + bulk(text) + (id === undefined ? "" : idWord + bulk(id));
