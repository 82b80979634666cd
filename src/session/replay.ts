/**
 * Catching up with a log. It is read page by page; each page begins with the last entry of the page before, so that a
 * log that has taken the former one's place is noticed. Of what is published meanwhile, messages of the log are dropped,
 * as they will be read, and plain ones are held. What was published during the last read is sent after it, and the
 * client is live.
 *
 * A live client gets the message that comes next in the log, and the first one of a new log: its subscription has not
 * broken since it was live, so nothing was published between the two. When a message is missing, or the times do not
 * fit, the log is read again.
 */

import { Buffer } from "node:buffer";
import { backoffMs } from "../backoff.ts";
import { transportOverheadBytes } from "../overhead.ts";
import { Unavailable } from "../redis/errors.ts";
import { before, beginning, type Entry, follows, isPast, type Position } from "../redis/log_entry.ts";
import type { Room } from "../redis/subscriptions.ts";
import type { Feed, FeedListener } from "./feed.ts";
import { type Dialect, gapNotice, type GapReason, liveNotice, type Notice } from "./frames.ts";

/** Where a log is read from. */
export interface LogSource {
  /** The position of the log's end; there is a log from then on. */
  openLog(): Promise<Position>;
  /** At most `count` entries from a position on, that one included. */
  readLog(from: Position, count: number): Promise<Entry[]>;
}

/** What a replay serves: a session. */
export interface ReplayListener extends FeedListener {
  /** Resolves when there is room for more. */
  room(): Promise<void>;
  /** More is held than one client may cost. */
  tooSlow(): void;
  /** The log could not be read, for so many milliseconds by now. It is tried again unless the replay is stopped. */
  unread(error: unknown, forMs: number): void;
  /** The client has caught up: with all of it, or with what was left of it. */
  caughtUp(result: "complete" | GapReason, seconds: number): void;
}

/** What has come while the log was read, in order. */
type Held =
  | { readonly kind: "logged"; readonly position: Position; readonly envelope: Buffer; readonly payloadAt: number }
  | { readonly kind: "plain"; readonly payload: Buffer }
  | { readonly kind: "action"; readonly action: () => void };

/** Entries of the first page, and bytes that a later one should have. */
const firstPage = 16;
const pageBytes = 256 * 1024;
const maxPage = 1000;
/** What an entry takes of a page besides its payload. */
const entryBytes = 128;
/** Delays while the log cannot be read. */
const firstRetryMs = 50;
const maxRetryMs = 1000;
/** How often in a row a log may vanish between its opening and its reading until there is a pause. */
const maxVanished = 10;

/** One client's place in its session's log. */
export class Replay implements Feed {
  readonly #source: LogSource;
  readonly #listener: ReplayListener;
  readonly #dialect: Dialect;
  readonly #maxHeldBytes: number;
  #position: Position;
  #state: "new" | "reading" | "live" | "stopped" = "new";
  /** Counts catch-ups: one that was overtaken by another does nothing more. */
  #run = 0;
  #held: Held[] = [];
  #heldBytes = 0;
  /** A message has come that was the next one, since the client is live. */
  #streamed = false;
  /** Something of the log did not fit into what is held: the log is to be read again. */
  #dropped = false;
  #result: "complete" | GapReason = "complete";
  /** A gap that is told when it is known where the log begins. */
  #untold: GapReason | undefined;
  /** The position may be one of a former log, which has expired: then all of the present one is new to the client. */
  #isHistory: boolean;
  #retryTimer: ReturnType<typeof setTimeout> | undefined;

  /** How often in a row not even the position was found. */
  #vanished = 0;
  #entriesRead = 0;
  #behindSinceMs = 0;

  /**
   * `position` is the last one that the client has handled; or `isHistory`, and it came with a history that the client
   * has loaded.
   */
  constructor(
    source: LogSource,
    listener: ReplayListener,
    dialect: Dialect,
    position: Position,
    maxHeldBytes: number,
    isHistory = false,
  ) {
    this.#source = source;
    this.#listener = listener;
    this.#dialect = dialect;
    this.#position = position;
    this.#maxHeldBytes = maxHeldBytes;
    this.#isHistory = isHistory;
  }

  get resumes(): boolean {
    return true;
  }

  /** The last position that was sent. */
  get position(): Position {
    return this.#position;
  }

  /** Begins to read, or to read again: something may have been missed. */
  catchUp(): void {
    if (this.#state === "stopped") return;
    this.#state = "reading";
    this.#result = "complete";
    this.#behindSinceMs = performance.now();
    clearTimeout(this.#retryTimer);
    void this.#readUntilLive(++this.#run);
  }

  /** Reading the log shows whether anything is missing. Before the socket is open it is not read. */
  gap(): void {
    if (this.#state !== "new") this.catchUp();
  }

  /** Nothing is sent any more. */
  stop(): void {
    this.#state = "stopped";
    this.#held = [];
    clearTimeout(this.#retryTimer);
  }

  logged(position: Position, envelope: Buffer, payloadAt: number): Room {
    if (this.#state === "live") {
      if (this.#comesNext(position)) {
        this.#position = position;
        this.#streamed = true;
        return this.#listener.send(this.#dialect.published(envelope, payloadAt), true);
      }
      // A message that was read may still arrive. After the first one that was not, an old position is of another log.
      if (!this.#streamed && isPast(position, this.#position)) return "taken";
      this.catchUp();
    }
    const held = () => ({ kind: "logged", position, envelope: Buffer.from(envelope), payloadAt }) as const;
    if (this.#hold(envelope.length, held) === "full") this.#dropped = true;
    return "taken";
  }

  /** Whether it comes right after the last one, or is the first one of a log that has taken the former one's place. */
  #comesNext(position: Position): boolean {
    return follows(position, this.#position) || (position.n === 1 && position.ms > this.#position.ms);
  }

  plain(payload: Buffer): Room {
    if (this.#state === "live") return this.#listener.send(this.#dialect.plain(payload));
    const held = () => ({ kind: "plain", payload: Buffer.from(payload) }) as const;
    if (this.#hold(payload.length, held) === "full") this.#listener.tooSlow();
    return "taken";
  }

  after(action: () => void): void {
    if (this.#state === "live") return action();
    if (this.#hold(0, () => ({ kind: "action", action })) === "full") this.#listener.tooSlow();
  }

  /** Holds something of so many bytes until the log has been read; not when it is full. */
  #hold(bytes: number, held: () => Held): Room {
    if (this.#state === "stopped") return "taken";
    // All that is held is sent at once, when it is sent.
    const heldBytes = this.#heldBytes + bytes + transportOverheadBytes;
    if (heldBytes > this.#maxHeldBytes) return "full";
    this.#heldBytes = heldBytes;
    this.#held.push(held());
    return "taken";
  }

  async #readUntilLive(run: number): Promise<void> {
    const over = () => run !== this.#run || this.#state !== "reading";
    let sinceMs = Infinity;
    let readAtFailure = -1;
    for (let failures = 0;; failures++) {
      try {
        return await this.#read(over);
      } catch (error) {
        if (over()) return;
        const nowMs = performance.now();
        if (this.#entriesRead !== readAtFailure) sinceMs = nowMs;
        readAtFailure = this.#entriesRead;
        this.#listener.unread(error, nowMs - sinceMs);
        if (over()) return;
        await new Promise<void>((resolve) =>
          this.#retryTimer = setTimeout(resolve, backoffMs(failures, firstRetryMs, maxRetryMs))
        );
      }
    }
  }

  async #read(over: () => boolean): Promise<void> {
    let end = await this.#source.openLog();
    for (let count = firstPage; !over();) {
      await this.#listener.room();
      if (over()) return;
      this.#forgetLogged();
      const from = this.#position;
      const entries = await this.#source.readLog(from, count);
      if (over()) return;
      if (entries.length === 0) {
        // Not even the position itself: the log ends before it, or was taken away since it was opened. A Redis that
        // evicts all it can does that each time.
        if (++this.#vanished % maxVanished === 0) throw new Unavailable("the log is gone as soon as it is opened");
        const former = end;
        end = await this.#source.openLog();
        if (over()) return;
        if (!isSame(end, former)) {
          // A gap is told with the position at which the log begins now.
          if (!this.#isHistory) this.#untold = "lost";
          this.#position = beginning;
        } else if (this.#isHistory && end.n === 0) this.#position = end;
        else this.#gap("lost", end);
        continue;
      }
      this.#vanished = 0;
      await this.#sendPage(entries, from, over);
      if (over()) return;
      if (entries.length === count) {
        count = nextCount(entries);
        continue;
      }
      if (this.#goLive()) return;
    }
  }

  /** Messages of the log that were held before a read are among those that it reads. */
  #forgetLogged(): void {
    const held = this.#held;
    this.#held = [];
    this.#heldBytes = 0;
    for (const one of held) {
      if (one.kind === "logged") continue;
      this.#held.push(one);
      this.#heldBytes += (one.kind === "plain" ? one.payload.length : 0) + transportOverheadBytes;
    }
    this.#dropped = false;
  }

  async #sendPage(entries: readonly Entry[], from: Position, over: () => boolean): Promise<void> {
    const first = entries[0]!.position;
    const missing = this.#missing(from, first);
    this.#untold = undefined;
    this.#isHistory = false;
    if (missing !== undefined) this.#gap(missing, before(first));
    for (let i = isSame(first, from) ? 1 : 0; i < entries.length; i++) {
      const { position, payload } = entries[i]!;
      await this.#listener.room();
      if (over()) return;
      // The first one has been judged.
      if (i > 0 && !follows(position, entries[i - 1]!.position)) this.#gap("trimmed", before(position));
      this.#position = position;
      this.#entriesRead++;
      if (payload !== undefined) {
        this.#listener.send(this.#dialect.logged(position, payload), true);
      }
    }
  }

  /** What is missing between a position and the first entry that the log has from there on. */
  #missing(from: Position, first: Position): GapReason | undefined {
    if (this.#untold !== undefined) return this.#untold;
    if (from.ms === 0) return first.n > 1 ? "trimmed" : undefined;
    // After a gap, the position is that of no entry.
    if (isSame(first, from) || isSame(before(first), from)) return undefined;
    // The log is whole, and later than the position: that is of a log which has expired.
    if (this.#isHistory && first.n <= 1) return undefined;
    return first.n > from.n ? "trimmed" : "lost";
  }

  /** Sends what came during the last read. False when a hole in it shows that the log has to be read again. */
  #goLive(): boolean {
    if (this.#dropped) return false;
    while (this.#held.length > 0) {
      const held = this.#held[0]!;
      if (held.kind === "logged") {
        const { position, envelope, payloadAt } = held;
        if (!isPast(position, this.#position)) {
          if (!this.#comesNext(position)) return false;
          this.#position = position;
          this.#listener.send(this.#dialect.published(envelope, payloadAt), true);
        }
      } else if (held.kind === "plain") this.#listener.send(this.#dialect.plain(held.payload));
      this.#held.shift();
      if (held.kind === "action") held.action();
      // What was done, or sent to a client that takes nothing, may have ended the session.
      if (this.#state !== "reading") return true;
    }
    this.#heldBytes = 0;
    this.#streamed = false;
    this.#state = "live";
    this.#tell(liveNotice(this.#position));
    this.#listener.caughtUp(this.#result, (performance.now() - this.#behindSinceMs) / 1000);
    return true;
  }

  /** Something is missing up to a position; what the log still holds comes next after it. */
  #gap(reason: GapReason, position: Position): void {
    this.#result = reason;
    this.#position = position;
    this.#tell(gapNotice(reason, position));
  }

  #tell(notice: Notice): void {
    const frame = this.#dialect.notice(notice);
    if (frame !== undefined) this.#listener.send(frame);
  }
}

const isSame = (one: Position, other: Position): boolean => one.ms === other.ms && one.n === other.n;

/** As many entries as have about the bytes of a page. */
function nextCount(entries: readonly Entry[]): number {
  const bytes = entries.reduce((sum, { payload }) => sum + (payload?.length ?? 0) + entryBytes, 0);
  return Math.max(2, Math.min(maxPage, Math.floor(pageBytes * entries.length / bytes)));
}
