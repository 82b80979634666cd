/**
 * `SESSION_SOCKETS=last`: of a session's sockets the one that opened last stays, as their client sees it. So each has a
 * number before the client is told that it is open, from one clock for all proxies, and a socket ends when it hears of a
 * higher one.
 *
 * A page that is loaded again may leave a socket behind that it has never seen open, with a higher number than the next
 * one has. So a socket tells the others only when its client has shown that it has it.
 */

import { type Deadline, type Deadlines, within } from "../deadline.ts";
import { SubscribeTimeout } from "../redis/errors.ts";
import type { Link } from "../redis/link.ts";
import type { Transport } from "./transport.ts";

/** How long a client must have had its socket where the engine cannot ask for a sign of life. */
const momentMs = 500;

/** What its session does. */
export interface SoleSocketListener {
  /** A newer one has opened. */
  replaced(): void;
  /** Redis has refused to tell the others. */
  untold(error: Error): void;
  /** What another socket has told is malformed. */
  malformed(): void;
}

/** One socket among those of its session, on this proxy and on others. */
export class SoleSocket {
  readonly #link: Link;
  readonly #deadlines: Deadlines;
  readonly #listener: SoleSocketListener;
  #number = 0;
  /** Its client has it, and the others have been told. */
  #told = false;
  #closed = false;
  #moment: Deadline | undefined;

  /** It has no number yet. */
  constructor(link: Link, deadlines: Deadlines, listener: SoleSocketListener) {
    this.#link = link;
    this.#deadlines = deadlines;
    this.#listener = listener;
  }

  /**
   * Takes its number: the client must not have been told before that the socket is open. Rejects as `Link.attach` does,
   * which goes on meanwhile.
   */
  async takeNumber(timeoutMs: number): Promise<void> {
    this.#number = await within(timeoutMs, this.#link.now(), () => {
      throw new SubscribeTimeout(`no number within ${timeoutMs} ms`);
    });
  }

  /** It has opened, as far as the engine knows. */
  open(socket: Transport): void {
    const seen = () => this.seen();
    if (socket.ask) socket.ask(seen);
    else this.#moment = this.#deadlines.set(momentMs, seen);
  }

  /** Its client has shown that it has it: by an answer, or by a message. */
  seen(): void {
    if (this.#told || this.#closed) return;
    this.#told = true;
    this.#moment?.cancel();
    this.#tellOthers();
  }

  /** The word of a newer socket may have been missed. This one tells of itself again, and a newer one answers that. */
  gap(): void {
    if (this.#told) this.#tellOthers();
  }

  /** Another socket of this session has told of itself, on this proxy or on another. */
  hear(json: string): void {
    const other = parseNumbered(json);
    if (other === undefined) return this.#listener.malformed();
    const { connection, at } = other;
    if (connection === this.#link.connection) return;
    const isNewer = at === this.#number ? connection > this.#link.connection : at > this.#number;
    if (isNewer) this.#listener.replaced();
    else if (this.#told) this.#tellOthers();
  }

  /** It has ended. */
  close(): void {
    this.#closed = true;
    this.#moment?.cancel();
  }

  #tellOthers(): void {
    const json = JSON.stringify({ connection: this.#link.connection, at: this.#number });
    this.#link.replaceOthers(json, (error) => this.#listener.untold(error));
  }
}

/** Which socket a `!replace` is about; undefined when it is malformed. `at` is in microseconds since the epoch. */
export function parseNumbered(json: string): { readonly connection: string; readonly at: number } | undefined {
  try {
    const { connection, at } = JSON.parse(json);
    return typeof connection === "string" && Number.isFinite(at) ? { connection, at } : undefined;
  } catch {
    return undefined;
  }
}
