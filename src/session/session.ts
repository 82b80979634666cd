/**
 * One client: relays its messages both ways, keeps its limits and deadlines, and ends once.
 *
 * A session is attached before its socket is open, so what arrives earlier is held. Its end detaches it from Redis
 * first and closes the socket then; a peer that never answers the close is given up after a deadline of ours.
 */

import { Buffer } from "node:buffer";
import type { Config } from "../config.ts";
import type { Log } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { RateLimit } from "../rate_limit.ts";
import type { Bridge, Endpoint, Link } from "../redis/bridge.ts";
import type { Loss } from "../redis/publisher.ts";
import { type Close, closes, gapNotice, invalidJson, messageTooLarge } from "../replies.ts";
import { Outbox } from "./outbox.ts";
import type { Transport } from "./transport.ts";

/** Whom a session is for: the decoded path segments, which the token must match. */
export interface Target {
  /** 1 to 128 characters. */
  readonly agentId: string;
  /** 1 to 128 characters: it names the channels. */
  readonly sessionId: string;
}

/** What a verified token allows. */
export interface Grant {
  /** When the token runs out, in milliseconds since the epoch; undefined for a token without `exp`. */
  readonly expiresAtMs: number | undefined;
}

/** What all sessions of a proxy share. */
export interface SessionContext {
  /** The settings. */
  readonly config: Config;
  /** The way to Redis. */
  readonly bridge: Bridge;
  /** The counters. */
  readonly metrics: Metrics;
  /** Messages taken for clients' sockets, and accepted from clients: counted for each, so as plain numbers. */
  readonly traffic: { down: number; up: number };
  /** Where ends are told. */
  readonly log: Log;
}

/** Wait for the engine to open a socket after the 101, and for a peer to answer a close. */
const openDeadlineMs = 5000;
const closeDeadlineMs = 5000;
/** The longest delay a timer can hold; a longer one would fire at once. */
const maxTimerMs = 2 ** 31 - 1;

/** One client, from its admission to the end of its socket. */
export class Session implements Endpoint {
  /** The agent of the path, decoded. */
  readonly agentId: string;
  /** The session of the path, decoded: it names the channels. */
  readonly sessionId: string;
  readonly #context: SessionContext;
  readonly #link: Link;
  readonly #onGone: (session: Session) => void;
  readonly #expiresAtMs: number | undefined;
  /** Connecting until its socket is open, closing until that has closed or is given up. */
  #state: "connecting" | "open" | "closing" | "closed" = "connecting";
  #socket: Transport | undefined;
  /** What to close a socket with that opens after the session has ended. */
  #endedAs: Close = closes.openedTooLate;
  readonly #outbox: Outbox;
  readonly #rate: RateLimit | undefined;
  #lastMessageAtMs = 0;
  /** Frames of the client are relayed: while the socket is open, and after some closes as long as frames come. */
  #hears = false;
  /** The one deadline that counts in the present state: to open, to expire, to answer a close. */
  #deadline: ReturnType<typeof setTimeout> | undefined;

  /** `onGone` is called once, when nothing is left of the session. */
  constructor(target: Target, grant: Grant, context: SessionContext, onGone: (session: Session) => void) {
    this.agentId = target.agentId;
    this.sessionId = target.sessionId;
    this.#expiresAtMs = grant.expiresAtMs;
    this.#context = context;
    this.#link = context.bridge.link(this.sessionId, this);
    this.#onGone = onGone;
    const { maxMessagesPerSec, maxBufferBytes } = context.config.limits;
    this.#outbox = new Outbox(maxBufferBytes, () => this.end(closes.tooSlow));
    if (maxMessagesPerSec > 0) this.#rate = new RateLimit(maxMessagesPerSec);
  }

  /** The socket is open and has not ended. */
  get isOpen(): boolean {
    return this.#state === "open";
  }

  /** It has ended, or will never open. */
  get isOver(): boolean {
    return this.#state === "closing" || this.#state === "closed";
  }

  /** Milliseconds since the last message either way, or the open. */
  get quietMs(): number {
    return Date.now() - this.#lastMessageAtMs;
  }

  /** Subscribes. Rejects as {@linkcode Link.attach} does; the session is gone then. */
  async attach(): Promise<void> {
    try {
      await this.#link.attach(this.#context.config.timing.handshakeTimeoutMs);
    } catch (error) {
      this.#gone();
      throw error;
    }
    if (this.#state !== "connecting") return;
    this.#arm(openDeadlineMs, () => {
      this.#context.metrics.unopened.inc();
      this.abandon();
    });
  }

  /** The request has gone before it became a socket. */
  abandon(): void {
    if (this.#state !== "connecting") return;
    this.#detach();
    this.#gone();
  }

  /** The engine has opened the socket. */
  open(socket: Transport): void {
    if (this.#state !== "connecting") return socket.close(this.#endedAs.code, this.#endedAs.reason);
    this.#state = "open";
    this.#hears = true;
    this.#socket = socket;
    this.#lastMessageAtMs = Date.now();
    this.#context.metrics.opened.inc();
    clearTimeout(this.#deadline);
    this.#armExpiry();
    const { log } = this.#context;
    if (log.isLevelEnabled("debug")) log.debug({ session: this.sessionId, agent: this.agentId }, "session opened");
    this.#outbox.open(socket);
  }

  /** A message for the client: the backend's, or ours about a mistake of the client's. True when it has no room. */
  deliver(message: string | Buffer): boolean {
    if (this.isOver) return false;
    this.#lastMessageAtMs = Date.now();
    this.#context.traffic.down++;
    return this.#outbox.send(message);
  }

  gap(): void {
    if (this.isOver) return;
    this.#context.metrics.gaps.inc();
    const policy = this.#context.config.redis.gap;
    if (policy === "notify") this.deliver(gapNotice);
    else if (policy === "close") this.end(closes.gap);
  }

  /** A frame from the client; anything but a string is a binary frame. */
  receive(data: unknown): void {
    if (!this.#hears) return;
    this.#lastMessageAtMs = Date.now();
    const { metrics } = this.#context;
    const { limits } = this.#context.config;
    if (this.#rate && !this.#rate.take()) return this.end(closes.tooFast);
    if (typeof data !== "string") return this.end(closes.binaryFrame);
    if (exceeds(data, limits.maxMessageBytes)) return this.receiveTooBig();
    if (limits.validateJson && !isJson(data)) {
      metrics.invalidJson.inc();
      this.deliver(invalidJson);
      return;
    }
    if (this.#link.publish(data)) this.#context.traffic.up++;
    else {
      metrics.upstreamRefused.inc();
      this.end(closes.upstreamFull);
    }
  }

  /** A message over `MAX_MESSAGE_SIZE_BYTES` has come, or is coming. */
  receiveTooBig(): void {
    this.deliver(messageTooLarge(this.#context.config.limits.maxMessageBytes));
    this.end(closes.tooBig);
  }

  /** Redis rejects the subscription, though messages flow: nobody can tell what was missed. */
  rejected(): void {
    this.end(closes.redisGone);
  }

  lost(messages: number, why: Loss): void {
    this.#context.metrics.upstreamLost.inc(messages);
    if (why === "refused") this.end(closes.upstreamRefused);
    else if (why === "broke") this.gap();
  }

  /** Ends the session because Redis is gone: what it has not published yet is lost, and its close code says so. */
  forsake(): void {
    this.#link.discard();
    this.end(closes.redisGone);
  }

  /** Ends the session from our side: detach, then close, then give up. The first end counts, all others do nothing. */
  end(close: Close): void {
    switch (this.#state) {
      case "connecting":
        this.#endedAs = close;
        return this.abandon();
      case "open":
        return this.#close(close);
      case "closing":
      case "closed":
    }
  }

  /** The engine reports that the socket has closed, with the code that RFC 6455, section 7.1.5 gives to that. */
  closed(code: number): void {
    switch (this.#state) {
      case "connecting":
        return this.abandon();
      case "open":
        this.#finish(code);
        return this.#gone();
      case "closing":
        return this.#gone();
      case "closed":
    }
  }

  /** A bug of ours showed while serving this session: it ends, and no other. */
  fail(error: unknown): void {
    this.#context.log.error({ err: error, session: this.sessionId }, "session failed");
    this.end(closes.internalError);
  }

  #close(close: Close): void {
    const socket = this.#socket!;
    this.#hears = close.hears ?? false;
    // What it could not take in time it gets before the close, unless that is why it is closed.
    if (close !== closes.tooSlow) this.#outbox.flush();
    this.#finish(close.code, close.reason);
    this.#arm(closeDeadlineMs, () => {
      socket.terminate();
      this.#gone();
    });
    socket.close(close.code, close.reason);
  }

  #finish(code: number, reason?: string): void {
    this.#state = "closing";
    this.#socket = undefined;
    this.#detach();
    clearTimeout(this.#deadline);
    const { log, metrics } = this.#context;
    metrics.closed.inc({ code });
    const level = reason === undefined ? "debug" : "info";
    if (log.isLevelEnabled(level)) {
      log[level]({ session: this.sessionId, agent: this.agentId, code, reason }, "session closed");
    }
  }

  #gone(): void {
    if (this.#state === "closed") return;
    this.#state = "closed";
    this.#hears = false;
    clearTimeout(this.#deadline);
    this.#onGone(this);
  }

  #detach(): void {
    this.#outbox.close();
    this.#link.detach();
  }

  #arm(delayMs: number, action: () => void): void {
    clearTimeout(this.#deadline);
    this.#deadline = setTimeout(action, Math.min(delayMs, maxTimerMs));
  }

  #armExpiry(): void {
    if (this.#expiresAtMs === undefined) return;
    const leftMs = this.#expiresAtMs - Date.now();
    if (leftMs <= 0) this.end(closes.tokenExpired);
    else this.#arm(leftMs, () => this.#armExpiry());
  }
}

/** Whether a text is longer than `maxBytes` in UTF-8, which takes 1 to 3 bytes a UTF-16 unit. */
function exceeds(text: string, maxBytes: number): boolean {
  if (text.length * 3 <= maxBytes) return false;
  return text.length > maxBytes || Buffer.byteLength(text) > maxBytes;
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
