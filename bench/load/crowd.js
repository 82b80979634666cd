// @ts-check
/** All clients of a load: they connect, some at a time, and a client that is cut connects again. */

import { Buffer } from "node:buffer";
import { createHmac } from "node:crypto";
import { Client } from "./client.js";
import { Histogram } from "./histogram.js";
import { sessionName } from "./redis.js";

/** @import { Order } from "../outcome.ts" */
/** @import { Listener } from "./client.js" */

/** Connections from one address, which has some 28,000 ports for them. */
const clientsPerAddress = 20_000;

export class Crowd {
  /** By session. @type {(Client | undefined)[]} */
  clients;
  open = 0;
  /** @type {Record<string, number>} */
  closes = {};
  /** @type {{ opened: number, refused: Record<string, number>, failed: Record<string, number> }} */
  connected = { opened: 0, refused: {}, failed: {} };
  reconnect = { opened: 0, failed: 0 };
  connectLatency = new Histogram();
  reconnectLatency = new Histogram();
  #order;
  #requests;
  #listener;
  /** What waits for a client's open or failure. @type {(((client: Client | undefined, why?: number | string) => void) | undefined)[]} */
  #opening;

  /** @param {Order} order @param {Pick<Listener, "onMessage" | "onForeign"> & { onOpen(client: Client): void }} listener */
  constructor(order, { onOpen, onMessage, onForeign }) {
    const { sessions } = order.load;
    this.#order = order;
    this.clients = new Array(sessions);
    this.#opening = new Array(sessions);
    this.#requests = Array.from({ length: sessions }, (_, session) => requestFor(order, session));
    this.#listener = /** @type {Listener} */ ({
      onOpen: (client) => {
        this.clients[client.session] = client;
        this.open++;
        onOpen(client);
        this.#opening[client.session]?.(client);
      },
      onRefused: (client, status) => this.#opening[client.session]?.(undefined, status),
      onMessage,
      onForeign,
      onEnd: (client, code) => {
        if (this.clients[client.session] !== client) return this.#opening[client.session]?.(undefined, code);
        this.clients[client.session] = undefined;
        this.open--;
        this.closes[code] = (this.closes[code] ?? 0) + 1;
      },
    });
  }

  /** Connects the sessions from one to before another, some at a time. @param {number} from @param {number} to */
  async connect(from, to) {
    let next = from;
    const connectNext = async () => {
      while (next < to) {
        const why = await this.#connectOne(next++, this.connectLatency);
        if (why === undefined) this.connected.opened++;
        else count(typeof why === "number" ? this.connected.refused : this.connected.failed, why);
      }
    };
    await Promise.all(Array.from({ length: this.#order.load.connecting }, connectNext));
  }

  /** Breaks a session's connection, if it has one. @param {number} session */
  cut(session) {
    const client = this.clients[session];
    if (!client) return false;
    this.clients[session] = undefined;
    this.open--;
    client.cut();
    return true;
  }

  /** @param {number} session */
  async reopen(session) {
    const why = await this.#connectOne(session, this.reconnectLatency);
    if (why === undefined) this.reconnect.opened++;
    else {
      this.reconnect.failed++;
      count(this.connected.failed, why);
    }
  }

  /** Resolves with nothing when it was opened, else with the HTTP status or the error's code. @param {number} session @param {Histogram} latency @returns {Promise<number | string | undefined>} */
  #connectOne(session, latency) {
    return new Promise((resolve) => {
      const client = new Client(session, {
        port: this.#order.port,
        localAddress: `127.0.0.${1 + Math.floor(session / clientsPerAddress)}`,
        request: this.#requests[session] ?? "",
        listener: this.#listener,
      });
      this.#opening[session] = (opened, why) => {
        this.#opening[session] = undefined;
        if (opened) latency.record((performance.now() - client.startedMs) * 1000);
        resolve(opened ? undefined : why);
      };
    });
  }
}

/** @param {Record<string, number>} by @param {number | string} why */
function count(by, why) {
  by[why] = (by[why] ?? 0) + 1;
}

/**
 * A client's opening handshake, resuming from the beginning of its log or not.
 * @param {Pick<Order, "port" | "secret">} order @param {number} session
 */
export function requestFor({ port, secret }, session, resuming = false) {
  /** @param {object} part */
  const encode = (part) => Buffer.from(JSON.stringify(part)).toString("base64url");
  const iat = Math.floor(Date.now() / 1000);
  const claims = { session_id: sessionName(session), iat, exp: iat + 86_400 };
  const signed = `${encode({ alg: "HS256", typ: "JWT" })}.${encode(claims)}`;
  const token = `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
  return [
    `GET /bench/ws/${sessionName(session)} HTTP/1.1`,
    `Host: 127.0.0.1:${port}`,
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    `Authorization: Bearer ${token}`,
    ...resuming ? ["Sec-WebSocket-Protocol: wsproxy.resume.v1"] : [],
    "User-Agent: wsproxy-bench",
    "\r\n",
  ].join("\r\n");
}
