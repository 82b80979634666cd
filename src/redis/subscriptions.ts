/**
 * The subscriptions of one connection. A table from channel to listeners is the one truth; Redis is brought to match
 * it. A change only marks its channel; one flush at the end of the tick sends what Redis has not been told, so leaving
 * and rejoining in one tick sends nothing, and a new connection is told all of it.
 *
 * A channel is asked, confirmed, or rejected. What Redis rejects while a session listens to it is asked for again, with
 * growing delays. Listeners learn that they may have missed something before anything newer reaches them.
 *
 * In a Cluster channels are sharded: each has a command of its own, and is subscribed to where its slot is. When that
 * moves, cluster.ts moves the channel to the subscriptions of another connection.
 */

import type { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import { backoffMs } from "../backoff.ts";
import type { Log } from "../log.ts";
import { ChannelTable, keyOf, type Named } from "./channel_table.ts";
import type { RedisConnection } from "./connection.ts";
import { isRedirected, isReply, reasonOf, Unavailable } from "./errors.ts";
import { timedOneIn } from "./publisher.ts";
import { askEach } from "./sharded_replies.ts";

/** Whether there was room for what was given. Each method says what becomes of it when it is "full". */
export type Room = "taken" | "full";

/**
 * Too much kept for a listener: `moving` as fast as its messages can be written, or `slow`, which is its receiver's
 * doing.
 */
export type Backlog = "none" | "moving" | "slow";

/** What listens to a channel: a session, the commander, a heartbeat. */
export interface Listener {
  /**
   * Takes one message, which should be UTF-8. Its bytes are part of what was read with it: to keep it, copy it. "full"
   * when it had to be kept, as its receiver has no room now.
   */
  deliver(message: Buffer): Room;
  /** Whether nothing more should be read for a moment, because too much is kept for it. */
  readonly backlog: Backlog;
  /** Its client resumes from the session's log, which must not expire while it listens. */
  readonly resumes?: boolean;
  /** A bug of ours kept a message from it. */
  fail(error: unknown): void;
  /** Messages may have been missed: Redis does not keep what it publishes while we are away. */
  gap(): void;
  /** Redis has rejected its subscription for longer than the outage grace. */
  rejected(): void;
}

/** A channel that has a listener. */
export interface Channel extends Named<Channel> {
  readonly name: string;
  /** Replaced, never changed, so that a delivery may end its listener. */
  listeners: readonly Listener[];
  /** SUBSCRIBE was sent on the present connection, and not rejected. */
  asked: boolean;
  /** SUBSCRIBE was confirmed on the present connection. */
  confirmed: boolean;
  /** A former subscription ended, and the listeners have not been told. */
  gap: boolean;
  /** Since when Redis rejects it, in milliseconds of `performance.now()`; 0 when it does not. */
  rejectedAtMs: number;
  /** What waits for the confirmation, or for the error that comes instead of it. */
  waiting: readonly ((error?: Error) => void)[];
}

/** What subscriptions are made of. */
export interface SubscriptionsOptions {
  readonly connection: RedisConnection;
  readonly log: Log;
  /** How long a rejected channel's listeners wait, in milliseconds. */
  readonly outageGraceMs: number;
  /** Channels are sharded, and Redis says that one belongs to another server; undefined for plain channels. */
  readonly onRedirected: (() => void) | undefined;
  /** From a read until one of its messages was delivered, in seconds; told of one in {@linkcode timedOneIn}. */
  readonly onTimed: (seconds: number) => void;
}

/** Names in one SUBSCRIBE or UNSUBSCRIBE: enough to cost little, few enough not to keep Redis from its other clients. */
const subscribeBatch = 1000;
/** Rejected channels asked for at once; as soon as one of them is confirmed come the next. */
const retryBatch = 64;
/**
 * How long nothing is read after a read that brought a listener more than it has room for. Reading is faster than
 * writing: without a pause, writes get no turn before the next read. A pause becomes longer for listeners with a
 * backlog, but ends after `maxPauseMs` in any case; for slow ones it is longer by no more than `maxCreditMs`, and
 * in the long run by no more than the time between pauses, as they must not keep messages from all others.
 */
const pauseMs = 5;
const maxPauseMs = 500;
const maxCreditMs = 50;
const firstRetryMs = 100;
const maxRetryMs = 2000;

/** Nothing waits for most channels, most of the time: one array is that of all. */
const noneWaiting: readonly never[] = [];

/** The subscriptions of one connection. */
export class Subscriptions {
  readonly #options: SubscriptionsOptions;
  readonly #table = new ChannelTable<Channel>();
  readonly #changed = new Set<Channel>();
  /** A flush comes at the end of the tick. */
  #flushing = false;
  readonly #rejected = new Set<Channel>();
  /** Names whose UNSUBSCRIBE was rejected. */
  readonly #unwanted = new Set<string>();
  #client: Redis | undefined;
  readonly #onMessage = (channel: Buffer, message: Buffer) => this.#dispatch(channel, message);
  readonly #onRead = () => {
    this.#readAtMs = performance.now();
  };
  #readAtMs = 0;
  #messages = 0;
  /** Counts connections, so that a late reply is not taken for one of the next connection. */
  #epoch = 0;
  /** Times in a row that some were asked for again in vain. */
  #retries = 0;
  #retryTimer: ReturnType<typeof setTimeout> | undefined;
  #pause: ReturnType<typeof setTimeout> | undefined;
  /**
   * Listeners that this pause waits for, for how long slow ones may be waited for, and since when there is a pause or
   * none.
   */
  readonly #awaited = new Set<Listener>();
  #creditMs = maxCreditMs;
  #pausedSinceMs = 0;
  #readingSinceMs = 0;

  /** Nothing is subscribed to yet. */
  constructor(options: SubscriptionsOptions) {
    this.#options = options;
  }

  /** Channels that have a listener. */
  get size(): number {
    return this.#table.size;
  }

  /** The channels that a resuming client listens to. */
  resumed(): Channel[] {
    const resumed: Channel[] = [];
    for (const channel of this.#table) {
      if (channel.listeners.some(({ resumes }) => resumes)) resumed.push(channel);
    }
    return resumed;
  }

  /** Adds a listener to the channel of that name. It may be delivered to before the channel is confirmed. */
  add(name: string, listener: Listener): Channel {
    const key = keyOf(name);
    let channel = this.#table.get(key);
    if (channel === undefined) {
      channel = {
        // One string instead of two, where they are the same.
        name: key === name ? key : name,
        key,
        nextOfHash: undefined,
        listeners: [],
        asked: false,
        confirmed: false,
        gap: false,
        rejectedAtMs: 0,
        waiting: noneWaiting,
      };
      this.#table.add(channel);
    }
    if (!channel.asked) this.#touch(channel);
    channel.listeners = [...channel.listeners, listener];
    return channel;
  }

  /** Removes a listener. The last one to leave a channel ends its subscription, and no other one does. Idempotent. */
  remove(channel: Channel, listener: Listener): void {
    if (!channel.listeners.includes(listener)) return;
    channel.listeners = channel.listeners.filter((other) => other !== listener);
    if (channel.listeners.length === 0) this.#touch(channel);
  }

  /** The connection serves: it is told of all channels that have a listener. */
  resume(): void {
    this.#client = this.#options.connection.client;
    this.#client?.on(this.#event, this.#onMessage);
    // Before ioredis reads it.
    this.#client?.stream.prependListener("data", this.#onRead);
    this.#flush();
  }

  /** The connection has ended, and its subscriptions with it. */
  forget(): void {
    this.#epoch++;
    // What it still had to say is part of the gap.
    this.#client?.off(this.#event, this.#onMessage);
    this.#client?.stream.off("data", this.#onRead);
    this.#client = undefined;
    this.#rejected.clear();
    this.#unwanted.clear();
    this.#retries = 0;
    clearTimeout(this.#retryTimer);
    this.#retryTimer = undefined;
    for (const channel of this.#table) {
      end(channel);
      if (channel.listeners.length === 0) this.#table.delete(channel);
      else this.#changed.add(channel);
    }
  }

  /** Redis has ended a subscription by itself: the channel's slot has left it. */
  unsubscribed(name: string): void {
    const channel = this.#table.get(keyOf(name));
    if (channel === undefined) return;
    end(channel);
    this.#reject(channel, undefined);
  }

  /** Gives away the channels of some names: they are subscribed to over another connection. */
  take(concerns: (name: string) => boolean): Channel[] {
    const taken: Channel[] = [];
    for (const channel of this.#table) {
      if (!concerns(channel.name)) continue;
      this.#table.delete(channel);
      this.#changed.delete(channel);
      this.#rejected.delete(channel);
      end(channel);
      if (channel.listeners.length > 0) taken.push(channel);
    }
    return taken;
  }

  /** Takes channels that others have given away. */
  adopt(channels: readonly Channel[]): void {
    for (const channel of channels) {
      this.#table.add(channel);
      this.#touch(channel);
    }
  }

  /** Nothing is asked for again. */
  close(): void {
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#pause);
  }

  #touch(channel: Channel): void {
    if (!this.#flushing) queueMicrotask(() => this.#flush());
    this.#flushing = true;
    this.#changed.add(channel);
  }

  /** Tells Redis what it has not been told; without a connection, the next one will be told what is wanted. */
  #flush(): void {
    this.#flushing = false;
    const redis = this.#client;
    const wanted: Channel[] = [];
    const unwanted: string[] = [];
    for (const channel of this.#changed) {
      if (channel.listeners.length > 0) {
        if (!channel.asked) wanted.push(channel);
      } else if (this.#table.delete(channel)) {
        this.#rejected.delete(channel);
        if (channel.asked) unwanted.push(channel.name);
      }
    }
    this.#changed.clear();
    if (redis === undefined) return wanted.forEach((channel) => this.#changed.add(channel));
    for (let at = 0; at < unwanted.length; at += subscribeBatch) {
      void this.#unsubscribe(redis, unwanted.slice(at, at + subscribeBatch));
    }
    for (let at = 0; at < wanted.length; at += subscribeBatch) {
      void this.#subscribe(redis, wanted.slice(at, at + subscribeBatch));
    }
  }

  async #unsubscribe(redis: Redis, names: readonly string[]): Promise<void> {
    const epoch = this.#epoch;
    const refused = this.#isSharded
      ? await askEach(redis, "unsubscribe", names).then((answers) =>
        names.filter((_, i) => isReply(answers[i]) && !isRedirected(answers[i]))
      )
      : await redis.unsubscribe(...names).then(() => [], (error) => isReply(error) ? names : []);
    if (refused.length === 0 || epoch !== this.#epoch) return;
    for (const name of refused) this.#unwanted.add(name);
    this.#retryLater();
  }

  async #subscribe(redis: Redis, channels: readonly Channel[]): Promise<void> {
    const epoch = this.#epoch;
    for (const channel of channels) {
      channel.asked = true;
      this.#unwanted.delete(channel.name);
    }
    if (this.#isSharded) return await this.#subscribeEach(redis, channels);
    let rejection: Error | undefined;
    try {
      await redis.subscribe(...channels.map((channel) => channel.name));
    } catch (error) {
      // Any other error is the connection's end, after which everything is asked for again.
      if (!isReply(error)) return;
      rejection = error;
    }
    if (epoch !== this.#epoch) return;
    if (rejection === undefined) {
      for (const channel of channels) this.#confirm(channel);
    } else if (channels.length > 1) {
      // One name that Redis forbids must not keep the others out.
      const half = channels.length >> 1;
      await Promise.all([
        this.#subscribe(redis, channels.slice(0, half)),
        this.#subscribe(redis, channels.slice(half)),
      ]);
    } else this.#reject(channels[0]!, reasonOf(rejection));
  }

  async #subscribeEach(redis: Redis, channels: readonly Channel[]): Promise<void> {
    const epoch = this.#epoch;
    const answers = await askEach(redis, "subscribe", channels.map((channel) => channel.name));
    if (epoch !== this.#epoch) return;
    for (const [i, channel] of channels.entries()) {
      // It may have been given away meanwhile.
      if (this.#table.get(channel.key) !== channel) continue;
      const answer = answers[i];
      if (isReply(answer)) this.#reject(channel, isRedirected(answer) ? undefined : reasonOf(answer));
      else if (typeof answer === "number") this.#confirm(channel);
    }
  }

  get #isSharded(): boolean {
    return this.#options.onRedirected !== undefined;
  }

  get #event(): "messageBuffer" | "smessageBuffer" {
    return this.#isSharded ? "smessageBuffer" : "messageBuffer";
  }

  #confirm(channel: Channel): void {
    channel.confirmed = true;
    channel.rejectedAtMs = 0;
    if (this.#rejected.delete(channel)) this.#retries = 0;
    if (channel.gap) tellGap(channel);
    settle(channel);
  }

  /** Without a `reason` it belongs to another server: what waits for it goes on waiting, as it will be moved there. */
  #reject(channel: Channel, reason: string | undefined): void {
    channel.asked = false;
    if (reason === undefined) this.#options.onRedirected?.();
    else settle(channel, new Unavailable(reason));
    if (channel.listeners.length === 0) return;
    if (channel.rejectedAtMs === 0) {
      channel.rejectedAtMs = performance.now();
      if (reason !== undefined) this.#options.log.warn({ reason }, "Redis rejected a subscription");
    }
    // Behind the others, so that all have their turn.
    this.#rejected.delete(channel);
    this.#rejected.add(channel);
    this.#retryLater();
  }

  #retryLater(): void {
    this.#retryTimer ??= setTimeout(() => void this.#retry(), backoffMs(this.#retries, firstRetryMs, maxRetryMs));
  }

  /** Asks again for some of what Redis rejected. */
  async #retry(): Promise<void> {
    const redis = this.#client;
    const epoch = this.#epoch;
    if (redis === undefined) return;
    this.#retries++;
    const unwanted = [...this.#unwanted];
    this.#unwanted.clear();
    for (let at = 0; at < unwanted.length; at += subscribeBatch) {
      await this.#unsubscribe(redis, unwanted.slice(at, at + subscribeBatch));
    }
    let size = 0;
    do {
      size = this.#rejected.size;
      const some: Channel[] = [];
      for (const channel of this.#rejected) {
        if (this.#isGivenUp(channel)) continue;
        some.push(channel);
        if (some.length === retryBatch) break;
      }
      if (some.length > 0) await this.#subscribe(redis, some);
      if (epoch !== this.#epoch) return;
    } while (this.#rejected.size > 0 && this.#rejected.size < size);
    this.#retryTimer = undefined;
    if (this.#rejected.size > 0 || this.#unwanted.size > 0) this.#retryLater();
  }

  /** Tells listeners that waited for too long; whether none is left then. */
  #isGivenUp(channel: Channel): boolean {
    if (performance.now() - channel.rejectedAtMs < this.#options.outageGraceMs) return false;
    for (const listener of channel.listeners) listener.rejected();
    return channel.listeners.length === 0;
  }

  /** What was read already is still dispatched. */
  #breathe(): void {
    this.#pausedSinceMs = performance.now();
    this.#creditMs = Math.min(maxCreditMs, this.#creditMs + this.#pausedSinceMs - this.#readingSinceMs);
    this.#wait();
  }

  #wait(): void {
    const stream = this.#client?.stream;
    stream?.pause();
    this.#pause = setTimeout(() => {
      let slow = false;
      for (const listener of this.#awaited) {
        const { backlog } = listener;
        // Without credit slow ones are waited for no longer, but those that move still are.
        if (backlog === "none" || (backlog === "slow" && this.#creditMs <= 0)) this.#awaited.delete(listener);
        else slow ||= backlog === "slow";
      }
      if (slow) this.#creditMs -= pauseMs;
      const nowMs = performance.now();
      if (this.#awaited.size > 0 && nowMs - this.#pausedSinceMs < maxPauseMs) return this.#wait();
      this.#awaited.clear();
      this.#pause = undefined;
      this.#readingSinceMs = nowMs;
      stream?.resume();
    }, pauseMs);
  }

  #dispatch(nameBytes: Buffer, message: Buffer): void {
    const channel = this.#table.find(nameBytes);
    if (channel === undefined) return;
    if (channel.gap) tellGap(channel);
    const { listeners } = channel;
    for (let i = 0; i < listeners.length; i++) {
      try {
        const listener = listeners[i]!;
        if (listener.deliver(message) === "taken") continue;
        if (listener.backlog !== "none") this.#awaited.add(listener);
        if (this.#pause === undefined) this.#breathe();
      } catch (error) {
        // Out of here it would end the process, and every other session with it.
        listeners[i]!.fail(error);
      }
    }
    if ((++this.#messages & (timedOneIn - 1)) === 0) {
      this.#options.onTimed((performance.now() - this.#readAtMs) / 1000);
    }
  }
}

/** Its subscription is no more. */
function end(channel: Channel): void {
  channel.gap ||= channel.confirmed;
  channel.asked = channel.confirmed = false;
  channel.rejectedAtMs = 0;
}

function tellGap(channel: Channel): void {
  channel.gap = false;
  for (const listener of channel.listeners) listener.gap();
}

function settle(channel: Channel, error?: Error): void {
  const { waiting } = channel;
  channel.waiting = noneWaiting;
  for (const done of waiting) done(error);
}
