/** What an engine is: something that listens, hands requests to the server, and carries its sessions' sockets. */

import type { Deadlines } from "../deadline.ts";

/** What an engine is started with. */
export interface EngineOptions {
  /** The address to listen on. */
  readonly hostname: string;
  /** 0 takes a free one. */
  readonly port: number;
  /** How many listen on the port, each in a thread of its own; the kernel deals connections out to them. */
  readonly workers: number;
  /** Keeps the time of the pings, where they are ours. */
  readonly deadlines: Deadlines;
  /** Silence after which a client is pinged. */
  readonly pingIntervalMs: number;
  /** How long it may take to answer. */
  readonly pingTimeoutMs: number;
  /** Longest wait for the head of a request, where the engine can tell. */
  readonly handshakeTimeoutMs: number;
  /** Largest message in UTF-8 bytes, where the engine can refuse one before it has all of it. */
  readonly maxMessageBytes: number;
  /** Most sessions at once, 0 for no limit, where the engine can hang up on more connections than that. */
  readonly maxConnections: number;
  /** How long a connection may wait for its next request, where the engine can tell. */
  readonly keepAliveTimeoutMs: number;
  /** So many bytes more, or less, are held by connections that were given up, where the engine cannot cut them. */
  readonly onHeld: (bytes: number) => void;
  /** The listener had gone deaf, and was opened again. */
  readonly onRelisten: () => void;
}

/** A listening engine. */
export interface Engine {
  /** The address it listens on. */
  readonly hostname: string;
  /** The port it listens on. */
  readonly port: number;
  /** Resolves when it listens no more, whatever the reason. */
  readonly finished: Promise<void>;
  /** Stops listening; what it has accepted is served to its end. Undefined where that would close open sockets. */
  readonly leave?: () => void;
  /** Stops listening, and waits for what is open: sessions must be closed before. */
  close(): Promise<void>;
}
