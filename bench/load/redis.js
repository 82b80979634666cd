/**
 * The backend's side: one raw connection that publishes in batches, one that hears everything from the clients. RESP
 * is written from a template and read by its lengths.
 */

import { Buffer } from "node:buffer";
import { once } from "node:events";
import { connect } from "node:net";
import { fill, putDigits } from "./message.js";

const sessionPrefix = "bench-";

/** The name of a session. @param {number} session */
export const sessionName = (session) => sessionPrefix + String(session).padStart(6, "0");

export class Publisher {
  #socket;
  #template;
  #channelAt;
  #payloadAt;
  #batch;
  #used = 0;
  /** Published and not yet answered by Redis. */
  unanswered = 0;

  /** @param {import("node:net").Socket} socket @param {Buffer} blank */
  constructor(socket, blank) {
    const channel = `session:${sessionName(0)}:down`;
    const head = `*3\r\n$7\r\nPUBLISH\r\n$${channel.length}\r\n`;
    const middle = `\r\n$${blank.length}\r\n`;
    this.#channelAt = head.length;
    this.#payloadAt = head.length + channel.length + middle.length;
    this.#template = Buffer.concat([Buffer.from(head + channel + middle), blank, Buffer.from("\r\n")]);
    this.#batch = Buffer.allocUnsafe(Math.max(256 * 1024, this.#template.length));
    this.#socket = socket;
    socket.on("data", (/** @type {Buffer} */ replies) => {
      for (let i = 0; i < replies.length; i++) if (replies[i] === 10) this.unanswered--;
    });
  }

  /** @param {number} port @param {Buffer} blank */
  static async connect(port, blank) {
    const socket = connect({ port, host: "127.0.0.1", noDelay: true });
    await once(socket, "connect");
    return new Publisher(socket, blank);
  }

  /** Adds a message to the batch. `astray`: to a name without a subscriber. @param {number} session @param {number} number @param {number} dueUs @param {boolean} astray */
  publish(session, number, dueUs, astray) {
    if (this.#used + this.#template.length > this.#batch.length) this.flush();
    const batch = this.#batch;
    const at = this.#used;
    this.#template.copy(batch, at);
    putDigits(batch, at + this.#channelAt + "session:".length + sessionPrefix.length, 6, session);
    if (astray) batch[at + this.#channelAt] = "S".charCodeAt(0);
    fill(batch, at + this.#payloadAt, session, number, dueUs);
    this.#used += this.#template.length;
    this.unanswered++;
  }

  /** Sends the batch. */
  flush() {
    if (this.#used === 0) return;
    this.#socket.write(this.#batch.subarray(0, this.#used));
    // What the kernel does not take at once stays in the buffer that was handed over.
    if (this.#socket.writableLength > 0) this.#batch = Buffer.allocUnsafe(this.#batch.length);
    this.#used = 0;
  }

  close() {
    this.#socket.destroy();
  }
}

/**
 * Hears every session's up channel.
 * @param {number} port
 * @param {(session: number, buffer: Buffer, at: number, length: number) => void} onMessage
 */
export async function hear(port, onMessage) {
  const pattern = `session:${sessionPrefix}*:up`;
  const socket = connect({ port, host: "127.0.0.1", noDelay: true });
  await once(socket, "connect");
  const { promise, resolve } = Promise.withResolvers?.() ?? withResolvers();
  let rest = Buffer.alloc(0);
  socket.on("data", (/** @type {Buffer} */ chunk) => {
    const buffer = rest.length === 0 ? chunk : Buffer.concat([rest, chunk]);
    let at = 0;
    for (;;) {
      const end = readReply(buffer, at);
      if (end < 0) break;
      if (parts[0] === "pmessage".length) onMessage(sessionIn(buffer, starts[2]), buffer, starts[3], parts[3]);
      else resolve(undefined);
      at = end;
    }
    rest = buffer.subarray(at);
  });
  socket.write(`*2\r\n$10\r\nPSUBSCRIBE\r\n$${pattern.length}\r\n${pattern}\r\n`);
  await promise;
  return { close: () => socket.destroy() };
}

function withResolvers() {
  /** @type {(value: unknown) => void} */
  let resolve = () => {};
  const promise = new Promise((done) => resolve = done);
  return { promise, resolve };
}

/** Lengths and places of the last reply's parts; its first one, "pmessage" or "psubscribe", is known by its length. */
const parts = [0, 0, 0, 0];
const starts = [0, 0, 0, 0];

/** The end of the array reply at `at`, or -1 when it is not complete. @param {Buffer} buffer @param {number} at */
function readReply(buffer, at) {
  if (at + 4 > buffer.length) return -1;
  const count = buffer[at + 1] - 48;
  let here = at + 4;
  for (let i = 0; i < count; i++) {
    let length = 0;
    const kind = buffer[here++];
    for (;;) {
      if (here >= buffer.length) return -1;
      const byte = buffer[here++];
      if (byte === 13) break;
      length = length * 10 + byte - 48;
    }
    here++;
    parts[i] = length;
    starts[i] = here;
    if (kind === 36) here += length + 2;
    if (here > buffer.length) return -1;
  }
  return here;
}

/** The index in a channel's name. @param {Buffer} buffer @param {number} at */
function sessionIn(buffer, at) {
  let index = 0;
  const first = at + "session:".length + sessionPrefix.length;
  for (let i = first; i < first + 6; i++) index = index * 10 + buffer[i] - 48;
  return index;
}
