/**
 * A watch over a listener of node:http. One that runs out of file descriptors never accepts a connection again, and does
 * not say so. So the watch knocks at it from time to time, and tells when it hears nothing any more. Any connection that
 * is accepted meanwhile proves that it hears: a knock may stand behind thousands of others, or not even find room among
 * those that wait. Where several listeners share the port, the kernel may lead a knock to another one: then it knocks
 * again, so often that chance alone makes no listener deaf.
 */

import type { Server as HttpServer } from "node:http";
import { within } from "../deadline.ts";

/** How often it knocks, and how long the listener may take to accept any connection. */
const knockIntervalMs = 2000;
/**
 * Rounds in vain that make a deaf listener, and how late a timer may be before the stall is ours and not the
 * listener's.
 */
const deafAfter = 3;
/** Knocks for each listener of a port: with so many, all three rounds miss one of 256 once in 10^20. */
const knocksForEach = 16;
const stallMs = 100;

/** How a listener is watched. */
export interface WatchOptions {
  /** Connects to the port of the listener. */
  readonly knock: () => Promise<Disposable>;
  /** The listener hears nothing: it is to be opened again. */
  readonly onDeaf: () => void;
  /** Listeners that share the port. */
  readonly listeners: number;
  /** How often it knocks. */
  readonly intervalMs?: number;
}

/** Watches until it is stopped. */
export class ListenerWatch {
  readonly #options: Required<WatchOptions>;
  readonly #knocks: number;
  /** Called when a connection is accepted. */
  #hears: (() => void) | undefined;
  /** Rounds in vain, one after the other. */
  #deaf = 0;
  #stopped = false;
  #timer: ReturnType<typeof setTimeout>;

  /** The first round begins after one interval. */
  constructor(http: Pick<HttpServer, "on">, options: WatchOptions) {
    this.#options = { intervalMs: knockIntervalMs, ...options };
    this.#knocks = options.listeners > 1 ? knocksForEach * options.listeners : 1;
    const came = () => this.#hears?.();
    http.on("connection", came);
    http.on("drop", came);
    this.#timer = this.#later();
  }

  /** Knocks no more. */
  stop(): void {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#hears?.();
  }

  #later(): ReturnType<typeof setTimeout> {
    return setTimeout(() => void this.#round(), this.#options.intervalMs);
  }

  async #round(): Promise<void> {
    const { intervalMs, onDeaf } = this.#options;
    let heard = false;
    const accepted = new Promise<true>((resolve) => {
      this.#hears = () => {
        heard = true;
        resolve(true);
      };
    });
    // No descriptor even for a knock says nothing of the listener.
    let knocked = true;
    const dueMs = performance.now() + intervalMs;
    const knocking = (async () => {
      for (let left = this.#knocks; left > 0 && !heard && !this.#stopped; left--) {
        try {
          using _connection = await this.#options.knock();
          await within(left === 1 ? dueMs - performance.now() : intervalMs / this.#knocks / 2, accepted);
        } catch {
          knocked = false;
        }
      }
    })();
    if (await within(intervalMs, accepted)) this.#deaf = 0;
    else if (knocked && performance.now() - dueMs < stallMs) this.#deaf++;
    this.#hears?.();
    void knocking;
    if (this.#stopped) return;
    this.#timer = this.#later();
    if (this.#deaf < deafAfter) return;
    this.#deaf = 0;
    onDeaf();
  }
}
