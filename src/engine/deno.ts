/**
 * The native engine: `Deno.serve` and `Deno.upgradeWebSocket`. What it needs to be told, and what it cannot do, is in
 * docs/engines.md. Once `upgradeWebSocket` has been called nothing may throw and nothing else may be answered: that
 * would end the listener without a word.
 */

import { Buffer } from "node:buffer";
import { readText } from "./body.ts";
import type { Handle, Request as ShownRequest, Respond, Sink, Stream, StreamListener } from "../http/exchange.ts";
import { Turns } from "../http/turns.ts";
import { closes } from "../replies.ts";
import type { SocketOwner, Transport } from "../session/transport.ts";
import type { Engine, EngineOptions } from "./engine.ts";

/** Connections the kernel may hold while a storm of clients waits to be accepted. */
const backlog = 4096;

/** What waits of a stream is handed to Deno in pieces of about this size: each one costs as much as many events. */
const maxJoinedBytes = 65_536;
/** A peer that sends nothing for this long has paused; and the longest wait for a pause. */
const pauseMs = 20;
const lingerMs = 1000;
/**
 * What Deno writes beyond some hundred operations of one turn (the budget of a task in tokio) is written in a later one,
 * also a close frame; and it breaks the connection when a pong comes meanwhile, of which JavaScript is not told. Measured
 * with three pongs of each of 8,000 clients in the second in which all are closed: 5 of them get no code, and with at most
 * so many closes in one turn 0.3.
 */
const closing = new Turns(8);

/** Starts to listen. Throws what the operating system says, such as `Deno.errors.AddrInUse`. */
export function listenDeno(
  handle: Handle,
  { hostname, port, workers, pingIntervalMs, pingTimeoutMs, onHeld }: EngineOptions,
): Engine {
  // Deno pings after half of it and closes after the other half, so that this sum is when a dead peer is gone.
  const idleTimeout = (pingIntervalMs + pingTimeoutMs) / 1000;
  // Without --unstable-net it may not even be asked for.
  const shared = workers > 1 ? { reusePort: true } : {};
  const http = Deno.serve({ hostname, port, ...shared, tcpBacklog: backlog, onListen() {} }, async (request, info) => {
    const verdict = await handle(show(request, info));
    if (verdict.kind === "respond") return respond(verdict);
    if (verdict.kind === "stream") return stream(verdict);
    const { owner, protocol } = verdict;
    if (protocol) spaceProtocols(request);
    const { socket, response } = Deno.upgradeWebSocket(request, { idleTimeout, protocol });
    new ClientSocket(socket, owner, onHeld).listen();
    return response;
  });
  return {
    hostname: http.addr.hostname,
    port: http.addr.port,
    finished: http.finished,
    // It closes all sockets at once, with a close of its own, and there is no other way to close the listener.
    close: () => http.shutdown(),
  };
}

/** Listens for requests that are answered and nothing else. Throws what the operating system says. */
export function listenPlain(
  handle: (request: ShownRequest) => Promise<Respond>,
  { hostname, port }: Pick<EngineOptions, "hostname" | "port">,
): () => Promise<void> {
  const http = Deno.serve(
    { hostname, port, onListen() {} },
    async (request, info) => respond(await handle(show(request, info))),
  );
  return () => http.shutdown();
}

/** An answer to HEAD has the length of the body that it leaves out; Deno leaves it out. */
function respond({ status, headers, body }: Respond): Response {
  if (status === 204) return new Response(null, { status, headers });
  return new Response(body, { status, headers: { ...headers, "Content-Length": String(Buffer.byteLength(body)) } });
}

/**
 * A body that is written as the session goes on. Deno takes a chunk when the last one has gone to the kernel, and takes
 * none while the reader is stuck; it cannot be made to cut that connection. So what waits is kept here, where it can be
 * dropped: in the stream's own queue it would stay for as long as the reader likes.
 */
function stream({ headers, open }: Stream): Response {
  const utf8 = new TextEncoder();
  let controller: ReadableStreamDefaultController<Uint8Array>;
  let waiting: Uint8Array[] = [];
  let unsent = 0;
  /** Deno has asked for a chunk, and there was none. */
  let wanted = false;
  /** Nothing more is written. */
  let ending = false;
  let isTold = false;
  const tell = () => {
    ending = true;
    if (isTold) return;
    isTold = true;
    // Deno says nothing of a body's end.
    queueMicrotask(() => listener.closed());
  };
  const close = () => {
    wanted = false;
    controller.close();
    tell();
  };
  const drop = () => {
    waiting = [];
    unsent = 0;
    tell();
  };
  const sink: Sink = {
    write(text) {
      if (ending) return;
      const chunk = utf8.encode(text);
      if (wanted) {
        wanted = false;
        controller.enqueue(chunk);
      } else {
        waiting.push(chunk);
        unsent += chunk.length;
      }
    },
    get unsent() {
      return unsent;
    },
    end() {
      ending = true;
      if (wanted) close();
    },
    destroy: drop,
  };
  const body = new ReadableStream<Uint8Array>({
    start(given) {
      controller = given;
    },
    pull() {
      if (waiting.length === 0) {
        wanted = true;
        if (ending) close();
        return;
      }
      let count = 0;
      let size = 0;
      while (count < waiting.length && size < maxJoinedBytes) size += waiting[count++]!.length;
      controller.enqueue(Buffer.concat(waiting.splice(0, count), size));
      unsent -= size;
    },
    cancel: drop,
  }, { highWaterMark: 0 });
  const listener: StreamListener = open(sink);
  return new Response(body, { headers });
}

function show(request: Request, info: Deno.ServeHandlerInfo<Deno.NetAddr>): ShownRequest {
  // The signal tells only of what happens after it was first asked for.
  const { url, headers, signal } = request;
  return {
    method: request.method,
    // As sent: a URL object would resolve dots and encode anew.
    target: url,
    httpVersion: undefined,
    isBounded: false,
    get peer() {
      return info.remoteAddr.hostname;
    },
    header: (name) => headers.get(name) ?? undefined,
    text: (maxBytes) => readText(request.body ?? new ReadableStream({ start: (body) => body.close() }), maxBytes),
    get gone() {
      return signal.aborted;
    },
  };
}

/**
 * `upgradeWebSocket` finds a protocol only in a list with a space after each comma, and throws otherwise; clients such
 * as npm `ws` send none. It reads the list through `request.headers`, so it is shown one that it understands.
 */
function spaceProtocols(request: Request): void {
  const headers = new Headers(request.headers);
  headers.set("sec-websocket-protocol", headers.get("sec-websocket-protocol")!.split(/[ \t]*,[ \t]*/).join(", "));
  Object.defineProperty(request, "headers", { value: headers });
}

/**
 * One client's socket. It is closed once its peer pauses: Deno breaks the connection when anything but a close frame
 * comes after ours, and a peer that was in the middle of sending would get a reset instead of the code.
 *
 * It is the listener of all its events itself: Deno keeps a kilobyte more for four functions.
 */
class ClientSocket implements Transport, EventListenerObject {
  readonly #socket: WebSocket;
  readonly #owner: SocketOwner;
  readonly #onHeld: EngineOptions["onHeld"];
  /** What it had not sent when it was closed: Deno shows it only until then. */
  #heldBytes = 0;
  #isGivenUp = false;
  /** Closes it, once it is to be closed. */
  #close: (() => void) | undefined;
  #giveUpAtMs = 0;
  #pause: ReturnType<typeof setTimeout> | undefined;

  constructor(socket: WebSocket, owner: SocketOwner, onHeld: EngineOptions["onHeld"]) {
    this.#socket = socket;
    this.#owner = owner;
    this.#onHeld = onHeld;
  }

  /** Hears of its socket from now on. */
  listen(): void {
    this.#socket.addEventListener("open", this, { once: true });
    for (const type of ["message", "close", "error"]) this.#socket.addEventListener(type, this);
  }

  handleEvent(event: Event): void {
    switch (event.type) {
      case "message":
        this.#received();
        try {
          return this.#owner.receive((event as MessageEvent).data);
        } catch (error) {
          return this.#owner.fail(error);
        }
      case "open":
        return this.#owner.open(this);
      case "close":
        clearTimeout(this.#pause);
        if (this.#isGivenUp) this.#onHeld(-this.#heldBytes);
        this.#isGivenUp = false;
        this.#heldBytes = 0;
        // Deno gives code 0 to an end without a close frame.
        return this.#owner.closed((event as CloseEvent).code || 1006);
      case "error":
        // A close always follows; unheard, it would end the process.
        event.preventDefault();
    }
  }

  get bufferedAmount(): number {
    return this.#socket.bufferedAmount || this.#heldBytes;
  }

  send(message: string | Buffer): void {
    this.#socket.send(typeof message === "string" ? message : message.toString());
  }

  close(code: number, reason: string): void {
    if (this.#close !== undefined) return;
    this.#close = () => {
      if (this.#socket.readyState >= WebSocket.CLOSING) return;
      this.#heldBytes = this.#socket.bufferedAmount;
      this.#socket.close(code, reason);
    };
    this.#giveUpAtMs = performance.now() + lingerMs;
    this.#awaitPause();
  }

  /** Deno has no way to cut a connection: all that can be done for a stuck peer is to close again, and to count. */
  terminate(): void {
    this.#isGivenUp = true;
    this.#onHeld(this.#heldBytes);
    this.#socket.close(closes.goingAway.code);
  }

  /** The peer has sent something: when the socket is to be closed, another pause is waited for. */
  #received(): void {
    if (this.#close === undefined) return;
    clearTimeout(this.#pause);
    this.#awaitPause();
  }

  /** Closes after a pause, or at once when its peer has gone on for too long. */
  #awaitPause(): void {
    const sinceMs = performance.now();
    const waitMs = sinceMs < this.#giveUpAtMs ? pauseMs : 0;
    this.#pause = setTimeout(() => {
      // A timer that is late fires before the frames that have come meanwhile are read: the proxy paused, not the peer.
      if (waitMs > 0 && performance.now() - sinceMs > 2 * waitMs) this.#awaitPause();
      else this.#closeInTurn();
    }, waitMs);
  }

  #closeInTurn(): void {
    const turn = closing.take();
    if (turn) void turn.then(this.#close);
    else this.#close!();
  }
}
