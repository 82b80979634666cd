/**
 * The native engine: `Deno.serve` and `Deno.upgradeWebSocket`. What it needs to be told, and what it cannot do, is in
 * docs/engines.md. Once `upgradeWebSocket` has been called nothing may throw and nothing else may be answered: that
 * would end the listener without a word.
 */

import type { Engine, EngineOptions } from "./engine.ts";
import type { Handshake, Server } from "./server.ts";
import { closes } from "./status.ts";

/** Connections the kernel may hold while a storm of clients waits to be accepted. */
const backlog = 4096;

/** A peer that sends nothing for this long has paused; and the longest wait for a pause. */
const pauseMs = 20;
const lingerMs = 1000;

/** Starts to listen. Throws what the operating system says, such as `Deno.errors.AddrInUse`. */
export function listenDeno(
  server: Server,
  { hostname, port, pingIntervalMs, pingTimeoutMs }: EngineOptions,
): Engine {
  // Deno pings after half of it and closes after the other half, so that this sum is when a dead peer is gone.
  const idleTimeout = (pingIntervalMs + pingTimeoutMs) / 1000;
  const http = Deno.serve({ hostname, port, tcpBacklog: backlog, onListen() {} }, async (request) => {
    const verdict = await server.handle(handshakeOf(request));
    if ("status" in verdict) return new Response(verdict.body, verdict);
    const { session, protocol } = verdict;
    if (protocol) spaceProtocols(request);
    const { socket, response } = Deno.upgradeWebSocket(request, { idleTimeout, protocol });
    let closer: Closer | undefined;
    socket.onopen = () =>
      session.open(Object.assign(socket, {
        terminate,
        close(code: number, reason: string) {
          closer ??= new Closer(socket, code, reason);
        },
      }));
    socket.onmessage = ({ data }) => {
      closer?.received();
      try {
        session.receive(data);
      } catch (error) {
        session.fail(error);
      }
    };
    socket.onclose = ({ code }) => {
      closer?.cancel();
      // Deno gives code 0 to an end without a close frame.
      session.closed(code || 1006);
    };
    // An error is always followed by a close; without a listener it would end the process.
    socket.onerror = (event) => event.preventDefault();
    return response;
  });
  return {
    hostname: http.addr.hostname,
    port: http.addr.port,
    finished: http.finished,
    close: () => http.shutdown(),
  };
}

function handshakeOf(request: Request): Handshake {
  // The signal tells only of what happens after it was first asked for.
  const { url, headers, signal } = request;
  return {
    method: request.method,
    // As sent, behind "http://host": a URL object would resolve dots and encode anew.
    target: url.slice(url.indexOf("/", "http://".length)),
    header: (name) => headers.get(name) ?? undefined,
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
 * Closes a socket once its peer pauses. Deno breaks the connection when anything but a close frame comes after ours,
 * and a peer that was in the middle of sending would get a reset instead of the code.
 */
class Closer {
  readonly #close: () => void;
  readonly #giveUpAtMs = performance.now() + lingerMs;
  #timer: ReturnType<typeof setTimeout>;

  constructor(socket: WebSocket, code: number, reason: string) {
    this.#close = () => WebSocket.prototype.close.call(socket, code, reason);
    this.#timer = setTimeout(this.#close, pauseMs);
  }

  /** The socket has closed. */
  cancel(): void {
    clearTimeout(this.#timer);
  }

  /** The peer goes on sending. */
  received(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(this.#close, performance.now() < this.#giveUpAtMs ? pauseMs : 0);
  }
}

/** Deno has no way to cut a connection: all that can be done for a stuck peer is to close again. */
function terminate(this: WebSocket): void {
  WebSocket.prototype.close.call(this, closes.goingAway.code);
}
