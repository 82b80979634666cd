// @ts-check
/**
 * Clients that are tortured, in any runtime: they connect, submit, throw, leave and come back, with tokens that run out,
 * hang, fail or are forged, and report all that they see. Who judges it is torture.ts.
 */

import { Connection } from "../../clients/js/wsproxy.js";

/**
 * @typedef {object} Orders
 * @property {readonly { session: string, url: string, sse: boolean }[]} clients
 * @property {string} secret of the proxy's tokens
 * @property {number} seed
 *
 * @typedef {{ session: string, event: string, number?: number, reason?: string, [name: string]: unknown }} Report
 *
 * @typedef {{ open: boolean, live: boolean, pending: number, carriers: number[], lastError: string,
 *   losses?: string[] }} Status `carriers`: the numbers of its sockets and streams; `losses`: since it was last open, why
 * each connection or attempt ended, and when
 *
 * How all clients of a process are: timers and listeners that theirs are, and memory in use, in MB.
 * @typedef {{ clients: Status[], timers: number, listeners: number, heapMb: number }} Summary
 */

const encoder = new TextEncoder();
const base64url = (/** @type {string | ArrayBuffer} */ data) =>
  btoa(typeof data === "string" ? data : String.fromCharCode(...new Uint8Array(data)))
    .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

/** @param {object} claims @param {string} secret */
async function mint(claims, secret) {
  const key = await crypto.subtle.importKey(
    "raw",
    encoder.encode(secret),
    { name: "HMAC", hash: "SHA-256" },
    false,
    ["sign"],
  );
  const text = `${base64url('{"alg":"HS256"}')}.${base64url(JSON.stringify(claims))}`;
  return `${text}.${base64url(await crypto.subtle.sign("HMAC", key, encoder.encode(text)))}`;
}

/** Random numbers that can be repeated (mulberry32). @param {number} seed */
function createRandom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Timers that the module itself has set, and that wait; and how many of its listeners that a signal ends there are. */
const timers = new Set();
let listeners = 0;
const { setTimeout, clearTimeout, document: page } = /** @type {{ document?: EventTarget } & typeof globalThis} */ (
  globalThis
);
for (const target of [globalThis, page]) {
  const { addEventListener } = target ?? {};
  if (!target || !addEventListener) continue;
  target.addEventListener = (
    /** @type {string} */ type,
    /** @type {EventListener} */ listener,
    /** @type {AddEventListenerOptions | undefined} */ options,
  ) => {
    addEventListener.call(target, type, listener, options);
    if (!options?.signal) return;
    listeners++;
    options.signal.addEventListener("abort", () => listeners--);
  };
}
Object.assign(globalThis, {
  /** @param {(...args: unknown[]) => void} action @param {number} ms @param {unknown[]} args */
  setTimeout(action, ms, ...args) {
    const [, , caller = ""] = String(new Error().stack).split("\n");
    const own = caller.includes("/wsproxy.js");
    const timer = setTimeout(() => {
      timers.delete(timer);
      action(...args);
    }, ms);
    if (own) timers.add(timer);
    return timer;
  },
  /** @param {ReturnType<typeof setTimeout>} timer */
  clearTimeout(timer) {
    timers.delete(timer);
    clearTimeout(timer);
  },
});
// Waits are a tenth of what they would be.
const { random } = Math;
Math.random = () => random() / 10;

/** A client of one session, and the application around it. */
class Tortured {
  /** What keeps a connection: sockets that are not closing, and streams; each with a number. */
  #carriers = /** @type {Map<{ readyState: number }, number>} */ (new Map());
  #carried = 0;
  #position = "0";
  #live = false;
  #submitted = 0;
  #lastError = "";
  /** @type {string[]} */
  #losses = [];
  /** @type {Connection} */
  #connection;
  /** Nothing goes wrong on this side any more. */
  calm = false;

  /**
   * @param {{ session: string, url: string, sse: boolean }} client
   * @param {Orders} orders
   * @param {new (url: string | URL, protocols?: string[]) => import("../../clients/js/wsproxy.js").Socket} Socket
   * @param {() => number} random
   * @param {(report: Report) => void} report
   */
  constructor({ session, url, sse }, { secret }, Socket, random, report) {
    const carry = (/** @type {{ readyState: number }} */ carrier) => this.#carriers.set(carrier, ++this.#carried);
    /** @type {any} */
    const Counted = class extends /** @type {any} */ (Socket) {
      /** @param {string} url @param {string[]} protocols */
      constructor(url, protocols) {
        // Where no WebSocket passes.
        super(sse ? "ws://127.0.0.1:9/" : url, protocols);
        carry(/** @type {any} */ (this));
      }
    };
    const oneOf = (/** @type {number} */ probability) => !this.calm && random() < probability;
    const token = async () => {
      if (oneOf(0.04)) return await new Promise(() => {});
      if (oneOf(0.04)) throw new Error("no token today");
      const lifeSecs = this.calm ? 3600 : 3 + Math.floor(random() * 40);
      const nowSecs = Math.floor(Date.now() / 1000);
      const claims = { session_id: session, iat: nowSecs, exp: nowSecs + lifeSecs };
      return await mint(claims, oneOf(0.03) ? "x".repeat(32) : secret);
    };
    /** @type {typeof fetch} */
    const counted = async (url, init) => {
      if (init?.method === "POST") return await fetch(url, init);
      const stream = { readyState: 0 };
      carry(stream);
      init?.signal?.addEventListener("abort", () => stream.readyState = 3);
      return await fetch(url, init);
    };
    const connect = () =>
      this.#connection = new Connection({
        url,
        token,
        position: this.#position,
        timeoutMs: 1500,
        silenceMs: 500,
        // What waits at the end is posted one after the other.
        maxPending: 20,
        WebSocket: Counted,
        fetch: counted,
        onMessage: (text, position) => {
          // It is still to come: the next connection gets it.
          if (oneOf(0.003)) return leave();
          report({ session, event: "message", number: parseInt(text), position });
          if (oneOf(0.01)) throw new Error("not handled");
        },
        onPosition: (position) => this.#position = position,
        onGap: (reason) => report({ session, event: "gap", reason }),
        onLive: () => this.#live = true,
        onError: (error) => this.#lastError = String(error),
        onState: (state, close) => {
          this.#live = false;
          if (state === "open") this.#losses = [];
          else if (close) this.#losses.push(`${Math.round(performance.now())} ms: ${close.code} ${close.reason}`);
          report({ session, event: state, reason: close && `${close.code} ${close.reason}` });
          // Refused for good, as far as it can tell: a person would load the page again.
          if (state === "closed" && close?.code !== 1000) setTimeout(connect, 100);
        },
      });
    const leave = () => {
      this.#connection.close();
      // It stays where it was, as the message that is being handled is still to come.
      queueMicrotask(() => {
        const { position } = this.#connection;
        if (position !== this.#position) report({ session, event: "fault", reason: `${position} ${this.#position}` });
      });
      setTimeout(connect, 20);
    };
    this.#connection = connect();
    const submit = () => {
      if (this.calm) return;
      const number = ++this.#submitted;
      report({ session, event: "submitted", number });
      this.#connection.submit(JSON.stringify(`${session}:${number}`)).then(
        () => report({ session, event: "acknowledged", number }),
        (error) => report({ session, event: "unsent", number, reason: error.reason }),
      );
      setTimeout(submit, random() * 400);
    };
    submit();
  }

  /** @returns {Status} */
  status() {
    for (const carrier of this.#carriers.keys()) if (carrier.readyState > 1) this.#carriers.delete(carrier);
    const { open, pending } = this.#connection;
    return {
      open,
      live: this.#live,
      pending,
      carriers: [...this.#carriers.values()],
      lastError: this.#lastError,
      losses: this.#losses.slice(-5),
    };
  }
}

/**
 * Begins. What is returned says how they are, but for the memory in use, and lets them be calm.
 * @param {Orders} orders
 * @param {new (url: string | URL, protocols?: string[]) => any} Socket
 * @param {(report: Report) => void} report
 */
export function begin(orders, Socket, report) {
  const random = createRandom(orders.seed);
  const clients = orders.clients.map((client) => new Tortured(client, orders, Socket, random, report));
  return {
    calm() {
      for (const client of clients) client.calm = true;
    },
    summarize: () => ({ clients: clients.map((client) => client.status()), timers: timers.size, listeners }),
  };
}
