// @ts-check
/**
 * A worker of a chat: the answers of the AI SDK, or of anything that streams chunks of UI messages, in the frames of
 * docs/chat.md. Node, Deno and Bun, as for the worker; of the AI SDK it needs nothing but types.
 *
 * @module
 */

import { Cancelled, Worker } from "./backend.js";

/** @import { UIMessage } from "ai" */
/** @import { Answer, Question } from "./answer.js" */

/**
 * One of a UI message stream, such as `{"type":"text-delta","id":"1","delta":"hello"}`.
 * @typedef {{ type: string }} Chunk
 */

/** @typedef {{ [name: string]: unknown, type: string, requestId: string }} Frame */

/**
 * What a worker of a chat is told: what any worker is, and these.
 * @typedef {object} OwnOptions
 * @property {(send: Send) => AsyncIterable<Chunk> | ReadableStream<Chunk>
 *   | Promise<AsyncIterable<Chunk> | ReadableStream<Chunk>>} answer streams the answer. What throws before anything is shown
 *   is asked again, three times in all
 * @property {((send: Send) => unknown) | undefined} [onQuestion] is called before the answer begins, which other pages of the
 *   session are told of, and for a question that was stopped by then as well: store the question there, and they find it. It
 *   is called again when another worker takes the question over
 * @property {string | undefined} [errorText] what the user is told of an answer that fails: `The answer failed.`
 */

/** @typedef {Omit<import("./backend.js").Options, "handle" | "failed" | "join"> & OwnOptions} ChatWorkerOptions */

/** The field of a delta that joins with others of its part, and the field that names the part. */
const deltas = new Map([
  ["text-delta", ["delta", "id"]],
  ["reasoning-delta", ["delta", "id"]],
  ["tool-input-delta", ["inputTextDelta", "toolCallId"]],
]);
const maxJoined = 65_536;
/** Chunks that show nothing: an answer that has no others yet may begin anew without being noticed. */
const silent = new Set(["start", "start-step", "message-metadata"]);
/** Aborts that are remembered until their request begins. */
const maxAborted = 10_000;
/** How long a model that is stopped may take to end its stream. */
const abortMs = 5000;

/** Ends an answer, with a text for the user. */
export class ChatError extends Error {
  /** @override */
  name = "ChatError";
}

/** A question of a chat. All of it is the client's word, but for `question.session` and `question.claims`. */
export class Send {
  /** @type {Answer | undefined} */
  #answer;

  /** @internal @param {Question} question @param {Frame} frame @param {AbortSignal} aborted */
  constructor(question, frame, aborted) {
    const { id, trigger, messageId, messages, body } = frame;
    /** As the worker has it. @readonly */
    this.question = question;
    /** As the client has sent it. @readonly */
    this.frame = frame;
    /** @readonly */
    this.requestId = frame.requestId;
    /** The chat's id: a session may have several. @readonly */
    this.chatId = String(id ?? question.session);
    /** @readonly @type {"submit-message" | "regenerate-message"} */
    this.trigger = trigger === "regenerate-message" ? trigger : "submit-message";
    /** Of the message to be answered anew, or of the one that was changed. @readonly */
    this.messageId = typeof messageId === "string" ? messageId : undefined;
    /** The last one of the chat, or all. @readonly */
    this.messages = /** @type {UIMessage[]} */ (messages);
    /** What the page has given its request. @readonly */
    this.body = /** @type {Record<string, unknown>} */ (typeof body === "object" && body || {});
    const last = this.messages.at(-1);
    /** The id of the message that is the answer: store it under this one, and again when it comes again. @readonly */
    this.answerId = last?.role === "assistant" ? last.id : this.requestId;
    /** Aborted when the client stops the answer, or it is another worker's. */
    this.abortSignal = aborted;
  }

  /** @internal @param {Answer} answer */
  begin(answer) {
    this.#answer = answer;
    this.abortSignal = AbortSignal.any([this.abortSignal, answer.cancelled]);
  }

  /** Where in the log what was streamed until now ends: to be stored with the history. */
  async position() {
    if (!this.#answer) throw new Error("the answer has not begun");
    await this.#answer.settled();
    return this.#answer.position;
  }
}

/** Answers the `send` frames of an agent's clients. */
export class ChatWorker extends Worker {
  #options;
  /** What is being answered here, by session and request. @type {Map<string, AbortController>} */
  #sends = new Map();
  /** Aborts whose request has not begun here: all workers hear of each. @type {Set<string>} */
  #aborted = new Set();

  /** @param {ChatWorkerOptions} options */
  constructor(options) {
    const { answer, onQuestion, errorText = "The answer failed.", ...rest } = options;
    const error = (/** @type {string} */ requestId, text = errorText) =>
      JSON.stringify({ type: "error", requestId, errorText: text });
    super({
      ...rest,
      handle: (question) => this.#take(question),
      interrupts: (entry) => this.#hear(entry),
      failed: (question) => error(frameOf(question.data)?.requestId ?? question.id),
    });
    this.#options = { ...rest, answer, onQuestion, error };
  }

  /** An abort ends the request that it names, and drops no other. @param {import("./backend.js").Entry} entry */
  #hear(entry) {
    const frame = entry["type"] === "message" ? frameOf(entry["data"] ?? "") : undefined;
    if (frame?.type !== "abort") return this.#options.interrupts?.(entry);
    const key = keyOf(entry["session"] ?? "", frame);
    const send = this.#sends.get(key);
    if (send) return void send.abort();
    this.#aborted.add(key);
    for (const oldest of this.#aborted) {
      if (this.#aborted.size <= maxAborted) break;
      this.#aborted.delete(oldest);
    }
  }

  /** @param {Question} question */
  async #take(question) {
    const frame = frameOf(question.data);
    if (frame?.type === "abort") this.#aborted.delete(keyOf(question.session, frame));
    if (frame?.type === "resume") {
      await question.begin(JSON.stringify({ type: "no-active", requestId: frame.requestId }));
    }
    if (frame?.type !== "send") return;
    if (isSend(frame)) await this.#answer(question, frame);
    else await question.begin(this.#options.error(frame.requestId, "The question was not understood."));
  }

  /** @param {Question} question @param {Frame} frame */
  async #answer(question, frame) {
    const { requestId } = frame;
    const key = keyOf(question.session, frame);
    const stop = new AbortController();
    this.#sends.set(key, stop);
    try {
      const send = new Send(question, frame, stop.signal);
      let refused;
      try {
        await this.#options.onQuestion?.(send);
      } catch (error) {
        if (!(error instanceof ChatError)) throw error;
        refused = error;
      }
      const start = JSON.stringify({ type: "start", requestId, id: frame["id"] ?? question.session });
      const answer = await question.begin(start, { join: joined(requestId) });
      if (this.#aborted.delete(key)) stop.abort();
      send.begin(answer);
      const writer = new Writer(answer, send.answerId);
      let last = JSON.stringify({ type: "end", requestId });
      try {
        if (refused) throw refused;
        await this.#write(send, stop.signal, answer, writer);
      } catch (error) {
        if (error instanceof ChatError) last = this.#options.error(requestId, error.message);
        else {
          // What another try shows takes the place of nothing that was seen.
          if (answer.cancelled.aborted || !writer.hasShown) throw error;
          const onError = this.#options.onError ?? ((error, what) => console.error(`${what}:`, error));
          onError(error, `question ${question.entry} of session ${question.session}`);
          last = this.#options.error(requestId);
        }
      }
      await answer.end(last);
    } finally {
      this.#sends.delete(key);
    }
  }

  /**
   * Until the stream ends, or something ends it. A stream that is left by itself ends at its next chunk, which cannot be sent.
   * @param {Send} send
   * @param {AbortSignal} stopped
   * @param {Answer} answer
   * @param {Writer} writer
   */
  async #write(send, stopped, answer, writer) {
    if (stopped.aborted) return await writer.write({ type: "abort" });
    const written = (async () => {
      for await (const chunk of /** @type {AsyncIterable<Chunk>} */ (await this.#options.answer(send))) {
        await writer.write(chunk);
      }
    })();
    let timer;
    const left = new Promise((resolve) => {
      answer.cancelled.addEventListener("abort", resolve, { once: true });
      stopped.addEventListener("abort", () => timer = setTimeout(resolve, abortMs), { once: true });
    });
    try {
      await Promise.race([written, left]);
    } catch (error) {
      // What the stream says of its stop.
      if (!stopped.aborted) throw error;
    } finally {
      written.catch(() => {});
      clearTimeout(timer);
    }
    if (answer.cancelled.aborted) throw new Cancelled("the answer goes no further");
    if (stopped.aborted && !writer.hasEnded) await writer.write({ type: "abort" });
  }
}

/** Sends chunks: first the one with the message's id. */
class Writer {
  hasShown = false;
  hasEnded = false;
  #answer;
  #id;
  #hasBegun = false;

  /** @param {Answer} answer @param {string} id of the message */
  constructor(answer, id) {
    this.#answer = answer;
    this.#id = id;
  }

  /** @param {Chunk} chunk */
  async write(chunk) {
    const { type } = chunk;
    if (type === "error") throw new ChatError(/** @type {{ errorText?: string }} */ (chunk).errorText);
    if (type !== "start" && !this.#hasBegun) await this.write({ type: "start" });
    this.#hasBegun = true;
    this.hasShown ||= !silent.has(type);
    this.hasEnded ||= type === "finish" || type === "abort";
    await this.#answer.send(JSON.stringify(type === "start" ? { ...chunk, messageId: this.#id } : chunk));
  }
}

/** Makes frames of chunks: neighbours that are deltas of one part go as one. @param {string} requestId */
function joined(requestId) {
  let sequence = 0;
  return (/** @type {string[]} */ pieces) => {
    /** @type {Record<string, string>[]} */
    const chunks = [];
    for (const piece of pieces) {
      const chunk = JSON.parse(piece);
      const last = chunks.at(-1);
      if (!last || !append(last, chunk)) chunks.push(chunk);
    }
    return chunks.map((chunk) => JSON.stringify({ type: "chunk", requestId, sequence: sequence++, chunk }));
  };
}

/** Whether a delta could be put to the one before it. @param {Record<string, string>} last @param {Record<string, string>} chunk */
function append(last, chunk) {
  const [text = "", part = ""] = deltas.get(chunk["type"] ?? "") ?? [];
  const { [text]: before, [part]: of } = last;
  if (text === "" || last["type"] !== chunk["type"] || of !== chunk[part] || before === undefined) return false;
  // Others have more to say.
  if (Object.keys(last).length !== 3 || Object.keys(chunk).length !== 3 || before.length > maxJoined) return false;
  last[text] = before + chunk[text];
  return true;
}

/** What a client has sent; undefined for what is no frame with a `requestId`. @param {string} data */
function frameOf(data) {
  try {
    const frame = JSON.parse(data);
    if (typeof frame?.type === "string" && typeof frame.requestId === "string") return /** @type {Frame} */ (frame);
  } catch {
    // Not of a chat.
  }
}

/** @param {Frame} frame */
function isSend({ messages }) {
  return Array.isArray(messages) && messages.length > 0 &&
    messages.every((message) => typeof message?.id === "string" && typeof message.role === "string");
}

/** @param {string} session @param {Frame} frame */
function keyOf(session, { requestId }) {
  return `${session} ${requestId}`;
}
