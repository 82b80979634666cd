// @ts-check
/** What is seen from time to time during a load: connections, rates, latency, the server's memory. */

import { Histogram } from "./histogram.js";
import { residentBytes } from "./process.js";

/** @import { Event, Sample } from "../outcome.ts" */
/** @import { Crowd } from "./crowd.js" */
/** @import { Direction } from "./direction.js" */

export class Series {
  /** Latency since the last sample, in microseconds. */
  interval = new Histogram();
  /** @type {Sample[]} */
  samples = [];
  peakBytes = 0;
  #beginMs = performance.now();
  #sampledMs = this.#beginMs;
  #sampled = { down: 0, up: 0 };

  /** @param {Crowd} crowd @param {{ down?: Direction, up?: Direction }} directions @param {number} serverPid @param {(event: Event) => void} tell */
  constructor(crowd, { down, up }, serverPid, tell) {
    this.crowd = crowd;
    this.down = down;
    this.up = up;
    this.serverPid = serverPid;
    this.tell = tell;
  }

  sample() {
    const { crowd: { open }, down, up, interval } = this;
    const nowMs = performance.now();
    const secs = (nowMs - this.#sampledMs) / 1000;
    const counts = { down: down?.ledger.received ?? 0, up: up?.ledger.received ?? 0 };
    const serverBytes = residentBytes(this.serverPid);
    this.peakBytes = Math.max(this.peakBytes, serverBytes);
    const downPerSecond = Math.round((counts.down - this.#sampled.down) / secs);
    const upPerSecond = Math.round((counts.up - this.#sampled.up) / secs);
    this.samples.push({
      atMs: Math.round(nowMs - this.#beginMs),
      connections: open,
      downPerSecond,
      upPerSecond,
      serverBytes,
      ...(interval.count > 0 ? { p50Us: interval.percentile(50), p99Us: interval.percentile(99) } : {}),
    });
    const rates = [down && `, ${downPerSecond} down/s`, up && `, ${upPerSecond} up/s`].filter(Boolean).join("");
    this.tell({ progress: `${open} open${rates}, ${Math.round(serverBytes / 2 ** 20)} MB` });
    interval.reset();
    this.#sampled = counts;
    this.#sampledMs = nowMs;
  }
}
