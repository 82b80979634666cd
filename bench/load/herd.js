// @ts-check
/**
 * A herd of clients that resume: it opens them all, brings each one back with jitter when it is cut, at another proxy,
 * and watches that no message is missing without a `!gap`. It takes commands as lines of JSON on standard input, and
 * answers each with a line on standard output, in order.
 */

import { createInterface } from "node:readline";
import process from "node:process";
import { Client } from "./client.js";
import { requestFor } from "./crowd.js";
import { Histogram } from "./histogram.js";
import { cpuUs, residentBytes } from "./process.js";

/** @import { HerdCommand, HerdReport, HerdUsage } from "../fleet.ts" */

/** As `clients/js` comes back: full jitter, twice as long after each failure. */
const firstDelayMs = 500;
const maxDelayMs = 30_000;
const openTimeoutMs = 10_000;
const nowMs = () => performance.timeOrigin + performance.now();

/** One session's client, over all its connections. */
class Member {
  /** @type {Client | undefined} */
  client;
  position = "0";
  /** Number of the last message. */
  last = 0;
  isLive = false;
  /** Something was missing, and it was told. */
  isTold = false;
  failures = 0;
  /** When it became live for the last time. */
  liveAtMs = 0;

  /** @param {number} session @param {number} proxy which one it tries, or has */
  constructor(session, proxy) {
    this.session = session;
    this.proxy = proxy;
  }
}

class Herd {
  /** @type {Member[]} */
  #members;
  #options;
  /** @type {{ mark: number, latency: Histogram, allLatency: Histogram, lost: number, repeated: number, gaps: number, reconnects: number, received: number, plain: number, lastLiveMs: number, lastPlainMs: number, lastEndMs: number, closes: Record<string, number> }} */
  #phase;
  #live = 0;
  #comesBack = true;

  /** @param {Extract<HerdCommand, { do: "start" }>} options */
  constructor(options) {
    this.#options = options;
    this.#members = Array.from({ length: options.sessions }, (_, n) => new Member(options.first + n, n));
    this.#phase = this.#begin();
  }

  #begin() {
    return {
      mark: nowMs(),
      latency: new Histogram(),
      allLatency: new Histogram(),
      lost: 0,
      repeated: 0,
      gaps: 0,
      reconnects: 0,
      received: 0,
      plain: 0,
      lastLiveMs: 0,
      lastPlainMs: 0,
      lastEndMs: 0,
      closes: {},
    };
  }

  /** Begins to open all, so many at a time. @param {number} connecting */
  open(connecting) {
    this.#comesBack = true;
    const away = this.#members.filter((member) => member.client === undefined);
    let next = 0;
    const openNext = () => {
      const member = away[next++];
      if (member) this.#dial(member, openNext);
    };
    for (let n = 0; n < connecting; n++) openNext();
  }

  /** A phase begins: what is reported from now on is of it. @param {boolean} comesBack */
  mark(comesBack) {
    this.#comesBack = comesBack;
    this.#phase = this.#begin();
  }

  /** @param {Member} member @param {() => void} [onDone] it is open, or has failed */
  #dial(member, onDone) {
    const { ports, secret, hasRoom } = this.#options;
    // As a balancer would choose that knows how many each may have: any of the others after a failure, or none.
    if (member.failures > 0 && hasRoom) member.proxy += 1 + Math.floor(Math.random() * (ports.length - 1));
    const port = ports[member.proxy % ports.length] ?? 0;
    const request = requestFor({ port, secret }, member.session, true);
    const done = () => {
      clearTimeout(deadline);
      onDone?.();
      onDone = undefined;
    };
    const client = member.client = new Client(member.session, {
      port,
      // The kernel looks for a port of a given address ever longer, the more of them are taken.
      localAddress: "127.0.0.1",
      request: request.replace(" HTTP/1.1", `?resume=${member.position} HTTP/1.1`),
      listener: {
        onOpen: done,
        onRefused: (_client, status) => {
          done();
          this.#ended(member, `HTTP ${status}`);
        },
        onMessage: () => {
          throw new Error("a frame without a position");
        },
        onForeign: (_client, text) => this.#receive(member, text),
        onEnd: (_client, code) => {
          done();
          this.#ended(member, code);
        },
      },
    });
    const deadline = setTimeout(() => {
      client.cut();
      done();
      this.#ended(member, "timeout");
    }, openTimeoutMs);
  }

  /** @param {Member} member @param {string | number} why */
  #ended(member, why) {
    const phase = this.#phase;
    member.client = undefined;
    phase.closes[why] = (phase.closes[why] ?? 0) + 1;
    phase.lastEndMs = nowMs();
    if (member.isLive) {
      member.isLive = false;
      member.failures = 0;
      this.#live--;
    }
    const delayMs = Math.random() * Math.min(maxDelayMs, firstDelayMs * 2 ** member.failures++);
    if (!this.#comesBack) return;
    setTimeout(() => {
      if (member.client === undefined && this.#comesBack) this.#dial(member);
    }, delayMs);
  }

  /** @param {Member} member @param {string} text */
  #receive(member, text) {
    const end = text.indexOf("\n");
    if (end < 0) throw new Error("a resuming client is served as a bare one");
    const head = text.slice(0, end);
    const phase = this.#phase;
    if (head === "") {
      phase.plain++;
      phase.lastPlainMs = nowMs();
    } else if (head === "!live") {
      member.position = text.slice(end + 1);
      if (member.isLive) return;
      member.isLive = true;
      member.failures = 0;
      member.liveAtMs = phase.lastLiveMs = nowMs();
      phase.reconnects++;
      this.#live++;
    } else if (head === "!gap") {
      phase.gaps++;
      member.position = JSON.parse(text.slice(end + 1)).position;
      member.isTold = true;
    } else if (!head.startsWith("!")) {
      const { n, t } = JSON.parse(text.slice(end + 1));
      phase.received++;
      member.position = head;
      if (n <= member.last) phase.repeated++;
      else if (n !== member.last + 1 && !member.isTold) phase.lost += n - member.last - 1;
      member.last = Math.max(member.last, n);
      member.isTold = false;
      const us = Math.max(0, (nowMs() - t) * 1000);
      phase.allLatency.record(us);
      // Of the others: those whose connection has not changed since the phase began.
      if (member.isLive && member.liveAtMs < phase.mark) phase.latency.record(us);
    }
  }

  /** @returns {HerdReport} */
  report() {
    const { latency, allLatency, ...phase } = this.#phase;
    return {
      ...phase,
      live: this.#live,
      last: this.#members.map(({ last }) => last),
      latency: latency.toBuckets(),
      allLatency: allLatency.toBuckets(),
    };
  }
}

/** What processes have used so far, the herd's own last. @param {readonly number[]} pids @returns {HerdUsage} */
const usage = (pids) => ({
  atMs: nowMs(),
  of: [...pids, process.pid].map((pid) => ({ cpuUs: cpuUs(pid), bytes: residentBytes(pid) })),
});

/** @type {Herd | undefined} */
let herd;
/** @param {HerdCommand} command @returns {unknown} */
function obey(command) {
  switch (command.do) {
    case "start":
      herd = new Herd(command);
      return {};
    case "open":
      return herd?.open(command.connecting) ?? {};
    case "mark":
      return herd?.mark(command.comesBack) ?? {};
    case "report":
      return herd?.report();
    case "usage":
      return usage(command.pids);
  }
}
let before = Promise.resolve();
for await (const line of createInterface({ input: process.stdin })) {
  before = before.then(async () => {
    process.stdout.write(`${JSON.stringify(await obey(JSON.parse(line)))}\n`);
  });
}
process.exit(0);
