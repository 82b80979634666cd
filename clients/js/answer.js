// @ts-check
/**
 * A question, and the one writer of its answer.
 *
 * @module
 */

import { fieldsOf, persist } from "./queue.js";

/** Clocks of two masters of a Cluster may differ by so much. */
const skewMs = 10_000;
const pageSize = 500;
/** Pieces that may wait to be sent before a writer has to. */
const maxWaiting = 256;

/** Why an answer goes no further: a stop, a newer question, another worker, or the end of this one. */
export class Cancelled extends Error {
  /** @override */
  name = "Cancelled";
}

/**
 * The answer is in the log already: the worker before this one was killed when it had sent the end. A handler leaves it to
 * the worker.
 */
export class Answered extends Error {
  /** @override */
  name = "Answered";
}

/** @internal @param {unknown} error */
export function isFenced(error) {
  return error instanceof Error && /^FENCED /.test(error.message);
}

/** The log of the question's session, as its writer sees it. @internal */
export class Log {
  /** @param {import("./queue.js").Commands} commands @param {string} session @param {AbortSignal} signal */
  constructor(commands, session, signal) {
    this.commands = commands;
    this.session = session;
    this.key = `session:${session}:down`;
    this.signal = signal;
  }

  /** @param {readonly (string | number)[]} words @returns {Promise<any>} */
  call(...words) {
    return persist(this.signal, () => this.commands.call(this.key, words));
  }

  /** @param {string} payload @param {string} nonce @param {number} epoch the one in force */
  async begin(payload, nonce, epoch) {
    const [position, , opened] = await this.call("FCALL", "wsproxy_begin", 1, this.key, payload, nonce, epoch);
    return { position: String(position), epoch: Number(opened) };
  }

  /**
   * Opens an epoch, unless what it is for was done already, or is another worker's now. The worker that takes it away begins
   * an epoch as well, so what was found out in one epoch holds when the next one opens right after it.
   * @param {string} payload
   * @param {string} entry of the inbox
   * @param {string} attempt
   * @param {"begin" | "end" | "interrupts"} what
   * @param {() => Promise<void>} confirm rejects when it is another worker's now
   */
  async open(payload, entry, attempt, what, confirm) {
    const done = what === "interrupts" ? what : "end";
    while (true) {
      const epoch = await this.epoch();
      if ((await this.about(entry)).some(({ what }) => what === done)) throw new Answered();
      await confirm();
      try {
        return await this.begin(payload, `${entry}/${attempt}/${what}`, epoch);
      } catch (error) {
        if (!isFenced(error)) throw error;
      }
    }
  }

  async epoch() {
    const [last] = await this.call("XREVRANGE", this.key, "+", "-", "COUNT", 1);
    return last ? Number(fieldsOf(last[1])["e"] ?? 0) : 0;
  }

  /** What was written about an entry of the inbox, in order: all have a nonce of three words. @param {string} entry */
  async about(entry) {
    /** @type {{ payload: string, attempt: string, what: string }[]} */
    const found = [];
    let from = `${Math.max(0, parseInt(entry) - skewMs)}`;
    while (true) {
      const page = await this.call("XRANGE", this.key, from, "+", "COUNT", pageSize);
      for (const [id, words] of page) {
        const { d: payload = "", k = "" } = fieldsOf(words);
        const [of, attempt = "", what = ""] = k.split("/");
        if (of === entry) found.push({ payload, attempt, what });
        from = `(${id}`;
      }
      if (page.length < pageSize) return found;
    }
  }
}

/**
 * Makes one message of pieces, or some.
 * @typedef {(pieces: string[]) => string | string[]} Join
 */

/** A client's message, which one worker has now. */
export class Question {
  /** What its answer's messages have as a nonce begins with this. */
  #attempt = Math.random().toString(36).slice(2, 12);
  #log;
  #confirm;
  #options;
  /** @internal @type {Answer | undefined} */
  answer;

  /**
   * @internal
   * @param {{ entry: string, fields: Record<string, string>, claims: string, deliveries: number }} what
   * @param {Log} log
   * @param {() => Promise<void>} confirm rejects when another one has the question now
   * @param {{ join?: Join, coalesceMs: number }} options
   */
  constructor({ entry, fields, claims, deliveries }, log, confirm, options) {
    /** The inbox's id of it. @readonly */
    this.entry = entry;
    /** The client's id of it, or the inbox's. @readonly */
    this.id = fields["id"] ?? entry;
    /** Whose it is. @readonly */
    this.session = fields["session"] ?? "";
    /** The socket it came over; empty for one that was posted. @readonly */
    this.connection = fields["connection"] ?? "";
    /** What the client has sent, as it is. @readonly */
    this.data = fields["data"] ?? "";
    /** Those of the token that INBOX_CLAIMS names. @readonly @type {Record<string, unknown>} */
    this.claims = claims === "" ? {} : JSON.parse(claims);
    /** How often it was given to a worker, this time included. @readonly */
    this.deliveries = deliveries;
    this.#log = log;
    this.#confirm = confirm;
    this.#options = options;
  }

  /**
   * Sends the first message of the answer, after which only this writer may send one.
   * @param {string} payload
   * @param {{ join?: Join }} [options] `join`: for this answer, in place of the worker's
   */
  async begin(payload, options = {}) {
    if (this.answer) throw new Error("an answer begins once");
    const begun = await this.open(payload, "begin");
    return this.answer = new Answer(this.#log, `${this.entry}/${this.#attempt}`, begun, {
      ...this.#options,
      ...options,
    });
  }

  /** Opens an epoch for its answer. @internal @param {string} payload @param {"begin" | "end"} what */
  open(payload, what) {
    return this.#log.open(payload, this.entry, this.#attempt, what, this.#confirm);
  }
}

/** The one writer of an answer. */
export class Answer {
  #log;
  #prefix;
  #epoch;
  #options;
  #count = 0;
  #position;
  /** @type {string[]} */
  #pieces = [];
  /** @type {Promise<void> | undefined} */
  #pump;
  #failed = new AbortController();
  #ended = false;
  /** Another epoch has begun. @internal */
  fenced = false;
  /** The log was lost, and its epochs with it: the question is to be answered again. @internal */
  lost = false;

  /** @internal @param {Log} log @param {string} prefix @param {{ position: string, epoch: number }} begun @param {{ join?: Join, coalesceMs: number }} options */
  constructor(log, prefix, { position, epoch }, options) {
    this.#position = position;
    /** Aborted when there is no use in going on: a stop, a newer question, another worker. @readonly */
    this.cancelled = AbortSignal.any([log.signal, this.#failed.signal]);
    this.#log = new Log(log.commands, log.session, this.cancelled);
    this.#prefix = prefix;
    this.#epoch = epoch;
    this.#options = options;
  }

  /** Where in the log the last message is that was sent: store it with what was said, and a page resumes from it. */
  get position() {
    return this.#position;
  }

  /** Sends a piece; with `join`, together with others that come soon. Rejects with `Cancelled` when it is not to be. @param {string} piece */
  async send(piece) {
    if (this.#ended) throw new Error("the answer has ended");
    this.cancelled.throwIfAborted();
    this.#pieces.push(piece);
    this.#pump ??= this.#send();
    if (!this.#options.join || this.#pieces.length > maxWaiting) await this.#pump;
    this.cancelled.throwIfAborted();
  }

  /** Sends the last message, after which no writer sends one more. @param {string} payload */
  async end(payload) {
    if (this.#ended) throw new Error("the answer has ended");
    this.#ended = true;
    await this.settled();
    const { position } = await this.#checked(() => this.#log.begin(payload, `${this.#prefix}/end`, this.#epoch));
    this.#position = position;
  }

  /** What workers before this one have sent of this answer, in order. */
  async soFar() {
    const [entry = "", own] = this.#prefix.split("/");
    const written = await this.#log.about(entry);
    return written.filter(({ attempt, what }) => attempt !== own && /^\d+$/.test(what)).map(({ payload }) => payload);
  }

  /** All pieces are in the log. @internal */
  async settled() {
    while (this.#pump) await this.#pump;
    this.cancelled.throwIfAborted();
  }

  async #send() {
    const { join, coalesceMs } = this.#options;
    try {
      while (this.#pieces.length > 0) {
        for (const payload of [join ? join(this.#pieces.splice(0)) : this.#pieces.shift() ?? ""].flat()) {
          const nonce = `${this.#prefix}/${this.#count++}`;
          const words = ["FCALL", "wsproxy_send", 1, this.#log.key, payload, nonce, this.#epoch];
          const [position] = await this.#checked(() => this.#log.call(...words));
          this.#position = String(position);
        }
        // What comes meanwhile goes as one message.
        if (join && !this.#ended) await new Promise((resolve) => setTimeout(resolve, coalesceMs));
      }
    } catch (error) {
      if (!this.cancelled.aborted) this.#failed.abort(error);
    } finally {
      this.#pump = undefined;
    }
  }

  /** @template T @param {() => Promise<T>} call @returns {Promise<T>} */
  async #checked(call) {
    try {
      return await call();
    } catch (error) {
      if (!isFenced(error)) throw error;
      const [, inForce] = /in force is (\d+)/.exec(/** @type {Error} */ (error).message) ?? [];
      this.lost = Number(inForce) < this.#epoch;
      this.fenced = !this.lost;
      const cancelled = new Cancelled(this.lost ? "the log was lost" : "another epoch has begun");
      if (!this.cancelled.aborted) this.#failed.abort(cancelled);
      throw cancelled;
    }
  }
}
