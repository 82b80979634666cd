/** What has arrived, in order, until the test asks for it. */

import { soon } from "./wait.ts";

/** What has arrived, kept until the test asks for it. */
export class Inbox {
  readonly #arrived: string[] = [];
  #ended = false;
  #waiting: (() => void) | undefined;

  /** How many have arrived and were not taken. */
  get size(): number {
    return this.#arrived.length;
  }

  add(text: string): void {
    this.#arrived.push(text);
    this.#waiting?.();
  }

  /** Nothing more will come. */
  end(): void {
    this.#ended = true;
    this.#waiting?.();
  }

  /** The next `count`, in the order of their arrival. Rejects when the inbox ends before. */
  async take(count: number): Promise<string[]> {
    const wait = async () => {
      while (this.#arrived.length < count) {
        if (this.#ended) throw new Error(`ended after ${this.#arrived.length} of ${count} messages`);
        await new Promise<void>((resolve) => this.#waiting = resolve);
      }
    };
    await soon(wait(), `${count} messages`);
    return this.#arrived.splice(0, count);
  }

  /** All that has arrived and was not taken. */
  takeAll(): string[] {
    return this.#arrived.splice(0);
  }
}
