/**
 * The engine of npm `ws` on `node:http`, inside Deno. It costs more per message than the native one, and defends
 * itself better: it refuses a message that is too large before it has all of it, really cuts off a peer that is stuck,
 * pings on time, and lets nobody be slow with a request. docs/engines.md has the differences and what they cost.
 */

import { Buffer, isUtf8 } from "node:buffer";
import {
  createServer,
  type IncomingMessage,
  type Server as HttpServer,
  type ServerResponse,
  STATUS_CODES,
} from "node:http";
import type { Socket as TcpSocket } from "node:net";
import { type Duplex, Writable } from "node:stream";
// @ts-types="@types/ws"
import { WebSocket, WebSocketServer } from "ws";
import { type Deadline, within } from "../deadline.ts";
import { readText } from "./body.ts";
import type { Handle, Request, Respond, Stream, Upgrade } from "../http/exchange.ts";
import { hasBody, isHandshake } from "../http/handshake.ts";
import { closes } from "../replies.ts";
import type { Session } from "../session/session.ts";
import type { Engine, EngineOptions } from "./engine.ts";

/** Connections the kernel may hold while a storm of clients waits to be accepted. */
const backlog = 4096;
/** Longest head of a request: a token of 8 KiB and all that proxies add. */
const maxHeadBytes = 65_536;
/** Fragments of one message: as many as it takes in pieces so small, as each costs memory of its own. */
const minFragments = 16_384;
const smallFragmentBytes = 64;
/** Connections beside the sessions: health checks, refused clients, those that are about to leave. */
const spareConnections = 256;
/** Most of a request's body that is read after its answer: an upload that was refused, and no more than that. */
const maxSkippedBytes = 16_777_216;
/** How often the listener is knocked at, and how long it may take to accept anybody. */
const knockIntervalMs = 2000;
/** Knocks in vain that make a deaf listener, and how late a timer may be before the stall is ours and not the listener's. */
const deafAfter = 3;
/** Knocks for each listener of a port: with so many, all three rounds miss one of 256 once in 10^20. */
const knocksForEach = 16;
const stallMs = 100;

/** Starts to listen. Rejects with what the operating system says, such as an error with code `EADDRINUSE`. */
export async function listenWs(handle: Handle, options: EngineOptions): Promise<Engine> {
  const { handshakeTimeoutMs, maxConnections } = options;
  const upgrader = new WebSocketServer({
    noServer: true,
    clientTracking: false,
    maxPayload: options.maxMessageBytes,
    maxFragments: Math.max(minFragments, options.maxMessageBytes / smallFragmentBytes),
    WebSocket: ClientSocket,
    // handleUpgrade asks for the choice here; it was made with the verdict.
    handleProtocols: (_offered, request) => selected.get(request) ?? false,
  });
  const selected = new WeakMap<IncomingMessage, string>();
  const http = createServer({
    // Else the first of two would count, and nothing would tell of the second.
    joinDuplicateHeaders: true,
    // The router asks for it: it knows who may go without.
    requireHostHeader: false,
    // Any other Upgrade is one that we do not speak, and is ignored (RFC 9110, section 7.8).
    shouldUpgradeCallback(request) {
      const shown = show(request);
      return shown.method === "GET" && isHandshake(shown) && !hasBody(shown);
    },
    maxHeaderSize: maxHeadBytes,
    headersTimeout: handshakeTimeoutMs,
    requestTimeout: handshakeTimeoutMs,
    keepAliveTimeout: options.keepAliveTimeoutMs,
    connectionsCheckingInterval: Math.min(1000, handshakeTimeoutMs / 4),
  });
  if (maxConnections > 0) http.maxConnections = maxConnections + spareConnections;
  const onRequest = async (request: IncomingMessage, response: ServerResponse) => {
    const shown = show(request);
    const verdict = await handle(shown);
    if (verdict.kind === "upgrade") return misled(verdict, request.socket);
    if (verdict.kind === "stream") stream(verdict, response);
    else {
      response.writeHead(verdict.status, { ...verdict.headers, "Content-Length": Buffer.byteLength(verdict.body) });
      response.end(verdict.body);
    }
    if (hasBody(shown)) skipRest(request, options);
  };
  http.on("request", onRequest);
  // An Expect that we do not know is ignored, as the native engine does; node:http would answer 417 by itself.
  http.on("checkExpectation", onRequest);
  http.on("upgrade", async (request: IncomingMessage, socket: Duplex, head: Buffer) => {
    // Whoever breaks the connection now is noticed after the upgrade, or by the answer that cannot be sent.
    socket.on("error", ignore);
    const verdict = await handle(show(request));
    if (verdict.kind === "respond") return answer(socket, verdict);
    if (verdict.kind === "stream") return misled(verdict, socket);
    const { session, protocol } = verdict;
    if (protocol !== undefined) selected.set(request, protocol);
    // It was checked; ws itself knows no list here.
    request.headers.upgrade = "websocket";
    let opened = false;
    upgrader.handleUpgrade(request, socket, head, (client) => {
      opened = true;
      socket.off("error", ignore);
      client.serve(session, options);
    });
    if (!opened) session.abandon();
  });
  http.on("clientError", (error: Error & { code?: string }, socket) => {
    const status = statusOfError[error.code ?? ""] ?? 400;
    if (socket.writable) socket.end(`HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\nConnection: close\r\n\r\n`);
    else socket.destroy();
  });

  const closed = Promise.withResolvers<void>();
  const reusePort = options.workers > 1;
  const listen = (port: number) => http.listen({ host: options.hostname, port, backlog, reusePort });
  await new Promise<void>((resolve, reject) => {
    http.once("listening", resolve).once("error", reject);
    listen(options.port);
  });
  const { address: hostname, port } = http.address() as { address: string; port: number };
  http.on("error", closed.reject);
  // By the name it was given: that is the one that the network permission holds.
  const knock = () => Deno.connect({ hostname: options.hostname, port });
  const watch = watchListener(http, knock, () => {
    options.onRelisten();
    http.close();
    listen(port);
  }, options.workers);
  return {
    hostname,
    port,
    finished: closed.promise,
    leave() {
      watch.stop();
      http.close();
    },
    close() {
      watch.stop();
      http.close(() => closed.resolve());
      http.closeAllConnections();
      return closed.promise;
    },
  };
}

const statusOfError: Readonly<Record<string, number | undefined>> = {
  ERR_HTTP_REQUEST_TIMEOUT: 408,
  HPE_HEADER_OVERFLOW: 431,
};

function ignore(): void {}

function show(request: IncomingMessage): Request {
  const { socket } = request;
  return {
    method: request.method ?? "",
    target: request.url ?? "",
    httpVersion: request.httpVersion,
    header(name) {
      const value = request.headers[name];
      return Array.isArray(value) ? value.join(", ") : value;
    },
    // Once it is destroyed, the rest could not be read either.
    text: (maxBytes) => readText(request.iterator({ destroyOnReturn: false }), maxBytes),
    get gone() {
      return socket.destroyed;
    },
  };
}

/**
 * Reads what is left of a request that has its answer: the next one of the connection stands behind it. A rest that is
 * too long, or takes too long, ends the connection.
 */
function skipRest(request: IncomingMessage, { deadlines, handshakeTimeoutMs }: EngineOptions): void {
  if (request.readableEnded || request.destroyed) return;
  const { socket } = request;
  let left = maxSkippedBytes;
  const deadline = deadlines.set(handshakeTimeoutMs, () => socket.destroy());
  const done = () => {
    deadline.cancel();
    socket.off("close", done);
  };
  socket.once("close", done);
  request.once("end", done).on("data", ({ length }: Buffer) => {
    left -= length;
    if (left < 0) socket.destroy();
  });
}

/** A session that its request cannot carry; the router looks at what `shouldUpgradeCallback` does, so there is none. */
function misled({ session }: Upgrade | Stream, socket: Duplex): void {
  session.abandon();
  socket.destroy();
}

/** A body that is written as the session goes on. */
function stream({ session, headers, open }: Stream, response: ServerResponse): void {
  if (response.destroyed) return session.abandon();
  response.writeHead(200, headers);
  const listener = open({
    write: (text) => response.write(text),
    get unsent() {
      return response.writableLength;
    },
    end: () => response.end(),
    destroy: () => response.destroy(),
  });
  response.on("error", ignore);
  response.on("close", () => listener.closed());
}

/** Answers on a connection that `node:http` has let go of. */
function answer(socket: Duplex, { status, headers, body }: Respond): void {
  const fields = { Connection: "close", ...headers, "Content-Length": Buffer.byteLength(body) };
  const head = Object.entries(fields).map(([name, value]) => `${name}: ${value}\r\n`).join("");
  socket.end(`HTTP/1.1 ${status} ${STATUS_CODES[status]}\r\n${head}\r\n${body}`);
  socket.once("finish", () => socket.destroy());
}

type HeartbeatOptions = Pick<EngineOptions, "deadlines" | "pingIntervalMs" | "pingTimeoutMs">;

/** One client's socket: `ws`'s own, which knows its session and keeps its heart beating. */
class ClientSocket extends WebSocket {
  #session: Session | undefined;
  #options: HeartbeatOptions | undefined;
  #heartbeat: Deadline | undefined;
  #pingedAtMs = 0;
  #onAnswer: (() => void) | undefined;
  /** Bytes read when it was last asked whether it lives. */
  #bytesRead = 0;

  serve(session: Session, options: HeartbeatOptions): void {
    this.#session = session;
    this.#options = options;
    this.on("message", this.#received);
    this.on("pong", this.#ponged);
    this.on("error", this.#malformed);
    this.on("close", this.#closed);
    this.#pingIn(options.pingIntervalMs);
    this.#receiver.end = endOnce;
    session.open(this);
  }

  /** `ws` itself closes with 1009, and no reason, on the first bytes of a message that is too large. */
  override close(code?: number, reason?: string | Buffer): void {
    const tooBig = code === closes.tooBig.code && reason === undefined;
    if (tooBig && this.#session?.isOpen) this.#session.receiveTooBig();
    else super.close(code, reason);
  }

  /**
   * One buffer and one write for a message; `ws` makes two of each, which Deno's streams join again at a cost. What
   * `ws` itself sends, pings and closes, goes straight to the same stream, so the order holds.
   */
  override send(message: string | Buffer): void {
    if (this.readyState !== WebSocket.OPEN) return;
    this.#tcp.write(textFrame(message));
  }

  /** ws keeps its streams in these fields, and offers no other way to them. */
  get #tcp(): TcpSocket {
    return (this as unknown as { _socket: TcpSocket })._socket;
  }

  get #receiver(): Writable {
    return (this as unknown as { _receiver: Writable })._receiver;
  }

  #received(data: unknown, isBinary: boolean): void {
    try {
      this.#session!.receive(isBinary ? data : String(data));
    } catch (error) {
      this.#session!.fail(error);
    }
  }

  /** By a ping at once, instead of the next one. */
  ask(onAnswer: () => void): void {
    this.#onAnswer = onAnswer;
    this.#heartbeat?.cancel();
    this.#ping();
  }

  #pingIn(delayMs: number): void {
    this.#heartbeat = this.#options!.deadlines.set(delayMs, () => this.#ping());
  }

  #ping(): void {
    this.#pingedAtMs = performance.now();
    this.ping();
    this.#await();
  }

  /** Waits for the pong. It may stand behind a long message: as long as bytes come, the peer lives. */
  #await(): void {
    this.#bytesRead = this.#tcp.bytesRead;
    const { deadlines, pingTimeoutMs } = this.#options!;
    this.#heartbeat = deadlines.set(pingTimeoutMs, () => {
      if (this.#tcp.bytesRead === this.#bytesRead) this.terminate();
      else this.#await();
    });
  }

  #ponged(): void {
    if (this.#pingedAtMs === 0) return; // nobody asked
    this.#heartbeat?.cancel();
    const sinceMs = performance.now() - this.#pingedAtMs;
    this.#pingedAtMs = 0;
    this.#onAnswer?.();
    this.#onAnswer = undefined;
    this.#pingIn(Math.max(0, this.#options!.pingIntervalMs - sinceMs));
  }

  /** A frame breaks the protocol: `ws` has sent the close, and would wait for the peer's as long as the peer likes. */
  #malformed(): void {
    this.#session!.end(closes.malformedFrame);
  }

  #closed(code: number): void {
    this.#heartbeat?.cancel();
    this.#session!.closed(code);
  }
}

const endOf: (this: Writable) => Writable = Writable.prototype.end;

/**
 * ws ends the stream of a client that just hangs up twice. The second time makes an error that nobody gets, and its
 * stack costs more than all else about that client's end: when many leave at once, the others wait for it.
 */
function endOnce(this: Writable): Writable {
  return this.writableEnded ? this : endOf.call(this);
}

/** An unmasked text frame (RFC 6455, section 5.2). */
function textFrame(message: string | Buffer): Buffer {
  const payload = typeof message !== "string" && isUtf8(message) ? message : Buffer.from(message.toString());
  const size = payload.length;
  const headSize = size < 126 ? 2 : size < 65_536 ? 4 : 10;
  const frame = Buffer.allocUnsafe(headSize + size);
  frame[0] = 0x81;
  if (headSize === 2) frame[1] = size;
  else if (headSize === 4) {
    frame[1] = 126;
    frame.writeUInt16BE(size, 2);
  } else {
    frame[1] = 127;
    frame.writeBigUInt64BE(BigInt(size), 2);
  }
  frame.set(payload, headSize);
  return frame;
}

/**
 * A listener that runs out of file descriptors accepts nobody ever again, and does not say so. So it is knocked at
 * from time to time; when it lets nobody in, `relisten` is called. Whoever is accepted meanwhile proves that it hears:
 * a knock may stand behind thousands of others, or not even find room among those that wait. Where several `listeners`
 * share the port, the kernel may lead a knock to another one: then it is knocked again, so often that chance alone
 * makes no listener deaf.
 */
export function watchListener(
  http: Pick<HttpServer, "on">,
  knock: () => Promise<Disposable>,
  relisten: () => void,
  listeners: number,
  intervalMs = knockIntervalMs,
) {
  let opened: (() => void) | undefined;
  const came = () => opened?.();
  http.on("connection", came);
  http.on("drop", came);
  const knocks = listeners > 1 ? knocksForEach * listeners : 1;
  let deaf = 0;
  let stopped = false;
  let timer = setTimeout(listenIn, intervalMs);

  async function listenIn(): Promise<void> {
    let heard = false;
    const accepted = new Promise<true>((resolve) => {
      opened = () => {
        heard = true;
        resolve(true);
      };
    });
    // No descriptor even for a knock says nothing of the listener.
    let knocked = true;
    const dueMs = performance.now() + intervalMs;
    const knocking = (async () => {
      for (let left = knocks; left > 0 && !heard && !stopped; left--) {
        try {
          using _connection = await knock();
          await within(left === 1 ? dueMs - performance.now() : intervalMs / knocks / 2, accepted);
        } catch {
          knocked = false;
        }
      }
    })();
    if (await within(intervalMs, accepted)) deaf = 0;
    else if (knocked && performance.now() - dueMs < stallMs) deaf++;
    opened?.();
    void knocking;
    if (stopped) return;
    timer = setTimeout(listenIn, intervalMs);
    if (deaf < deafAfter) return;
    deaf = 0;
    relisten();
  }

  return {
    stop() {
      stopped = true;
      clearTimeout(timer);
      opened?.();
    },
  };
}
