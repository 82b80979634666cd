/**
 * The engine of npm `ws` on `node:http`, inside Deno. It costs more per message than the native one, and defends
 * itself better: it refuses a message that is too large before it has all of it, really cuts off a peer that is stuck,
 * pings on time, and lets no client be slow with a request. docs/engines.md has the differences and what they cost.
 */

import { Buffer } from "node:buffer";
import { createServer, type IncomingMessage, type ServerResponse, STATUS_CODES } from "node:http";
import type { Duplex } from "node:stream";
// @ts-types="@types/ws"
import { WebSocketServer } from "ws";
import { readText } from "./body.ts";
import type { Handle, Request, Respond, Stream, Upgrade } from "../http/exchange.ts";
import { hasBody, isHandshake } from "../http/handshake.ts";
import { maxSendHeadBytes } from "../session/frames.ts";
import type { Engine, EngineOptions } from "./engine.ts";
import { ClientSocket } from "./ws_socket.ts";
import { ListenerWatch } from "./ws_watchdog.ts";

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

/** Starts to listen. Rejects with what the operating system says, such as an error with code `EADDRINUSE`. */
export async function listenWs(handle: Handle, options: EngineOptions): Promise<Engine> {
  const { handshakeTimeoutMs, maxConnections } = options;
  const upgrader = new WebSocketServer({
    noServer: true,
    clientTracking: false,
    // The session measures exactly, and a payload without what stands before it.
    maxPayload: options.maxMessageBytes + maxSendHeadBytes,
    maxFragments: Math.max(minFragments, options.maxMessageBytes / smallFragmentBytes),
    WebSocket: ClientSocket,
    // handleUpgrade asks for the choice here; it was made with the verdict.
    handleProtocols: (_offered, request) => selected.get(request) ?? false,
  });
  const selected = new WeakMap<IncomingMessage, string>();
  const http = createServer({
    // Else the first of two would count, and nothing would tell of the second.
    joinDuplicateHeaders: true,
    // The router asks for it: it knows which requests may go without.
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
    // A client that breaks the connection now is noticed after the upgrade, or by the answer that cannot be sent.
    socket.on("error", ignore);
    const verdict = await handle(show(request));
    if (verdict.kind === "respond") return answer(socket, verdict);
    if (verdict.kind === "stream") return misled(verdict, socket);
    const { owner, protocol } = verdict;
    if (protocol !== undefined) selected.set(request, protocol);
    // It was checked; ws itself knows no list here.
    request.headers.upgrade = "websocket";
    let opened = false;
    upgrader.handleUpgrade(request, socket, head, (client) => {
      opened = true;
      socket.off("error", ignore);
      client.serve(owner, options);
    });
    if (!opened) owner.abandon();
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
  const watch = new ListenerWatch(http, {
    // By the name it was given: that is the one that the network permission holds.
    knock: () => Deno.connect({ hostname: options.hostname, port }),
    onDeaf() {
      options.onRelisten();
      http.close();
      listen(port);
    },
    listeners: options.workers,
  });
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
    isBounded: true,
    get peer() {
      return socket.remoteAddress;
    },
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
function misled(verdict: Upgrade | Stream, socket: Duplex): void {
  if (verdict.kind === "upgrade") verdict.owner.abandon();
  else verdict.session.abandon();
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
