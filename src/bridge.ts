/**
 * Sessions to Redis channels, over two connections in all: one publishes, one subscribes.
 *
 * Down: a map from channel to members is the one truth; the subscriber connection is brought to match it. A change
 * only marks its channel; one flush at the end of the tick sends what Redis has not been told, so leaving and
 * rejoining in one tick sends nothing, and a new connection is told all of it.
 *
 * Up: accepted messages wait in one queue, and one batch of it at a time is on its way. What was never written waits
 * out an outage and goes once; what was written when the connection broke is not repeated, and its sender is told.
 */

import { Redis, type RedisOptions, ReplyError } from "ioredis";
import type { Log } from "./log.ts";

/** Whoever is attached to a session's down channel. */
export interface Member {
  /** Takes one message. */
  deliver(text: string): void;
}

/** Whoever publishes to a session's up channel. */
export interface Sender {
  /** Size of its messages that Redis has not confirmed, kept by the bridge. */
  unpublished: number;
  /** Some of its messages may not have arrived, and are not sent again. */
  publishFailed(): void;
}

/** Redis cannot be used now. */
export class Unavailable extends Error {
  override readonly name = "Unavailable";
}

/** Redis did not confirm a subscription in time. */
export class SubscribeTimeout extends Error {
  override readonly name = "SubscribeTimeout";
}

interface Channel {
  readonly name: string;
  /** Replaced, never changed, so that a delivery may end its member. */
  members: readonly Member[];
  /** SUBSCRIBE was sent on the present connection. */
  asked: boolean;
  /** SUBSCRIBE was confirmed on the present connection. */
  confirmed: boolean;
  /** Attaches that wait for the confirmation, or for the error that comes instead of it. */
  waiting: ((error?: Error) => void)[];
}

interface Outgoing {
  readonly channel: string;
  readonly text: string;
  /** What it takes of the queue's bound. */
  readonly cost: number;
  readonly sender: Sender;
}

/** Names in one SUBSCRIBE: enough to cost little, few enough not to keep Redis from its other clients. */
const subscribeBatch = 1000;
/** Messages in one batch upstream, and the cost at which it is full: what a broken connection can leave in doubt. */
const publishBatch = 512;
const publishBatchCost = 1024 * 1024;
/** Cost of a queued message besides its characters. */
const messageOverhead = 256;
/** All clients' unpublished messages together, in characters and overhead: what an outage may cost the process. */
const maxUnpublished = 64 * 1024 * 1024;
const connectTimeoutMs = 2000;

/** The channel that carries messages from a session's backend to its client. */
export const downChannel = (sessionId: string) => `session:${sessionId}:down`;
/** The channel that carries messages from a session's client to its backend. */
export const upChannel = (sessionId: string) => `session:${sessionId}:up`;

/** What a bridge is made of. */
export interface BridgeOptions {
  readonly redisUrl: string;
  readonly log: Log;
}

export class Bridge {
  readonly #log: Log;
  readonly #publisher: Redis;
  readonly #subscriber: Redis;
  readonly #channels = new Map<string, Channel>();
  readonly #dirty = new Set<Channel>();
  /** Counts subscriber connections, so that a late reply is not taken for one of the next connection. */
  #epoch = 0;
  #queue: Outgoing[] = [];
  /** Where the queue begins: taking from the front of an array would move the rest. */
  #head = 0;
  #queuedCost = 0;
  #publishing = false;
  #closing = false;
  #idle: (() => void) | undefined;
  readonly #canary = `wsproxy:canary:${crypto.randomUUID()}`;
  #canarySent = 0;
  readonly #canaryWaiting = new Map<string, () => void>();

  /** Connects, and goes on trying for as long as it lives. */
  constructor(options: BridgeOptions) {
    this.#log = options.log;
    const common: RedisOptions = {
      connectTimeout: connectTimeoutMs,
      // We disconnect only when nothing is on its way, or when nothing will ever come back.
      disconnectTimeout: 0,
      // SUBSCRIBE and PUBLISH work while Redis loads; INFO, which the check needs, may be forbidden to us.
      enableReadyCheck: false,
      enableOfflineQueue: false,
      autoResendUnfulfilledCommands: false,
      autoResubscribe: false,
      maxRetriesPerRequest: 0,
      retryStrategy: (attempt) => Math.min(50 * attempt, 500) * (0.5 + Math.random() / 2),
    };
    this.#publisher = new Redis(options.redisUrl, { ...common, connectionName: "wsproxy-publisher" });
    this.#subscriber = new Redis(options.redisUrl, { ...common, connectionName: "wsproxy-subscriber" });
    this.#watch(this.#publisher, "publisher");
    this.#watch(this.#subscriber, "subscriber");
    this.#publisher.on("ready", () => this.#publishing || this.#publishQueued());
    this.#subscriber.on("ready", () => this.#flush());
    this.#subscriber.on("close", () => this.#forgetSubscriptions());
    this.#subscriber.on("message", (channel, text) => this.#dispatch(channel, text));
    this.#enter({
      deliver: (text) => {
        this.#canaryWaiting.get(text)?.();
        this.#canaryWaiting.delete(text);
      },
    }, this.#canary);
  }

  /** Both connections are up, and Pub/Sub was confirmed on the present one. */
  get available(): boolean {
    return this.#publisher.status === "ready" && this.#channels.get(this.#canary)!.confirmed;
  }

  /** Channels subscribed to, the canary included. */
  get subscriptions(): number {
    return this.#channels.size;
  }

  /**
   * Attaches a member to a session's down channel. Resolves when Redis has confirmed the subscription: whatever is
   * published from then on is delivered. A message may be delivered before. On failure the member is detached.
   * @throws {Unavailable} when Redis cannot be used, or refuses.
   * @throws {SubscribeTimeout} after `timeoutMs` milliseconds without a confirmation.
   */
  async attach(sessionId: string, member: Member, timeoutMs: number): Promise<void> {
    if (!this.available) throw new Unavailable("Redis is unavailable");
    const channel = this.#enter(member, downChannel(sessionId));
    if (channel.confirmed) return;
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    channel.waiting.push((error) => error ? reject(error) : resolve());
    const timer = setTimeout(() => reject(new SubscribeTimeout(`no confirmation within ${timeoutMs} ms`)), timeoutMs);
    try {
      await promise;
    } catch (error) {
      this.detach(sessionId, member);
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Detaches a member. The last one to leave a session ends its subscription, and no other one does. Idempotent. */
  detach(sessionId: string, member: Member): void {
    const channel = this.#channels.get(downChannel(sessionId));
    if (channel === undefined || !channel.members.includes(member)) return;
    channel.members = channel.members.filter((other) => other !== member);
    if (channel.members.length === 0) this.#touch(channel);
  }

  /**
   * Queues one message for a session's up channel, in order. False, and nothing queued, when `limit` characters of
   * this sender, or too many of all senders, wait already.
   */
  publish(sessionId: string, text: string, sender: Sender, limit: number): boolean {
    if (sender.unpublished >= limit || this.#queuedCost >= maxUnpublished) return false;
    const cost = text.length + messageOverhead;
    sender.unpublished += cost;
    this.#queuedCost += cost;
    this.#queue.push({ channel: upChannel(sessionId), text, cost, sender });
    if (!this.#publishing) void this.#publishQueued();
    return true;
  }

  /**
   * Proves that messages flow, with one that crosses both connections.
   * @throws {Unavailable} when it did not come back within `timeoutMs` milliseconds, with the reason.
   */
  async probe(timeoutMs: number): Promise<void> {
    const text = String(++this.#canarySent);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const timer = setTimeout(() => reject(new Unavailable(`no answer within ${timeoutMs} ms`)), timeoutMs);
    this.#canaryWaiting.set(text, resolve);
    this.#publisher.publish(this.#canary, text).catch((error) => reject(new Unavailable(reasonOf(error))));
    try {
      await promise;
    } finally {
      clearTimeout(timer);
      this.#canaryWaiting.delete(text);
    }
  }

  /** Publishes what is queued, for at most `timeoutMs` milliseconds, then closes both connections. */
  async close(timeoutMs: number): Promise<void> {
    if (this.#queuedCost > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#idle = resolve;
      const timer = setTimeout(resolve, timeoutMs);
      await promise;
      clearTimeout(timer);
    }
    this.#closing = true;
    const left = this.#queue.length - this.#head;
    if (left > 0) this.#log.error({ messages: left }, "messages left unpublished");
    await Promise.all([disconnect(this.#publisher), disconnect(this.#subscriber)]);
  }

  #watch(redis: Redis, connection: string): void {
    let up: boolean | undefined;
    redis.on("error", (error) => {
      if (up === undefined) this.#log.warn({ connection, reason: reasonOf(error) }, "Redis could not be reached");
      else this.#log.debug({ connection, reason: reasonOf(error) }, "Redis connection failed");
      up ??= false;
    });
    redis.on("ready", () => {
      up = true;
      this.#log.info({ connection }, "Redis connected");
    });
    redis.on("close", () => {
      if (up && !this.#closing) this.#log.warn({ connection }, "Redis connection lost");
      up &&= false;
    });
  }

  #enter(member: Member, name: string): Channel {
    let channel = this.#channels.get(name);
    if (channel === undefined) {
      channel = { name, members: [], asked: false, confirmed: false, waiting: [] };
      this.#channels.set(name, channel);
    }
    if (!channel.asked) this.#touch(channel);
    channel.members = [...channel.members, member];
    return channel;
  }

  #touch(channel: Channel): void {
    if (this.#dirty.size === 0) queueMicrotask(() => this.#flush());
    this.#dirty.add(channel);
  }

  /** Tells Redis what it has not been told. */
  #flush(): void {
    if (this.#subscriber.status !== "ready") return;
    const wanted: Channel[] = [];
    const unwanted: string[] = [];
    for (const channel of this.#dirty) {
      if (channel.members.length > 0) {
        if (!channel.asked) wanted.push(channel);
      } else if (this.#channels.get(channel.name) === channel) {
        this.#channels.delete(channel.name);
        if (channel.asked) unwanted.push(channel.name);
      }
    }
    this.#dirty.clear();
    if (unwanted.length > 0) this.#subscriber.unsubscribe(...unwanted).catch(() => {});
    for (let at = 0; at < wanted.length; at += subscribeBatch) this.#subscribe(wanted.slice(at, at + subscribeBatch));
  }

  async #subscribe(channels: readonly Channel[]): Promise<void> {
    const epoch = this.#epoch;
    for (const channel of channels) channel.asked = true;
    let refusal: string | undefined;
    try {
      await this.#subscriber.subscribe(...channels.map((channel) => channel.name));
    } catch (error) {
      // Any other error is the connection's end, after which everything is asked for again.
      if (!(error instanceof ReplyError)) return;
      refusal = reasonOf(error);
    }
    if (epoch !== this.#epoch) return;
    if (refusal === undefined) {
      for (const channel of channels) settle(channel);
    } else if (channels.length > 1) {
      // One name that Redis forbids must not keep the others out.
      for (const channel of channels) this.#subscribe([channel]);
    } else {
      this.#log.error({ reason: refusal }, "Redis refused a subscription");
      for (const channel of channels) settle(channel, new Unavailable(refusal));
    }
  }

  /** A connection's subscriptions end with it; those still wanted are asked for again on the next one. */
  #forgetSubscriptions(): void {
    this.#epoch++;
    for (const channel of this.#channels.values()) {
      channel.asked = channel.confirmed = false;
      if (channel.members.length === 0) this.#channels.delete(channel.name);
      else this.#dirty.add(channel);
    }
  }

  #dispatch(name: string, text: string): void {
    const members = this.#channels.get(name)?.members;
    if (members === undefined) return;
    for (let i = 0; i < members.length; i++) members[i]!.deliver(text);
  }

  async #publishQueued(): Promise<void> {
    this.#publishing = true;
    while (this.#head < this.#queue.length && this.#publisher.status === "ready") {
      const batch = this.#takeBatch();
      const pipeline = this.#publisher.pipeline();
      for (const { channel, text } of batch) pipeline.publish(channel, text);
      const results = await pipeline.exec().catch(() => null);
      for (let i = 0; i < batch.length; i++) {
        const { sender, cost } = batch[i]!;
        sender.unpublished -= cost;
        this.#queuedCost -= cost;
        if (results === null || results[i]?.[0]) sender.publishFailed();
      }
    }
    this.#publishing = false;
    if (this.#head === this.#queue.length) this.#idle?.();
  }

  #takeBatch(): Outgoing[] {
    const queue = this.#queue;
    const first = this.#head;
    let end = first;
    for (let cost = 0; end < queue.length && end - first < publishBatch && cost < publishBatchCost; end++) {
      cost += queue[end]!.cost;
    }
    const batch = first === 0 && end === queue.length ? queue : queue.slice(first, end);
    if (end === queue.length) {
      this.#queue = [];
      this.#head = 0;
    } else if (end > queue.length / 2) {
      this.#queue = queue.slice(end);
      this.#head = 0;
    } else this.#head = end;
    return batch;
  }
}

function settle(channel: Channel, error?: Error): void {
  channel.asked = channel.confirmed = error === undefined;
  const waiting = channel.waiting;
  channel.waiting = [];
  for (const done of waiting) done(error);
}

/** Ends a connection for good, and waits until it has ended, which a frozen peer cannot delay. */
async function disconnect(redis: Redis): Promise<void> {
  const connected = redis.status === "connecting" || redis.status === "connect" || redis.status === "ready";
  const ended = connected ? new Promise((resolve) => redis.once("end", resolve)) : undefined;
  redis.disconnect();
  await (ended ?? new Promise((resolve) => setTimeout(resolve, 0)));
}

/** An error's text for logs: ioredis names addresses and codes in it, never credentials. */
function reasonOf(error: unknown): string {
  if (error instanceof AggregateError) return error.errors.map(reasonOf).join("; ");
  return error instanceof Error ? error.message : String(error);
}
