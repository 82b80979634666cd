/**
 * A histogram of microseconds with buckets of 1/64 of a power of two: a percentile is at most 1.6 % too high. It can be
 * sent as JSON and merged, which Node's own cannot.
 */

const subBits = 6;
const sub = 1 << subBits;

/** @param {number} value */
function indexOf(value) {
  if (value < sub) return value;
  const shift = 31 - Math.clz32(value) - subBits;
  return shift * sub + (value >>> shift);
}

/** The largest value of a bucket. @param {number} index */
function upperEdge(index) {
  if (index < 2 * sub) return index;
  const shift = Math.floor(index / sub) - 1;
  return (index - shift * sub + 1) * 2 ** shift - 1;
}

export class Histogram {
  #counts = new Float64Array(indexOf(2 ** 31 - 1) + 1);
  count = 0;
  max = 0;

  /** Counts one value: microseconds, 0 to 2^31. @param {number} us */
  record(us) {
    const value = us < 0 ? 0 : us | 0;
    this.#counts[indexOf(value)]++;
    this.count++;
    if (value > this.max) this.max = value;
  }

  reset() {
    this.#counts.fill(0);
    this.count = this.max = 0;
  }

  /** The value that `percent` of the recorded ones do not exceed; undefined when there are none. @param {number} percent */
  percentile(percent) {
    if (this.count === 0) return undefined;
    const rank = Math.max(1, Math.ceil(this.count * percent / 100));
    let seen = 0;
    for (let i = 0; i < this.#counts.length; i++) {
      seen += this.#counts[i];
      if (seen >= rank) return Math.min(upperEdge(i), this.max);
    }
    return this.max;
  }

  /** The buckets that are not empty, and the maximum first. @returns {number[]} */
  toBuckets() {
    const buckets = [this.max];
    this.#counts.forEach((count, index) => count > 0 && buckets.push(index, count));
    return buckets;
  }

  /** Adds what {@link toBuckets} gave. @param {readonly number[]} buckets */
  add(buckets) {
    this.max = Math.max(this.max, buckets[0] ?? 0);
    for (let i = 1; i < buckets.length; i += 2) {
      this.#counts[buckets[i]] += buckets[i + 1];
      this.count += buckets[i + 1];
    }
    return this;
  }
}
