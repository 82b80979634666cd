/** Refused requests in the log: each one, until there are many of a kind, and then how many there were. */

import type { Log } from "../log.ts";
import type { Refusal, RefusalName } from "../replies.ts";

/** How many lines of one kind there may be in a window of time; a storm of requests must not become one of lines. */
export interface RefusalLogOptions {
  readonly level?: "info" | "warn";
  readonly lines?: number;
  readonly windowMs?: number;
}

interface Window {
  lines: number;
  /** Refused and not told. */
  more: number;
  timer: ReturnType<typeof setTimeout>;
}

/** Tells of refusals. */
export class RefusalLog {
  readonly #log: Log;
  readonly #options: Required<RefusalLogOptions>;
  readonly #windows = new Map<RefusalName, Window>();

  /** Nothing is refused yet. */
  constructor(log: Log, { level = "info", lines = 10, windowMs = 1000 }: RefusalLogOptions = {}) {
    this.#log = log;
    this.#options = { level, lines, windowMs };
  }

  /** A request has been refused. */
  add({ refusal, message, row: { status } }: Refusal): void {
    const { level, lines, windowMs } = this.#options;
    let window = this.#windows.get(refusal);
    if (window === undefined) {
      const timer = setTimeout(() => this.#end(refusal), windowMs);
      this.#windows.set(refusal, window = { lines: 0, more: 0, timer });
    }
    if (window.lines === lines) window.more++;
    else {
      window.lines++;
      this.#log[level]({ status, refusal, reason: message }, "request refused");
    }
  }

  /** Tells what is left to tell. */
  close(): void {
    for (const refusal of this.#windows.keys()) this.#end(refusal);
  }

  #end(refusal: RefusalName): void {
    const { timer, more } = this.#windows.get(refusal)!;
    clearTimeout(timer);
    this.#windows.delete(refusal);
    if (more > 0) this.#log[this.#options.level]({ refusal, more }, "more requests refused");
  }
}
