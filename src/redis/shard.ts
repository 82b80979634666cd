/**
 * One Redis server and what is kept with it: a connection that publishes, one that subscribes and one that reads logs,
 * their subscriptions, queue and heartbeat. One server is one shard; a Cluster is one for each master.
 */

import type { Redis } from "ioredis";
import { after } from "../deadline.ts";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import type { ServerAddress } from "../redis_url.ts";
import { type Purpose, RedisConnection } from "./connection.ts";
import { Heartbeat } from "./heartbeat.ts";
import { LogReader } from "./log_reader.ts";
import { Publisher } from "./publisher.ts";
import { Rights, type Wants } from "./rights.ts";
import { isReply, refusedOrThrow, Unavailable } from "./errors.ts";
import { findMasters, type Sentinels } from "./sentinel.ts";
import { expectSharded } from "./sharded_replies.ts";
import { type Channel, Subscriptions } from "./subscriptions.ts";

/** Time from one question to the sentinels to the next. */
const watchMs = 1000;

/** What a shard is made of. */
export interface ShardOptions {
  readonly address: ServerAddress;
  readonly log: Log;
  /** How long an outage may last before `onOutage`, in milliseconds. */
  readonly outageGraceMs: number;
  /** How the logs of sessions are kept. */
  readonly sessionLogs: LogSettings;
  /** What the settings need of Redis besides. */
  readonly wants: Omit<Wants, "db" | "sharded">;
  /** The publishing connection serves; called before anything is sent over it. */
  readonly onConnected: () => void;
  /** The outage of a shard, or of something else that is down, has outlasted its grace. Called once per outage. */
  readonly onOutage: (server: object) => void;
  /** It is over. */
  readonly onRecovery: (server: object) => void;
  /** A connection serves, or an attempt to make one has failed. */
  readonly onConnect: () => void;
  readonly onConnectFailure: () => void;
  /** What is measured on the way. */
  readonly timings: Timings;
  /** Called at each beat while both connections take commands. */
  readonly onBeat: (shard: Shard) => void;
  /** Asks a new connection for what the proxy must know before it serves. */
  readonly learn: (redis: Redis, shard: Shard) => Promise<unknown>;
  /** Undefined for a server that is all there is. */
  readonly cluster: ClusterSide | undefined;
}

/** Takes down how long things took, in seconds. */
export interface Timings {
  /** From a read until one of its messages had been delivered; of some messages. */
  down(seconds: number): void;
  /** From a client's message until Redis had confirmed it; of some messages. */
  up(seconds: number): void;
  /** From publishing the canary until it came back. */
  roundTrip(seconds: number): void;
}

/** What a shard of a Cluster needs besides. */
export interface ClusterSide {
  /** A channel in one of the server's own slots. */
  readonly canary: string;
  /** The server has redirected a command, or may have been replaced. */
  readonly onRedirected: () => void;
}

/** One server. */
export class Shard {
  readonly #connections: readonly [publisher: RedisConnection, subscriber: RedisConnection];
  readonly #heartbeat: Heartbeat;
  readonly #rights: Rights;
  readonly #name: string;
  #canary: Channel;
  readonly #log: Log;
  #watch: ReturnType<typeof setTimeout> | undefined;
  /** No sentinel could name the master when they were asked last. */
  #sentinelsFailed = false;
  #closed = false;
  /** What its sessions listen to. */
  readonly subscriptions: Subscriptions;
  /** What clients have sent. */
  readonly publisher: Publisher;
  /** Reads the logs of its sessions. */
  readonly reader: LogReader;

  /** Connects, and goes on trying for as long as it lives. */
  constructor(options: ShardOptions) {
    const { address, log, outageGraceMs, sessionLogs, cluster } = options;
    this.#log = log;
    this.#name = "host" in address ? `${address.host}:${address.port}` : "redis";
    const onRedirected = () => cluster?.onRedirected();
    const rights = this.#rights = new Rights(address, { ...options.wants, sharded: cluster !== undefined }, log);
    const onFailure = (error: unknown) => {
      options.onConnectFailure();
      onRedirected();
      if (isReply(error)) rights.try();
    };
    const connect = (purpose: Purpose, handlers: Pick<Handlers, "prove" | "onUp" | "onDown">) =>
      new RedisConnection({ purpose, address, log, onFailure, ...handlers });
    const publisher = connect("publisher", {
      prove: (redis) => Promise.all([options.learn(redis, this), this.#heartbeat.prove(redis)]),
      onUp: () => {
        options.onConnect();
        options.onConnected();
        rights.try();
        this.publisher.resume();
        this.#heartbeat.poke();
      },
      onDown: () => {
        this.publisher.interrupt();
        this.#heartbeat.interrupt();
        onRedirected();
      },
    });
    const subscriber = connect("subscriber", {
      prove: (redis) => {
        if (cluster) expectSharded(redis, (channel) => this.subscriptions.unsubscribed(channel));
        return redis.ping().catch(refusedOrThrow);
      },
      onUp: () => {
        options.onConnect();
        this.subscriptions.resume();
      },
      onDown: () => {
        this.subscriptions.forget();
        this.#heartbeat.interrupt();
        onRedirected();
      },
    });
    this.#connections = [publisher, subscriber];
    const command = cluster ? "spublish" : "publish";
    this.publisher = new Publisher({ connection: publisher, log, command, onRedirected, onTimed: options.timings.up });
    this.subscriptions = new Subscriptions({
      connection: subscriber,
      log,
      outageGraceMs,
      onRedirected: cluster && onRedirected,
      onTimed: options.timings.down,
    });
    this.reader = new LogReader({
      ...{ address, log, settings: sessionLogs, sharded: cluster !== undefined, onRedirected },
      attached: () => this.subscriptions.resumed(),
      onConnectFailure: options.onConnectFailure,
    });
    this.#heartbeat = new Heartbeat({
      ...{ publisher, subscriber, log, outageGraceMs, command, onRedirected },
      channel: cluster?.canary ?? `wsproxy:canary:${crypto.randomUUID()}`,
      onBeat: () => options.onBeat(this),
      onOutage: () => options.onOutage(this),
      onRecovery: () => options.onRecovery(this),
      onRoundTrip: options.timings.roundTrip,
      onWrongServer: (reason) => this.reader.drop(reason),
    });
    if ("sentinels" in address) this.#watchMaster(address, watchMs);
    this.#canary = this.#listenToCanary();
  }

  /** Where the server is, as operators know it. */
  get name(): string {
    return this.#name;
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get flowing(): boolean {
    return this.#heartbeat.flowing;
  }

  /** The publishing connection, if it takes a command now. */
  get writable(): Redis | undefined {
    return this.#connections[0].writable;
  }

  /** The channel that proves that messages flow. */
  get canary(): string {
    return this.#canary.name;
  }

  /** Resolves when what the server permits has been told. */
  get tried(): Promise<void> {
    return this.#rights.tried;
  }

  /** Moves the canary to another channel, as the former one's slot has left the server. */
  moveCanary(channel: string): void {
    const former = this.#canary;
    this.#heartbeat.moveTo(channel);
    this.#canary = this.#listenToCanary();
    this.subscriptions.remove(former, this.#heartbeat);
  }

  /**
   * Proves that messages flow.
   * @throws {Unavailable} when it could not be proved within `timeoutMs` milliseconds, with the reason.
   */
  probe(timeoutMs: number): Promise<void> {
    return this.#heartbeat.probe(timeoutMs);
  }

  /** Gives up what was asked of the server and has not been answered, and connects anew. */
  drop(reason: string): void {
    for (const connection of this.#connections) connection.drop(reason);
  }

  #listenToCanary(): Channel {
    const canary = this.subscriptions.add(this.#heartbeat.channel, this.#heartbeat);
    canary.waiting = [...canary.waiting, () => this.#heartbeat.poke()];
    return canary;
  }

  /**
   * Asks the sentinels every second: a former master that comes back, or was cut off together with the proxy, answers
   * as if nothing had happened. While no sentinel can say where the master is, the connections stay as they are.
   */
  #watchMaster(sentinels: Sentinels, delayMs: number): void {
    this.#watch = after(delayMs, async () => {
      const sinceMs = performance.now();
      try {
        const masters = await findMasters(sentinels);
        this.#sentinelsFailed = false;
        for (const connection of this.#connections) connection.expect(masters);
        this.reader.expect(masters);
      } catch (error) {
        if (!(error instanceof Unavailable)) throw error;
        if (!this.#sentinelsFailed && !this.#closed) {
          this.#log.warn({ reason: error.message }, "no sentinel can be asked");
        }
        this.#sentinelsFailed = true;
      }
      if (!this.#closed) this.#watchMaster(sentinels, sinceMs + watchMs - performance.now());
    });
  }

  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes all connections. */
  async close(timeoutMs: number): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#watch);
    await this.publisher.close(timeoutMs);
    this.#heartbeat.close();
    this.subscriptions.close();
    await Promise.all([...this.#connections, this.reader, this.#rights].map((connection) => connection.close()));
  }
}

type Handlers = ConstructorParameters<typeof RedisConnection>[0];
