/**
 * Sessions to Redis: a session opens a {@linkcode Link}, over which the messages of its down channel come and those of
 * its up channel go. A few connections serve all sessions; redis/shard.ts has what is behind it.
 */

import { within } from "../deadline.ts";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { SubscribeTimeout, Unavailable } from "./errors.ts";
import type { Loss, Source } from "./publisher.ts";
import type { Entry, Position } from "./log.ts";
import { LogReader } from "./log_reader.ts";
import { Shard } from "./shard.ts";
import type { Channel, Listener } from "./subscriptions.ts";
import type { RedisAddress } from "../redis_url.ts";

/** The channel that carries messages from a session's backend to its client. */
export const downChannel = (sessionId: string): string => `session:${sessionId}:down`;
/** The channel that carries messages from a session's client to its backend. */
export const upChannel = (sessionId: string): string => `session:${sessionId}:up`;

/** What a link leads to: a session. */
export interface Endpoint extends Listener {
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
  /** The outage has outlasted its grace. Called once per outage. */
  readonly onOutage: () => void;
  /** Messages flow again. */
  readonly onRecovery: () => void;
}

/** The way of all sessions to Redis. */
export class Bridge {
  readonly #maxPendingCost: number;
  readonly #shard: Shard;
  readonly #logReader: LogReader;
  #connectFailures = 0;

  /** Connects, and goes on trying for as long as it lives. */
  constructor({ maxPendingCost, logs, ...options }: BridgeOptions) {
    this.#maxPendingCost = maxPendingCost;
    const onConnectFailure = () => this.#connectFailures++;
    this.#shard = new Shard({ ...options, onConnectFailure });
    this.#logReader = new LogReader({ address: options.address, log: options.log, settings: logs, onConnectFailure });
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get available(): boolean {
    return this.#shard.flowing;
  }

  /** Channels subscribed to, the canary included. */
  get subscriptions(): number {
    return this.#shard.subscriptions.size;
  }

  /** Clients can resume from the log: Redis has the functions for it. */
  get resumable(): boolean {
    return this.#logReader.resumable;
  }

  /** Attempts to connect that failed. */
  get connectFailures(): number {
    return this.#connectFailures;
  }

  /** A session's link. Nothing of it is known to Redis before {@linkcode Link.attach}. */
  link(sessionId: string, endpoint: Endpoint): Link {
    return new Link(this.#shard, this.#logReader, sessionId, endpoint, this.#maxPendingCost);
  }

  /**
   * Publishes one message to a session's up channel, and says how many have received it.
   * @throws {Unavailable} when that is not known in time.
   */
  publish(sessionId: string, text: string): Promise<number> {
    return this.#shard.publisher.publishNow(upChannel(sessionId), text);
  }

  /**
   * Proves that messages flow, with one that crosses both connections.
   * @throws {Unavailable} when it did not come back within `timeoutMs` milliseconds, with the reason.
   */
  probe(timeoutMs: number): Promise<void> {
    return this.#shard.probe(timeoutMs);
  }

  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes all connections. */
  async close(timeoutMs: number): Promise<void> {
    await Promise.all([this.#shard.close(timeoutMs), this.#logReader.close()]);
  }
}

/** One session's way to its two channels. */
export class Link implements Source {
  readonly #shard: Shard;
  readonly #logReader: LogReader;
  readonly #endpoint: Endpoint;
  readonly #down: string;
  readonly #up: string;
  readonly #maxPendingCost: number;
  #channel: Channel | undefined;
  /** See {@linkcode Source}. */
  pendingCost = 0;
  /** See {@linkcode Source}. */
  discarded = false;

  /** Made by {@linkcode Bridge.link}. */
  constructor(
    shard: Shard,
    logReader: LogReader,
    sessionId: string,
    endpoint: Endpoint,
    maxPendingCost: number,
  ) {
    this.#shard = shard;
    this.#logReader = logReader;
    this.#endpoint = endpoint;
    this.#down = downChannel(sessionId);
    this.#up = upChannel(sessionId);
    this.#maxPendingCost = maxPendingCost;
  }

  /**
   * Subscribes to the down channel. Resolves when Redis has confirmed it: whatever is published from then on is
   * delivered. A message may be delivered before. On failure the link is detached.
   * @throws {Unavailable} when Redis cannot be used, or rejects.
   * @throws {SubscribeTimeout} after `timeoutMs` milliseconds without a confirmation.
   */
  async attach(timeoutMs: number): Promise<void> {
    if (!this.#shard.flowing) throw new Unavailable("Redis is unavailable");
    const channel = this.#channel = this.#shard.subscriptions.add(this.#down, this.#endpoint);
    if (channel.confirmed) return;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    channel.waiting.push((error) => error ? reject(error) : resolve());
    try {
      await within(timeoutMs, promise, () => {
        throw new SubscribeTimeout(`no confirmation within ${timeoutMs} ms`);
      });
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
    return this.#shard.publisher.publish(this.#up, text, this, this.#maxPendingCost);
  }

  /** Drops what is pending and was never written: the client has been told that it is lost. */
  discard(): void {
    this.discarded = true;
  }

  /** Ends the subscription, unless another link of the session needs it. What is pending still goes. Idempotent. */
  detach(): void {
    if (this.#channel !== undefined) this.#shard.subscriptions.remove(this.#channel, this.#endpoint);
    this.#channel = undefined;
  }

  /** The position of the log's end; there is a log from then on. Rejects while Redis cannot be asked. */
  openLog(): Promise<Position> {
    return this.#logReader.open(this.#down);
  }

  /** At most `count` entries of the log, from a position on, that one included. Rejects as `openLog` does. */
  readLog(from: Position, count: number): Promise<Entry[]> {
    return this.#logReader.read(this.#down, from, count);
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
