/**
 * The log of a session: a stream that backends write with the function `wsproxy_send` and clients resume from. Here are
 * positions and envelopes; log_library.ts loads the functions, and session/replay.ts reads the log.
 */

import type { Buffer } from "node:buffer";

/** Where in a log: when an entry was written, and the how-manieth it is. */
export interface Position {
  /** Milliseconds since the epoch. */
  readonly ms: number;
  /** Counts from 1 without holes over the life of a log; 0 for its mark, and for its beginning. */
  readonly n: number;
}

/** The position before everything. */
export const beginning: Position = { ms: 0, n: 0 };

/** `<ms>-<n>`, as Redis writes it. */
export const formatPosition = ({ ms, n }: Position): string => `${ms}-${n}`;

/** A position as {@linkcode formatPosition} writes it, or "0" for the beginning; undefined for any other text. */
export function parsePosition(text: string): Position | undefined {
  if (text === "0") return beginning;
  const match = /^(\d{1,15})-(\d{1,15})$/.exec(text);
  return match ? { ms: Number(match[1]), n: Number(match[2]) } : undefined;
}

/** Whether an entry comes right after a position: the next number, and not written before it. */
export const follows = (next: Position, before: Position): boolean => next.n === before.n + 1 && next.ms >= before.ms;

/** Whether an entry is one that a position is past. */
export const isPast = (entry: Position, position: Position): boolean =>
  entry.n <= position.n && entry.ms <= position.ms;

/** What the first byte of a published message is when it is more than a payload: it never occurs in UTF-8. */
export const envelopeByte = 0xff;

/** What a published message is, when it is more than a payload. */
export type Envelope =
  | { readonly kind: "logged"; readonly position: Position; readonly payloadAt: number }
  | { readonly kind: "command"; readonly name: string; readonly json: string };

/** The envelope of a message that begins with {@linkcode envelopeByte}; undefined when it only looks like one. */
export function parseEnvelope(message: Buffer): Envelope | undefined {
  // A position has at most 31 characters, a command's name fewer.
  const lineEnd = message.subarray(0, 40).indexOf(10);
  if (lineEnd < 0) return undefined;
  const line = message.toString("latin1", 1, lineEnd);
  if (line.startsWith("!")) {
    return { kind: "command", name: line.slice(1), json: message.toString("utf8", lineEnd + 1) };
  }
  const position = line === "0" ? undefined : parsePosition(line);
  return position && { kind: "logged", position, payloadAt: lineEnd + 1 };
}

/** One entry of a log. */
export interface Entry {
  readonly position: Position;
  /** Undefined for the mark of an empty log. */
  readonly payload: Buffer | undefined;
}

/** A reply to XRANGE, read as buffers. */
export function parseEntries(reply: readonly [id: Buffer, fields: readonly Buffer[]][]): Entry[] {
  return reply.map(([id, fields]) => ({
    position: parsePosition(id.toString())!,
    payload: fields[0]?.toString() === "d" ? fields[1] : undefined,
  }));
}
