/**
 * Sessions to Redis: a session opens a {@linkcode Link}, over which the messages of its down channel come and those of
 * its up channel go. A few connections serve all sessions; redis/topology.ts has what is behind it.
 */

import type { Deadlines } from "../deadline.ts";
import type { Redis } from "ioredis";
import type { InboxSettings, LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { Cluster } from "./cluster.ts";
import { isReply, reasonOf, SubscribeTimeout, Unavailable } from "./errors.ts";
import { Inbox, inboxKey, type Member } from "./inbox.ts";
import type { LogReader } from "./log_reader.ts";
import type { Loss, Publisher, Source } from "./publisher.ts";
import { commandText } from "./publish_batch.ts";
import { type Entry, formatPosition, type Position } from "./log.ts";
import type { Shard, Timings } from "./shard.ts";
import type { Channel, Listener } from "./subscriptions.ts";
import { SingleServer, type Topology } from "./topology.ts";
import type { RedisAddress } from "../redis_url.ts";

/** The channel that carries messages from a session's backend to its client. */
export const downChannel = (sessionId: string): string => `session:${sessionId}:down`;
/** The channel that carries messages from a session's client to its backend. */
export const upChannel = (sessionId: string): string => `session:${sessionId}:up`;

/** The channel on which every proxy hears what is for many sessions. */
export const controlChannel = "wsproxy:control";
/** Whose older tokens are revoked: a hash from an agent, or "*" for all, to seconds since the epoch. */
const revokedKey = "wsproxy:revoked";

/** What a link leads to: a session. */
export interface Endpoint extends Listener {
  /** Of the path, decoded. */
  readonly agentId: string;
  /** What a backend's trace goes on from; empty while nobody wants traces. */
  readonly traceparent: string;
  /** So many of its messages have not arrived, or may not have. They are not sent again. */
  lost(messages: number, why: Loss): void;
  /** So many of its messages were published while nobody was subscribed. */
  unheard(messages: number): void;
}

/** What a bridge is made of. */
export interface BridgeOptions {
  /** Where Redis is. */
  readonly address: RedisAddress;
  /** Where losses, returns and refusals of Redis are told. */
  readonly log: Log;
  /** How long an outage may last before `onOutage`, in milliseconds. */
  readonly outageGraceMs: number;
  /** What one session may have pending, in characters. */
  readonly maxPendingCost: number;
  /** How the logs of sessions are kept. */
  readonly logs: LogSettings;
  /** A server's outage has outlasted its grace. Called once per outage. */
  readonly onOutage: (server: Server) => void;
  /** Messages flow again through a server, or nobody uses it any more. */
  readonly onRecovery: (server: Server) => void;
  /** What backends want to read of all that happens; undefined for nothing. */
  readonly inbox?: InboxSettings;
  /** So many entries of inboxes have been written. */
  readonly onEntries?: (count: number) => void;
  /** So many entries of inboxes will never be. */
  readonly onEntriesLost?: (count: number) => void;
  /** Hears the control channel. */
  readonly control?: Control;
  /** Hears what is measured. */
  readonly timings?: Timings;
}

/** A server of Redis, as others know it: something that a link uses or not. */
export type Server = object;

/** Who obeys what is for many sessions. */
export interface Control extends Listener {
  /** Tokens of an agent, or of all agents by "*", are revoked that were issued before; in seconds since the epoch. */
  revoked(agentId: string, beforeSecs: number): void;
}

/** The way of all sessions to Redis. */
export class Bridge {
  readonly #maxPendingCost: number;
  readonly #topology: Topology;
  readonly #inbox: Inbox | undefined;
  readonly #log: Log;
  readonly #control: Control | undefined;
  /** Begins the names of our connections, which no other proxy uses. */
  readonly #id = crypto.randomUUID().slice(0, 8);
  #links = 0;
  #connects = 0;
  #connectFailures = 0;

  /** Connects, and goes on trying for as long as it lives. */
  constructor({ address, maxPendingCost, inbox, onEntries, onEntriesLost, control, ...options }: BridgeOptions) {
    this.#maxPendingCost = maxPendingCost;
    this.#log = options.log;
    this.#control = control;
    const shardOptions = {
      ...options,
      timings: options.timings ?? unmeasured,
      onConnect: () => this.#connects++,
      onConnectFailure: () => this.#connectFailures++,
      onConnected: () => this.#inbox?.resume(),
      learn: (redis: Redis, shard: Shard) => this.#learnRevoked(redis, shard),
    };
    const topology = this.#topology = "nodes" in address
      ? new Cluster(address, shardOptions)
      : new SingleServer(address, shardOptions);
    const nobody = () => {};
    this.#inbox = inbox &&
      new Inbox({
        ...{ settings: inbox, topology, log: options.log },
        onEntries: onEntries ?? nobody,
        onLost: onEntriesLost ?? nobody,
      });
    if (control) topology.listen(controlChannel, control);
  }

  /** Messages flow both ways through every server, as far as the last canaries tell. */
  get available(): boolean {
    const { shards } = this.#topology;
    return shards.length > 0 && shards.every((shard) => shard.flowing);
  }

  /** Channels subscribed to, the canaries' and the one for control included. */
  get subscriptions(): number {
    return this.#topology.shards.reduce((sum, { subscriptions }) => sum + subscriptions.size, 0);
  }

  /** What clients have sent and Redis has not taken yet, in characters, and 256 more for each message. */
  get pending(): number {
    return this.#topology.shards.reduce((sum, { publisher }) => sum + publisher.cost, 0);
  }

  /** Connections that began to serve. */
  get connects(): number {
    return this.#connects;
  }

  /** Attempts to connect that failed. */
  get connectFailures(): number {
    return this.#connectFailures;
  }

  /** Clients can resume from a session's log: its server has the functions for it. */
  isResumable(sessionId: string): boolean {
    return this.#shardOf(downChannel(sessionId))?.reader.resumable ?? false;
  }

  /** A session's link. Nothing of it is known to Redis before {@linkcode Link.attach}. */
  link(sessionId: string, endpoint: Endpoint): Link {
    const connection = `${this.#id}-${++this.#links}`;
    return new Link(this.#topology, this.#inbox, sessionId, connection, endpoint, this.#maxPendingCost);
  }

  /**
   * Publishes one message to a session's up channel, and says how many have received it, and whether it is in an inbox.
   * @throws {Unavailable} when that is not known in time.
   */
  async publish(agentId: string, sessionId: string, text: string): Promise<{ receivers: number; entered: boolean }> {
    const channel = upChannel(sessionId);
    const inbox = this.#inbox;
    const entering = inbox && this.#servingShard(inboxKey(agentId)).publisher
      .commandNow(inbox.posted(agentId, sessionId, text))
      .then(() => true, (error) => (inbox.told(error), false));
    const publishing = this.#servingShard(channel).publisher.publishNow(channel, text);
    const [entered, receivers] = await Promise.all([entering ?? false, publishing]);
    if (entered) inbox?.told(undefined);
    return { receivers, entered };
  }

  #shardOf(name: string): Shard | undefined {
    return this.#topology.at(this.#topology.slotOf(name));
  }

  #servingShard(name: string): Shard {
    const shard = this.#shardOf(name);
    if (shard === undefined) throw new Unavailable("no server serves it");
    return shard;
  }

  /** Lets all proxies know, now and when they connect, that older tokens of an agent, or of all by "*", are revoked. */
  revoke(agentId: string, beforeSecs: number): void {
    const keepNewest = "local set = redis.call('HGET', KEYS[1], ARGV[1]) " +
      "if not set or set + 0 < ARGV[2] + 0 then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end return 1";
    const command = commandText("EVAL", keepNewest, 1, revokedKey, agentId, beforeSecs);
    const done = (error: Error | undefined) => {
      if (error) this.#log.error({ reason: reasonOf(error) }, "revocation could not be kept in Redis");
    };
    const sent = this.#shardOf(revokedKey)?.publisher.command(revokedKey, command, nobody, { done });
    if (!sent) done(new Unavailable("too much is pending"));
  }

  async #learnRevoked(redis: Redis, shard: Shard): Promise<void> {
    if (this.#control === undefined || this.#shardOf(revokedKey) !== shard) return;
    try {
      const revoked = await redis.hgetall(revokedKey);
      for (const [agentId, secs] of Object.entries(revoked)) this.#control.revoked(agentId, Number(secs));
    } catch (error) {
      // It has the wrong type, or we may not read it: that must not keep everybody out.
      if (!isReply(error)) throw error;
      this.#log.warn({ reason: reasonOf(error) }, "revoked tokens could not be read from Redis");
    }
  }

  /**
   * Proves that messages flow through each server, within `timeoutMs` milliseconds; returns what keeps them from it, by
   * the server's name: undefined when nothing does.
   */
  async probe(timeoutMs: number): Promise<ReadonlyMap<string, Unavailable | undefined>> {
    const { shards } = this.#topology;
    const outcomes = await Promise.allSettled(shards.map((shard) => shard.probe(timeoutMs)));
    return new Map(outcomes.map((outcome, i) => {
      if (outcome.status === "rejected" && !(outcome.reason instanceof Unavailable)) throw outcome.reason;
      return [shards[i]!.name, outcome.status === "rejected" ? outcome.reason : undefined];
    }));
  }

  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes all connections. */
  async close(timeoutMs: number): Promise<void> {
    await this.#topology.close(timeoutMs);
    this.#inbox?.close();
  }
}

const unmeasured: Timings = { down() {}, up() {}, roundTrip() {} };

/** Sends commands that no client waits for. */
const nobody: Source = { pendingCost: 0, discarded: false, entered: true, lost() {}, unheard() {} };

/** Closes the others' sockets; published from a script, as text cannot hold the envelope's first byte. */
const replaceScript = "return redis.call(ARGV[2], KEYS[1], '\\255!replace\\n' .. ARGV[1])";

/** One session's way to its two channels. */
export class Link implements Source {
  readonly #topology: Topology;
  readonly #endpoint: Endpoint;
  readonly #down: string;
  readonly #up: string;
  readonly #downSlot: number;
  readonly #upSlot: number;
  readonly #maxPendingCost: number;
  /** In the agent's inbox, if there is one. */
  readonly #member: Member | undefined;
  #channel: Channel | undefined;
  /** See {@linkcode Source}. */
  pendingCost = 0;
  /** See {@linkcode Source}. */
  discarded = false;
  /** See {@linkcode Source}. */
  entered: boolean;

  /** Made by {@linkcode Bridge.link}. */
  constructor(
    topology: Topology,
    inbox: Inbox | undefined,
    sessionId: string,
    /** Names this connection, and no other of any proxy. */
    readonly connection: string,
    endpoint: Endpoint,
    maxPendingCost: number,
  ) {
    this.#topology = topology;
    this.#endpoint = endpoint;
    this.#down = downChannel(sessionId);
    this.#up = upChannel(sessionId);
    this.#downSlot = topology.slotOf(this.#down);
    this.#upSlot = topology.slotOf(this.#up);
    this.#maxPendingCost = maxPendingCost;
    this.#member = inbox?.member(endpoint, sessionId, connection, this);
    // Another server may tell of the entry when the message has long been published.
    this.entered = this.#member !== undefined && this.#member.slot !== this.#upSlot;
  }

  /** Whether the session's messages go through a server, either way. */
  uses(server: Server): boolean {
    return this.#topology.at(this.#downSlot) === server || this.#topology.at(this.#upSlot) === server;
  }

  /** The client's socket has opened: backends read so before its first message. */
  opened(): void {
    this.#member?.opened();
  }

  /** The client's socket has ended; `position` is the last one that was sent to a resuming client. */
  ended(code: number, position: Position | undefined): void {
    this.#member?.ended(code, position ? formatPosition(position) : "");
  }

  /** Tells every socket of the session, on every proxy, that this one takes their place; `json` says which it is. */
  replaceOthers(json: string, onRefused: () => void): void {
    const shard = this.#topology.at(this.#downSlot);
    const command = commandText("EVAL", replaceScript, 1, this.#down, json, shard?.publisher.publishCommand ?? "");
    const sent = shard?.publisher.command(this.#down, command, nobody, { done: (error) => error && onRefused() });
    if (!sent) onRefused();
  }

  /**
   * Subscribes to the down channel. Resolves when Redis has confirmed it: whatever is published from then on is
   * delivered. A message may be delivered before. On failure the link is detached.
   * @throws {Unavailable} when Redis cannot be used, or rejects.
   * @throws {SubscribeTimeout} after `timeoutMs` milliseconds without a confirmation.
   */
  async attach(timeoutMs: number, deadlines: Deadlines): Promise<void> {
    const shard = this.#topology.at(this.#downSlot);
    if (!shard?.flowing || !this.#topology.at(this.#upSlot)?.flowing) throw new Unavailable("Redis is unavailable");
    const channel = this.#channel = shard.subscriptions.add(this.#down, this.#endpoint);
    if (channel.confirmed) return;
    try {
      await confirmed(channel, timeoutMs, deadlines);
    } catch (error) {
      this.detach();
      throw error;
    }
  }

  /**
   * Queues one message for the up channel, in order. False, and nothing queued, when too much of this session, or of
   * all sessions, is pending already.
   */
  publish(text: string): boolean {
    const publisher = this.#topology.at(this.#upSlot)?.publisher;
    if (publisher === undefined) return false;
    if (this.#member !== undefined && !this.#enter(text, publisher)) return false;
    return publisher.publish(this.#up, text, this, this.#maxPendingCost);
  }

  /** The message's entry goes first. */
  #enter(text: string, publisher: Publisher): boolean {
    const member = this.#member!;
    const inbox = this.#topology.at(member.slot)?.publisher;
    if (!inbox?.hasRoom(this, this.#maxPendingCost) || !publisher.hasRoom(this, this.#maxPendingCost)) return false;
    const entry = member.entry(text);
    if (entry === undefined) return true;
    inbox.enter(member.key, entry, this, member);
    if (inbox !== publisher) inbox.resume();
    return true;
  }

  /** Drops what is pending and was never written: the client has been told that it is lost. */
  discard(): void {
    this.discarded = true;
  }

  /** Ends the subscription, unless another link of the session needs it. What is pending still goes. Idempotent. */
  detach(): void {
    if (this.#channel !== undefined) {
      this.#topology.at(this.#downSlot)?.subscriptions.remove(this.#channel, this.#endpoint);
    }
    this.#channel = undefined;
  }

  /** The position of the log's end; there is a log from then on. Rejects while Redis cannot be asked. */
  async openLog(): Promise<Position> {
    return await this.#reader().open(this.#down);
  }

  /** At most `count` entries of the log, from a position on, that one included. Rejects as `openLog` does. */
  async readLog(from: Position, count: number): Promise<Entry[]> {
    return await this.#reader().read(this.#down, from, count);
  }

  #reader(): LogReader {
    const shard = this.#topology.at(this.#downSlot);
    if (shard === undefined) throw new Unavailable("no server serves it");
    return shard.reader;
  }

  /** See {@linkcode Source}. */
  unheard(messages: number): void {
    this.#endpoint.unheard(messages);
  }

  /** See {@linkcode Source}. */
  lost(messages: number, why: Loss): void {
    this.#endpoint.lost(messages, why);
  }
}

/** Resolves when Redis has confirmed the subscription. Rejects as {@linkcode Link.attach} does. */
function confirmed(channel: Channel, timeoutMs: number, deadlines: Deadlines): Promise<void> {
  return new Promise((resolve, reject) => {
    const deadline = deadlines.set(timeoutMs, () => {
      reject(new SubscribeTimeout(`no confirmation within ${timeoutMs} ms`));
    });
    const done = (error?: Error) => {
      deadline.cancel();
      if (error) reject(error);
      else resolve();
    };
    channel.waiting = [...channel.waiting, done];
  });
}
