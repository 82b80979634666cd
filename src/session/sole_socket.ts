/** `SESSION_SOCKETS=last`: the socket of a session that opened last, and no other one, stays open. */

import type { Link } from "../redis/link.ts";

/** One socket among those of its session, on this proxy and on others. */
export class SoleSocket {
  readonly #link: Link;
  readonly #onReplaced: () => void;
  #openedAtMs = 0;
  /** It has told the others to go, and that has not come back to it yet: what comes before is older. */
  #replacing = false;

  /** `onReplaced` is called when a newer one has opened. */
  constructor(link: Link, onReplaced: () => void) {
    this.#link = link;
    this.#onReplaced = onReplaced;
  }

  /** It has opened. */
  open(atMs: number): void {
    this.#openedAtMs = atMs;
    this.#replacing = true;
    this.#replaceOthers();
  }

  /** Whether its own word came to the others, or another's was missed, it cannot know any more. */
  gap(): void {
    this.#replacing = false;
    this.#replaceOthers();
  }

  /** A socket of this session has opened, on this proxy or on another, or may not have heard who has. */
  makeWay(json: string): void {
    const { connection, opened_ms } = parseNewcomer(json);
    if (connection === this.#link.connection) this.#replacing = false;
    else if (this.#replacing) return;
    else if (typeof opened_ms !== "number" || !this.#isNewerThan(opened_ms, connection)) this.#onReplaced();
    else this.#replaceOthers();
  }

  /** Tells the others to go: all of them when it has just opened, later those that opened before it. */
  #replaceOthers(): void {
    const { connection } = this.#link;
    const newcomer = this.#replacing ? { connection } : { connection, opened_ms: this.#openedAtMs };
    this.#link.replaceOthers(JSON.stringify(newcomer), () => this.#replacing = false);
  }

  /** In an order that is the same for all, so that exactly one of them stays. */
  #isNewerThan(openedAtMs: number, connection: unknown): boolean {
    return this.#openedAtMs === openedAtMs ? this.#link.connection > String(connection) : this.#openedAtMs > openedAtMs;
  }
}

/** Whom a `!replace` names, and when that opened, where it says so. */
function parseNewcomer(json: string): { connection?: unknown; opened_ms?: unknown } {
  try {
    return Object(JSON.parse(json));
  } catch {
    return {};
  }
}
