/**
 * The limits that hold for all workers together, kept in memory that they share: how many connections there are, and how
 * many may come in a second. Without locks, and so that nothing is lost with a worker that ends at any instruction.
 */

import type { Config } from "./config.ts";

/** Nanoseconds in a second, in which the rate is kept. */
const secondNs = 1_000_000_000n;
const headerBytes = 16;

/** What keeps a client out. */
export type Excess = "tooManyConnections" | "tooManyConnects";

/** Shared memory for so many workers. */
export function createShared(workers: number): SharedArrayBuffer {
  return new SharedArrayBuffer(headerBytes + workers * 4);
}

/** One worker's view of the limits of all. */
export class Limits {
  /** The instant at which all that was admitted would have come at the full rate (GCRA's theoretical arrival time). */
  readonly #arrivalNs: BigInt64Array<SharedArrayBuffer>;
  /** Grows with each connection that is admitted, by whichever worker. */
  readonly #admitted: Int32Array<SharedArrayBuffer>;
  /** Connections, by worker. */
  readonly #held: Int32Array<SharedArrayBuffer>;
  readonly #index: number;
  readonly #maxConnections: number;
  readonly #intervalNs: bigint;

  /** `index` is the worker's own place. Limits of 0 are none. */
  constructor(
    { maxConnections, maxConnectsPerSec }: Pick<Config["limits"], "maxConnections" | "maxConnectsPerSec">,
    shared: SharedArrayBuffer = createShared(1),
    index = 0,
  ) {
    this.#arrivalNs = new BigInt64Array(shared, 0, 1);
    this.#admitted = new Int32Array(shared, 8, 1);
    this.#held = new Int32Array(shared, headerBytes);
    this.#index = index;
    this.#maxConnections = maxConnections;
    this.#intervalNs = maxConnectsPerSec > 0 ? secondNs / BigInt(maxConnectsPerSec) : 0n;
  }

  /** Admits one connection, or says why not. Its end must {@linkcode Limits.release} it. */
  enter(): Excess | undefined {
    if (!this.#enterRoom()) return "tooManyConnections";
    if (this.#takeTurn()) return undefined;
    this.release();
    return "tooManyConnects";
  }

  /** One connection is gone. */
  release(): void {
    Atomics.sub(this.#held, this.#index, 1);
  }

  /** A worker has ended, and its connections with it. */
  static forget(shared: SharedArrayBuffer, index: number): void {
    Atomics.store(new Int32Array(shared, headerBytes), index, 0);
  }

  #enterRoom(): boolean {
    if (this.#maxConnections === 0) return Atomics.add(this.#held, this.#index, 1) >= 0;
    while (true) {
      const before = Atomics.load(this.#admitted, 0);
      let total = 0;
      for (let i = 0; i < this.#held.length; i++) total += Atomics.load(this.#held, i);
      if (total >= this.#maxConnections) {
        // The count may hold a worker that steps back below: then another one has been admitted meanwhile.
        if (Atomics.load(this.#admitted, 0) === before) return false;
        continue;
      }
      Atomics.add(this.#held, this.#index, 1);
      if (Atomics.compareExchange(this.#admitted, 0, before, before + 1 | 0) === before) return true;
      // Another worker has admitted one since the count.
      Atomics.sub(this.#held, this.#index, 1);
    }
  }

  #takeTurn(): boolean {
    if (this.#intervalNs === 0n) return true;
    // Workers' monotonic clocks have no common start.
    const nowNs = BigInt(Date.now()) * 1_000_000n;
    while (true) {
      const arrivalNs = Atomics.load(this.#arrivalNs, 0);
      // Further ahead than a full second is a clock that was set back.
      const fromNs = arrivalNs < nowNs || arrivalNs > nowNs + secondNs ? nowNs : arrivalNs;
      const nextNs = fromNs + this.#intervalNs;
      if (nextNs > nowNs + secondNs) return false;
      if (Atomics.compareExchange(this.#arrivalNs, 0, arrivalNs, nextNs) === arrivalNs) return true;
    }
  }
}
