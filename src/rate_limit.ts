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
