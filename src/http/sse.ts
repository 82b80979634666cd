/**
 * The twin of a WebSocket over Server-Sent Events (HTML Standard, section 9.2), where WebSockets cannot pass. What a
 * session sends over it are events already: see session/frames.ts.
 */

import type { Buffer } from "node:buffer";
import { closeEvent, keepAliveComment, streamBeginning } from "../session/frames.ts";
import type { Transport } from "../session/transport.ts";
import type { Sink } from "./exchange.ts";

/** The headers of a stream. */
export const streamHeaders = {
  "Content-Type": "text/event-stream",
  // Whatever compresses would hold events back until it has a block.
  "Cache-Control": "no-store, no-transform",
  // nginx would hold events back.
  "X-Accel-Buffering": "no",
};

/** When an `EventSource` is to come back after its stream has broken: from one second to three. */
const minRetryMs = 1000;
const retrySpreadMs = 2001;

/** A transport over a response that does not end. */
export class EventStream implements Transport {
  readonly #sink: Sink;
  readonly #keepAlive: ReturnType<typeof setInterval>;

  /** It is kept alive so often. */
  constructor(sink: Sink, keepAliveMs: number) {
    this.#sink = sink;
    this.#keepAlive = setInterval(() => sink.write(keepAliveComment), keepAliveMs);
    // Whatever is between sees that there is an answer; and the crowd that a broken proxy had comes back spread out.
    sink.write(streamBeginning(keepAliveMs, minRetryMs + Math.floor(Math.random() * retrySpreadMs)));
  }

  get bufferedAmount(): number {
    return this.#sink.unsent;
  }

  send(message: string | Buffer): void {
    this.#sink.write(message.toString());
  }

  /** The last event says why. */
  close(code: number, reason: string): void {
    this.ended();
    this.#sink.write(closeEvent(code, reason));
    this.#sink.end();
  }

  terminate(): void {
    this.ended();
    this.#sink.destroy();
  }

  /** Nothing is sent any more. */
  ended(): void {
    clearInterval(this.#keepAlive);
  }
}
