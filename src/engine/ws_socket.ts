/**
 * A client's socket in the engine of npm `ws`: `ws`'s own, which knows its owner, keeps its heart beating, and writes a
 * message as one frame.
 */

import { Buffer, isUtf8 } from "node:buffer";
import { Socket as TcpSocket } from "node:net";
import { Writable } from "node:stream";
// @ts-types="@types/ws"
import { WebSocket } from "ws";
import type { Deadline } from "../deadline.ts";
import { closes } from "../replies.ts";
import type { SocketOwner } from "../session/transport.ts";
import type { EngineOptions } from "./engine.ts";

/** How its peer is asked whether it lives. */
export type HeartbeatOptions = Pick<EngineOptions, "deadlines" | "pingIntervalMs" | "pingTimeoutMs">;

/**
 * Pings that are due in the same one of so many parts of an interval are sent in one turn, and their pongs are mostly read
 * in one: half of what a ping costs is the turn. A part of all sockets that is so small holds up no message.
 */
const pingSteps = 128;
/** RFC 6455, section 5.5.2. */
const pingFrame = Buffer.from([0x89, 0]);

/** One client's socket. */
export class ClientSocket extends WebSocket {
  #owner: SocketOwner | undefined;
  #options: HeartbeatOptions | undefined;
  #heartbeat: Deadline | undefined;
  #pingedAtMs = 0;
  #onAnswer: (() => void) | undefined;
  /** Bytes read when it was last asked whether it lives. */
  #bytesRead = 0;

  /** It is open, and its owner's. */
  serve(owner: SocketOwner, options: HeartbeatOptions): void {
    this.#owner = owner;
    this.#options = options;
    this.on("message", this.#received);
    this.on("pong", this.#ponged);
    this.on("error", this.#malformed);
    this.on("close", this.#closed);
    this.#pingIn(options.pingIntervalMs);
    this.#receiver.end = endOnce;
    this.#tcp.destroy = destroySilently;
    owner.open(this);
  }

  /** `ws` itself closes with 1009, and no reason, on the first bytes of a message that is too large. */
  override close(code?: number, reason?: string | Buffer): void {
    const tooBig = code === closes.tooBig.code && reason === undefined;
    if (tooBig && this.#owner?.isOpen) this.#owner.receiveTooBig();
    else super.close(code, reason);
  }

  /**
   * Sends one text. One buffer and one write for a message; `ws` makes two of each, which Deno's streams join again at
   * a cost. What `ws` itself sends, pings and closes, goes straight to the same stream, so the order holds.
   */
  override send(message: string | Buffer): void {
    if (this.#isWritable) this.#tcp.write(textFrame(message));
  }

  /** ws keeps its streams in these fields, and offers no other way to them. */
  get #tcp(): TcpSocket {
    return (this as unknown as { _socket: TcpSocket })._socket;
  }

  /** A connection that is lost stays "open" for a moment, and each write to it would make an error, with its stack. */
  get #isWritable(): boolean {
    return this.readyState === WebSocket.OPEN && !this.#tcp.destroyed;
  }

  get #receiver(): Writable {
    return (this as unknown as { _receiver: Writable })._receiver;
  }

  #received(data: unknown, isBinary: boolean): void {
    try {
      this.#owner!.receive(isBinary ? data : String(data));
    } catch (error) {
      this.#owner!.fail(error);
    }
  }

  /** Asks the peer for a sign of life: by a ping at once, instead of the next one. */
  ask(onAnswer: () => void): void {
    this.#onAnswer = onAnswer;
    this.#heartbeat?.cancel();
    this.#ping();
  }

  #pingIn(delayMs: number): void {
    const { deadlines, pingIntervalMs } = this.#options!;
    const stepMs = pingIntervalMs / pingSteps;
    const nowMs = performance.now();
    const dueMs = Math.ceil((nowMs + delayMs) / stepMs) * stepMs;
    this.#heartbeat = deadlines.set(dueMs - nowMs, () => this.#ping());
  }

  #ping(): void {
    this.#pingedAtMs = performance.now();
    // As in `send`; `ws` itself would make two writes of it.
    if (this.#isWritable) this.#tcp.write(pingFrame);
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
    if (this.#pingedAtMs === 0) return; // it was not asked
    this.#heartbeat?.cancel();
    const sinceMs = performance.now() - this.#pingedAtMs;
    this.#pingedAtMs = 0;
    this.#onAnswer?.();
    this.#onAnswer = undefined;
    this.#pingIn(Math.max(0, this.#options!.pingIntervalMs - sinceMs));
  }

  /** A frame breaks the protocol: `ws` has sent the close, and would wait for the peer's as long as the peer likes. */
  #malformed(): void {
    this.#owner!.end(closes.malformedFrame);
  }

  #closed(code: number): void {
    this.#heartbeat?.cancel();
    this.#owner!.closed(code);
  }
}

const endOf: (this: Writable) => Writable = Writable.prototype.end;

/**
 * ws ends the stream of a client that just hangs up twice. The second time makes an error that no listener gets, and its
 * stack costs more than all else about that client's end: when many leave at once, the others wait for it.
 */
function endOnce(this: Writable): Writable {
  return this.writableEnded ? this : endOf.call(this);
}

const destroyOf: TcpSocket["destroy"] = TcpSocket.prototype.destroy;

/**
 * The error that a connection broke with has no reader: `ws` makes 1006 of each. Node's streams would write down its
 * stack, which costs a quarter of what a connect does, and comes when many break at once.
 */
function destroySilently(this: TcpSocket): TcpSocket {
  return destroyOf.call(this);
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
