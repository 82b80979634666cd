/**
 * What an engine and the rest of the proxy exchange: it shows each request as a {@linkcode Request}, and gets a
 * {@linkcode Verdict} to carry out. What it then hands to a session is a `Transport` (session/transport.ts).
 */

import type { Session } from "../session/session.ts";

/** A request, as every engine can show it. */
export interface Request {
  /** The request's method, in capitals. */
  readonly method: string;
  /** In origin form or in absolute form, as sent, not decoded (RFC 9112, section 3.2). */
  readonly target: string;
  /** A header's value, `name` in lower case; several of one name joined by ", ". */
  header(name: string): string | undefined;
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

/** A 101: a session to open with the engine's socket, or to abandon. */
export interface Upgrade {
  readonly kind: "upgrade";
  /** Waits to be opened. */
  readonly session: Session;
  /** The subprotocol to select, if any. */
  readonly protocol: string | undefined;
}

/** What is to be done with a request. */
export type Verdict = Respond | Upgrade;

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
