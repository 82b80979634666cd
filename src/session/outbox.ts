/**
 * What a client is to get, in order: straight to its transport, or held while that is not open yet or has no room.
 *
 * All messages of one read from Redis are delivered in one turn of the event loop, in which a transport can hand
 * nothing to the kernel. So a lack of room is judged over some turns after that: a client is stuck when its transport
 * got rid of nothing in any of them, or when more is held than one client may cost.
 */

import type { Buffer } from "node:buffer";
import { SendBudget } from "./send_budget.ts";
import type { Transport } from "./transport.ts";

/** Time between two looks at a transport without room, and looks without progress that make a stuck client. */
const lookMs = 10;
const stuckAfter = 20;
/** What a held message takes of the process's memory besides its characters; in bytes. */
const heldOverheadBytes = 32;

/** One client's messages. */
export class Outbox {
  readonly #maxHeldBytes: number;
  readonly #onStuck: () => void;
  readonly #budget: SendBudget;
  #transport: Transport | undefined;
  #held: string[] = [];
  #heldBytes = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #unsent = 0;
  #looks = 0;
  /** Who waits for room. */
  #waiting: (() => void)[] = [];

  /**
   * Room for `maxBytes` in the transport, and for half as much beside it. `onStuck` is called when the client takes nothing,
   * or takes it too slowly; what it does must end with {@linkcode Outbox.close}.
   */
  constructor(maxBytes: number, onStuck: () => void) {
    this.#maxHeldBytes = maxBytes / 2;
    this.#onStuck = onStuck;
    this.#budget = new SendBudget(maxBytes);
  }

  /** The transport is open: it gets what was held. */
  open(transport: Transport): void {
    this.#transport = transport;
    this.#drain(transport);
    if (this.#held.length > 0 || this.#waiting.length > 0) this.#watch(transport);
  }

  /** Sends a message after all that were sent before. True when the transport has no room for it now. */
  send(message: string | Buffer): boolean {
    const transport = this.#transport;
    if (transport === undefined || this.#held.length > 0 || !this.#budget.hasRoom(transport)) {
      return this.#hold(message);
    }
    this.#budget.spend(message);
    transport.send(message);
    return false;
  }

  /** Resolves when nothing is held and the transport has room, or when the outbox is closed. */
  room(): Promise<void> {
    const transport = this.#transport;
    if (this.#heldBytes === Infinity) return Promise.resolve();
    if (transport !== undefined && this.#held.length === 0 && this.#budget.hasRoom(transport)) return Promise.resolve();
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      if (transport !== undefined && this.#timer === undefined) this.#watch(transport);
    });
  }

  /** Hands everything that is held to the transport, which is about to be closed. */
  flush(): void {
    for (const text of this.#held) this.#transport?.send(text);
    this.#empty();
  }

  /** Drops what is held. Nothing is sent any more. */
  close(): void {
    this.#empty();
    this.#transport = undefined;
    this.#wake();
    // Whatever still comes is not held either.
    this.#heldBytes = Infinity;
  }

  #empty(): void {
    this.#held = [];
    this.#heldBytes = 0;
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #hold(message: string | Buffer): boolean {
    if (this.#heldBytes === Infinity) return false;
    const text = message.toString();
    this.#held.push(text);
    this.#heldBytes += text.length + heldOverheadBytes;
    if (this.#heldBytes > this.#maxHeldBytes) {
      this.#onStuck();
      return false;
    }
    if (this.#transport === undefined) return false;
    if (this.#timer === undefined) this.#watch(this.#transport);
    return true;
  }

  #watch(transport: Transport): void {
    this.#unsent = this.#budget.unsent(transport);
    this.#looks = 0;
    this.#timer = setTimeout(() => this.#look(), 0);
  }

  #look(): void {
    const transport = this.#transport!;
    this.#timer = undefined;
    const unsent = this.#budget.unsent(transport);
    this.#looks = unsent < this.#unsent ? 0 : this.#looks + 1;
    this.#unsent = unsent;
    if (this.#looks > stuckAfter) return this.#onStuck();
    this.#drain(transport);
    if (this.#held.length === 0 && this.#budget.hasRoom(transport)) this.#wake();
    if (this.#held.length > 0 || this.#waiting.length > 0) this.#timer = setTimeout(() => this.#look(), lookMs);
  }

  #wake(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const resolve of waiting) resolve();
  }

  /** Sends as much of what is held as there is room for. */
  #drain(transport: Transport): void {
    const held = this.#held;
    let count = 0;
    while (count < held.length && this.#budget.hasRoom(transport)) {
      const text = held[count++]!;
      this.#heldBytes -= text.length + heldOverheadBytes;
      this.#budget.spend(text);
      transport.send(text);
    }
    if (count > 0) this.#held = held.slice(count);
  }
}
