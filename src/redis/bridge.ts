/**
 * Sessions to Redis: a session opens a {@linkcode Link}, over which the messages of its down channel come and those of
 * its up channel go. A few connections serve all sessions; redis/shard.ts has what is behind it.
 */

import { within } from "../deadline.ts";
import type { Redis } from "ioredis";
import type { InboxSettings, LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import type { Member } from "./inbox.ts";
import { isReply, reasonOf, SubscribeTimeout, Unavailable } from "./errors.ts";
import type { Loss, Source } from "./publisher.ts";
import { commandText } from "./publish_batch.ts";
import { type Entry, formatPosition, type Position } from "./log.ts";
import { LogReader } from "./log_reader.ts";
import { Shard } from "./shard.ts";
import type { Channel, Listener } from "./subscriptions.ts";
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
  /** What backends want to read of all that happens; undefined for nothing. */
  readonly inbox?: InboxSettings;
  /** So many entries of inboxes have been written. */
  readonly onEntries?: (count: number) => void;
  /** So many entries of inboxes will never be. */
  readonly onEntriesLost?: (count: number) => void;
  /** Hears the control channel. */
  readonly control?: Control;
}

/** Who obeys what is for many sessions. */
export interface Control extends Listener {
  /** Tokens of an agent, or of all agents by "*", are revoked that were issued before; in seconds since the epoch. */
  revoked(agentId: string, beforeSecs: number): void;
}

/** The way of all sessions to Redis. */
export class Bridge {
  readonly #maxPendingCost: number;
  readonly #shard: Shard;
  readonly #logReader: LogReader;
  readonly #log: Log;
  readonly #control: Control | undefined;
  /** Begins the names of our connections, which no other proxy uses. */
  readonly #id = crypto.randomUUID().slice(0, 8);
  #links = 0;
  #connectFailures = 0;

  /** Connects, and goes on trying for as long as it lives. */
  constructor({ maxPendingCost, logs, inbox, onEntries, onEntriesLost, control, ...options }: BridgeOptions) {
    this.#maxPendingCost = maxPendingCost;
    this.#log = options.log;
    this.#control = control;
    const onConnectFailure = () => this.#connectFailures++;
    const nobody = () => {};
    this.#shard = new Shard({
      ...options,
      onConnectFailure,
      onMaster: (master) => this.#logReader.expect(master),
      onWrongServer: (reason) => this.#logReader.leave(reason),
      learn: (redis) => this.#learnRevoked(redis),
      inbox: inbox && { settings: inbox, onEntries: onEntries ?? nobody, onLost: onEntriesLost ?? nobody },
    });
    if (control) this.#shard.subscriptions.add(controlChannel, control);
    this.#logReader = new LogReader({ address: options.address, log: options.log, settings: logs, onConnectFailure });
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get available(): boolean {
    return this.#shard.flowing;
  }

  /** Channels subscribed to, the canary's and the one for control included. */
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
    const connection = `${this.#id}-${++this.#links}`;
    return new Link(this.#shard, this.#logReader, sessionId, connection, endpoint, this.#maxPendingCost);
  }

  /**
   * Publishes one message to a session's up channel, and says how many have received it, and whether it is in an inbox.
   * @throws {Unavailable} when that is not known in time.
   */
  async publish(agentId: string, sessionId: string, text: string): Promise<{ receivers: number; entered: boolean }> {
    const { inbox, publisher } = this.#shard;
    let entered = false;
    const receivers = await publisher.publishNow(upChannel(sessionId), text, inbox?.posted(agentId, sessionId, text), {
      done(error) {
        entered = error === undefined;
        inbox?.told(error);
      },
    });
    return { receivers, entered };
  }

  /** Lets all proxies know, now and when they connect, that older tokens of an agent, or of all by "*", are revoked. */
  revoke(agentId: string, beforeSecs: number): void {
    const keepNewest = "local set = redis.call('HGET', KEYS[1], ARGV[1]) " +
      "if not set or set + 0 < ARGV[2] + 0 then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end return 1";
    this.#shard.publisher.command(commandText("EVAL", keepNewest, 1, revokedKey, agentId, beforeSecs), nobody, {
      done: (error) => {
        if (error) this.#log.error({ reason: reasonOf(error) }, "revocation could not be kept in Redis");
      },
    });
  }

  async #learnRevoked(redis: Redis): Promise<void> {
    if (this.#control === undefined) return;
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

/** Sends commands that no client waits for. */
const nobody: Source = { pendingCost: 0, discarded: false, entered: true, lost() {}, unheard() {} };

/** Closes the others' sockets; PUBLISH from a script, as text cannot hold the envelope's first byte. */
const replaceScript = "return redis.call('PUBLISH', KEYS[1], '\\255!replace\\n' .. ARGV[1])";

/** One session's way to its two channels. */
export class Link implements Source {
  readonly #shard: Shard;
  readonly #logReader: LogReader;
  readonly #endpoint: Endpoint;
  readonly #down: string;
  readonly #up: string;
  readonly #maxPendingCost: number;
  /** In the agent's inbox, if there is one. */
  readonly #member: Member | undefined;
  #channel: Channel | undefined;
  /** See {@linkcode Source}. */
  pendingCost = 0;
  /** See {@linkcode Source}. */
  discarded = false;
  /** See {@linkcode Source}. */
  entered = false;

  /** Made by {@linkcode Bridge.link}. */
  constructor(
    shard: Shard,
    logReader: LogReader,
    sessionId: string,
    /** Names this connection, and no other of any proxy. */
    readonly connection: string,
    endpoint: Endpoint,
    maxPendingCost: number,
  ) {
    this.#shard = shard;
    this.#logReader = logReader;
    this.#endpoint = endpoint;
    this.#down = downChannel(sessionId);
    this.#up = upChannel(sessionId);
    this.#maxPendingCost = maxPendingCost;
    this.#member = shard.inbox?.member(endpoint.agentId, sessionId, connection, this);
  }

  /** The client's socket has opened: backends read so before its first message. */
  opened(): void {
    this.#member?.opened();
  }

  /** The client's socket has ended; `position` is the last one that was sent to a resuming client. */
  ended(code: number, position: Position | undefined): void {
    this.#member?.ended(code, position ? formatPosition(position) : "");
  }

  /** Tells every socket of the session, on every proxy, that this one takes their place. */
  replaceOthers(onRefused: () => void): void {
    const json = JSON.stringify({ connection: this.connection });
    const command = commandText("EVAL", replaceScript, 1, this.#down, json);
    const sent = this.#shard.publisher.command(command, nobody, { done: (error) => error && onRefused() });
    if (!sent) onRefused();
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
    const member = this.#member;
    return this.#shard.publisher.publish(this.#up, text, this, this.#maxPendingCost, member?.entry(text), member);
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
