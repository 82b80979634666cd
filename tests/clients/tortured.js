// @ts-check
/**
 * Clients that are tortured, in any runtime: they connect, submit, throw, leave and come back, with tokens that run out,
 * hang, fail or are forged, and report all that they see. Who judges it is torture.ts.
 */

import { Connection } from "../../clients/js/wsproxy.js";

/**
 * @typedef {object} Orders
 * @property {readonly { session: string, port: number, sse: boolean }[]} clients
 * @property {string} secret of the proxy's tokens
 * @property {number} seed
 *
 * @typedef {{ session: string, event: string, number?: number, reason?: string, [name: string]: unknown }} Report
 *
 * @typedef {{ open: boolean, live: boolean, pending: number, carriers: number, timers: number, lastError: string }} Status
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

/** Timers that the module itself has set, and that wait. */
const timers = new Set();
const { setTimeout, clearTimeout } = globalThis;
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
  /** What keeps a connection: sockets that are not closing, and streams. @type {Set<{ readyState: number }>} */
  #carriers = new Set();
  #position = "0";
  #live = false;
  #submitted = 0;
  #lastError = "";
  /** @type {Connection} */
  #connection;
  /** Nothing goes wrong on this side any more. */
  calm = false;

  /**
   * @param {{ session: string, port: number, sse: boolean }} client
   * @param {Orders} orders
   * @param {new (url: string | URL, protocols?: string[]) => import("../../clients/js/wsproxy.js").Socket} Socket
   * @param {() => number} random
   * @param {(report: Report) => void} report
   */
  constructor({ session, port, sse }, { secret }, Socket, random, report) {
    const carriers = this.#carriers;
    /** @type {any} */
    const Counted = class extends /** @type {any} */ (Socket) {
      /** @param {string} url @param {string[]} protocols */
      constructor(url, protocols) {
        // Where no WebSocket passes.
        super(sse ? "ws://127.0.0.1:9/" : url, protocols);
        carriers.add(/** @type {any} */ (this));
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
      carriers.add(stream);
      init?.signal?.addEventListener("abort", () => stream.readyState = 3);
      return await fetch(url, init);
    };
    const connect = () =>
      this.#connection = new Connection({
        url: `ws://127.0.0.1:${port}/agent/ws/${session}`,
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
          if (oneOf(0.0003)) return leave();
          report({ session, event: "message", number: parseInt(text), position });
          if (oneOf(0.01)) throw new Error("not handled");
        },
        onPosition: (position) => this.#position = position,
        onGap: (reason) => report({ session, event: "gap", reason }),
        onLive: () => this.#live = true,
        onError: (error) => this.#lastError = String(error),
        onState: (state, close) => {
          this.#live = false;
          report({ session, event: state, reason: close && `${close.code} ${close.reason}` });
          // Refused for good, as far as it can tell: a person would load the page again.
          if (state === "closed" && close?.code !== 1000) setTimeout(connect, 100);
        },
      });
    const leave = () => {
      this.#connection.close();
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
    for (const carrier of this.#carriers) if (carrier.readyState > 1) this.#carriers.delete(carrier);
    const { open, pending } = this.#connection;
    return {
      open,
      live: this.#live,
      pending,
      carriers: this.#carriers.size,
      timers: timers.size,
      lastError: this.#lastError,
    };
  }
}

/**
 * Begins. What is returned says how they are, and lets them be calm.
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
    status: () => clients.map((client) => client.status()),
  };
}
