// @ts-check
/** One direction of a load: whose turn it is, what is due, and what has come. */

import { Histogram } from "./histogram.js";
import { Ledger } from "./ledger.js";
import { dueUsOf, numberOf, sessionOf } from "./message.js";

/** @import { Flow, FlowOutcome, Load } from "../outcome.ts" */

/** How often a share of streaming sessions moves on. */
const rotateMs = 500;

export class Direction {
  latency = new Histogram();
  /** Messages sent since the flow began. */
  sent = 0;
  startMs = 0;
  /** Messages still to be lost on purpose. */
  drop = 0;
  #receivedBefore = 0;
  #messages = 0;

  /** @param {Flow} flow @param {Load} load @param {number} firstSlow sessions from there on do not read */
  constructor(flow, load, firstSlow) {
    this.flow = flow;
    this.sessions = load.sessions;
    this.firstSlow = firstSlow;
    this.ledger = new Ledger(load.sessions, firstSlow);
    this.streaming = Math.max(1, Math.round(load.sessions * (flow.active ?? 1)));
  }

  /** The session whose turn it is. @param {number} nowMs */
  turn(nowMs) {
    const { streaming } = this;
    if (streaming === this.sessions) return this.sent % streaming;
    const moved = Math.floor((nowMs - this.startMs) / rotateMs) * streaming / 2;
    return (this.sent % streaming + Math.floor(moved)) % this.sessions;
  }

  /** How many are due. @param {number} nowMs */
  due(nowMs) {
    const { perSecond, window = 0 } = this.flow;
    if (perSecond === undefined) return Math.max(0, window - this.ledger.outstanding);
    return Math.floor((nowMs - this.startMs) * perSecond / 1000) - this.sent;
  }

  /** When the next one is due, in microseconds. @param {number} nowMs */
  dueUs(nowMs) {
    const { perSecond } = this.flow;
    return Math.round((perSecond === undefined ? nowMs : this.startMs + (this.sent + 1) * 1000 / perSecond) * 1000);
  }

  /**
   * A message has come; how long it took, in microseconds, or nothing where that does not count.
   * @param {number} session @param {Buffer} buffer @param {number} at
   */
  receive(session, buffer, at) {
    const us = Math.round(performance.now() * 1000) - dueUsOf(buffer, at);
    this.ledger.receive(session, sessionOf(buffer, at), numberOf(buffer, at));
    if (session >= this.firstSlow) return undefined;
    this.latency.record(us);
    return us;
  }

  /** What is measured begins now. */
  begin() {
    this.latency.reset();
    this.#receivedBefore = this.ledger.received;
  }

  /** What is measured ends now. */
  end() {
    this.#messages = this.ledger.received - this.#receivedBefore;
  }

  /** @param {number} measuredMs @returns {FlowOutcome} */
  outcome(measuredMs) {
    return {
      account: this.ledger.close(),
      messages: this.#messages,
      perSecond: this.#messages / measuredMs * 1000,
      latency: this.latency.toBuckets(),
    };
  }
}
