/**
 * What many clients cause at once is done in steps: so many of them in one turn of the event loop, then whatever else is
 * ready has its turn. Handshakes give way to messages so: in a storm of clients that all come back the others would hear
 * nothing for as long as it takes.
 */

import { setImmediate } from "node:timers";

/** Steps of handshakes in one turn of the event loop: together below a millisecond, with ES256 below two. */
const handshakesPerTurn = 2;

/** The steps of this turn. */
export class Turns {
  #left: number;
  #beginning: (() => void)[] = [];
  #begun: (() => void)[] = [];
  #scheduled = false;

  constructor(readonly stepsPerTurn = handshakesPerTurn) {
    this.#left = stepsPerTurn;
  }

  /**
   * Undefined when there is room in this turn; else resolves in a later one, in the order of the calls. A handshake that
   * has begun, and cost something already, comes before those that only begin, whose clients may give up meanwhile.
   */
  take(hasBegun = false): Promise<void> | undefined {
    if (!this.#scheduled) {
      this.#scheduled = true;
      setImmediate(this.#next);
    }
    if (this.#left > 0) {
      this.#left--;
      return undefined;
    }
    return new Promise((resolve) => (hasBegun ? this.#begun : this.#beginning).push(resolve));
  }

  readonly #next = (): void => {
    const { stepsPerTurn } = this;
    const some = this.#begun.splice(0, stepsPerTurn);
    if (some.length < stepsPerTurn) some.push(...this.#beginning.splice(0, stepsPerTurn - some.length));
    this.#left = stepsPerTurn - some.length;
    this.#scheduled = some.length > 0;
    if (this.#scheduled) setImmediate(this.#next);
    for (const resolve of some) resolve();
  };
}
