/** Reads logs, over a connection of its own: a long log must not keep messages waiting that flow now. */

import type { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import { within } from "../deadline.ts";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import type { ServerAddress, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { Connection } from "./connection.ts";
import { isElsewhere, isReply, Unavailable } from "./errors.ts";
import { type Entry, formatPosition, parseEntries, parsePosition, type Position } from "./log.ts";
import { LogLibrary } from "./log_library.ts";

/** What a reader is made of. */
export interface LogReaderOptions {
  readonly address: ServerAddress;
  readonly log: Log;
  readonly settings: LogSettings;
  /** The server is part of a Cluster. */
  readonly sharded: boolean;
  /** Redis has said that a log belongs to another server. */
  readonly onElsewhere: () => void;
  /** An attempt to connect has failed. */
  readonly onConnectFailure: () => void;
}

/** Commands at once, for all sessions: what a storm of resuming clients may take of Redis, and of our memory. */
const maxAtOnce = 8;
/** A connection that has not answered for so long is replaced. */
const timeoutMs = 5000;

/** The reader of all logs of a server. */
export class LogReader {
  readonly #connection: Connection;
  readonly #options: LogReaderOptions;
  #loaded = false;
  #running = 0;
  readonly #waiting: (() => void)[] = [];

  /** Connects, and loads the functions. */
  constructor(options: LogReaderOptions) {
    const { address, log, settings, sharded, onConnectFailure } = this.#options = options;
    const library = new LogLibrary({ ...settings, sharded, startedMs: Date.now() }, log);
    this.#connection = new Connection({
      purpose: "reader",
      address,
      log,
      prove: async (redis) => this.#loaded = await library.load(redis),
      onUp() {},
      onDown() {},
      onFailure: onConnectFailure,
    });
  }

  /** The server has our functions, as far as the last connection could tell: clients can resume. */
  get resumable(): boolean {
    return this.#loaded;
  }

  /**
   * The position of a log's end. There is a log from then on, and its life begins anew.
   * @throws {Unavailable} when Redis cannot be asked now.
   */
  async open(channel: string): Promise<Position> {
    const id = await this.#ask((redis) => redis.call("FCALL", "wsproxy_open", 1, channel));
    return parsePosition(String(id))!;
  }

  /**
   * At most `count` entries of a log, from a position on, that one included.
   * @throws {Unavailable} when Redis cannot be asked now.
   */
  async read(channel: string, from: Position, count: number): Promise<Entry[]> {
    const reply = await this.#ask((redis) =>
      redis.callBuffer("XRANGE", channel, from.ms === 0 ? "-" : formatPosition(from), "+", "COUNT", count)
    );
    return parseEntries(reply as [Buffer, Buffer[]][]);
  }

  /** See {@linkcode Connection.expect}. */
  expect(masters: readonly TcpAddress[]): void {
    this.#connection.expect(masters);
  }

  /** The server is not the one to read from any more. */
  leave(reason: string): void {
    this.#connection.drop(reason);
  }

  /** Ends the connection. */
  close(): Promise<void> {
    return this.#connection.close();
  }

  async #ask<T>(command: (redis: Redis) => Promise<T>): Promise<T> {
    if (this.#running === maxAtOnce) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#running++;
    try {
      const redis = this.#connection.writable;
      if (redis === undefined) throw new Unavailable("not connected");
      return await within(timeoutMs, command(redis), () => {
        if (redis === this.#connection.client) this.#connection.drop("silent");
        throw new Unavailable(`no answer within ${timeoutMs} ms`);
      });
    } catch (error) {
      const { address, onElsewhere } = this.#options;
      const [, named, port] = isReply(error) && /^ASK \d+ (.*):(\d+)$/.exec(error.message) || [];
      if (port === undefined || !("host" in address)) {
        if (isElsewhere(error)) onElsewhere();
        throw error;
      }
      // The slot is moving there, and this log is there already. A server may name none but the port.
      const host = named || address.host;
      return await askServer({ ...address, host, port: Number(port) }, timeoutMs, async (redis) => {
        const asking = redis.call("ASKING");
        const [answer] = await Promise.all([command(redis), asking]);
        return answer;
      });
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#running--;
    }
  }
}
