/** What a session delivers of its channel: as it comes, to a bare client; replay.ts is that of a client that resumes. */

import type { Buffer } from "node:buffer";
import type { Position } from "../redis/log_entry.ts";
import type { Room } from "../redis/subscriptions.ts";
import { type Close, closes } from "../replies.ts";
import { type Dialect, missedNotice } from "./frames.ts";

/** From a session's channel to its client. */
export interface Feed {
  /** Its client resumes from the log. */
  readonly resumes: boolean;
  /** The last position that was sent; undefined for a client that does not resume. */
  readonly position: Position | undefined;
  /** The client's socket is open: what it has missed is sent, where there is a log. */
  catchUp(): void;
  /** Something may have been missed. */
  gap(): void;
  /**
   * A message of the log has been published. Its envelope is part of what was read with it. "full" when the client has
   * no room now.
   */
  logged(position: Position, envelope: Buffer, payloadAt: number): Room;
  /** The same for a message that is in no log. */
  plain(payload: Buffer): Room;
  /** Something is to be done when all that was published before has been sent. */
  after(action: () => void): void;
  /** Nothing is sent any more. */
  stop(): void;
}

/** What a feed serves: a session. */
export interface FeedListener {
  /** Sends a frame; whether it is an entry of the log. "full" when it is kept, as there is no room now. */
  send(frame: string | Buffer, isLogged?: true): Room;
  /** The client cannot be served any longer. */
  end(close: Close): void;
}

/** The feed of a bare client: what is published while it is there. */
export class LiveFeed implements Feed {
  readonly #listener: FeedListener;
  readonly #dialect: Dialect;
  readonly #onGap: "notify" | "close" | "ignore";

  /** `onGap` is `REDIS_GAP`. */
  constructor(listener: FeedListener, dialect: Dialect, onGap: "notify" | "close" | "ignore") {
    this.#listener = listener;
    this.#dialect = dialect;
    this.#onGap = onGap;
  }

  get resumes(): boolean {
    return false;
  }

  get position(): undefined {
    return undefined;
  }

  catchUp(): void {}

  gap(): void {
    if (this.#onGap === "close") return this.#listener.end(closes.gap);
    const frame = this.#onGap === "notify" ? this.#dialect.notice(missedNotice) : undefined;
    if (frame !== undefined) this.#listener.send(frame);
  }

  logged(_position: Position, envelope: Buffer, payloadAt: number): Room {
    return this.#listener.send(this.#dialect.published(envelope, payloadAt), true);
  }

  plain(payload: Buffer): Room {
    return this.#listener.send(this.#dialect.plain(payload));
  }

  after(action: () => void): void {
    action();
  }

  stop(): void {}
}
