/**
 * The account of one direction, message by message: every session's messages are numbered from 0, and every number is
 * received once, in order, or it shows here.
 */

/** @import { Account } from "../outcome.ts" */

export class Ledger {
  #sent;
  /** The number expected next, and the first one sent after the session was last opened. */
  #next;
  #floor;
  /** Numbers that were skipped, by session. @type {Map<number, Set<number>>} */
  #missing = new Map();
  /** Sessions that are not connected now. */
  #cut;
  #total = 0;
  #received = 0;
  #duplicated = 0;
  #reordered = 0;
  #misrouted = 0;
  #away = 0;
  #toSlow = 0;

  /** Sessions from `firstSlow` on do not read. @param {number} sessions @param {number} firstSlow */
  constructor(sessions, firstSlow) {
    this.#sent = new Int32Array(sessions);
    this.#next = new Int32Array(sessions);
    this.#floor = new Int32Array(sessions);
    this.#cut = new Uint8Array(sessions);
    this.firstSlow = firstSlow;
  }

  get received() {
    return this.#received;
  }

  /** Sent and not received, as far as a client is there to receive it. */
  get outstanding() {
    return this.#total - this.#received - this.#away - this.#toSlow;
  }

  /** The number of the session's next message, which is now sent. @param {number} session */
  send(session) {
    this.#total++;
    if (session >= this.firstSlow) this.#toSlow++;
    else if (this.#cut[session]) this.#away++;
    return this.#sent[session]++;
  }

  /** A session received a message that says it is `number` of session `meant`. @param {number} session @param {number} meant @param {number} number */
  receive(session, meant, number) {
    if (session >= this.firstSlow) return;
    if (meant !== session) {
      this.#misrouted++;
      return;
    }
    const next = this.#next[session];
    if (number === next) {
      this.#received++;
      this.#next[session]++;
    } else if (number > next) {
      this.#received++;
      let missing = this.#missing.get(session);
      if (!missing) this.#missing.set(session, missing = new Set());
      for (let skipped = next; skipped < number; skipped++) missing.add(skipped);
      this.#next[session] = number + 1;
    } else if (number < this.#floor[session]) {
      // Sent before the session knew that it was open again: counted as away, and here it is.
      this.#received++;
      this.#away--;
    } else if (this.#missing.get(session)?.delete(number)) {
      this.#received++;
      this.#reordered++;
    } else this.#duplicated++;
  }

  /** The session breaks its connection: what is on its way will not arrive. @param {number} session */
  cut(session) {
    this.#cut[session] = 1;
    this.#away += this.#sent[session] - this.#next[session];
    this.#next[session] = this.#sent[session];
  }

  /** The session is open again: what is sent from now on must arrive. @param {number} session */
  reopen(session) {
    this.#cut[session] = 0;
    this.#next[session] = this.#floor[session] = this.#sent[session];
  }

  /** @returns {Account} */
  close() {
    let lost = 0;
    for (const missing of this.#missing.values()) lost += missing.size;
    for (let session = 0; session < Math.min(this.firstSlow, this.#sent.length); session++) {
      if (!this.#cut[session]) lost += this.#sent[session] - this.#next[session];
    }
    return {
      sent: this.#total,
      received: this.#received,
      lost,
      duplicated: this.#duplicated,
      reordered: this.#reordered,
      misrouted: this.#misrouted,
      away: this.#away,
      toSlow: this.#toSlow,
    };
  }
}
