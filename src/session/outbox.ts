/**
 * What a client is to get, in order: straight to its transport, or held while that is not open yet or has no room.
 *
 * All messages of one read from Redis are delivered in one turn of the event loop, in which a transport can hand
 * nothing to the kernel. So a lack of room is judged in later turns. Nothing more is read from Redis for a while when
 * more is held than a client may cost; a client that has not taken it after that while is too slow, and so is one that
 * takes nothing for long. It can cost `maxBytes` and one message in its transport, and here a quarter of that and what
 * one read brings.
 */

import { Buffer } from "node:buffer";
import { outboxOverheadBytes } from "../overhead.ts";
import type { Backlog, Room } from "../redis/subscriptions.ts";
import { SendBudget } from "./send_budget.ts";
import type { Transport } from "./transport.ts";

/** Time between two looks at a transport without room, when it takes nothing and when it takes something. */
const lookMs = 10;
const soonMs = 1;
/**
 * How long a client may take nothing until it is closed, while too much is held for it and otherwise. The kernel shows
 * what a client takes in lumps, a third of its buffer at a time: on a slow line that takes a while, and is no reason to
 * close.
 */
const chanceMs = 200;
const stuckMs = 5000;
/**
 * How long too much may be held for a client that takes some of what it gets, but not all at once; and how long reading
 * from Redis waits for one that takes nothing, as all other clients wait with it.
 */
const crowdedMs = 50;
/** What can come before reading from Redis pauses: one read, as it is counted here. */
const readBytes = 131_072;

/** What a client is to get when there is room. */
interface Held {
  readonly text: string;
  readonly bytes: number;
}

/** Most clients have nothing held, and there are many. */
const nothing: readonly never[] = [];

/** One client's messages. */
export class Outbox {
  readonly #maxHeldBytes: number;
  readonly #owner: { tooSlow(): void };
  readonly #budget: SendBudget;
  #transport: Transport | undefined;
  #held: readonly Held[] = nothing;
  #heldBytes = 0;
  #backlog: Backlog = "none";
  #timer: ReturnType<typeof setTimeout> | undefined;
  #lookedAtMs = 0;
  /** What was unsent after the last look, and for how long it has not become less. */
  #unsent = 0;
  #idleMs = 0;
  #crowdedMs = 0;
  /** What waits for room. */
  #waiting: readonly (() => void)[] = nothing;

  /**
   * Room for `maxBytes` in the transport, and for a quarter as much beside it. `owner` is told when the client takes
   * nothing, or takes it too slowly; what it does then must end with {@linkcode Outbox.close}.
   */
  constructor(maxBytes: number, owner: { tooSlow(): void }) {
    this.#maxHeldBytes = maxBytes / 4;
    this.#owner = owner;
    this.#budget = new SendBudget(maxBytes);
  }

  /** Whether more is held than the client may cost, and how it takes that. */
  get backlog(): Backlog {
    return this.#backlog;
  }

  /** The transport is open: it gets what was held. */
  open(transport: Transport): void {
    this.#transport = transport;
    this.#drain(transport);
    if (this.#isWaitedFor) this.#watch();
  }

  /**
   * Sends a message after all that were sent before. "full" when it is held, as the transport has no room for it now,
   * and might have it soon.
   */
  send(message: string | Buffer): Room {
    const transport = this.#transport;
    if (transport === undefined || this.#held.length > 0 || !this.#budget.hasRoom(transport)) {
      return this.#hold(message);
    }
    this.#budget.spend(message);
    transport.send(message);
    return "taken";
  }

  /** Resolves when nothing is held and the transport has room, or when the outbox is closed. */
  room(): Promise<void> {
    const transport = this.#transport;
    if (this.#heldBytes === Infinity) return Promise.resolve();
    if (transport !== undefined && this.#held.length === 0 && this.#budget.hasRoom(transport)) return Promise.resolve();
    return new Promise((resolve) => {
      this.#waiting = [...this.#waiting, resolve];
      if (transport !== undefined && this.#timer === undefined) this.#watch();
    });
  }

  /** Hands everything that is held to the transport, which is about to be closed. */
  flush(): void {
    for (const { text } of this.#held) this.#transport?.send(text);
    this.#empty();
  }

  /** Drops what is held. Nothing is sent any more. */
  close(): void {
    this.#empty();
    this.#transport = undefined;
    this.#wake();
    // What comes after the end is not held either.
    this.#heldBytes = Infinity;
  }

  #empty(): void {
    this.#held = nothing;
    this.#heldBytes = 0;
    this.#backlog = "none";
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  #hold(message: string | Buffer): Room {
    if (this.#heldBytes === Infinity) return "taken";
    const text = message.toString();
    // V8 keeps a string with one byte a character, or with two as soon as one of them needs it.
    const bytes = text.length * (Buffer.byteLength(message) === text.length ? 1 : 2) + outboxOverheadBytes;
    if (this.#held === nothing) this.#held = [];
    (this.#held as Held[]).push({ text, bytes });
    this.#heldBytes += bytes;
    if (this.#heldBytes > this.#maxHeldBytes) {
      if (this.#backlog === "none") this.#backlog = "moving";
      const tooMuch = this.#held.length > 1 && this.#heldBytes > this.#maxHeldBytes + readBytes;
      if (tooMuch || (this.#timer !== undefined && this.#idleMs >= chanceMs)) {
        this.#owner.tooSlow();
        return "taken";
      }
    }
    // A client that is about to open its socket has time, unless its messages come too fast for that.
    if (this.#transport === undefined && this.#backlog === "none") return "taken";
    if (this.#timer === undefined) this.#watch();
    return this.#idleMs < crowdedMs ? "full" : "taken";
  }

  get #isWaitedFor(): boolean {
    return this.#held.length > 0 || this.#waiting.length > 0;
  }

  #watch(): void {
    clearTimeout(this.#timer);
    this.#unsent = this.#unsentNow;
    this.#idleMs = this.#crowdedMs = 0;
    this.#lookAfter(0);
  }

  #lookAfter(delayMs: number): void {
    this.#lookedAtMs = performance.now();
    this.#timer = setTimeout(() => this.#look(), delayMs);
  }

  #look(): void {
    const transport = this.#transport;
    this.#timer = undefined;
    // A process that did not run gave no client a chance.
    const sinceMs = Math.min(lookMs, performance.now() - this.#lookedAtMs);
    const unsent = this.#unsentNow;
    const takes = unsent < this.#unsent;
    this.#idleMs = takes ? 0 : this.#idleMs + sinceMs;
    if (this.#backlog !== "none") this.#backlog = takes && unsent === 0 ? "moving" : "slow";
    this.#crowdedMs = this.#backlog === "slow" ? this.#crowdedMs + sinceMs : 0;
    const patienceMs = this.#backlog === "none" ? stuckMs : chanceMs;
    if (this.#idleMs >= patienceMs || this.#crowdedMs >= crowdedMs) return this.#owner.tooSlow();
    if (transport !== undefined) {
      this.#drain(transport);
      if (this.#held.length === 0 && this.#budget.hasRoom(transport)) this.#wake();
    }
    if (!this.#isWaitedFor) return;
    this.#unsent = this.#unsentNow;
    this.#lookAfter(takes ? soonMs : lookMs);
  }

  #wake(): void {
    const waiting = this.#waiting;
    this.#waiting = nothing;
    for (const resolve of waiting) resolve();
  }

  /** A client without a transport takes nothing. */
  get #unsentNow(): number {
    return this.#transport === undefined ? 0 : this.#budget.unsent(this.#transport);
  }

  /** Sends as much of what is held as there is room for. */
  #drain(transport: Transport): void {
    const held = this.#held;
    let count = 0;
    while (count < held.length && this.#budget.hasRoom(transport)) {
      const { text, bytes } = held[count++]!;
      this.#heldBytes -= bytes;
      this.#budget.spend(text);
      transport.send(text);
    }
    if (count > 0) this.#held = count < held.length ? held.slice(count) : nothing;
    if (this.#heldBytes <= this.#maxHeldBytes * 0.75) this.#backlog = "none";
  }
}
