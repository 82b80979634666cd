/**
 * Sessions to Redis channels, over two connections in all: one publishes, one subscribes.
 *
 * Down: a map from channel to members is the one truth; the subscriber connection is brought to match it. A change
 * only marks its channel; one flush at the end of the tick sends what Redis has not been told, so leaving and
 * rejoining in one tick sends nothing, and a new connection is told all of it. Members learn that they may have
 * missed something before anything newer reaches them.
 *
 * Up: accepted messages wait in one queue, and one batch of it at a time is on its way. What was never written waits
 * out an outage and goes once; what was written when the connection broke is not repeated, and its sender is told.
 *
 * Health: a canary, published on one connection and awaited on the other, proves that messages flow. When it does not
 * come, a connection that is silent while the other one answers is replaced. While both are silent Redis is frozen or
 * away, and nothing is lost yet: they are kept, because all will go on where it stopped.
 */

import { Buffer } from "node:buffer";
import { type Command, Redis, type RedisOptions, ReplyError } from "ioredis";
import { ChannelTable, type Named } from "./channel_table.ts";
import type { Log } from "../log.ts";

/** Whoever is attached to a session's down channel. */
export interface Member {
  /** Takes one message, which should be UTF-8. Its bytes are part of what was read with it: to keep it, copy it. */
  deliver(message: Buffer): void;
  /** A bug of ours kept a message from it. */
  fail(error: unknown): void;
  /** Messages may have been missed: Redis does not keep what it publishes while we are away. */
  missed(): void;
}

/** Whoever publishes to a session's up channel. */
export interface Sender {
  /** Size of its messages that Redis has not confirmed, kept by the bridge. */
  unpublished: number;
  /** It was told that its messages are lost: those that were never written are dropped, and counted. */
  readonly forsaken: boolean;
  /**
   * Messages of it will not arrive because Redis `refused` them, or may not have arrived because the connection
   * `broke`, or were dropped because it is `forsaken`. They are not sent again.
   */
  publishFailed(messages: number, why: "refused" | "broke" | "forsaken"): void;
}

/** Redis cannot be used now. */
export class Unavailable extends Error {
  override readonly name = "Unavailable";
}

/** Redis did not confirm a subscription in time. */
export class SubscribeTimeout extends Error {
  override readonly name = "SubscribeTimeout";
}

interface Channel extends Named<Channel> {
  readonly name: string;
  /** Replaced, never changed, so that a delivery may end its member. */
  members: readonly Member[];
  /** SUBSCRIBE was sent on the present connection. */
  asked: boolean;
  /** SUBSCRIBE was confirmed on the present connection. */
  confirmed: boolean;
  /** A former connection's subscription ended, and the members have not been told. */
  missed: boolean;
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
const publishBatch = 4096;
const publishBatchCost = 1024 * 1024;
/** Cost of a queued message besides its characters. */
const messageOverhead = 256;
/** All clients' unpublished messages together, in characters and overhead: what an outage may cost the process. */
const maxUnpublished = 64 * 1024 * 1024;
const connectTimeoutMs = 2000;
/** Time between two canaries. */
const canaryIntervalMs = 500;
/** Unanswered canaries in a row that make a silence. Counted, not timed, so that a stall of ours is none of Redis. */
const silentAfter = 4;

const utf8 = new TextEncoder();

/** The channel that carries messages from a session's backend to its client. */
export const downChannel = (sessionId: string): string => `session:${sessionId}:down`;
/** The channel that carries messages from a session's client to its backend. */
export const upChannel = (sessionId: string): string => `session:${sessionId}:up`;

/** What a bridge is made of. */
export interface BridgeOptions {
  /** `redis://` or `rediss://`. */
  readonly redisUrl: string;
  /** Where losses, returns and refusals of Redis are told. */
  readonly log: Log;
  /** How long an outage may last before `onOutage`, in milliseconds. */
  readonly outageGraceMs: number;
  /** The outage has outlasted its grace. Called once per outage. */
  readonly onOutage: () => void;
  /** Messages flow again. */
  readonly onRecovery: () => void;
}

/** The one link between all sessions and Redis. */
export class Bridge {
  readonly #options: BridgeOptions;
  readonly #log: Log;
  readonly #publisher: Redis;
  readonly #subscriber: Redis;
  readonly #channels = new ChannelTable<Channel>();
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
  /** Canaries, and questions to either connection, that were not answered yet, since the last answer. */
  #unanswered = { canary: 0, publisher: 0, subscriber: 0 };
  /** A canary has come back on the present connections. */
  #flowing = false;
  #downSinceMs = performance.now();
  #outageTold = false;
  #ticker: ReturnType<typeof setTimeout>;

  /** Connects, and goes on trying for as long as it lives. */
  constructor(options: BridgeOptions) {
    this.#options = options;
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
    this.#publisher.on("ready", () => {
      if (!this.#publishing) void this.#publishQueued();
      this.#sendCanary();
    });
    this.#subscriber.on("ready", () => this.#flush());
    this.#publisher.on("close", () => this.#stopped());
    this.#subscriber.on("close", () => {
      this.#stopped();
      this.#forgetSubscriptions();
    });
    this.#subscriber.on("messageBuffer", (channel: Buffer, message: Buffer) => this.#dispatch(channel, message));
    this.#enter({
      deliver: (message) => this.#canaryCame(message.toString()),
      missed: () => this.#sendCanary(),
      fail: (error) => this.#log.error({ err: error }, "canary failed"),
    }, this.#canary);
    this.#ticker = setTimeout(() => this.#tick(), canaryIntervalMs);
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get available(): boolean {
    return this.#flowing;
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
    const channel = this.#channels.find(utf8.encode(downChannel(sessionId)));
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
    if (this.#publisher.status !== "ready" || this.#subscriber.status !== "ready") {
      throw new Unavailable("not connected");
    }
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
    clearTimeout(this.#ticker);
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
    // A small copy lies in V8's heap beside what belongs to it; the encoder's bytes do not.
    const nameBytes = new Uint8Array(utf8.encode(name));
    let channel = this.#channels.find(nameBytes);
    if (channel === undefined) {
      channel = {
        name,
        nameBytes,
        nextOfHash: undefined,
        members: [],
        asked: false,
        confirmed: false,
        missed: false,
        waiting: [],
      };
      this.#channels.add(channel);
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
      } else if (this.#channels.delete(channel) && channel.asked) unwanted.push(channel.name);
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
      if (!this.#flowing) this.#sendCanary();
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
    for (const channel of this.#channels) {
      channel.missed ||= channel.confirmed;
      channel.asked = channel.confirmed = false;
      if (channel.members.length === 0) this.#channels.delete(channel);
      else this.#dirty.add(channel);
    }
  }

  #dispatch(nameBytes: Buffer, message: Buffer): void {
    const channel = this.#channels.find(nameBytes);
    if (channel === undefined) return;
    if (channel.missed) tellMissed(channel);
    const { members } = channel;
    for (let i = 0; i < members.length; i++) {
      try {
        members[i]!.deliver(message);
      } catch (error) {
        // Out of here it would end the process, and every other session with it.
        members[i]!.fail(error);
      }
    }
  }

  async #publishQueued(): Promise<void> {
    this.#publishing = true;
    while (this.#head < this.#queue.length && this.#publisher.status === "ready") {
      const batch = this.#takeBatch();
      if (batch.length === 0) continue;
      const errors = await new PublishBatch(batch).send(this.#publisher);
      let broke: Map<Sender, number> | undefined;
      for (let i = 0; i < batch.length; i++) {
        const { sender, cost } = batch[i]!;
        this.#release(sender, cost);
        const error = errors[i];
        if (error instanceof ReplyError) {
          this.#log.error({ reason: reasonOf(error) }, "Redis refused a message");
          sender.publishFailed(1, "refused");
        } else if (error) {
          broke ??= new Map();
          broke.set(sender, (broke.get(sender) ?? 0) + 1);
        }
      }
      for (const [sender, messages] of broke ?? []) sender.publishFailed(messages, "broke");
    }
    this.#publishing = false;
    if (this.#head === this.#queue.length) this.#idle?.();
  }

  #release(sender: Sender, cost: number): void {
    sender.unpublished -= cost;
    this.#queuedCost -= cost;
  }

  #takeBatch(): Outgoing[] {
    const queue = this.#queue;
    const first = this.#head;
    let end = first;
    let forsaken = false;
    for (let cost = 0; end < queue.length && end - first < publishBatch && cost < publishBatchCost; end++) {
      cost += queue[end]!.cost;
      forsaken ||= queue[end]!.sender.forsaken;
    }
    let batch = first === 0 && end === queue.length ? queue : queue.slice(first, end);
    if (forsaken) batch = batch.filter((outgoing) => !this.#dropForsaken(outgoing));
    if (end === queue.length) {
      this.#queue = [];
      this.#head = 0;
    } else if (end > queue.length / 2) {
      this.#queue = queue.slice(end);
      this.#head = 0;
    } else this.#head = end;
    return batch;
  }

  #dropForsaken({ sender, cost }: Outgoing): boolean {
    if (!sender.forsaken) return false;
    this.#release(sender, cost);
    sender.publishFailed(1, "forsaken");
    return true;
  }

  #sendCanary(): void {
    if (this.#publisher.status !== "ready" || this.#closing) return;
    this.#publisher.publish(this.#canary, String(++this.#canarySent)).catch((error) => {
      if (error instanceof ReplyError) this.#log.error({ reason: reasonOf(error) }, "Redis refused the canary");
    });
  }

  #canaryCame(text: string): void {
    this.#unanswered.canary = 0;
    this.#canaryWaiting.get(text)?.();
    if (this.#flowing) return;
    this.#flowing = true;
    this.#outageTold = false;
    this.#options.onRecovery();
    this.#log.info({ outageMs: Math.round(performance.now() - this.#downSinceMs) }, "messages flow through Redis");
  }

  /** Messages have stopped to flow. */
  #stopped(): void {
    this.#unanswered = { canary: 0, publisher: 0, subscriber: 0 };
    if (!this.#flowing) return;
    this.#flowing = false;
    this.#downSinceMs = performance.now();
  }

  #tick(): void {
    this.#ticker = setTimeout(() => this.#tick(), canaryIntervalMs);
    const { canary, publisher, subscriber } = this.#unanswered;
    if (canary >= silentAfter) {
      if (this.#flowing) this.#log.warn("no message flows through Redis");
      this.#stopped();
      if (publisher < silentAfter) this.#replace(this.#subscriber, "subscriber");
      else if (subscriber < silentAfter) this.#replace(this.#publisher, "publisher");
    }
    if (!this.#flowing && !this.#outageTold) this.#checkOutage();
    this.#ask();
  }

  /** Sends a canary, and asks each connection for a sign of life. */
  #ask(): void {
    if (this.#publisher.status !== "ready" || this.#subscriber.status !== "ready") return;
    const asked = this.#unanswered;
    asked.canary++;
    asked.publisher++;
    asked.subscriber++;
    this.#sendCanary();
    this.#publisher.ping().then(() => asked.publisher = 0, () => {});
    this.#subscriber.ping().then(() => asked.subscriber = 0, () => {});
  }

  #checkOutage(): void {
    const outageMs = performance.now() - this.#downSinceMs;
    if (outageMs < this.#options.outageGraceMs) return;
    this.#outageTold = true;
    this.#log.error({ outageMs: Math.round(outageMs) }, "Redis is gone for longer than the grace");
    this.#options.onOutage();
    // Whoever is still connected has not answered all that time: it may be half-open.
    this.#replace(this.#publisher, "publisher");
    this.#replace(this.#subscriber, "subscriber");
  }

  #replace(redis: Redis, connection: string): void {
    if (redis.status !== "ready" && redis.status !== "connect") return;
    this.#log.warn({ connection }, "silent Redis connection is replaced");
    redis.disconnect(true);
  }
}

/**
 * PUBLISH for each message of a batch, in one write. To ioredis it is the same command, sent once a message: its text,
 * asked for with the first, is that of all, and the replies come in order. ioredis's own commands take four objects and
 * two promises each.
 */
class PublishBatch {
  readonly name = "publish";
  readonly args: string[] = [];
  /** Keeps ioredis from building a trace for each message. */
  readonly isTraced = true;
  readonly #batch: readonly Outgoing[];
  readonly #errors: (Error | undefined)[];
  readonly #answered = Promise.withResolvers<readonly (Error | undefined)[]>();
  readonly promise = this.#answered.promise;
  #replies = 0;

  constructor(batch: readonly Outgoing[]) {
    this.#batch = batch;
    this.#errors = new Array(batch.length);
  }

  /** Resolves with an error, or nothing, for each message. */
  send(redis: Redis): Promise<readonly (Error | undefined)[]> {
    const command = this as unknown as Command;
    redis.sendCommand(command);
    for (let i = 1; i < this.#batch.length; i++) redis.sendCommand(command, sentAlready);
    return this.promise;
  }

  /** RESP, as ioredis writes it. Asked for once with a stream to write to. */
  toWritable(stream: unknown): string {
    if (stream === sentAlready) return "";
    let text = "";
    for (const { channel, text: message } of this.#batch) {
      text += `*3\r\n$7\r\npublish\r\n$${Buffer.byteLength(channel)}\r\n${channel}\r\n` +
        `$${Buffer.byteLength(message)}\r\n${message}\r\n`;
    }
    return text;
  }

  resolve(): void {
    this.#reply();
  }

  reject(error: Error): void {
    this.#reply(error);
  }

  #reply(error?: Error): void {
    this.#errors[this.#replies++] = error;
    if (this.#replies === this.#errors.length) this.#answered.resolve(this.#errors);
  }
}

/** Where the commands of a batch after the first are written to. */
const sentAlready = { write: () => true } as unknown as NetStream;
type NetStream = NonNullable<Parameters<Redis["sendCommand"]>[1]>;

function tellMissed(channel: Channel): void {
  channel.missed = false;
  for (const member of channel.members) member.missed();
}

function settle(channel: Channel, error?: Error): void {
  channel.asked = channel.confirmed = error === undefined;
  if (channel.confirmed && channel.missed) tellMissed(channel);
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
