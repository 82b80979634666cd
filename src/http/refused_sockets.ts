/**
 * Refusals that a page can read. A browser shows it neither the status nor the text of a handshake that is refused, so
 * a client may ask for a socket that is closed at once, with a code and a reason. Such a socket is no session: it counts
 * in no limit and in no metric of sessions, and Redis hears nothing of it.
 */

import { type Deadline, type Deadlines } from "../deadline.ts";
import type { SocketOwner, Transport } from "../session/transport.ts";

/** A close code and a reason of at most 123 bytes. */
export interface RefusalClose {
  readonly code: number;
  readonly reason: string;
}

/**
 * Such sockets at once; all others are refused by a status. A plain refusal costs no socket, and half of the connections
 * that the ws engine has to spare are left for those.
 */
const maxRefusedSockets = 128;
/** Wait for the engine to open one, and for its peer to answer the close. */
const closeDeadlineMs = 5000;

/** The sockets of one proxy that are closed as soon as they are open. */
export class RefusedSockets {
  readonly #deadlines: Deadlines;
  readonly #onUnopened: () => void;
  readonly #sockets = new Set<RefusedSocket>();
  readonly #onGone = (socket: RefusedSocket): void => void this.#sockets.delete(socket);

  /** `onUnopened` is told of each one that the engine has not opened in time. */
  constructor(deadlines: Deadlines, onUnopened: () => void) {
    this.#deadlines = deadlines;
    this.#onUnopened = onUnopened;
  }

  /** The owner of a socket that is to be refused; undefined when there are too many. */
  take(close: RefusalClose): SocketOwner | undefined {
    if (this.#sockets.size >= maxRefusedSockets) return undefined;
    const socket = new RefusedSocket(close, this.#deadlines, this.#onGone, this.#onUnopened);
    this.#sockets.add(socket);
    return socket;
  }

  /** Cuts those whose peers have not answered yet. */
  close(): void {
    for (const socket of this.#sockets) socket.giveUp();
  }
}

/** One of them. An engine that cannot cut its connection lets it count until the kernel gives it up. */
class RefusedSocket implements SocketOwner {
  readonly #close: RefusalClose;
  readonly #onGone: (socket: RefusedSocket) => void;
  readonly #onUnopened: () => void;
  readonly #deadline: Deadline;
  #transport: Transport | undefined;
  /** What comes on it is dropped. */
  readonly isOpen = false;

  constructor(
    close: RefusalClose,
    deadlines: Deadlines,
    onGone: (socket: RefusedSocket) => void,
    onUnopened: () => void,
  ) {
    this.#close = close;
    this.#onGone = onGone;
    this.#onUnopened = onUnopened;
    this.#deadline = deadlines.set(closeDeadlineMs, () => this.giveUp());
  }

  open(transport: Transport): void {
    this.#transport = transport;
    transport.close(this.#close.code, this.#close.reason);
  }

  /** Its peer does not answer, or the engine has not opened it. */
  giveUp(): void {
    this.#deadline.cancel();
    if (this.#transport !== undefined) return this.#transport.terminate();
    this.#onUnopened();
    this.#onGone(this);
  }

  closed(): void {
    this.#deadline.cancel();
    this.#onGone(this);
  }

  abandon(): void {
    this.closed();
  }

  receive(): void {}

  receiveTooBig(): void {}

  end(): void {}

  fail(): void {
    this.giveUp();
  }
}
