// @ts-check
/**
 * The page's end of a chat: a transport for `useChat` and `Chat` of the AI SDK (npm ai 7), over one {@linkcode Connection}.
 * A question is sent until a backend has it; an answer that is under way is read from the log, from its start, by a page
 * that was loaded again and by another tab. The frames are those of docs/chat.md.
 *
 * @module
 */

import { Connection, createId, UnsentError } from "./wsproxy.js";

/** @import { ChatTransport, UIMessage, UIMessageChunk } from "ai" */

/**
 * What a chat has besides.
 * @typedef {object} OwnOptions
 * @property {import("./wsproxy.js").SocketConstructor | undefined} [webSocket] for a runtime without one of its own
 * @property {"last" | "all" | undefined} [messages] what a question has of its chat: the last message, as the history is the
 * backend's (the default), or all of them
 * @property {((chatId: string | undefined) => unknown) | undefined} [onAnswer] what the page shows may be old: there is an
 * answer that no stream here carries, under way or ended, as another tab has asked, or a worker began anew what cannot be
 * taken back within a stream; or messages are missing, of any chat (undefined). The page loads its history and calls
 * `chat.resumeStream()`, if it shows that chat. Called once at a time, and not while the chat has a stream, nor while it
 * shows an error of a question that its history may not have
 */

/**
 * What a transport is made of: a session, what a {@linkcode Connection} takes besides, and what is the chat's own.
 * @typedef {Omit<import("./wsproxy.js").Options, "onMessage" | "onPosition" | "WebSocket"> & OwnOptions} ChatOptions
 */

/** Chunks that make no part of a message. */
const partless = new Set([
  "start",
  "finish",
  "message-metadata",
  "abort",
  "error",
]);
/** How long a message waits that may not have arrived, until it is sent again. */
const againMs = 1000;

const missing = "part of the answer is missing: ask again";

/** One stream of an answer, and what it has made of the message. */
class Reader {
  /** Steps that it has begun. */
  #steps = 0;
  /** There are parts in front of the first step, or without any. */
  #loose = false;
  /** What it has made is to be taken back before it makes more. */
  #reset = false;
  /** The new writer has begun the step that is taken back: its mark stays. */
  #marked = false;
  #pushed = false;

  /** @param {ReadableStreamDefaultController<UIMessageChunk>} controller */
  constructor(controller) {
    this.controller = controller;
  }

  /** @param {UIMessageChunk} chunk */
  push(chunk) {
    this.#pushed = true;
    const { type } = chunk;
    if (type === "start" || type === "message-metadata") return this.controller.enqueue(chunk);
    if (this.#reset && this.#steps > 0 && !this.#marked && type === "start-step") return void (this.#marked = true);
    this.flush();
    const isPart = !partless.has(type) && !("transient" in chunk && chunk.transient);
    if (type === "start-step") this.#steps++;
    else if (this.#steps === 0 && isPart) this.#loose = true;
    this.controller.enqueue(chunk);
  }

  /**
   * Another writer begins the message anew. What a stream has made can be taken back as long as it is one step; the text
   * stays until another one comes.
   * @param {boolean} continues whether the message had parts before
   * @returns {boolean} false when it cannot be taken back
   */
  restart(continues) {
    if (this.#steps > 1 || (this.#loose && (continues || this.#steps > 0))) return false;
    this.#reset ||= this.#loose || this.#steps > 0;
    this.#loose = this.#marked = false;
    return true;
  }

  /**
   * An error that a stream is given would take away what was not read of it: after chunks it is one of them.
   * @param {Error} error
   */
  fail(error) {
    if (!this.#pushed) return this.controller.error(error);
    this.controller.enqueue({ type: "error", errorText: error.message });
    this.controller.close();
  }

  /** Takes back what is to be taken back. */
  flush() {
    if (this.#reset) this.controller.enqueue({ type: "reset-step" });
    this.#reset = false;
  }
}

/** A question that is not answered yet, or an answer that is under way. */
class Answer {
  /** From the beginning. @type {UIMessageChunk[]} */
  chunks = [];
  /** The number of the next one. */
  sequence = 0;
  /** @type {Set<Reader>} */
  readers = new Set();
  started = false;
  /** A backend has the question. */
  sent = false;
  /** It continues a message. */
  continues = false;
  /** It was stopped here. */
  stopped = false;
  /** A backend had the question before this connection. */
  sentBefore = false;
  /** A backend had the question before messages went missing: it may have begun in these, or begins in what comes now. */
  doubtful = false;
  /** A part of it is missing. */
  lost = false;
  /** It was lost, and nothing was heard of it since. */
  silent = false;
  /** A stream here has carried it. */
  carried = false;
  /** The page was told of it, or has asked itself: the history that it has has the question. */
  told = false;
  /** @type {string | undefined} */
  messageId;
  /** Resumes of its chat that waited for the log when it was asked. @type {(() => void)[]} */
  #superseded = [];

  /** @param {string} requestId @param {string | undefined} chatId */
  constructor(requestId, chatId) {
    this.requestId = requestId;
    this.chatId = chatId;
  }

  /** @param {string | undefined} chatId */
  isOf(chatId) {
    return this.chatId === undefined || this.chatId === chatId;
  }

  /** The next chunk. The first one has the message's id, so that what is read again takes the place of what is there. @param {UIMessageChunk} chunk */
  push(chunk) {
    if (this.sequence++ === 0) {
      const own = chunk.type === "start" ? chunk.messageId : undefined;
      this.messageId ??= own ?? (this.continues ? undefined : this.requestId);
      if (this.messageId !== undefined) {
        this.#add({ ...(chunk.type === "start" && chunk), type: "start", messageId: this.messageId });
        if (chunk.type === "start") return;
      }
    }
    this.#add(chunk);
  }

  /**
   * A resume has nothing to show any more. The chat hears of that when this answer shows: it takes it for the end of what
   * it waits for.
   * @param {() => void} end
   */
  supersede(end) {
    this.#superseded.push(end);
  }

  #endSuperseded() {
    for (const end of this.#superseded.splice(0)) end();
  }

  /** @param {UIMessageChunk} chunk */
  #add(chunk) {
    this.#endSuperseded();
    this.chunks.push(chunk);
    for (const reader of this.readers) reader.push(chunk);
  }

  /** @param {Error} error */
  fail(error) {
    this.#endSuperseded();
    for (const reader of this.readers) reader.fail(error);
    this.readers.clear();
  }

  close() {
    this.#endSuperseded();
    for (const reader of this.readers) {
      reader.flush();
      reader.controller.close();
    }
    this.readers.clear();
  }
}

/**
 * A `ChatTransport` of the AI SDK: all chats of a session share its connection, which is made when it is first needed and
 * kept until {@linkcode SessionChatTransport.close}.
 * @template {UIMessage} [UI_MESSAGE=UIMessage]
 */
export class SessionChatTransport {
  /** An answer that is read again comes from its start. @readonly */
  resumeStreamIsReplay = true;
  #options;
  /** @type {Connection | undefined} */
  #connection;
  /** All that the log has has come. */
  #live = false;
  #wasLive = false;
  /** By request, in order. @type {Map<string, Answer>} */
  #answers = new Map();
  /**
   * What waits for the log, or until the page is told.
   * @type {Set<{ chatId: string, isTold: boolean, ready: () => void, none: () => void, fail: (error: Error) => void }>}
   */
  #waiting = new Set();
  /** Chats with an answer that has ended, and that the page has not seen. @type {Set<string | undefined>} */
  #missed = new Set();
  /**
   * Chats whose user is to ask again, and has not; `isStored`: the history has the question.
   * @type {Map<string | undefined, { requestId: string, isStored: boolean }>}
   */
  #failed = new Map();
  /** Chats whose page is told just now. @type {Set<string | undefined>} */
  #telling = new Set();
  /** Chats whose stream is replaced by another one just now. @type {Set<string>} */
  #replaced = new Set();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #tellTimer;
  /** End the waits of what is to be sent again. @type {Set<() => void>} */
  #delays = new Set();

  /** @param {ChatOptions} options @throws {TypeError} for what is no url */
  constructor(options) {
    new URL(options.url);
    this.#options = options;
  }

  /**
   * Asks. The stream ends with the answer, and fails when no backend has the question, when a part of the answer is lost
   * for good, and when the connection ends for good.
   * @param {Parameters<ChatTransport<UI_MESSAGE>["sendMessages"]>[0]} options
   * @returns {Promise<ReadableStream<UIMessageChunk>>}
   */
  // deno-lint-ignore require-await
  async sendMessages({ trigger, chatId, messageId, messages, abortSignal, headers, body, metadata }) {
    abortSignal?.throwIfAborted();
    // There is no use in what is written of an answer that has a hole.
    for (const answer of this.#answers.values()) {
      if (answer.lost && answer.chatId === chatId) this.#stop(answer);
    }
    const answer = this.#add(createId(), chatId);
    const { requestId } = answer;
    // What the page was about to show would stand behind this question. It is told of that after this answer.
    for (const waiting of this.#waiting) {
      if (waiting.chatId !== chatId) continue;
      this.#waiting.delete(waiting);
      answer.supersede(waiting.none);
    }
    if (this.#isTelling(chatId)) this.#missed.add(chatId);
    this.#failed.delete(chatId);
    answer.told = true;
    answer.continues = messages.at(-1)?.role === "assistant";
    const stream = this.#stream(answer, chatId, abortSignal);
    const frame = {
      ...{ type: "send", requestId, id: chatId, trigger, messageId },
      messages: this.#options.messages === "all" ? messages : messages.slice(-1),
      headers: Object.fromEntries(new Headers(headers)),
      ...{ body: body ?? {}, metadata },
    };
    this.#submit(requestId, frame).then(() => answer.sent = true, (error) => {
      if (!answer.started) this.#fail(answer, error);
    });
    return stream;
  }

  /**
   * The answer that is under way, from its start: of a question of this page's, of another tab's, or of this page's before
   * it was loaded again. It is read from the log; the backend is not asked.
   * @param {Parameters<ChatTransport<UI_MESSAGE>["reconnectToStream"]>[0]} options
   * @returns {Promise<ReadableStream<UIMessageChunk> | null>} null when none is
   */
  reconnectToStream({ chatId, abortSignal }) {
    this.#replaced.add(chatId);
    queueMicrotask(() => this.#replaced.delete(chatId));
    return new Promise((resolve, reject) => {
      abortSignal?.throwIfAborted();
      // The connection has ended while the page loaded its history: that is no reason for another one.
      if (!this.#connection && this.#isTelling(chatId)) return resolve(null);
      this.#open();
      const done = () => {
        this.#waiting.delete(waiting);
        abortSignal?.removeEventListener("abort", abort);
      };
      const abort = () => waiting.fail(abortSignal?.reason);
      const waiting = {
        chatId,
        isTold: this.#isTelling(chatId),
        none: () => {
          done();
          resolve(null);
        },
        ready: () => {
          const answer = this.#underWay(chatId);
          // The history that the page has may be from before its question: the page is told first.
          if (this.#options.onAnswer && answer && !answer.told && !answer.lost && !this.#isHeld(chatId, true)) return;
          done();
          resolve(answer ? this.#stream(answer, chatId, abortSignal) : null);
        },
        fail(/** @type {Error} */ error) {
          done();
          reject(error);
        },
      };
      this.#waiting.add(waiting);
      abortSignal?.addEventListener("abort", abort, { once: true });
      if (this.#live) waiting.ready();
      this.#tellSoon();
    });
  }

  /** Leaves for good: streams that are open fail. A later question, or a page that is loaded again, connects again. */
  close() {
    this.#connection?.close();
  }

  #open() {
    if (this.#connection) return this.#connection;
    const { webSocket, messages: _, onAnswer: __, ...options } = this.#options;
    return this.#connection = new Connection({
      ...options,
      WebSocket: webSocket,
      onMessage: (text) => this.#receive(text),
      onGap: (reason) => {
        this.#gap();
        return options.onGap?.(reason);
      },
      onLive: (position) => {
        // Without a log nothing says what came while there was no socket.
        if (position === undefined && this.#wasLive) this.#gap();
        this.#endDoubts();
        this.#live = this.#wasLive = true;
        this.#resume();
        this.#tellSoon();
        return options.onLive?.(position);
      },
      onState: (state, close) => {
        if (state === "connecting") {
          this.#live = false;
          for (const answer of this.#answers.values()) answer.sentBefore = answer.sent;
        }
        if (state === "closed") this.#closed(`the connection has ended: ${close?.code} ${close?.reason}`.trim());
        return options.onState?.(state, close);
      },
    });
  }

  /** What the next connection reads from the log is all there is. @param {string} why */
  #closed(why) {
    this.#connection = undefined;
    this.#live = this.#wasLive = false;
    clearTimeout(this.#tellTimer);
    for (const answer of this.#answers.values()) this.#break(answer, new Error(why));
    this.#answers.clear();
    this.#missed.clear();
    for (const { fail } of this.#waiting) fail(new Error(why));
    for (const end of this.#delays) end();
  }

  /** Messages are missing: some may have been of any answer, or all of it. */
  #gap() {
    this.#missed.add(undefined);
    for (const answer of this.#answers.values()) {
      if (!answer.started) {
        // What a connection finds missing when it begins is from before it.
        answer.doubtful ||= this.#live ? answer.sent : answer.sentBefore;
        continue;
      }
      this.#lose(answer);
      answer.silent = true;
    }
    this.#resume();
    this.#tellSoon();
  }

  /** All that the log still has has come: what has not begun in it has begun in what is missing. */
  #endDoubts() {
    for (const answer of this.#answers.values()) {
      if (!answer.doubtful || answer.started) continue;
      this.#lose(answer);
      this.#answers.delete(answer.requestId);
    }
  }

  /** What waits for the log, or for what the page is told, may go on. */
  #resume() {
    if (!this.#live) return;
    for (const { chatId, isTold, ready } of this.#waiting) if (isTold || !this.#isTelling(chatId)) ready();
  }

  /** Its streams fail. @param {Answer} answer @param {Error} error */
  #break(answer, error) {
    const { requestId, chatId, readers, told, chunks } = answer;
    if (readers.size > 0 && told) this.#failed.set(chatId, { requestId, isStored: chunks.length > 0 });
    answer.fail(error);
  }

  /** @param {Answer} answer */
  #lose(answer) {
    this.#break(answer, new Error(missing));
    Object.assign(answer, { lost: true, carried: false, told: false, chunks: [] });
  }

  /** @param {string} requestId @param {string | undefined} chatId */
  #add(requestId, chatId) {
    const answer = new Answer(requestId, chatId);
    this.#answers.set(requestId, answer);
    return answer;
  }

  /** @param {string} text */
  #receive(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return;
    }
    const { type, requestId = frame?.id } = frame ?? {};
    if (type === "control" && frame.command === "gap") {
      this.#gap();
      return this.#endDoubts();
    }
    if (typeof requestId !== "string") return;
    const answer = this.#answers.get(requestId);
    switch (type) {
      case "start":
        return this.#begin(answer ?? this.#add(requestId, typeof frame.id === "string" ? frame.id : undefined));
      case "chunk":
        return this.#continue(answer ?? this.#add(requestId, undefined), frame);
      case "end":
        answer?.close();
        return answer && this.#ended(answer);
      case "error":
      case "failed":
        return answer && this.#fail(answer, new Error(frame.errorText || "the answer has failed"));
    }
  }

  /** @param {Answer} answer */
  #begin(answer) {
    if (answer.started) {
      Object.assign(answer, { chunks: [], sequence: 0, lost: false, silent: false });
      for (const reader of answer.readers) {
        if (reader.restart(answer.continues)) continue;
        answer.readers.delete(reader);
        this.#interrupt(reader);
      }
      if (answer.readers.size === 0) answer.carried = answer.told = false;
    }
    answer.started = true;
  }

  /** What the stream has made of the message cannot be taken back, so another stream is to make it. @param {Reader} reader */
  #interrupt({ controller }) {
    const text = "the answer has begun anew";
    // The AI SDK takes the first for a stop, after which the page resumes, and the second for a break of the network.
    controller.error(
      this.#options.onAnswer ? new DOMException(text, "AbortError") : new TypeError(`network: ${text}`),
    );
  }

  /** @param {Answer} answer @param {{ sequence: unknown, chunk: UIMessageChunk }} frame */
  #continue(answer, { sequence, chunk }) {
    answer.silent = false;
    answer.started = true;
    if (answer.lost || typeof chunk?.type !== "string" || Number(sequence) < answer.sequence) return;
    if (sequence !== answer.sequence) {
      this.#lose(answer);
      return this.#resume();
    }
    answer.push(chunk);
    if (sequence !== 0) return;
    // With its first chunk an answer has its question in the history.
    for (const failed of this.#failed.values()) failed.isStored ||= failed.requestId === answer.requestId;
    this.#tellSoon();
  }

  /** @param {string} chatId */
  #underWay(chatId) {
    // The history that the page is loading may be from before this question. It is told of its answer after that.
    const isLoading = this.#isTelling(chatId);
    const answers = [...this.#answers.values()].filter((answer) =>
      answer.isOf(chatId) && !answer.stopped && !(answer.lost && answer.silent) && !(isLoading && !answer.told)
    );
    return answers.findLast(({ started }) => started) ?? answers.at(-1);
  }

  /** @param {string} chatId */
  #isTelling(chatId) {
    return this.#telling.has(chatId) || this.#telling.has(undefined);
  }

  /** The page has the ends of its streams behind it then. */
  #tellSoon() {
    clearTimeout(this.#tellTimer);
    if (this.#connection) this.#tellTimer = setTimeout(() => this.#tell());
  }

  /** The page does not know of these answers. A chat with a stream of its own hears of others after that. */
  #tell() {
    if (!this.#live) return;
    const answers = [...this.#answers.values()];
    const untold = answers.filter(({ chunks, stopped, carried, told }) =>
      chunks.length > 0 && !stopped && !carried && !told
    );
    for (const chatId of new Set([...this.#missed, ...untold.map(({ chatId }) => chatId)])) {
      const isBusy = answers.some((answer) => answer.readers.size > 0 && (chatId === undefined || answer.isOf(chatId)));
      const isNew = untold.some((answer) => answer.chatId === chatId);
      const isTold = chatId === undefined ? this.#telling.size > 0 : this.#isTelling(chatId);
      if (isBusy || isTold || this.#isHeld(chatId, isNew)) continue;
      if (chatId === undefined) this.#missed.clear();
      this.#missed.delete(chatId);
      for (const failed of this.#failedOf(chatId)) this.#failed.delete(failed);
      for (const answer of untold) if (answer.chatId === chatId) answer.told = true;
      // Of a question that was stopped, and that no answer has begun to, the history may not know yet.
      for (const answer of answers) {
        if (answer.chunks.length === 0 && (chatId === undefined || answer.isOf(chatId))) answer.told = false;
      }
      void this.#tellOf(chatId);
    }
  }

  /** @param {string | undefined} chatId undefined: of all */
  #failedOf(chatId) {
    return [...this.#failed.keys()].filter((failed) =>
      chatId === undefined || failed === undefined || failed === chatId
    );
  }

  /**
   * What the page would load takes an error away, after which its user may ask again: that is for what is new, and not for a
   * history that may not have the question.
   * @param {string | undefined} chatId
   * @param {boolean} isNew there is an answer that the page does not show
   */
  #isHeld(chatId, isNew) {
    return this.#failedOf(chatId).some((failed) => !(isNew && this.#failed.get(failed)?.isStored));
  }

  /** @param {string | undefined} chatId */
  async #tellOf(chatId) {
    const { onAnswer, onError = (error) => console.error("wsproxy:", error) } = this.#options;
    if (!onAnswer) return;
    this.#telling.add(chatId);
    try {
      await onAnswer(chatId);
    } catch (error) {
      onError(error);
    }
    this.#telling.delete(chatId);
    this.#resume();
    this.#tellSoon();
  }

  /** @param {Answer} answer @param {string} chatId @param {AbortSignal | undefined} signal */
  #stream(answer, chatId, signal) {
    /** @type {Reader} */
    let reader;
    const leave = () => {
      signal?.removeEventListener("abort", abort);
      return answer.readers.delete(reader);
    };
    const abort = () => {
      if (!leave()) return;
      reader.controller.close();
      // A chat that resumes once more aborts the stream that it had.
      queueMicrotask(() => this.#replaced.has(chatId) || this.#stop(answer));
    };
    return /** @type {ReadableStream<UIMessageChunk>} */ (new ReadableStream({
      start(controller) {
        reader = new Reader(controller);
        if (answer.lost) return controller.error(new Error(missing));
        answer.readers.add(reader);
        answer.carried = true;
        signal?.addEventListener("abort", abort, { once: true });
        for (const chunk of answer.chunks) reader.push(chunk);
      },
      cancel: () => void leave(),
    }));
  }

  /** Tells the writer, wherever it is. @param {Answer} answer */
  #stop(answer) {
    const { requestId } = answer;
    if (answer.stopped || this.#answers.get(requestId) !== answer) return;
    answer.stopped = true;
    // An answer that is heard of no more needs none.
    this.#submit(`${requestId}-abort`, { type: "abort", requestId }).catch(() => {});
  }

  /** @param {Answer} answer @param {Error} error */
  #fail(answer, error) {
    this.#break(answer, error);
    this.#ended(answer);
  }

  /** @param {Answer} answer */
  #ended({ requestId, chatId, started, carried, told, stopped }) {
    this.#answers.delete(requestId);
    // The history that the page has loaded may be older, also than the question of an answer that it resumed by itself,
    // or that was stopped.
    if (started && !(told && (carried || stopped))) this.#missed.add(chatId);
    this.#resume();
    this.#tellSoon();
  }

  /** Submits a frame. A backend knows one that comes twice by its id. @param {string} id @param {object} frame */
  async #submit(id, frame) {
    const connection = this.#open();
    const text = JSON.stringify(frame);
    while (true) {
      try {
        return await connection.submit(text, { id });
      } catch (error) {
        if (!(error instanceof UnsentError && error.reason === "unconfirmed")) throw error;
        await this.#delay(againMs);
      }
    }
  }

  /** Ends early with the connection. @param {number} ms @returns {Promise<void>} */
  #delay(ms) {
    return new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer);
        this.#delays.delete(end);
        resolve();
      };
      const timer = setTimeout(end, ms);
      this.#delays.add(end);
    });
  }
}
