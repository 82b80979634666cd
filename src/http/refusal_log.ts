/** Refused requests in the log: each one, until there are many of a kind, and then how many there were each second. */

import type { Log } from "../log.ts";
import type { Refusal, RefusalName } from "../replies.ts";

/** Lines a second of one kind; a storm of requests must not become one of lines. */
const linesPerWindow = 10;
const windowMs = 1000;

interface Window {
  lines: number;
  /** Refused and not told. */
  more: number;
  timer: ReturnType<typeof setTimeout>;
}

/** Tells of refusals. */
export class RefusalLog {
  readonly #log: Log;
  readonly #windows = new Map<RefusalName, Window>();

  /** Nothing is refused yet. */
  constructor(log: Log) {
    this.#log = log;
  }

  /** A request has been refused. */
  add({ refusal, message, row: { status } }: Refusal): void {
    let window = this.#windows.get(refusal);
    if (window === undefined) {
      const timer = setTimeout(() => this.#end(refusal), windowMs);
      this.#windows.set(refusal, window = { lines: 0, more: 0, timer });
    }
    if (window.lines === linesPerWindow) window.more++;
    else {
      window.lines++;
      this.#log.info({ status, reason: message }, "request refused");
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
    if (more > 0) this.#log.info({ refusal, more }, "more requests refused");
  }
}
