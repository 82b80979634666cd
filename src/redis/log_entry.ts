/**
 * The log of a session: a stream that backends write with the function `wsproxy_send` and clients resume from. Here are
 * positions and envelopes; log_library.ts loads the functions, and session/replay.ts reads the log.
 */

import type { Buffer } from "node:buffer";
import { LogRefused } from "./errors.ts";

/** Where in a log: when an entry was written, and its number. */
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

/** The position from which an entry comes next, also when it is the first one of a log; of a mark the mark itself. */
export const before = ({ ms, n }: Position): Position => ({ ms, n: Math.max(0, n - 1) });

/** Whether a position is an entry's, or a later one. */
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
  if (message[1] === exclamationMark) return parseCommand(message);
  // Digit by digit: a string of the line and a pattern for it took four times as long, for each message.
  const dashAt = endOfDigits(message, 1);
  const lineEnd = endOfDigits(message, dashAt + 1);
  if (message[dashAt] !== dash || message[lineEnd] !== newline) return undefined;
  const position = { ms: numberIn(message, 1, dashAt), n: numberIn(message, dashAt + 1, lineEnd) };
  if (!Number.isSafeInteger(position.ms) || !Number.isSafeInteger(position.n)) return undefined;
  return { kind: "logged", position, payloadAt: lineEnd + 1 };
}

function parseCommand(message: Buffer): Envelope | undefined {
  const lineEnd = message.indexOf(newline);
  if (lineEnd < 0) return undefined;
  return {
    kind: "command",
    name: message.toString("latin1", 2, lineEnd),
    json: message.toString("utf8", lineEnd + 1),
  };
}

const exclamationMark = 0x21;
const dash = 0x2d;
const newline = 0x0a;
const zero = 0x30;

function endOfDigits(bytes: Buffer, from: number): number {
  let at = from;
  // Past its end a buffer has undefined, which is no digit.
  while (bytes[at]! >= zero && bytes[at]! <= zero + 9) at++;
  return at;
}

/** The number that digits are; NaN when there are none. */
function numberIn(bytes: Buffer, from: number, to: number): number {
  let number = from === to ? NaN : 0;
  for (let at = from; at < to; at++) number = number * 10 + (bytes[at]! - zero);
  return number;
}

/** One entry of a log. */
export interface Entry {
  readonly position: Position;
  /** Undefined for the mark of an empty log. */
  readonly payload: Buffer | undefined;
}

/**
 * A reply to XRANGE, read as buffers.
 * @throws {LogRefused} as {@linkcode parseId} does.
 */
export function parseEntries(reply: readonly [id: Buffer, fields: readonly Buffer[]][]): Entry[] {
  return reply.map(([id, fields]) => ({
    position: parseId(id.toString()),
    payload: fields[0]?.toString() === "d" ? fields[1] : undefined,
  }));
}

/** The position that an entry's id is. @throws {LogRefused} for one that our functions do not make. */
export function parseId(id: string): Position {
  const position = parsePosition(id);
  if (position === undefined) throw new LogRefused(`the log has an entry that wsproxy did not write: ${id}`);
  return position;
}
