/** A WebSocket client that keeps what it gets. */

import { Inbox } from "./inbox.ts";
import { type Claims, mint } from "./token.ts";
import { soon } from "./wait.ts";

/** How a client connects. */
export interface ConnectOptions {
  agent?: string;
  claims?: Claims;
  /** Instead of one minted from the claims. */
  token?: string;
  headers?: Record<string, string>;
  /** Offered subprotocols. */
  protocols?: string[];
  /** The last position handled, of a client that resumes: it offers the subprotocol for it. */
  resume?: string;
}

/** A WebSocket client that keeps what it gets until the test asks for it. */
export class Client implements AsyncDisposable {
  readonly socket: WebSocket;
  /** Resolves when the socket has closed. */
  readonly closed: Promise<{ code: number; reason: string }>;
  readonly #inbox = new Inbox();

  private constructor(socket: WebSocket) {
    this.socket = socket;
    socket.addEventListener("message", ({ data }) => this.#inbox.add(data));
    this.closed = new Promise((resolve) => {
      socket.addEventListener("close", ({ code, reason }) => {
        resolve({ code, reason });
        this.#inbox.end();
      });
    });
  }

  /** Connects to a proxy of the loopback, with a token. */
  static async connect(port: number, sessionId: string, options: ConnectOptions = {}): Promise<Client> {
    const token = options.token ?? await mint(sessionId, options.claims);
    const path = `/${encodeURIComponent(options.agent ?? "agent")}/ws/${encodeURIComponent(sessionId)}`;
    const headers = { Authorization: `Bearer ${token}`, ...options.headers };
    const query = options.resume === undefined ? "" : `?resume=${options.resume}`;
    const protocols = options.resume === undefined ? options.protocols : ["wsproxy.resume.v1"];
    return await Client.open(new URL(`ws://127.0.0.1:${port}${path}${query}`), { headers, protocols });
  }

  /** Connects and waits for the open. Rejects when it is refused. */
  static async open(url: URL, options: WebSocketOptions): Promise<Client> {
    const client = new Client(new WebSocket(url, options));
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    client.socket.addEventListener("open", () => resolve());
    client.socket.addEventListener("error", (event) => {
      event.preventDefault();
      reject(new Error((event as ErrorEvent).message));
    });
    await soon(promise, `open of ${url.pathname}`);
    return client;
  }

  send(data: string | Uint8Array<ArrayBuffer>): void {
    this.socket.send(data);
  }

  /** The next `count` messages. Rejects when the socket closes before. */
  take(count: number): Promise<string[]> {
    return this.#inbox.take(count);
  }

  /** The next message. */
  async next(): Promise<string> {
    return (await this.take(1))[0]!;
  }

  /** All that has arrived and was not taken. */
  arrived(): string[] {
    return this.#inbox.takeAll();
  }

  /** How the socket ends. */
  ended(): Promise<{ code: number; reason: string }> {
    return soon(this.closed, "close");
  }

  /** Closes and waits for the end. */
  async close(): Promise<void> {
    this.socket.close();
    await this.ended();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** A client of each of so many sessions. */
export const connectMany = (port: number, count: number, prefix = "s") =>
  Promise.all(Array.from({ length: count }, (_, n) => Client.connect(port, `${prefix}${n}`)));
