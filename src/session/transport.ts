/** What an engine's socket is to a session. */

import type { Buffer } from "node:buffer";

/** All that a session knows of its connection, so that engines can differ. None of it may throw. */
export interface Transport {
  /**
   * Sends one text frame. Bytes are UTF-8, and what is invalid in them becomes U+FFFD; they are not kept. Sending to a
   * transport that is no longer open does nothing.
   */
  send(message: string | Buffer): void;
  /** Bytes not yet handed to the kernel. */
  readonly bufferedAmount: number;
  /** Asks the peer for a sign of life, and tells of it once; undefined where the engine cannot. */
  ask?(onAnswer: () => void): void;
  /** Begins the closing handshake (RFC 6455, section 7.1.2). */
  close(code: number, reason: string): void;
  /** Cuts the connection where the engine can; for a peer that did not answer the close. */
  terminate(): void;
}
