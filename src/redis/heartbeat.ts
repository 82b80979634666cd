/**
 * Whether messages flow: a canary, published on one connection and awaited on the other. When it does not come, a
 * connection that is silent is suspected, and a second one beside it decides whether it or Redis has stopped. While
 * Redis is frozen or away nothing is lost yet: connections are kept, because all will go on where it stopped.
 *
 * The canary proves one server, not the right one: PUBLISH on a replica succeeds and reaches only its own subscribers.
 * So the publisher's connection is asked for its role at every beat. In a Cluster the canary lives in a slot of the
 * server's own, so that what happens to messages happens to it.
 */

import type { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import { within } from "../deadline.ts";
import type { Log } from "../log.ts";
import { assertMaster, type RedisConnection, WrongServer } from "./connection.ts";
import { isRedirected, isReply, reasonOf, Unavailable } from "./errors.ts";
import type { PublishCommand } from "./publish_batch.ts";
import type { Listener } from "./subscriptions.ts";

/** What a heartbeat watches, and what it calls. */
export interface HeartbeatOptions {
  readonly publisher: RedisConnection;
  readonly subscriber: RedisConnection;
  readonly log: Log;
  /** The channel that the canary crosses; no other proxy uses it. */
  readonly channel: string;
  /** How it is published. */
  readonly command: PublishCommand;
  /** The server has redirected the canary: its channel belongs to another one. */
  readonly onRedirected: () => void;
  /** How long an outage may last before `onOutage`, in milliseconds. */
  readonly outageGraceMs: number;
  /** Another beat, while both connections take commands. */
  readonly onBeat: () => void;
  /** The outage has outlasted its grace. Called once per outage. */
  readonly onOutage: () => void;
  /** Messages flow again. */
  readonly onRecovery: () => void;
  /** The canary took so many seconds. */
  readonly onRoundTrip: (seconds: number) => void;
  /** The server is a replica: both connections have been left for that reason. */
  readonly onWrongServer: (reason: string) => void;
}

/** Time between two beats. */
const intervalMs = 500;
/**
 * After so many beats without an answer a connection is silent. Beats are counted, so that a stall of the proxy is not
 * taken for one of Redis.
 */
const silentBeats = 4;
/** Published to prove a connection that does not serve yet; when it arrives, it proves nothing of those that do. */
const proof = "proof";

/** The pulse of a publishing and a subscribing connection; it listens to the canary's channel. */
export class Heartbeat implements Listener {
  readonly #options: HeartbeatOptions;
  #channel: string;
  #sent = 0;
  readonly #waiting = new Map<string, () => void>();
  /** Beats in a row without a canary, and without a byte from either connection. */
  #missed = { canary: 0, publisher: 0, subscriber: 0 };
  /** The last question to the subscriber's connection, until it is answered. */
  #question: Promise<unknown> | undefined;
  /** The publisher's connection, when its server does not say whether it is a master. */
  #roleless: Redis | undefined;
  /** The canary has come back on the present connections. */
  #flowing = false;
  #downSinceMs = performance.now();
  #outageTold = false;
  /** How often a connection that answered, but brought no canary, has been replaced since the canary last came. */
  #replacements = 0;
  #timer: ReturnType<typeof setTimeout>;
  /** When the last canary was published, other than by a probe; 0 once it has come. */
  #pokedAtMs = 0;
  #closed = false;

  /** Begins to beat. */
  constructor(options: HeartbeatOptions) {
    this.#options = options;
    this.#channel = options.channel;
    this.#timer = setTimeout(() => this.#beat(), intervalMs);
  }

  /** Messages flow both ways, as far as the last canaries tell. */
  get flowing(): boolean {
    return this.#flowing;
  }

  /** The channel that the canary crosses. */
  get channel(): string {
    return this.#channel;
  }

  /** The canary crosses another channel from now on. */
  moveTo(channel: string): void {
    this.#channel = channel;
    this.#missed.canary = 0;
  }

  /** Sends a canary at once, as something has changed that it will prove. */
  poke(): void {
    const redis = this.#options.publisher.writable;
    if (redis === undefined || this.#closed) return;
    this.#pokedAtMs = performance.now();
    this.#publish(redis, String(++this.#sent)).catch((error) => {
      if (isRedirected(error)) this.#options.onRedirected();
      else if (isReply(error)) this.#options.log.warn({ reason: reasonOf(error) }, "Redis refused the canary");
    });
  }

  /** A connection has ended: messages do not flow. */
  interrupt(): void {
    this.#missed = { canary: 0, publisher: 0, subscriber: 0 };
    this.#question = undefined;
    if (!this.#flowing) return;
    this.#flowing = false;
    this.#downSinceMs = performance.now();
  }

  /**
   * Proves that messages flow, with one that crosses both connections.
   * @throws {Unavailable} when it did not come back within `timeoutMs` milliseconds, with the reason.
   */
  async probe(timeoutMs: number): Promise<void> {
    const redis = this.#options.publisher.writable;
    if (redis === undefined || this.#options.subscriber.client === undefined) throw new Unavailable("not connected");
    const text = String(++this.#sent);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    this.#waiting.set(text, resolve);
    this.#publish(redis, text).catch((error) => reject(new Unavailable(reasonOf(error))));
    try {
      await within(timeoutMs, promise, () => {
        throw new Unavailable(`no answer within ${timeoutMs} ms`);
      });
    } finally {
      this.#waiting.delete(text);
    }
  }

  /** Ends the beats. */
  close(): void {
    this.#closed = true;
    clearTimeout(this.#timer);
  }

  /** Publishes on a connection that does not serve yet: a paused Redis answers everything but this. */
  prove(redis: Redis): Promise<unknown> {
    return this.#publish(redis, proof);
  }

  #publish(redis: Redis, text: string): Promise<unknown> {
    return redis[this.#options.command](this.#channel, text);
  }

  /** See {@linkcode Listener}. A canary is not kept. */
  readonly backlog = "none";

  /** The canary has come. */
  deliver(message: Buffer): "taken" {
    const text = message.toString();
    if (text !== proof) this.#came(text);
    return "taken";
  }

  #came(text: string): void {
    this.#missed.canary = 0;
    this.#replacements = 0;
    if (this.#pokedAtMs > 0 && text === String(this.#sent)) {
      this.#options.onRoundTrip((performance.now() - this.#pokedAtMs) / 1000);
    }
    this.#pokedAtMs = 0;
    this.#waiting.get(text)?.();
    if (this.#flowing) return;
    this.#flowing = true;
    this.#outageTold = false;
    const outageMs = Math.round(performance.now() - this.#downSinceMs);
    this.#options.log.info({ outageMs }, "messages flow through Redis");
    this.#options.onRecovery();
  }

  /** The canary's channel is subscribed to again. */
  gap(): void {
    this.poke();
  }

  /** The outage that follows from it has been told by then. */
  rejected(): void {}

  /** A bug of ours. */
  fail(error: unknown): void {
    this.#options.log.error({ err: error }, "canary failed");
  }

  #beat(): void {
    this.#timer = setTimeout(() => this.#beat(), intervalMs);
    this.#watch();
    if (!this.#flowing && !this.#outageTold) this.#checkOutage();
    this.#ask();
  }

  #watch(): void {
    const { publisher, subscriber, log } = this.#options;
    const missed = this.#missed;
    for (const [name, connection] of [["publisher", publisher], ["subscriber", subscriber]] as const) {
      if (connection.heard()) {
        missed[name] = 0;
        connection.trust();
        // It still brings what came before the question's answer, and the canary may stand behind that as well.
        if (connection === subscriber && this.#question !== undefined) missed.canary = 0;
      }
    }
    if (missed.canary < silentBeats) return;
    if (this.#flowing) {
      log.warn("no message flows through Redis");
      this.#flowing = false;
      this.#downSinceMs = performance.now();
    }
    if (missed.publisher >= silentBeats) publisher.suspect();
    if (missed.subscriber >= silentBeats) subscriber.suspect();
    if (missed.publisher < silentBeats && missed.subscriber < silentBeats) this.#replaceMute();
  }

  /** Both connections are answered, but no canary crosses: they may lead to different servers. */
  #replaceMute(): void {
    this.#missed.canary = 0;
    const { publisher, subscriber } = this.#options;
    subscriber.drop("no message comes through it");
    if (this.#replacements++ > 0) publisher.drop("no message comes through it");
  }

  /** Sends a canary, and asks each connection for a sign of life. */
  #ask(): void {
    const { publisher, subscriber } = this.#options;
    if (publisher.writable === undefined || subscriber.writable === undefined) return;
    const missed = this.#missed;
    this.#options.onBeat();
    missed.canary++;
    missed.publisher++;
    missed.subscriber++;
    this.poke();
    const question: Promise<unknown> = this.#question = subscriber.writable.ping().catch(() => {}).then(() => {
      if (this.#question === question) this.#question = undefined;
    });
    const asked = publisher.writable;
    if (asked === this.#roleless) return;
    assertMaster(asked).then((knows) => {
      if (!knows) this.#roleless = asked;
    }, (error) => {
      if (!(error instanceof WrongServer) || asked !== publisher.client) return;
      publisher.drop(error.message);
      subscriber.drop(error.message);
      this.#options.onWrongServer(error.message);
    });
  }

  #checkOutage(): void {
    const outageMs = performance.now() - this.#downSinceMs;
    if (outageMs < this.#options.outageGraceMs) return;
    this.#outageTold = true;
    const { log, publisher, subscriber, onOutage } = this.#options;
    log.error({ outageMs: Math.round(outageMs) }, "Redis is gone for longer than the grace");
    onOutage();
    // A connection that is still there has not answered all that time: what was asked over it is given up.
    publisher.drop("silent for longer than the grace");
    subscriber.drop("silent for longer than the grace");
  }
}
