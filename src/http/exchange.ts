/**
 * What an engine and the rest of the proxy exchange: it shows each request as a {@linkcode Request}, and gets a
 * {@linkcode Verdict} to carry out. What it then hands to a session is a `Transport` (session/transport.ts).
 */

import type { Session } from "../session/session.ts";
import type { SocketOwner } from "../session/transport.ts";

/** A request, as every engine can show it. */
export interface Request {
  /** The request's method, in capitals. */
  readonly method: string;
  /** In origin form or in absolute form, as sent, not decoded (RFC 9112, section 3.2). */
  readonly target: string;
  /** The IP address at the other end of the connection; undefined when that has ended. */
  readonly peer: string | undefined;
  /** As in "1.1"; undefined where the engine does not know it. */
  readonly httpVersion: string | undefined;
  /** A header's value, `name` in lower case; several of one name joined by ", ". */
  header(name: string): string | undefined;
  /**
   * The body as text.
   * @throws {Refusal} when it is larger than `maxBytes`, and the rest of it is not read; when it is no UTF-8, or does
   * not come to its end.
   */
  text(maxBytes: number): Promise<string>;
  /** The engine takes no more of what comes on its socket than a message may have, before any of it is shown. */
  readonly isBounded: boolean;
  /** The client has gone, as far as the engine can tell. Looked at just before an upgrade. */
  readonly gone: boolean;
}

/** A plain HTTP answer. */
export interface Respond {
  readonly kind: "respond";
  /** The HTTP status. */
  readonly status: number;
  /** The headers, without Content-Length. */
  readonly headers: Readonly<Record<string, string>>;
  /** The body, as text. */
  readonly body: string;
}

/** A 101: a session, or a refusal, to open with the engine's socket, or to abandon. */
export interface Upgrade {
  readonly kind: "upgrade";
  /** Waits to be opened. */
  readonly owner: SocketOwner;
  /** The subprotocol to select, if any. */
  readonly protocol: string | undefined;
}

/** A 200 whose body goes on for as long as its session. */
export interface Stream {
  readonly kind: "stream";
  /** Waits to be opened. */
  readonly session: Session;
  /** The headers. */
  readonly headers: Readonly<Record<string, string>>;
  /** Opens the session on what the engine can write to; the engine must do it at once. Returns what it is told of. */
  open(sink: Sink): StreamListener;
}

/** A response's body, as every engine can write it. None of it may throw, also when the client has gone. */
export interface Sink {
  /** Sends a text, in UTF-8. */
  write(text: string): void;
  /** Bytes not yet handed to the kernel. */
  readonly unsent: number;
  /** Ends the body after what was written. */
  end(): void;
  /** Cuts the connection where the engine can. */
  destroy(): void;
}

/** What an engine tells of a stream. */
export interface StreamListener {
  /** The body has ended, or the client has gone. Idempotent. */
  closed(): void;
}

/** What is to be done with a request. */
export type Verdict = Respond | Upgrade | Stream;

/** Decides on a request. Never rejects. */
export type Handle = (request: Request) => Promise<Verdict>;

/** An answer in plain text. */
export const respondText = (status: number, text: string, headers: Readonly<Record<string, string>> = {}): Respond => ({
  kind: "respond",
  status,
  headers: { "Content-Type": "text/plain; charset=utf-8", ...headers },
  body: `${text}\n`,
});

/** An answer in JSON. */
export const respondJson = (status: number, value: unknown): Respond => ({
  kind: "respond",
  status,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});
