/**
 * A WebSocket client that costs next to nothing: raw TCP, one read buffer for all, no event objects, no decoding. It
 * checks what it must (the status, frame lengths, that every message is ours) and not what tests check elsewhere (the
 * accept key, UTF-8).
 */

import { Buffer } from "node:buffer";
import { connect } from "node:net";
import { fill, headBytes, isOurs } from "./message.js";

/** All sockets read into it: a callback is done with it before the next read. */
const readBuffer = Buffer.allocUnsafeSlow(256 * 1024);
const emptyHead = Buffer.alloc(0);
/** RFC 6455 wants it unpredictable; servers only see that there is one. */
const mask = [0x37, 0xfa, 0x21, 0x3d];
const opText = 1, opClose = 8, opPing = 9, opPong = 10;

/**
 * Who hears of a client's events. One for all clients.
 * @typedef {object} Listener
 * @property {(client: Client) => void} onOpen
 * @property {(client: Client, status: number) => void} onRefused
 * @property {(client: Client, buffer: Buffer, at: number, length: number) => void} onMessage a text frame of ours has come wholly; `at` is where the part of it that is kept begins
 * @property {(client: Client, text: string) => void} onForeign a text frame that is not ours
 * @property {(client: Client, code: number | string) => void} onEnd a close code, 1006 without one, or before the open the code of an error; not called after `leave` or `cut`
 */

export class Client {
  #listener;
  /** @type {import("node:net").Socket} */
  #socket;
  #state = "opening";
  #head = emptyHead;
  /** Bytes of the present message that are still to come. */
  #rest = 0;
  /** The whole length of the present message. */
  #length = 0;
  #closeCode = 1006;

  /**
   * Connects and asks for an upgrade.
   * @param {number} session
   * @param {{ port: number, localAddress: string, request: string, listener: Listener }} options
   */
  constructor(session, { port, localAddress, request, listener }) {
    this.session = session;
    this.startedMs = performance.now();
    this.#listener = listener;
    this.#socket = connect({
      port,
      host: "127.0.0.1",
      ...(localAddress === "127.0.0.1" ? {} : { localAddress }),
      noDelay: true,
      onread: {
        buffer: readBuffer,
        callback: (bytes) => {
          this.#read(bytes);
          return true;
        },
      },
    });
    this.#socket.on("connect", () => this.#socket.write(request, "latin1"));
    this.#socket.on("error", (error) => this.#ended("code" in error ? String(error.code) : "error"));
    this.#socket.on("close", () => this.#ended(this.#closeCode));
  }

  /** Sends bytes, which are whole frames. @param {Buffer} frames */
  send(frames) {
    this.#socket.write(frames);
  }

  /** Reads nothing more, until `readAgain`. */
  stopReading() {
    this.#socket.pause();
  }

  readAgain() {
    this.#socket.resume();
  }

  /** Says goodbye and hears nothing more. */
  leave() {
    this.#state = "left";
    this.#socket.resume();
    this.#socket.end(frame(opClose, Buffer.from([0x03, 0xe8])));
    this.#socket.unref();
  }

  /** Breaks the connection. */
  cut() {
    this.#state = "left";
    this.#socket.resetAndDestroy();
  }

  /** @param {number | string} code */
  #ended(code) {
    if (this.#state === "left") return;
    this.#state = "left";
    this.#listener.onEnd(this, code);
  }

  /** @param {number} end */
  #read(end) {
    let at = 0;
    if (this.#state === "opening") {
      at = this.#readAnswer(end);
      if (at < 0) return;
    }
    while (at < end && this.#state === "open") {
      if (this.#rest > 0) {
        const taken = Math.min(this.#rest, end - at);
        this.#rest -= taken;
        at += taken;
        if (this.#rest === 0) {
          this.#listener.onMessage(this, this.#head, 0, this.#length);
          this.#head = emptyHead;
        }
      } else if (this.#head.length === 0) {
        const next = this.#readFrame(readBuffer, at, end);
        if (next === at) {
          this.#head = Buffer.from(readBuffer.subarray(at, end));
          return;
        }
        at = next;
      } else {
        // A frame's beginning came with the read before.
        const before = this.#head.length;
        const joined = Buffer.concat([this.#head, readBuffer.subarray(at, end)]);
        this.#head = emptyHead;
        const next = this.#readFrame(joined, 0, joined.length);
        if (next === 0) {
          this.#head = joined;
          return;
        }
        at += next - before;
      }
    }
  }

  /**
   * Reads the frame at `at`, or of a message that goes on behind `end` the part that is kept. Returns where it went
   * on, which is `at` when more must come first.
   * @param {Buffer} buffer @param {number} at @param {number} end
   */
  #readFrame(buffer, at, end) {
    if (end - at < 2) return at;
    const opcode = buffer[at] & 15;
    let length = buffer[at + 1];
    let payload = at + 2;
    if (length === 126) {
      if (end - at < 4) return at;
      length = buffer.readUInt16BE(at + 2);
      payload = at + 4;
    } else if (length === 127) {
      if (end - at < 10) return at;
      length = Number(buffer.readBigUInt64BE(at + 2));
      payload = at + 10;
    }
    if (end - payload < Math.min(length, headBytes)) return at;
    if (opcode === opText && buffer[at] & 128 && length >= headBytes && isOurs(buffer, payload)) {
      if (end - payload >= length) this.#listener.onMessage(this, buffer, payload, length);
      else {
        this.#length = length;
        this.#rest = length - (end - payload);
        this.#head = Buffer.from(buffer.subarray(payload, payload + headBytes));
        return end;
      }
    } else {
      if (end - payload < length) return at;
      this.#readOther(opcode, buffer.subarray(payload, payload + length));
    }
    return payload + length;
  }

  /** @param {number} opcode @param {Buffer} payload */
  #readOther(opcode, payload) {
    if (opcode === opPing) this.#socket.write(frame(opPong, payload));
    else if (opcode === opClose) {
      this.#closeCode = payload.length >= 2 ? payload.readUInt16BE(0) : 1005;
      this.#socket.end(frame(opClose, payload));
      this.#ended(this.#closeCode);
    } else if (opcode !== opPong) this.#listener.onForeign(this, payload.toString());
  }

  /** Where the answer's end is, or -1. @param {number} end */
  #readAnswer(end) {
    const before = this.#head.length;
    const all = before === 0 ? readBuffer.subarray(0, end) : Buffer.concat([this.#head, readBuffer.subarray(0, end)]);
    const blankLine = all.indexOf("\r\n\r\n");
    if (blankLine < 0) {
      this.#head = Buffer.from(all);
      return -1;
    }
    this.#head = emptyHead;
    const status = Number(all.latin1Slice(9, 12));
    if (status === 101) {
      this.#state = "open";
      this.#listener.onOpen(this);
      return blankLine + 4 - before;
    }
    this.#state = "left";
    this.#socket.destroy();
    this.#listener.onRefused(this, status);
    return -1;
  }
}

/** A short masked frame. @param {number} opcode @param {Buffer} payload */
function frame(opcode, payload) {
  return Buffer.concat([
    Buffer.from([0x80 | opcode, 0x80 | payload.length, ...mask]),
    payload.map((byte, i) => byte ^ mask[i & 3]),
  ]);
}

/** Writes messages of one size as masked frames into buffers of their own. */
export class FrameWriter {
  #plain;
  #masked;
  #payloadAt;

  /** @param {Buffer} blank a message without its numbers */
  constructor(blank) {
    const length = blank.length;
    const head = length < 126
      ? [0x81, 0x80 | length]
      : length < 65536
      ? [0x81, 0xfe, length >> 8, length & 255]
      : [0x81, 0xff, 0, 0, 0, 0, length >>> 24, length >>> 16 & 255, length >>> 8 & 255, length & 255];
    this.#plain = Buffer.from(blank);
    this.#payloadAt = head.length + 4;
    this.#masked = Buffer.concat([Buffer.from([...head, ...mask]), blank.map((byte, i) => byte ^ mask[i & 3])]);
  }

  /** A frame with the message. @param {number} session @param {number} number @param {number} dueUs */
  write(session, number, dueUs) {
    const plain = this.#plain;
    fill(plain, 0, session, number, dueUs);
    const out = Buffer.allocUnsafe(this.#masked.length);
    this.#masked.copy(out);
    for (let i = 0; i < headBytes; i++) out[this.#payloadAt + i] = plain[i] ^ mask[i & 3];
    return out;
  }
}
