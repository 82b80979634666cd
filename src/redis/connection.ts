/**
 * A connection to Redis that is kept: made, proved by what Redis answers, and made anew when it ends. ioredis speaks
 * the protocol; whether a connection serves is decided here, as its status words can be wrong on a dead stream.
 *
 * A connection that has gone silent is only suspected. A second one is made beside it, and takes its place when it
 * answers while the first one still does not: a frozen or paused Redis answers neither, and nothing is lost.
 */

import { Redis } from "ioredis";
import { within } from "../deadline.ts";
import { backoffMs } from "../backoff.ts";
import type { Log } from "../log.ts";
import { isRefused, isReply, reasonOf, repliedOrThrow } from "./errors.ts";
import type { ServerAddress, TcpAddress } from "../redis_url.ts";
import { disconnect, handshakeTimeoutMs, logIn, redisOptions } from "./client.ts";
import { findMasters } from "./sentinel.ts";

/** What a connection is for, in `CLIENT LIST` and in logs. */
export type Purpose = "publisher" | "subscriber" | "reader";

/** What a connection is made of. */
export interface ConnectionOptions {
  readonly purpose: Purpose;
  readonly address: ServerAddress;
  readonly log: Log;
  /** Asks a new connection for what it is needed for. Rejects when Redis refuses. */
  readonly prove: (redis: Redis) => Promise<unknown>;
  /** A connection serves from now on. */
  readonly onUp: () => void;
  /** The one that served is gone, with all that was asked of it and not answered. */
  readonly onDown: () => void;
  /** An attempt to connect has failed. */
  readonly onFailure: (error: unknown) => void;
}

/** Delays between attempts: from the first to one of the others. */
const firstDelayMs = 50;
const maxDelayMs = 1000;
/** Wrong credentials are not right a second later. */
const maxRefusedDelayMs = 5000;
/** A connection that ended sooner has not really served, and the delays go on growing. */
const servedMs = 1000;
/** Silent ticks after the proof of a second connection until it takes over. */
const patienceTicks = 2;

/** One kept connection. */
export class RedisConnection {
  readonly #options: ConnectionOptions;
  /** The one that serves. */
  #client: Redis | undefined;
  /** The server that it leads to, where sentinels named it. */
  #clientMaster: TcpAddress | undefined;
  /** The one that is being made. */
  #candidate: Redis | undefined;
  /** The server of the last attempt, where sentinels named it. */
  #triedMaster: TcpAddress | undefined;
  /** The attempt to make one, from the question to the sentinels until it is proved or given up. */
  #attempt: symbol | undefined;
  /** The second one, proved while the one that serves is silent; and for how many ticks that has been silent since. */
  #spare: Redis | undefined;
  #spareMaster: TcpAddress | undefined;
  #spareTicks = 0;
  #suspected = false;
  #closed = false;
  #failures = 0;
  #upSinceMs = 0;
  #bytesRead = 0;
  /** The last reason that was logged since the last connection. */
  #toldReason: string | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** The ends of former connections. */
  readonly #ending = new Set<Promise<void>>();

  /** Connects, and goes on trying for as long as it lives. */
  constructor(options: ConnectionOptions) {
    this.#options = options;
    this.#connect();
  }

  /** The connection that serves now, if there is one. What is asked of it may never be answered: see `onDown`. */
  get client(): Redis | undefined {
    return this.#client;
  }

  /** The connection that serves, if it takes a command now: else nothing of it would be written. */
  get writable(): Redis | undefined {
    return this.#client?.stream.writable ? this.#client : undefined;
  }

  /** Whether anything was read since the last call. */
  heard(): boolean {
    const bytesRead = this.#client?.stream.bytesRead ?? 0;
    if (bytesRead === this.#bytesRead) return false;
    this.#bytesRead = bytesRead;
    return true;
  }

  /** The connection that serves is silent; called at each tick of the heartbeat while it is. */
  suspect(): void {
    if (this.#client === undefined || this.#closed) return;
    if (this.#spare !== undefined) {
      if (++this.#spareTicks > patienceTicks) this.#replace();
    } else if (!this.#suspected) {
      this.#suspected = true;
      this.#failures = 0;
      this.#connect();
    }
  }

  /** The connection that serves has answered. */
  trust(): void {
    if (!this.#suspected || this.#client === undefined) return;
    this.#suspected = false;
    this.#giveUpAttempt();
  }

  #giveUpAttempt(): void {
    clearTimeout(this.#timer);
    const others = [this.#candidate, this.#spare];
    this.#candidate = this.#spare = this.#attempt = undefined;
    for (const other of others) if (other) this.#letGo(other);
  }

  /** Ends the connection that serves, and makes another one. */
  drop(reason: string): void {
    const client = this.#client;
    if (client === undefined || this.#closed) return;
    this.#options.log.warn({ connection: this.#options.purpose, reason }, "Redis connection replaced");
    this.#down();
    this.#letGo(client);
  }

  /** Ends it for good, and waits until nothing is left of it, which a frozen peer cannot delay. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    for (const redis of [this.#client, this.#candidate, this.#spare]) if (redis) this.#letGo(redis);
    this.#client =
      this.#candidate =
      this.#spare =
      this.#attempt =
        undefined;
    await Promise.all(this.#ending);
  }

  #letGo(redis: Redis): void {
    const ended = disconnect(redis).finally(() => this.#ending.delete(ended));
    this.#ending.add(ended);
  }

  /**
   * The sentinels have named the master, or several servers with as many votes. A connection to any other server is
   * given up, and so is the attempt to make one, which a machine that has vanished would never answer.
   */
  expect(masters: readonly TcpAddress[]): void {
    const isFormer = (server: TcpAddress | undefined) =>
      server !== undefined && !masters.some(({ host, port }) => host === server.host && port === server.port);
    if (this.#closed) return;
    if (isFormer(this.#triedMaster)) {
      this.#triedMaster = undefined;
      this.#failures = 0;
      this.#giveUpAttempt();
      if (this.#client === undefined || this.#suspected) this.#connect();
    }
    if (isFormer(this.#clientMaster)) this.drop("the sentinels name another master");
  }

  async #connect(): Promise<void> {
    const attempt = this.#attempt = Symbol();
    const { address } = this.#options;
    let master: TcpAddress | undefined;
    if ("sentinels" in address) {
      try {
        const masters = await findMasters(address);
        // Several may have as many votes: the next one's turn comes when one was a replica, or dead.
        master = masters[this.#failures % masters.length];
      } catch (error) {
        if (attempt === this.#attempt) this.#failed(error);
        return;
      }
      if (attempt !== this.#attempt || this.#closed) return;
    }
    this.#triedMaster = master;
    const redis = new Redis(redisOptions({ ...address, ...master }));
    this.#candidate = redis;
    const ended = Promise.withResolvers<never>();
    ended.promise.catch(() => {});
    const onEnd = (error: Error) => {
      ended.reject(error);
      if (redis === this.#client) this.#ended(error);
      else if (redis === this.#spare) this.#spareEnded();
    };
    redis.on("error", onEnd);
    redis.on("close", () => onEnd(new Error("Redis hung up")));
    const ready = new Promise<void>((resolve) => redis.once("ready", resolve));
    try {
      const proof = ready.then(() => this.#shakeHands(redis));
      await within(handshakeTimeoutMs, Promise.race([proof, ended.promise]), () => {
        throw new Error(`no answer within ${handshakeTimeoutMs} ms`);
      });
    } catch (error) {
      this.#letGo(redis);
      if (redis === this.#candidate) this.#failed(error);
      return;
    }
    if (redis !== this.#candidate) return;
    this.#candidate = this.#attempt = undefined;
    if (this.#client === undefined) return this.#serve(redis, master);
    this.#spare = redis;
    this.#spareMaster = master;
    this.#spareTicks = 0;
  }

  /** All in one write; the first of Redis's refusals is the one that counts. */
  async #shakeHands(redis: Redis): Promise<void> {
    const { address: { username, password, db }, purpose, prove } = this.#options;
    const asked: Promise<unknown>[] = [];
    if (password !== undefined) asked.push(logIn(redis, username, password));
    if (db !== 0) asked.push(redis.select(db));
    asked.push(redis.client("SETNAME", `wsproxy-${purpose}`).catch(repliedOrThrow), assertMaster(redis), prove(redis));
    for (const answer of await Promise.allSettled(asked)) if (answer.status === "rejected") throw answer.reason;
  }

  #serve(redis: Redis, master: TcpAddress | undefined): void {
    const { log, purpose, onUp } = this.#options;
    this.#client = redis;
    this.#clientMaster = master;
    this.#suspected = false;
    this.#bytesRead = redis.stream.bytesRead;
    this.#upSinceMs = performance.now();
    this.#toldReason = undefined;
    log.info({ connection: purpose, failures: this.#failures, ...master }, "Redis connected");
    onUp();
  }

  /** The connection that served has ended by itself. */
  #ended(error: Error): void {
    const { log, purpose } = this.#options;
    log.warn({ connection: purpose, reason: reasonOf(error) }, "Redis connection lost");
    this.#letGo(this.#client!);
    this.#down();
  }

  #down(): void {
    this.#client = undefined;
    this.#suspected = false;
    this.#failures = performance.now() - this.#upSinceMs < servedMs ? this.#failures + 1 : 0;
    const spare = this.#spare;
    this.#spare = undefined;
    this.#options.onDown();
    if (this.#closed) return;
    if (spare !== undefined) this.#serve(spare, this.#spareMaster);
    else if (this.#attempt === undefined) this.#connectLater(maxDelayMs);
  }

  /** The spare one has answered what the one that serves did not. */
  #replace(): void {
    this.drop("silent, while a new one is answered");
  }

  #spareEnded(): void {
    this.#spare = undefined;
    this.#connectLater(maxDelayMs);
  }

  #failed(error: unknown): void {
    this.#candidate = this.#attempt = undefined;
    const { log, purpose, onFailure } = this.#options;
    const reason = reasonOf(error);
    if (this.#client === undefined && reason !== this.#toldReason) {
      this.#toldReason = reason;
      log.warn({ connection: purpose, reason }, "Redis could not be reached");
    }
    onFailure(error);
    this.#failures++;
    const refused = isReply(error) && /^(WRONGPASS|NOAUTH|NOPERM|ERR (invalid password|AUTH))/.test(error.message);
    this.#connectLater(refused ? maxRefusedDelayMs : maxDelayMs);
  }

  #connectLater(maxMs: number): void {
    clearTimeout(this.#timer);
    if (this.#closed) return;
    this.#timer = setTimeout(() => this.#connect(), backoffMs(this.#failures, firstDelayMs, maxMs));
  }
}

/**
 * Whether the server says that it is a master; false when it does not say what it is, as some providers' do not.
 * @throws {WrongServer} when it is a replica: what is published there reaches only its own subscribers.
 */
export async function assertMaster(redis: Redis): Promise<boolean> {
  let role: unknown;
  try {
    [role] = await redis.call("ROLE") as unknown[];
  } catch (error) {
    if (!isRefused(error)) throw error;
    return false;
  }
  if (String(role) !== "master") throw new WrongServer(`the server is a ${role}, not a master`);
  return true;
}

/** The server that answers is not the one that was looked for. */
export class WrongServer extends Error {
  override readonly name = "WrongServer";
}
