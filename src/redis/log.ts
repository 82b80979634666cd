/**
 * The log of a session: a stream that backends write with the function `wsproxy_send` and clients resume from. Here are
 * positions, envelopes, and the library of functions; session/replay.ts reads the log.
 */

import type { Buffer } from "node:buffer";
import type { Redis } from "ioredis";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { isReply, reasonOf } from "./errors.ts";
import source from "./log.lua" with { type: "text" };

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

/** The library's text for some settings. */
export function renderLibrary({ maxMessages, ttlMs, maxMessageBytes }: LogSettings): string {
  const values = { MAX_MESSAGES: maxMessages, TTL_MS: ttlMs, MAX_MESSAGE_BYTES: maxMessageBytes };
  return Object.entries(values).reduce((text, [name, value]) => {
    const line = new RegExp(`^local ${name} = .*$`, "m");
    if (!line.test(text)) throw new Error(`log.lua must set ${name}`);
    return text.replace(line, `local ${name} = ${value}`);
  }, source);
}

/** The settings in a library's text, or nothing when it is not ours. */
function settingsOf(library: string): LogSettings | undefined {
  const value = (name: string) => Number(new RegExp(`^local ${name} = (\\d+)$`, "m").exec(library)?.[1]);
  const settings = {
    maxMessages: value("MAX_MESSAGES"),
    ttlMs: value("TTL_MS"),
    maxMessageBytes: value("MAX_MESSAGE_BYTES"),
  };
  return Object.values(settings).every(Number.isFinite) ? settings : undefined;
}

/**
 * Loads the library where it is missing or another one. Whoever loads last wins, and says so when the settings differ.
 * False when this server has no functions, or we may not load them: nobody can resume then.
 */
export async function loadLibrary(redis: Redis, settings: LogSettings, log: Log): Promise<boolean> {
  const library = renderLibrary(settings);
  try {
    const loaded = codeOf(await redis.call("FUNCTION", "LIST", "LIBRARYNAME", "wsproxy", "WITHCODE"));
    if (loaded === library) return true;
    const former = loaded === undefined ? undefined : settingsOf(loaded);
    for (const name of Object.keys(settings) as (keyof LogSettings)[]) {
      if (former === undefined || former[name] === settings[name]) continue;
      log.warn({ setting: name, loaded: former[name], here: settings[name] }, "proxies differ in a setting of the log");
    }
    await redis.call("FUNCTION", "LOAD", "REPLACE", library);
    log.info("functions loaded into Redis");
    return true;
  } catch (error) {
    if (!isReply(error) || !/unknown command|unknown subcommand|NOPERM/i.test(error.message)) throw error;
    log.warn({ reason: reasonOf(error) }, "clients cannot resume: Redis has no functions, or forbids them");
    return false;
  }
}

/** The code in a reply to FUNCTION LIST: an array of flat maps. */
function codeOf(reply: unknown): string | undefined {
  const [fields] = reply as unknown[][];
  const at = fields?.indexOf("library_code") ?? -1;
  return at < 0 ? undefined : String(fields![at + 1]);
}
