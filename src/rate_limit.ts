/** How often something may happen: one limit, or one for each name. */

/** A token bucket: so many a second on average, and as many at once. */
export class RateLimit {
  readonly #perSec: number;
  #tokens: number;
  #filledAtMs = performance.now();

  /** `perSec` must be positive. The bucket is full at first. */
  constructor(perSec: number) {
    this.#perSec = perSec;
    this.#tokens = perSec;
  }

  /** Takes one; false, and nothing taken, when there is none. */
  take(): boolean {
    if (this.#tokens < 1) this.#fill();
    if (this.#tokens < 1) return false;
    this.#tokens--;
    return true;
  }

  #fill(): void {
    const nowMs = performance.now();
    this.#tokens = Math.min(this.#perSec, this.#tokens + (nowMs - this.#filledAtMs) / 1000 * this.#perSec);
    this.#filledAtMs = nowMs;
  }
}

/** Names whose last turn is remembered, at most: more than connect in a second. */
const maxRemembered = 65_536;

/** A limit for each name: so many in a time on average, and as many at once (GCRA). */
export class Rates {
  readonly #windowUs: number;
  readonly #intervalUs: number;
  /**
   * The instant at which all turns of a name would have been taken at the full rate, in microseconds of
   * `performance.now()`; in the order of the last turns.
   */
  readonly #arrivalsUs = new Map<string, number>();

  /** `turns` in `windowMs` milliseconds. */
  constructor(turns: number, windowMs: number) {
    this.#windowUs = windowMs * 1000;
    this.#intervalUs = Math.floor(this.#windowUs / turns);
  }

  /** Names that are remembered. */
  get size(): number {
    return this.#arrivalsUs.size;
  }

  /** Whether a name has a turn. */
  has(name: string): boolean {
    const nowUs = microseconds();
    return this.#nextUs(name, nowUs) <= nowUs + this.#windowUs;
  }

  /** Takes a turn; false, and nothing taken, when there is none. */
  take(name: string): boolean {
    const nowUs = microseconds();
    const nextUs = this.#nextUs(name, nowUs);
    if (nextUs > nowUs + this.#windowUs) return false;
    this.#arrivalsUs.delete(name);
    this.#forget(nowUs);
    this.#arrivalsUs.set(name, nextUs);
    return true;
  }

  #nextUs(name: string, nowUs: number): number {
    return Math.max(nowUs, this.#arrivalsUs.get(name) ?? 0) + this.#intervalUs;
  }

  /** One that has all its turns again is as good as unknown. */
  #forget(nowUs: number): void {
    for (const [name, arrivalUs] of this.#arrivalsUs) {
      if (arrivalUs > nowUs && this.#arrivalsUs.size < maxRemembered) return;
      this.#arrivalsUs.delete(name);
    }
  }
}

const microseconds = () => Math.floor(performance.now() * 1000);
