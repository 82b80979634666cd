/** Logs: past-tense events with fields, one line each. Nothing secret, no token and no payload ever goes in. */

import { Buffer } from "node:buffer";
import { pino } from "pino";
import { prettyFactory } from "pino-pretty";
import type { Config } from "./config.ts";
import { within } from "./deadline.ts";

/** What wsproxy logs with: pino's own logger. */
export type Log = pino.Logger;

/** Bytes of lines that wait for a reader, of each thread. */
const maxWaitingBytes = 1_048_576;
/** The most that a pipe takes as one (POSIX's PIPE_BUF on Linux): lines of several threads do not mix. */
const writeBytes = 4096;
/** Until a writer is tried again that cannot take anything now. */
const retryMs = 50;
/** How long an end waits for lines to be written. */
const flushMs = 500;

/**
 * A logger to standard output. `json` has one object a line with ISO times; `text` is for people, and what
 * `auto` takes on a terminal. Lines are written in the background: await {@linkcode flushLog} before the process ends.
 */
export function createLog({ level, format }: Config["logging"]): Log {
  const options: pino.LoggerOptions = {
    level,
    base: undefined,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (level) => ({ level }) },
  };
  const isTerminal = Deno.stdout.isTerminal();
  const isJson = format === "json" || (format === "auto" && !isTerminal);
  const output = new LogOutput({
    writer: Deno.stdout,
    maxBytes: maxWaitingBytes,
    format: isJson ? undefined : prettyFactory({ colorize: isTerminal, singleLine: true }),
    onFlow: (lines) => log.warn({ lines }, "log lines were dropped, as standard output was not read"),
  });
  const log: Log = pino(options, output);
  return log;
}

/** Resolves when the lines of this thread have been written; half a second later in any case. */
export function flushLog(log: Log): Promise<void> {
  return within(flushMs, new Promise<void>((resolve) => log.flush(() => resolve())));
}

/** Lines of this thread that could not be written. */
export function droppedLines(log: Log): number {
  const output = (log as unknown as Record<symbol, unknown>)[pino.symbols.streamSym];
  return output instanceof LogOutput ? output.dropped : 0;
}

/** Where lines go. */
export interface LogOutputOptions {
  /** Writes some bytes, and says how many. */
  readonly writer: { write(bytes: Uint8Array): Promise<number> };
  /** Bytes of lines that may wait. */
  readonly maxBytes: number;
  /** Makes a line of JSON one for people. */
  readonly format?: ((line: string) => string) | undefined;
  /** Lines are written again, after so many were not. */
  readonly onFlow: (dropped: number) => void;
}

/**
 * A stream for pino that makes no message wait. A pipe that is not read takes 64 KiB; a write beyond that would stop
 * the thread, and all its clients with it. So lines wait here, within a bound, and the ones beyond it are dropped and
 * counted.
 */
export class LogOutput {
  readonly #options: LogOutputOptions;
  readonly #lines: Buffer[] = [];
  #waitingBytes = 0;
  /** Resolves when nothing waits any more; undefined when nothing does. */
  #writing: Promise<void> | undefined;
  /** In all, and since it was told of last. */
  #dropped = 0;
  #untold = 0;

  /** Nothing is written yet. */
  constructor(options: LogOutputOptions) {
    this.#options = options;
  }

  /** Lines that were not written: there was no room, or the output was closed. */
  get dropped(): number {
    return this.#dropped;
  }

  /** Takes a line, with its line feed. */
  write(line: string): void {
    const { format, maxBytes } = this.#options;
    const bytes = Buffer.from(format ? format(line) : line);
    if (this.#waitingBytes + bytes.length > maxBytes) return this.#drop(1);
    this.#waitingBytes += bytes.length;
    this.#lines.push(bytes);
    this.#writing ??= this.#writeAll();
  }

  /** Calls back when nothing waits any more. */
  flush(done: () => void): void {
    void Promise.resolve(this.#writing).then(done);
  }

  #drop(lines: number): void {
    this.#dropped += lines;
    this.#untold += lines;
  }

  async #writeAll(): Promise<void> {
    // What is logged in the same turn goes with it.
    await Promise.resolve();
    while (this.#lines.length > 0) {
      const { bytes, lines } = this.#take();
      const ok = await this.#writeSome(bytes);
      this.#waitingBytes -= bytes.length;
      if (!ok) this.#drop(lines);
      else if (this.#untold > 0 && this.#lines.length === 0) {
        const untold = this.#untold;
        this.#untold = 0;
        this.#options.onFlow(untold);
      }
    }
    this.#writing = undefined;
  }

  /** The next lines, as many as one write takes whole, and one at least. */
  #take(): { bytes: Uint8Array; lines: number } {
    let length = 0;
    let lines = 0;
    for (const line of this.#lines) {
      length += line.length;
      if (lines > 0 && length > writeBytes) break;
      lines++;
    }
    return { bytes: Buffer.concat(this.#lines.splice(0, lines)), lines };
  }

  /** Whether all of it has been written. */
  async #writeSome(bytes: Uint8Array): Promise<boolean> {
    for (let at = 0; at < bytes.length;) {
      try {
        at += await this.#options.writer.write(bytes.subarray(at));
      } catch (error) {
        // Its reader has gone, or the disk is full: only the count can tell it.
        if (!(error instanceof Deno.errors.WouldBlock)) return false;
        await new Promise((resolve) => setTimeout(resolve, retryMs));
      }
    }
    return true;
  }
}
