/**
 * One client: relays its messages both ways, keeps its limits and deadlines, and ends once.
 *
 * A session is attached before its socket is open, so what arrives earlier is held. Its end detaches it from Redis
 * first and closes the socket then; a peer that never answers the close is given up after a deadline of ours.
 */

import { Buffer } from "node:buffer";
import type { Config } from "../config.ts";
import type { Deadline, Deadlines } from "../deadline.ts";
import type { Log } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { RateLimit } from "../rate_limit.ts";
import type { Bridge } from "../redis/bridge.ts";
import type { Endpoint, Link, Server } from "../redis/link.ts";
import type { SocketReport } from "../report.ts";
import type { Loss } from "../redis/publisher.ts";
import type { Backlog, Room } from "../redis/subscriptions.ts";
import { type Close, closeLabel, closes, Refusal } from "../replies.ts";
import { LogRefused, Unavailable } from "../redis/errors.ts";
import { envelopeByte, formatPosition, parseEnvelope, type Position } from "../redis/log_entry.ts";
import { type Feed, LiveFeed } from "./feed.ts";
import {
  type Command,
  type Dialect,
  dialects,
  expiringNotice,
  invalidJson,
  invalidToken,
  type Notice,
  pongNotice,
  sentNotice,
  tooLarge,
  unheardNotice,
  unsentNotice,
  type UnsentReason,
} from "./frames.ts";
import { Outbox } from "./outbox.ts";
import { Replay, type ReplayListener } from "./replay.ts";
import { parseNumbered, SoleSocket, type SoleSocketListener } from "./sole_socket.ts";
import type { Tally, Traffic } from "./traffic.ts";
import type { SocketOwner, Transport } from "./transport.ts";

/** What a session is for: the decoded path segments, which the token must match. */
export interface Target {
  /** 1 to 128 characters. */
  readonly agentId: string;
  /** 1 to 128 characters: it names the channels. */
  readonly sessionId: string;
}

/** What a verified token allows. */
export interface Grant {
  /** When the token was made, in seconds since the epoch. */
  readonly issuedAtSecs: number;
  /** When the token runs out, in milliseconds since the epoch; undefined for a token without `exp`. */
  readonly expiresAtMs: number | undefined;
  /** What backends may read of the token, as JSON; empty for nothing. */
  readonly claims: string;
}

/** What all sessions of a proxy share. */
export interface SessionContext {
  /** The settings. */
  readonly config: Config;
  /** Keeps their times. */
  readonly deadlines: Deadlines;
  /** The way to Redis. */
  readonly bridge: Bridge;
  /** The counters. */
  readonly metrics: Metrics;
  /** What is relayed. */
  readonly traffic: Traffic;
  /** Verifies the tokens that a resuming client sends. */
  readonly verify: (token: string, target: Target) => Grant;
  /** What to wait for before a token is verified; undefined where there is never anything. */
  readonly awaitKey?: ((token: string) => Promise<void> | undefined) | undefined;
  /** Where ends are told. */
  readonly log: Log;
}

/** How a client is served, besides what its token says. */
export interface SessionOptions {
  readonly dialect?: Dialect;
  readonly resume?: Position | undefined;
  /** `resume` came with a history that the client has loaded. */
  readonly isHistory?: boolean;
  readonly traceparent?: string | undefined;
  /** Where the client is, for backends; empty when they are not told. */
  readonly address?: string;
}

/** Wait for the engine to open a socket after the 101, and for a peer to answer a close. */
const openDeadlineMs = 5000;
const closeDeadlineMs = 5000;
/** How long before its end a resuming client is told that its token runs out, unless the token is a short one. */
const expiryNoticeMs = 30_000;

/** One client, from its admission to the end of its socket. */
export class Session implements Endpoint, ReplayListener, SocketOwner {
  /** The agent of the path, decoded. */
  readonly agentId: string;
  /** The session of the path, decoded: it names the channels. */
  readonly sessionId: string;
  /** See {@linkcode Endpoint}. */
  readonly traceparent: string;
  /** See {@linkcode Endpoint}. */
  readonly claims: string;
  /** See {@linkcode Endpoint}. */
  readonly address: string;
  readonly #context: SessionContext;
  readonly #link: Link;
  readonly #tally: Tally;
  readonly #onGone: (session: Session) => void;
  #issuedAtSecs: number;
  #expiresAtMs: number | undefined;
  /** When the client is told that its token runs out, in milliseconds since the epoch; `Infinity` once it has been. */
  #expiryNoticeAtMs = Infinity;
  /** Connecting until its socket is open, closing until that has closed or is given up. */
  #state: "connecting" | "open" | "closing" | "closed" = "connecting";
  #socket: Transport | undefined;
  #endedAs: Close = closes.openedTooLate;
  readonly #outbox: Outbox;
  readonly #dialect: Dialect;
  readonly #feed: Feed;
  readonly #rate: RateLimit | undefined;
  #openedAtMs = 0;
  /** What it has moved, for operators. */
  #downBytes = 0;
  #upChars = 0;
  #lastMessageAtMs = 0;
  /** Frames of the client are relayed: while the socket is open, and after some closes as long as frames come. */
  #hears = false;
  /** The newest token that waits for its key. */
  #waitingToken: string | undefined;
  /** Undefined while a session may have several sockets. */
  readonly #sole: SoleSocket | undefined;
  /** The one deadline that counts in the present state: to open, to expire, to answer a close. */
  #deadline: Deadline | undefined;

  /**
   * `onGone` is called once, when nothing is left of the session. A client that resumes has handled the log up to
   * `resume`, and `dialect` is one for it; `traceparent` is that of its handshake.
   */
  constructor(
    target: Target,
    grant: Grant,
    context: SessionContext,
    onGone: (session: Session) => void,
    { dialect = dialects.socket.bare, resume, isHistory, traceparent = "", address = "" }: SessionOptions = {},
  ) {
    this.agentId = target.agentId;
    this.sessionId = target.sessionId;
    this.traceparent = traceparent;
    this.claims = grant.claims;
    this.address = address;
    this.#issuedAtSecs = grant.issuedAtSecs;
    this.#expiresAtMs = grant.expiresAtMs;
    this.#context = context;
    this.#link = context.bridge.link(this.sessionId, this);
    this.#tally = context.traffic.of(this.agentId);
    this.#onGone = onGone;
    const { maxMessagesPerSec, maxBufferBytes, sessionSockets } = context.config.limits;
    this.#outbox = new Outbox(maxBufferBytes, this);
    this.#dialect = dialect;
    this.#feed = resume === undefined
      ? new LiveFeed(this, dialect, context.config.redis.gap)
      : new Replay(this.#link, this, dialect, resume, maxBufferBytes, isHistory);
    if (maxMessagesPerSec > 0) this.#rate = new RateLimit(maxMessagesPerSec);
    if (sessionSockets === "last") this.#sole = new SoleSocket(this.#link, context.deadlines, this.#soleListener);
  }

  /** The socket is open and has not ended. */
  get isOpen(): boolean {
    return this.#state === "open";
  }

  /** Bytes that its socket has not taken yet, also while it is being closed. */
  get bufferedBytes(): number {
    return this.#socket?.bufferedAmount ?? 0;
  }

  /** What operators may know of its socket, which is open. */
  report(): SocketReport {
    const { position } = this.#feed;
    return {
      connection: this.#link.connection,
      agent: this.agentId,
      opened_ms: this.#openedAtMs,
      quiet_ms: this.quietMs,
      expires_ms: this.#expiresAtMs ?? null,
      position: position ? formatPosition(position) : null,
      down_bytes: this.#downBytes,
      up_chars: this.#upChars,
      unsent_bytes: this.bufferedBytes,
    };
  }

  /** It has ended, or will never open. */
  get isOver(): boolean {
    return this.#state === "closing" || this.#state === "closed";
  }

  /** Why it has ended before its socket was open. */
  get endedAs(): Close {
    return this.#endedAs;
  }

  /** When its token was made, in seconds since the epoch. */
  get issuedAtSecs(): number {
    return this.#issuedAtSecs;
  }

  /** Milliseconds since the last message either way, or the open. */
  get quietMs(): number {
    return Date.now() - this.#lastMessageAtMs;
  }

  /** Subscribes. Rejects as {@linkcode Link.attach} does; the session is gone then. */
  async attach(): Promise<void> {
    try {
      const { config, deadlines } = this.#context;
      const { handshakeTimeoutMs } = config.timing;
      const attached = this.#link.attach(handshakeTimeoutMs, deadlines);
      await (this.#sole ? Promise.all([attached, this.#sole.takeNumber(handshakeTimeoutMs)]) : attached);
    } catch (error) {
      this.#detach();
      this.#gone();
      throw error;
    }
  }

  /** The engine opens a socket for it now, or abandons it. */
  awaitSocket(): void {
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
    this.#openedAtMs = this.#lastMessageAtMs = Date.now();
    this.#tally.open++;
    this.#context.metrics.opened.inc();
    this.#disarm();
    const { log } = this.#context;
    if (log.isLevelEnabled("debug")) log.debug(this.#named, "session opened");
    this.#link.opened();
    // It may have run out while Redis was waited for: then this is the end, which comes after what tells of the beginning.
    this.#expireAt(this.#expiresAtMs);
    if (this.#state !== "open") return;
    this.#sole?.open(socket);
    this.#outbox.open(socket);
    this.#feed.catchUp();
  }

  /** See {@linkcode Endpoint}. */
  get backlog(): Backlog {
    return this.#outbox.backlog;
  }

  /** See {@linkcode Endpoint}. */
  get resumes(): boolean {
    return this.#feed.resumes;
  }

  /** What the backend has published. "full" when it is kept, as the client has no room now. */
  deliver(message: Buffer): Room {
    return message[0] === envelopeByte ? this.#deliverEnvelope(message) : this.#feed.plain(message);
  }

  /** What the backend has logged, or a command; what only looks like one is an ordinary message. */
  #deliverEnvelope(message: Buffer): Room {
    const envelope = parseEnvelope(message);
    switch (envelope?.kind) {
      case "logged":
        return this.#feed.logged(envelope.position, message, envelope.payloadAt);
      case "command":
        this.#obey(envelope.name, envelope.json);
        return "taken";
      case undefined:
        return this.#feed.plain(message);
    }
  }

  /** A command to this session; it takes its place in the order of the messages. */
  #obey(name: string, json: string): void {
    const { metrics } = this.#context;
    if (name === "replace") return this.#makeWay(json);
    const close = name === "close" ? parseClose(json) : undefined;
    if (close === undefined) {
      return this.#tellMalformed(name === "close" ? name : "unknown");
    }
    metrics.commands.inc({ command: "close", result: "obeyed" });
    this.#feed.after(() => this.end(close));
  }

  /** A socket of this session has opened where `SESSION_SOCKETS` is `last`. */
  #makeWay(json: string): void {
    if (this.#state !== "open") return;
    if (this.#sole) return this.#sole.hear(json);
    const other = parseNumbered(json);
    if (other === undefined) this.#tellMalformed("replace");
    else if (other.at > this.#openedAtMs * 1000) this.end(closes.replaced);
  }

  #tellMalformed(command: string): void {
    this.#context.metrics.commands.inc({ command, result: "malformed" });
    this.#context.log.warn(this.#named, "unknown or malformed command ignored");
  }

  get #soleListener(): SoleSocketListener {
    return {
      replaced: () => this.end(closes.replaced),
      untold: (error) => {
        this.#context.log.warn({ ...this.#named, reason: error.message }, "other sockets of the session stay open");
      },
      malformed: () => this.#tellMalformed("replace"),
    };
  }

  /** A frame for the client. See {@linkcode FeedListener}. */
  send(frame: string | Buffer, isLogged?: true): Room {
    if (isLogged) this.#tally.logged++;
    if (this.isOver) return "taken";
    this.#lastMessageAtMs = Date.now();
    this.#tally.down++;
    this.#downBytes += frame.length;
    return this.#outbox.send(frame);
  }

  /** Tells the client something. False when clients of its dialect are not told that. */
  #tell(notice: Notice): boolean {
    const frame = this.#dialect.notice(notice);
    if (frame === undefined) return false;
    this.send(frame);
    return true;
  }

  gap(): void {
    if (this.isOver) return;
    if (this.#state === "open") this.#sole?.gap();
    this.#tellGap();
  }

  #tellGap(): void {
    this.#context.metrics.gaps.inc();
    this.#feed.gap();
  }

  /** A frame from the client; anything but a string is a binary frame. */
  receive(data: unknown): void {
    if (!this.#hears) return;
    this.#lastMessageAtMs = Date.now();
    this.#sole?.seen();
    const { metrics } = this.#context;
    const { maxMessageBytes } = this.#context.config.limits;
    if (this.#rate && !this.#rate.take()) return this.end(closes.tooFast);
    if (typeof data !== "string") return this.end(closes.binaryFrame);
    const command = this.#dialect.command(data);
    if (command?.name === "send") return this.#submit(command.id, command.payload);
    if (exceeds(data, maxMessageBytes)) return this.receiveTooBig();
    this.#upChars += data.length;
    if (command !== undefined) return this.#answer(command);
    if (!this.#isValid(data)) {
      this.#tell(invalidJson);
      return;
    }
    if (this.#link.publish(data) === "taken") this.#tally.up++;
    else {
      metrics.upstreamRefused.inc();
      this.end(closes.upstreamFull);
    }
  }

  /** Whether a message may go to the backend. */
  #isValid(text: string): boolean {
    if (!this.#context.config.limits.validateJson || isJson(text)) return true;
    this.#context.metrics.invalidJson.inc();
    return false;
  }

  /**
   * A message whose fate the client wants to know. It has the limits of any message: over one, the session ends alike.
   */
  #submit(id: string, text: string): void {
    const unsent = (reason: UnsentReason) => void this.#tell(unsentNotice(id, reason));
    if (exceeds(text, this.#context.config.limits.maxMessageBytes)) {
      unsent("invalid");
      return this.receiveTooBig();
    }
    this.#upChars += text.length;
    if (!this.#isValid(text)) return unsent("invalid");
    const { metrics } = this.#context;
    const room = this.#link.submit(text, id, (outcome, entered) => {
      const receivers = typeof outcome === "number" ? outcome : 0;
      if (typeof outcome !== "number") metrics.upstreamLost.inc();
      else if (receivers === 0 && entered === false) metrics.unheard.inc();
      if (receivers > 0 || entered) this.#tell(sentNotice(id, receivers, entered ?? false));
      else if (typeof outcome !== "number") unsent(outcome);
      // Its entry may be in the inbox, or be taken soon.
      else unsent(entered === undefined ? "unconfirmed" : "unheard");
    });
    if (room === "taken") this.#tally.up++;
    else {
      metrics.upstreamRefused.inc();
      unsent("refused");
    }
  }

  /** A message over `MAX_MESSAGE_SIZE_BYTES` has come, or is coming. */
  receiveTooBig(): void {
    this.#tell(tooLarge(this.#context.config.limits.maxMessageBytes));
    this.end(closes.tooBig);
  }

  /** Redis rejects the subscription, though messages flow: what was missed cannot be known. */
  rejected(): void {
    this.end(closes.redisGone);
  }

  lost(messages: number, why: Loss): void {
    this.#context.metrics.upstreamLost.inc(messages);
    if (why === "refused") this.end(closes.upstreamRefused);
    else if (why === "unconfirmed" && !this.#tell(unheardNotice(messages))) this.#tellGap();
  }

  unheard(messages: number): void {
    this.#context.metrics.unheard.inc(messages);
    this.#tell(unheardNotice(messages));
  }

  /** The client asks something of the proxy itself. */
  #answer(command: Exclude<Command, { readonly name: "send" }>): void {
    switch (command.name) {
      case "token":
        return this.#renew(command.token);
      case "ping":
        this.#tell(pongNotice(command.text));
        return;
      case "malformed":
        this.#tell(command.complaint);
    }
  }

  /** The client has a new token. A newer one takes the place of one that waits. */
  #renew(token: string): void {
    if (this.#waitingToken !== undefined) {
      this.#waitingToken = token;
      return;
    }
    const known = this.#context.awaitKey?.(token);
    if (known === undefined) return this.#renewNow(token);
    this.#waitingToken = token;
    void known.then(() => {
      const newest = this.#waitingToken!;
      this.#waitingToken = undefined;
      this.#renewNow(newest);
    });
  }

  #renewNow(token: string): void {
    try {
      const { issuedAtSecs, expiresAtMs } = this.#context.verify(token, this);
      if (this.#state !== "open") return;
      this.#issuedAtSecs = issuedAtSecs;
      // A token with the same end is not told of again: a client that asks for a new one and gets the same would ask on.
      if (expiresAtMs !== this.#expiresAtMs) this.#expireAt(expiresAtMs);
    } catch (error) {
      if (!(error instanceof Refusal)) return this.fail(error);
      this.#tell(invalidToken(error.message));
    }
  }

  /** The wall clock has jumped: its token may have run out, or run out later. */
  clockJumped(jumpMs: number): void {
    this.#lastMessageAtMs += jumpMs;
    if (this.#state === "open") this.#armExpiry();
  }

  /** Whether its messages go through a server of Redis. */
  uses(server: Server): boolean {
    return this.#link.uses(server);
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

  /** See {@linkcode ReplayListener}: some errors stay; those that may pass are waited for, but not for ever. */
  unread(error: unknown, forMs: number): void {
    const isRefused = error instanceof LogRefused;
    if (!isRefused && !(error instanceof Unavailable)) return this.fail(error);
    if (!isRefused && forMs < this.#patienceMs) return;
    this.#context.metrics.resumes.inc({ result: "unreadable" });
    this.end(closes.logUnreadable);
  }

  /** Spread, as what keeps one client from its log may keep many. */
  get #patienceMs(): number {
    return this.#context.config.redis.outageGraceMs * (1 + Math.random());
  }

  /** The client takes nothing, or takes it too slowly. */
  tooSlow(): void {
    this.end(closes.tooSlow);
  }

  /** A bug of ours showed while serving this session: it ends, and no other. */
  fail(error: unknown): void {
    this.#context.log.error({ err: error, ...this.#named }, "session failed");
    this.end(closes.internalError);
  }

  #close(close: Close): void {
    const socket = this.#socket!;
    this.#hears = close.hears ?? false;
    // What is held is sent before the close, unless the client is closed because it takes too little.
    if (close === closes.tooSlow) this.#context.metrics.slowClients.inc();
    else this.#outbox.flush();
    this.#finish(close.code, close.reason);
    this.#arm(closeDeadlineMs, () => {
      socket.terminate();
      this.#gone();
    });
    socket.close(close.code, close.reason);
  }

  #finish(code: number, reason?: string): void {
    this.#state = "closing";
    this.#tally.open--;
    this.#sole?.close();
    this.#link.ended(code, this.#feed.position);
    this.#detach();
    this.#disarm();
    const { log, metrics } = this.#context;
    metrics.closed.inc({ code: closeLabel(code) });
    const level = reason === undefined ? "debug" : "info";
    if (log.isLevelEnabled(level)) {
      log[level]({ ...this.#named, code, reason }, "session closed");
    }
  }

  /** Names it in a line of the log. */
  get #named() {
    return { session: this.sessionId, agent: this.agentId, connection: this.#link.connection };
  }

  #gone(): void {
    if (this.#state === "closed") return;
    this.#state = "closed";
    this.#hears = false;
    this.#socket = undefined;
    this.#disarm();
    this.#onGone(this);
  }

  /** See {@linkcode ReplayListener}. */
  room(): Promise<void> {
    return this.#outbox.room();
  }

  /** See {@linkcode ReplayListener}. */
  caughtUp(result: string, seconds: number): void {
    this.#context.metrics.resumes.inc({ result });
    this.#context.metrics.catchUp.observe(seconds);
  }

  #detach(): void {
    this.#feed.stop();
    this.#outbox.close();
    this.#link.detach();
  }

  #disarm(): void {
    this.#deadline?.cancel();
    this.#deadline = undefined;
  }

  #arm(delayMs: number, action: () => void): void {
    this.#deadline?.cancel();
    this.#deadline = this.#context.deadlines.set(delayMs, action);
  }

  /** A token with this end has been accepted. */
  #expireAt(expiresAtMs: number | undefined): void {
    this.#expiresAtMs = expiresAtMs;
    if (expiresAtMs === undefined) return this.#disarm();
    // A client that renews with short tokens has half of each to itself, and is not told again at once.
    this.#expiryNoticeAtMs = expiresAtMs - Math.min(expiryNoticeMs, (expiresAtMs - Date.now()) / 2);
    this.#armExpiry();
  }

  #armExpiry(): void {
    if (this.#expiresAtMs === undefined) return;
    const nowMs = Date.now();
    const leftMs = this.#expiresAtMs - nowMs;
    if (leftMs <= 0) return this.end(closes.tokenExpired);
    const isDue = nowMs >= this.#expiryNoticeAtMs;
    if (isDue) this.#expiryNoticeAtMs = Infinity;
    // What is told may end the session, which has another deadline then.
    this.#arm(Math.min(this.#expiryNoticeAtMs - nowMs, leftMs), () => this.#armExpiry());
    if (isDue) this.#tell(expiringNotice(leftMs));
  }
}

/** Whether a text is longer than `maxBytes` in UTF-8, which takes 1 to 3 bytes a UTF-16 unit. */
function exceeds(text: string, maxBytes: number): boolean {
  if (text.length * 3 <= maxBytes) return false;
  return text.length > maxBytes || Buffer.byteLength(text) > maxBytes;
}

/** Whether a text is JSON. */
export function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

/** The close that a backend asks for; undefined when a frame could not carry it. */
export function parseClose(json: string): Close | undefined {
  try {
    const { code, reason = "" } = JSON.parse(json);
    const ok = Number.isInteger(code) && (code === 1000 || (code >= 3000 && code <= 4999)) &&
      typeof reason === "string" && Buffer.byteLength(reason) <= 123;
    return ok ? { code, reason, when: "a backend closed it", advice: "as the backend defines" } : undefined;
  } catch {
    return undefined;
  }
}
