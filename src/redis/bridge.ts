/**
 * Sessions to Redis: a session opens a {@linkcode Link}, over which the messages of its down channel come and those of
 * its up channel go. A few connections serve all sessions; redis/topology.ts has the servers behind it.
 */

import type { Redis } from "ioredis";
import type { InboxSettings, LogSettings } from "../config.ts";
import { within } from "../deadline.ts";
import type { Log } from "../log.ts";
import type { RedisAddress } from "../redis_url.ts";
import type { Revocations } from "../revocations.ts";
import { Cluster } from "./cluster.ts";
import { isPassing, reasonOf, Unavailable } from "./errors.ts";
import { Inbox, inboxKey, type Who } from "./inbox.ts";
import { downChannel, type Endpoint, Link, type Server, upChannel } from "./link.ts";
import { Revoked } from "./revoked.ts";
import type { Shard, Timings } from "./shard.ts";
import type { Listener } from "./subscriptions.ts";
import { servingOrThrow, shardOf, SingleServer, type Topology } from "./topology.ts";

/** The channel on which every proxy hears what is for many sessions. */
export const controlChannel = "wsproxy:control";

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
  readonly sessionLogs: LogSettings;
  /** A server's outage has outlasted its grace. Called once per outage. */
  readonly onOutage: (server: Server) => void;
  /** Messages flow again through a server, or no slot is served by it any more. */
  readonly onRecovery: (server: Server) => void;
  /** What backends want to read of all that happens; undefined for nothing. */
  readonly inbox?: InboxSettings;
  /** A new socket of a session closes the others. */
  readonly lastSocket?: boolean;
  /** Names the process when several workers have one. */
  readonly process?: string | undefined;
  /** So many entries of inboxes have been written. */
  readonly onEntries?: (count: number) => void;
  /** So many entries of inboxes will never be. */
  readonly onEntriesLost?: (count: number) => void;
  /** What is known of revoked tokens; undefined for a proxy that admits no session. */
  readonly revocations?: Revocations;
  /** Hears what is measured. */
  readonly timings?: Timings;
}

/** The way of all sessions to Redis. */
export class Bridge {
  readonly #maxPendingCost: number;
  readonly #topology: Topology;
  readonly #inbox: Inbox | undefined;
  /** Undefined for a proxy that admits no session. */
  readonly revoked: Revoked | undefined;
  /** Begins the names of our connections, which no other proxy uses. */
  readonly #id = crypto.randomUUID().slice(0, 8);
  #links = 0;
  #connects = 0;
  #connectFailures = 0;

  /** Connects, and goes on trying for as long as it lives. */
  constructor(
    { address, maxPendingCost, inbox, process, onEntries, onEntriesLost, revocations, lastSocket = false, ...options }:
      BridgeOptions,
  ) {
    this.#maxPendingCost = maxPendingCost;
    const shardOptions = {
      ...options,
      wants: { inbox: inbox !== undefined, lastSocket },
      timings: options.timings ?? unmeasured,
      onConnect: () => this.#connects++,
      onConnectFailure: () => this.#connectFailures++,
      onConnected: () => this.#inbox?.resume(),
      onBeat: (shard: Shard) => this.revoked?.beat(shard),
      learn: async (redis: Redis, shard: Shard) => await this.revoked?.learn(redis, shard),
    };
    const topology = this.#topology = "nodes" in address
      ? new Cluster(address, shardOptions)
      : new SingleServer(address, shardOptions);
    this.revoked = revocations && new Revoked(topology, revocations, options.log);
    const ignore = () => {};
    this.#inbox = inbox &&
      new Inbox({
        ...{ settings: inbox, topology, log: options.log, process },
        onEntries: onEntries ?? ignore,
        onLost: onEntriesLost ?? ignore,
      });
  }

  /** Resolves when what Redis refuses of all that may be needed has been logged. */
  async tried(): Promise<void> {
    await Promise.all(this.#topology.shards.map((shard) => shard.tried));
  }

  /** Messages flow both ways through every server, as far as the last canaries tell, and no other part is down. */
  get available(): boolean {
    const { shards, faults } = this.#topology;
    return shards.length > 0 && shards.every((shard) => shard.flowing) && faults.size === 0;
  }

  /** Channels subscribed to, the canaries' and the one for control included. */
  get subscriptions(): number {
    return this.#topology.shards.reduce((sum, { subscriptions }) => sum + subscriptions.size, 0);
  }

  /** What clients have sent and Redis has not taken yet, in characters and overhead. */
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

  /**
   * Clients can resume from a session's log: its server has the functions for it, and has not refused it lately.
   * Undefined while that is not known, as after a start.
   */
  isResumable(sessionId: string): boolean | undefined {
    const channel = downChannel(sessionId);
    return shardOf(this.#topology, channel)?.reader.isResumable(channel);
  }

  /**
   * The same as soon as it is known.
   * @throws {Unavailable} when messages do not flow, or it is not known after so many milliseconds.
   */
  async whenResumable(sessionId: string, timeoutMs: number): Promise<boolean> {
    const shard = shardOf(this.#topology, downChannel(sessionId));
    if (!shard?.flowing) throw new Unavailable("Redis is unavailable");
    await within(timeoutMs, shard.reader.known, () => {
      throw new Unavailable("it is not known whether Redis keeps logs");
    });
    return this.isResumable(sessionId) === true;
  }

  /** Lets `listener` hear what is for many sessions, from now on. */
  listenToControl(listener: Listener): void {
    this.#topology.listen(controlChannel, listener);
  }

  /** A session's link. Nothing of it is known to Redis before {@linkcode Link.attach}. */
  link(sessionId: string, endpoint: Endpoint): Link {
    const connection = `${this.#id}-${++this.#links}`;
    return new Link({
      ...{ topology: this.#topology, inbox: this.#inbox, sessionId, connection, endpoint },
      maxPendingCost: this.#maxPendingCost,
    });
  }

  /**
   * Publishes one message to a session's up channel, and says how many have received it, and whether it is in an inbox,
   * with the `id` that its client has given it. What is in an inbox has a backend, also when it could not be published:
   * `receivers` is undefined then.
   * @throws {Unavailable} when it is in no inbox, and not known in time to be published.
   */
  async publish(
    who: Omit<Who, "traceparent">,
    sessionId: string,
    text: string,
    id?: string,
  ): Promise<{ receivers: number | undefined; entered: boolean }> {
    const channel = upChannel(sessionId);
    const inbox = this.#inbox;
    const publisherOf = (name: string) => servingOrThrow(shardOf(this.#topology, name)).publisher;
    const publisher = publisherOf(channel);
    const entering = inbox && publisherOf(inboxKey(who.agentId))
      .commandNow(inbox.posted(who, sessionId, text, id))
      .then(() => true, (error: Error) => (inbox.told(error), error));
    const publishing = publisher.publishNow(channel, text).catch((error: Unavailable) => error);
    const [entry, outcome] = await Promise.all([entering ?? false, publishing]);
    const entered = entry === true;
    if (entered) inbox?.told(undefined);
    else if (outcome instanceof Unavailable) throw outcome;
    // No backend has it, as far as is known, and the next try may bring it to one.
    else if (outcome === 0 && entry instanceof Error && isPassing(entry)) throw new Unavailable(reasonOf(entry));
    return { receivers: typeof outcome === "number" ? outcome : undefined, entered };
  }

  /**
   * Proves that messages flow through each server, within `timeoutMs` milliseconds; returns what keeps them from it, by
   * the server's name: undefined when nothing does. Parts for which no server stands are told with the servers.
   */
  async probe(timeoutMs: number): Promise<ReadonlyMap<string, Unavailable | undefined>> {
    const { shards, faults } = this.#topology;
    const outcomes = await Promise.allSettled(shards.map((shard) => shard.probe(timeoutMs)));
    const found = new Map<string, Unavailable | undefined>();
    for (const [i, outcome] of outcomes.entries()) {
      if (outcome.status === "rejected" && !(outcome.reason instanceof Unavailable)) throw outcome.reason;
      found.set(shards[i]!.name, outcome.status === "rejected" ? outcome.reason : undefined);
    }
    for (const [part, reason] of faults) found.set(part, new Unavailable(reason));
    return found;
  }

  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes all connections. */
  async close(timeoutMs: number): Promise<void> {
    this.#inbox?.flush();
    await this.#topology.close(timeoutMs);
    this.#inbox?.close();
  }
}

const unmeasured: Timings = { down() {}, up() {}, roundTrip() {} };
