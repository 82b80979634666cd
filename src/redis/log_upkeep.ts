/**
 * Prolongs the lives of the logs that resuming clients are attached to: a client that sits idle in front of an open
 * page must find its log again when it comes back. A pass goes through all of them within an eighth of a log's time to
 * live, a few at a time. So no log waits for longer than a quarter of that time.
 */

import type { Redis } from "ioredis";
import { isReply } from "./errors.ts";
import type { Listener } from "./subscriptions.ts";

/** Commands in one write. */
const batch = 500;

/** A log by the name of its channel, and the listeners of that. */
interface Attached {
  readonly name: string;
  readonly listeners: readonly Pick<Listener, "resumes">[];
}

/** The lives of one server's logs. */
export class LogUpkeep {
  readonly #passMs: number;
  readonly #expiryMs: number;
  readonly #attached: () => readonly Attached[];
  /** The channels whose logs this pass goes through, and how many of them have had their turn. */
  #pass: readonly Attached[] = [];
  #done = 0;
  #passBeganMs = -Infinity;

  /** `attached` returns the channels that resuming clients listen to. */
  constructor(ttlMs: number, attached: () => readonly Attached[]) {
    this.#passMs = ttlMs / 8;
    this.#expiryMs = Math.ceil(ttlMs * 1.25);
    this.#attached = attached;
  }

  /**
   * Prolongs those whose turn it is; called about once a second. Returns what Redis answered to one of them, if that was
   * an error. Rejects when the connection ends; their turn comes again then.
   */
  async step(redis: Redis): Promise<Error | undefined> {
    const nowMs = performance.now();
    if (this.#done === this.#pass.length) {
      if (nowMs - this.#passBeganMs < this.#passMs) return;
      this.#pass = this.#attached();
      this.#done = 0;
      this.#passBeganMs = nowMs;
    }
    const share = Math.min(1, (nowMs - this.#passBeganMs) / this.#passMs);
    const due = Math.ceil(this.#pass.length * share);
    let refusal: Error | undefined;
    while (this.#done < due) {
      const some = this.#pass.slice(this.#done, Math.min(due, this.#done + batch));
      const pipeline = redis.pipeline();
      for (const { name, listeners } of some) {
        // It may have left since the pass began.
        if (listeners.some(({ resumes }) => resumes)) pipeline.pexpire(name, this.#expiryMs);
      }
      for (const [error] of await pipeline.exec() ?? []) {
        if (error && !isReply(error)) throw error;
        refusal ??= error ?? undefined;
      }
      this.#done += some.length;
    }
    return refusal;
  }
}
