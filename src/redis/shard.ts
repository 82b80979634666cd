/**
 * One Redis server and what is kept with it: a connection that publishes and one that subscribes, their subscriptions,
 * queue and heartbeat. One server is one shard; a Cluster is one for each master.
 */

import type { InboxSettings } from "../config.ts";
import type { Log } from "../log.ts";
import type { Redis } from "ioredis";
import { Connection, type Purpose } from "./connection.ts";
import { Heartbeat } from "./heartbeat.ts";
import { Inbox } from "./inbox.ts";
import { Publisher } from "./publisher.ts";
import { findMaster, type Sentinels } from "./sentinel.ts";
import { Subscriptions } from "./subscriptions.ts";
import type { RedisAddress, TcpAddress } from "../redis_url.ts";

/** Time between two questions to the sentinels. */
const watchMs = 1000;

/** What a shard is made of. */
export interface ShardOptions {
  readonly address: RedisAddress;
  readonly log: Log;
  /** How long an outage may last before `onOutage`, in milliseconds. */
  readonly outageGraceMs: number;
  /** The outage has outlasted its grace. Called once per outage. */
  readonly onOutage: () => void;
  /** Messages flow again. */
  readonly onRecovery: () => void;
  /** The sentinels name this master; told now and then. */
  readonly onMaster: (master: TcpAddress) => void;
  /** The server is a replica, and has been left. */
  readonly onWrongServer: (reason: string) => void;
  /** An attempt to connect has failed. */
  readonly onConnectFailure: () => void;
  /** Asks a new connection for what the proxy must know before it serves. */
  readonly learn: (redis: Redis) => Promise<unknown>;
  /** Undefined for none. */
  readonly inbox:
    | (Pick<ConstructorParameters<typeof Inbox>[0], "onEntries" | "onLost"> & { settings: InboxSettings })
    | undefined;
}

/** One server. */
export class Shard {
  readonly #connections: readonly [publisher: Connection, subscriber: Connection];
  #watch: ReturnType<typeof setTimeout> | undefined;
  #closed = false;
  readonly #heartbeat: Heartbeat;
  /** Who listens. */
  readonly subscriptions: Subscriptions;
  /** Who sends. */
  readonly publisher: Publisher;
  /** What backends read of all that happens. */
  readonly inbox: Inbox | undefined;

  /** Connects, and goes on trying for as long as it lives. */
  constructor(options: ShardOptions) {
    const { address, log, outageGraceMs, onOutage, onRecovery, onWrongServer, onConnectFailure, learn, inbox } =
      options;
    const connect = (purpose: Purpose, handlers: Pick<Handlers, "prove" | "onUp" | "onDown">) =>
      new Connection({ purpose, address, log, onFailure: onConnectFailure, ...handlers });
    const publisher = connect("publisher", {
      prove: (redis) => Promise.all([learn(redis), this.#heartbeat.prove(redis)]),
      onUp: () => {
        this.inbox?.resume();
        this.publisher.resume();
        this.#heartbeat.poke();
      },
      onDown: () => {
        this.publisher.interrupt();
        this.#heartbeat.interrupt();
      },
    });
    const subscriber = connect("subscriber", {
      prove: (redis) => redis.ping(),
      onUp: () => this.subscriptions.resume(),
      onDown: () => {
        this.subscriptions.forget();
        this.#heartbeat.interrupt();
      },
    });
    this.#connections = [publisher, subscriber];
    this.publisher = new Publisher(publisher, log);
    this.inbox = inbox && new Inbox({ ...inbox, publisher: this.publisher, connection: publisher, log });
    this.subscriptions = new Subscriptions({ connection: subscriber, log, outageGraceMs });
    this.#heartbeat = new Heartbeat({ publisher, subscriber, log, outageGraceMs, onOutage, onRecovery, onWrongServer });
    if ("sentinels" in address) this.#watchMaster(address, options.onMaster);
    const canary = this.subscriptions.add(this.#heartbeat.channel, this.#heartbeat);
    canary.waiting.push(() => this.#heartbeat.poke());
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get flowing(): boolean {
    return this.#heartbeat.flowing;
  }

  /**
   * Proves that messages flow.
   * @throws {Unavailable} when it could not be proved within `timeoutMs` milliseconds, with the reason.
   */
  probe(timeoutMs: number): Promise<void> {
    return this.#heartbeat.probe(timeoutMs);
  }

  /**
   * Asks the sentinels now and then: a former master that comes back, or was cut off with us, answers as if nothing had
   * happened.
   */
  #watchMaster(sentinels: Sentinels, onMaster: ShardOptions["onMaster"]): void {
    this.#watch = setTimeout(async () => {
      try {
        const master = await findMaster(sentinels);
        for (const connection of this.#connections) connection.expect(master);
        onMaster(master);
      } catch {
        // Nobody knows better than the connections that serve.
      }
      if (!this.#closed) this.#watchMaster(sentinels, onMaster);
    }, watchMs);
  }

  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes both connections. */
  async close(timeoutMs: number): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#watch);
    await this.publisher.close(timeoutMs);
    this.inbox?.close();
    this.#heartbeat.close();
    this.subscriptions.close();
    await Promise.all(this.#connections.map((connection) => connection.close()));
  }
}

type Handlers = ConstructorParameters<typeof Connection>[0];
