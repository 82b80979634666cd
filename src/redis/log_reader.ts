/**
 * Reads logs, over a connection of its own: a long log must not delay the messages that flow now. It also looks after
 * them: the functions are loaded again when they are gone, and logs that clients are attached to do not expire.
 */

import type { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import { within } from "../deadline.ts";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import type { ServerAddress, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { RedisConnection } from "./connection.ts";
import { isLasting, isRedirected, isReply, LogRefused, reasonOf, Unavailable } from "./errors.ts";
import { type Entry, formatPosition, parseEntries, parseId, type Position } from "./log_entry.ts";
import { LogLibrary } from "./log_library.ts";
import { LogUpkeep } from "./log_upkeep.ts";
import type { Channel } from "./subscriptions.ts";

/** What a reader is made of. */
export interface LogReaderOptions {
  readonly address: ServerAddress;
  readonly log: Log;
  readonly settings: LogSettings;
  /** The server is part of a Cluster. */
  readonly sharded: boolean;
  /** The channels of this server that resuming clients listen to. */
  readonly attached: () => Channel[];
  /** Redis has said that a log belongs to another server. */
  readonly onRedirected: () => void;
  /** An attempt to connect has failed. */
  readonly onConnectFailure: () => void;
}

/** Commands at once, for all sessions: what a storm of resuming clients may take of Redis, and of our memory. */
const maxAtOnce = 8;
/** A connection that has not answered for so long is replaced. */
const timeoutMs = 5000;
/** Time between two looks at the functions, and at the logs whose lives are to be prolonged. */
const lookMs = 1000;
/**
 * After a refusal of a session's own log: how long its clients are served as bare ones, and of how many sessions that
 * is remembered.
 */
const refusedMs = 60_000;
const maxRefused = 1000;
/** How long the same reason is not logged again, and how many reasons are remembered. */
const quietMs = 60_000;
const maxReasons = 100;

/** The reader of all logs of a server. */
export class LogReader {
  readonly #connection: RedisConnection;
  readonly #options: LogReaderOptions;
  readonly #library: LogLibrary;
  readonly #upkeep: LogUpkeep;
  /** The server has our functions, and lets us do what they do, as far as we know; undefined before we know anything. */
  #loaded: boolean | undefined;
  readonly #first = Promise.withResolvers<void>();
  #looking: Promise<void> | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #closed = false;
  #running = 0;
  readonly #waiting: (() => void)[] = [];
  /** Channels whose own log was refused, and until when that is remembered. */
  readonly #refused = new Map<string, number>();
  /** When each reason was last logged. */
  readonly #told = new Map<string, number>();

  /** Connects, and loads the functions. */
  constructor(options: LogReaderOptions) {
    const { address, log, settings, sharded, attached, onConnectFailure } = this.#options = options;
    this.#library = new LogLibrary({ ...settings, sharded, startedMs: Date.now() }, log);
    this.#upkeep = new LogUpkeep(settings.ttlMs, attached);
    this.#connection = new RedisConnection({
      purpose: "reader",
      address,
      log,
      prove: (redis) => this.#load(redis),
      onUp() {},
      onDown() {},
      onFailure: onConnectFailure,
    });
    this.#lookLater();
  }

  /** Whether clients can resume from a log, as far as is known; undefined as long as nothing is. */
  isResumable(channel: string): boolean | undefined {
    return this.#loaded && !((this.#refused.get(channel) ?? 0) > performance.now());
  }

  /** Resolves when something is known of that. */
  get known(): Promise<void> {
    return this.#first.promise;
  }

  /**
   * The position of a log's end. There is a log from then on, and its life begins anew.
   * @throws {Unavailable} when Redis cannot be asked now.
   * @throws {LogRefused} when Redis refuses, and will go on to.
   */
  async open(channel: string): Promise<Position> {
    const id = await this.#askFor(channel, (redis) => redis.call("FCALL", "wsproxy_open", 1, channel));
    return this.#parse(channel, () => parseId(String(id)));
  }

  /**
   * At most `count` entries of a log, from a position on, that one included.
   * @throws {Unavailable} when Redis cannot be asked now.
   * @throws {LogRefused} when Redis refuses, and will go on to.
   */
  async read(channel: string, from: Position, count: number): Promise<Entry[]> {
    const first = from.ms === 0 ? "-" : formatPosition(from);
    const reply = await this.#askFor(
      channel,
      (redis) => redis.callBuffer("XRANGE", channel, first, "+", "COUNT", count),
    );
    return this.#parse(channel, () => parseEntries(reply as [Buffer, Buffer[]][]));
  }

  /** See {@linkcode RedisConnection.expect}. */
  expect(masters: readonly TcpAddress[]): void {
    this.#connection.expect(masters);
  }

  /** The server is not the one to read from any more. */
  drop(reason: string): void {
    this.#connection.drop(reason);
  }

  /** Ends the connection. */
  close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    return this.#connection.close();
  }

  #lookLater(): void {
    this.#timer = setTimeout(async () => {
      await this.#lookAfterLogs();
      if (!this.#closed) this.#lookLater();
    }, lookMs);
  }

  async #lookAfterLogs(): Promise<void> {
    if (this.#connection.writable === undefined) return;
    if (!this.#loaded) return this.#library.mayLoad ? await this.#look() : undefined;
    try {
      await this.#inTime(async (redis) => {
        await this.#library.keep(redis);
        const refusal = await this.#upkeep.step(redis);
        if (refusal) throw refusal;
      });
    } catch (error) {
      if (isRedirected(error)) this.#options.onRedirected();
      else if (isReply(error)) await this.#look();
      else this.#tell("session logs could not be looked after", error);
    }
  }

  /** Finds out whether logs can be kept here, once for all calls that wait for it. */
  #look(): Promise<void> {
    this.#looking ??= this.#inTime((redis) => this.#load(redis))
      .catch((error) => this.#tell("session log's functions could not be loaded", error))
      .finally(() => this.#looking = undefined);
    return this.#looking;
  }

  async #load(redis: Redis): Promise<void> {
    this.#loaded = await this.#library.load(redis);
    this.#first.resolve();
  }

  /** Asks for the log of one session. @throws as {@linkcode LogReader.read} does. */
  async #askFor<T>(channel: string, command: (redis: Redis) => Promise<T>): Promise<T> {
    for (let isFirst = true;; isFirst = false) {
      try {
        return await this.#ask(command);
      } catch (error) {
        if (!isReply(error)) throw error;
        const reason = reasonOf(error);
        if (!isLasting(error)) {
          if (!isRedirected(error)) this.#tell("session logs cannot be read now", error, channel);
          throw new Unavailable(reason);
        }
        // Whether the server refuses all sessions, or this one only.
        if (this.#loaded && !reason.startsWith("WRONGTYPE")) await this.#look();
        if (this.#loaded && isFirst) continue;
        if (this.#loaded) this.#refuse(channel, error);
        throw new LogRefused(reason);
      }
    }
  }

  #parse<T>(channel: string, parse: () => T): T {
    try {
      return parse();
    } catch (error) {
      if (error instanceof LogRefused) this.#refuse(channel, error);
      throw error;
    }
  }

  #refuse(channel: string, error: Error): void {
    this.#tell("session's log cannot be used", error, channel);
    if (this.#refused.size === maxRefused) this.#refused.delete(this.#refused.keys().next().value!);
    this.#refused.set(channel, performance.now() + refusedMs);
  }

  /** Warns; of one reason not more than once a minute, with a channel that it is true of. */
  #tell(message: string, error: unknown, channel?: string): void {
    // A connection that has ended is told of already.
    if (this.#connection.writable === undefined) return;
    const reason = reasonOf(error);
    const nowMs = performance.now();
    if ((this.#told.get(reason) ?? -Infinity) > nowMs - quietMs) return;
    if (this.#told.size === maxReasons) this.#told.clear();
    this.#told.set(reason, nowMs);
    this.#options.log.warn({ channel, reason }, message);
  }

  async #ask<T>(command: (redis: Redis) => Promise<T>): Promise<T> {
    if (this.#running === maxAtOnce) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#running++;
    try {
      return await this.#inTime(command);
    } catch (error) {
      const { address, onRedirected } = this.#options;
      const [, named, port] = isReply(error) && /^ASK \d+ (.*):(\d+)$/.exec(error.message) || [];
      if (port === undefined || !("host" in address)) {
        if (isRedirected(error)) onRedirected();
        throw error;
      }
      // The slot is moving there, and this log is there already. A server may name none but the port.
      const host = named || address.host;
      return await askServer({ ...address, host, port: Number(port) }, timeoutMs, async (redis) => {
        const asking = redis.call("ASKING");
        const [answer] = await Promise.all([command(redis), asking]);
        return answer;
      }).catch(unlessReply);
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    }
  }

  /**
   * @throws {Unavailable} when the connection does not serve, ends, or does not answer in time; and what Redis answers.
   */
  async #inTime<T>(command: (redis: Redis) => Promise<T>): Promise<T> {
    const redis = this.#connection.writable;
    if (redis === undefined) throw new Unavailable("not connected");
    return await within(timeoutMs, command(redis).catch(unlessReply), () => {
      if (redis === this.#connection.client) this.#connection.drop("silent");
      throw new Unavailable(`no answer within ${timeoutMs} ms`);
    });
  }
}

/** Any other error of a command is the end of its connection. */
function unlessReply(error: unknown): never {
  throw isReply(error) ? error : new Unavailable(reasonOf(error));
}
