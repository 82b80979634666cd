// @ts-check
/** Sends what is due, down through Redis and up through the clients. */

import { Histogram } from "./histogram.js";
import { blank } from "./message.js";
import { FrameWriter } from "./client.js";

/** @import { Crowd } from "./crowd.js" */
/** @import { Direction } from "./direction.js" */
/** @import { Publisher } from "./redis.js" */

export class Sender {
  /** How late our own messages are, in microseconds. */
  lag = new Histogram();
  sending = false;
  #crowd;
  #down;
  #up;
  #publisher;
  #frames;
  /** @type {NodeJS.Immediate | undefined} */
  #refilling;

  /** @param {Crowd} crowd @param {{ down?: Direction, up?: Direction, publisher?: Publisher }} ways */
  constructor(crowd, { down, up, publisher }) {
    this.#crowd = crowd;
    this.#down = down;
    this.#up = up;
    this.#publisher = publisher;
    this.#frames = up && new FrameWriter(blank(up.flow.bytes));
  }

  /** Sends from now on. */
  start() {
    this.sending = true;
    const nowMs = performance.now();
    if (this.#down) this.#down.startMs = nowMs;
    if (this.#up) this.#up.startMs = nowMs;
    this.#pump();
  }

  /** Closed loop: sends more as soon as half of the window has come back. @param {Direction} direction */
  refill(direction) {
    if (direction.flow.perSecond !== undefined || this.#refilling || !this.sending) return;
    if (direction.ledger.outstanding > (direction.flow.window ?? 0) / 2) return;
    this.#refilling = setImmediate(() => {
      this.#refilling = undefined;
      this.#sendDue();
    });
  }

  #pump() {
    if (!this.sending) return;
    this.#sendDue();
    setTimeout(() => this.#pump(), 1);
  }

  #sendDue() {
    if (!this.sending) return;
    const nowMs = performance.now();
    if (this.#down && this.#publisher) this.#sendDown(this.#down, this.#publisher, nowMs);
    if (this.#up && this.#frames) this.#sendUp(this.#up, this.#frames, nowMs);
  }

  /** @param {Direction} down @param {Publisher} publisher @param {number} nowMs */
  #sendDown(down, publisher, nowMs) {
    for (let due = down.due(nowMs); due > 0; due--) {
      const session = down.turn(nowMs);
      const dueUs = down.dueUs(nowMs);
      const astray = down.drop > 0 && session < down.firstSlow;
      if (astray) down.drop--;
      publisher.publish(session, down.ledger.send(session), dueUs, astray);
      if (down.flow.perSecond !== undefined) this.lag.record(nowMs * 1000 - dueUs);
      down.sent++;
    }
    publisher.flush();
  }

  /** @param {Direction} up @param {FrameWriter} frames @param {number} nowMs */
  #sendUp(up, frames, nowMs) {
    for (let due = up.due(nowMs); due > 0; due--) {
      const session = up.turn(nowMs);
      const dueUs = up.dueUs(nowMs);
      up.sent++;
      const client = this.#crowd.clients[session];
      if (!client) continue;
      client.send(frames.write(session, up.ledger.send(session), dueUs));
      if (up.flow.perSecond !== undefined) this.lag.record(nowMs * 1000 - dueUs);
    }
  }
}
