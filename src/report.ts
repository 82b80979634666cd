/** What a proxy says of itself to operators: alone, or as one worker of several, whose reports are put together. */

import type { MetricsReport } from "./metrics.ts";

/** What one proxy knows, or has done, by the kind of the question. */
export interface Reports {
  readonly health: HealthReport;
  readonly metrics: MetricsReport;
  /** The setting whose value it still has to fetch before it can admit clients; null when there is none. */
  readonly missing: string | null;
  /** The sessions that move the most bytes. */
  readonly busiest: readonly SessionReport[];
  /** One session's sockets. */
  readonly session: readonly SocketReport[];
  /** How many sockets of one session it has ended. */
  readonly end: number;
}

/** What a question is about. */
export type Kind = keyof Reports;

/** What operators ask, or ask for. */
export type Question<K extends Kind = Kind> = { readonly [Each in K]: { readonly kind: Each } & Particulars[Each] }[K];

interface Particulars extends Record<Kind, unknown> {
  readonly session: { readonly sessionId: string };
  readonly end: { readonly sessionId: string };
}

/** Asks each proxy of a port. */
export type Ask = <K extends Kind>(question: Question<K>) => Promise<readonly Reports[K][]>;

/** The answers of one proxy. */
export type Answers = {
  readonly [K in Kind]: (question: Question<K>) => Reports[K] | Promise<Reports[K]>;
};

/** Whether messages flow through a proxy. */
export interface HealthReport {
  /** Open sockets. */
  readonly connections: number;
  /** What keeps messages from flowing through a server of Redis, by its name; null when nothing does. */
  readonly servers: Readonly<Record<string, string | null>>;
}

/** What a session, or one of its sockets, has moved. */
export interface Moved {
  /** Bytes given to sockets. */
  readonly down_bytes: number;
  /** Characters taken from clients. */
  readonly up_chars: number;
  /** Bytes that sockets have not taken yet. */
  readonly unsent_bytes: number;
}

/** A session with at least one open socket. */
export interface SessionReport extends Moved {
  readonly session: string;
  /** Of the socket that opened first. */
  readonly agent: string;
  readonly sockets: number;
  /** When the first of its sockets opened, in milliseconds since the epoch. */
  readonly opened_ms: number;
  /** Bytes and characters a second, both ways, since an operator looked last, or since it was opened. */
  readonly per_sec: number;
}

/** An open socket of a session. */
export interface SocketReport extends Moved {
  /** Its name in log lines and inboxes. */
  readonly connection: string;
  readonly agent: string;
  /** When it opened, in milliseconds since the epoch. */
  readonly opened_ms: number;
  /** Milliseconds since the last message either way, or the open. */
  readonly quiet_ms: number;
  /** When its token runs out, in milliseconds since the epoch; null for never. */
  readonly expires_ms: number | null;
  /** Of a client that resumes, the last position in the log that it was sent; null for any other. */
  readonly position: string | null;
}
