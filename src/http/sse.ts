/**
 * The twin of a WebSocket over Server-Sent Events (HTML Standard, section 9.2), for whoever cannot have one. What a
 * session sends to a resuming client becomes events: a position is an event's id, a notice is an event of its name.
 */

import type { Buffer } from "node:buffer";
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
  readonly #resuming: boolean;
  readonly #keepAlive: ReturnType<typeof setInterval>;

  /** `resuming` says that frames are those of a resuming client; else each is a payload. */
  constructor(sink: Sink, resuming: boolean, keepAliveMs: number) {
    this.#sink = sink;
    this.#resuming = resuming;
    this.#keepAlive = setInterval(() => sink.write(":\n\n"), keepAliveMs);
    // Whatever is between sees that there is an answer; and the crowd that a broken proxy had comes back spread out.
    sink.write(`:\nretry: ${minRetryMs + Math.floor(Math.random() * retrySpreadMs)}\n\n`);
  }

  get bufferedAmount(): number {
    return this.#sink.unsent;
  }

  send(message: string | Buffer): void {
    const text = message.toString();
    this.#sink.write(this.#resuming ? eventOf(text) : `${dataOf(text)}\n`);
  }

  /** The last event says why. */
  close(code: number, reason: string): void {
    this.ended();
    this.#sink.write(`event: close\n${dataOf(JSON.stringify({ code, reason }))}\n`);
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

/** A resuming client's frame as an event. */
function eventOf(frame: string): string {
  const end = frame.indexOf("\n");
  const [head, body] = [frame.slice(0, end), frame.slice(end + 1)];
  if (head === "!live") return `event: live\nid: ${body}\n${dataOf(body)}\n`;
  if (head.startsWith("!")) return `event: ${head.slice(1)}\n${dataOf(body)}\n`;
  return `${head === "" ? "" : `id: ${head}\n`}${dataOf(body)}\n`;
}

/** Lines of data; a receiver joins them again with line feeds. */
function dataOf(text: string): string {
  return text.split(/\r\n|\r|\n/).map((line) => `data: ${line}\n`).join("");
}
