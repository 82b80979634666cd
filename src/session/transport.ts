/** What an engine's socket is to a session, and what a session is to the engine. */

import type { Buffer } from "node:buffer";
import type { Close } from "../replies.ts";

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

/** What an engine tells of a socket: a session, or what closes a socket that is refused. */
export interface SocketOwner {
  /** The socket is open and has not ended. */
  readonly isOpen: boolean;
  /** The socket is open. */
  open(transport: Transport): void;
  /** A frame has come; anything but a string is a binary frame. */
  receive(data: unknown): void;
  /** A message that is too large has come, or is coming. */
  receiveTooBig(): void;
  /** The socket has closed, with the code that RFC 6455, section 7.1.5 gives to that. Idempotent. */
  closed(code: number): void;
  /** The socket is to be closed. */
  end(close: Close): void;
  /** A bug of ours showed while serving it. */
  fail(error: unknown): void;
  /** The request has gone before it became a socket. */
  abandon(): void;
}
