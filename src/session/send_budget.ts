/**
 * What a client's unsent messages cost: the bytes that its transport has not handed to the kernel, and what each
 * message takes of the process's memory besides. The transport is asked only when the sum could be too much.
 */

import type { Buffer } from "node:buffer";
import { transportOverheadBytes } from "../overhead.ts";
import type { Transport } from "./transport.ts";

/** UTF-8 bytes of a UTF-16 unit, or of a byte that is invalid and becomes U+FFFD, at most. */
const maxBytesPerUnit = 3;

/** An estimate that is never too low. */
export class SendBudget {
  readonly #maxBytes: number;
  /** Messages sent since nothing was unsent, the least that they have in bytes, and the most that they can cost. */
  #messages = 0;
  #bytes = 0;
  #cost = 0;

  /** Room for `maxBytes` of unsent messages, payload and overhead. */
  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  /** Whether another message may be sent now. */
  hasRoom(transport: Transport): boolean {
    return this.#cost < this.#maxBytes || this.unsent(transport) < this.#maxBytes;
  }

  /** A message is sent. */
  spend(message: string | Buffer): void {
    this.#messages++;
    this.#bytes += message.length;
    this.#cost += message.length * maxBytesPerUnit + transportOverheadBytes;
  }

  /** What is unsent now, in bytes of payload and overhead. */
  unsent(transport: Transport): number {
    const bytes = transport.bufferedAmount;
    if (bytes === 0) {
      this.#messages = this.#bytes = this.#cost = 0;
      return 0;
    }
    return bytes + this.#messages * Math.min(1, bytes / this.#bytes) * transportOverheadBytes;
  }
}
