// @ts-check
/**
 * A class with the interface of `WebSocket` over a {@linkcode Connection}: a library that takes a WebSocket constructor
 * resumes without knowing it. What cannot be hidden is a close with a code: a gap, a message that no backend has, and a
 * close of the proxy's that is for good.
 *
 * @module
 */

import { Connection } from "./wsproxy.js";

/**
 * What all sockets of a class share: the token function, where to begin, what a {@linkcode Connection} takes besides; and,
 * for libraries whose sockets begin a conversation of their own, `begins`: whether a message is the first of one, as
 * `connection_ack` is for graphql-ws. A new socket is then not given what the log has of former conversations.
 * @typedef {Pick<import("./wsproxy.js").Options, "token" | "position" | "historyLoaded" | "onPosition" | "onError" | "sse"
 *   | "timeoutMs" | "silenceMs" | "maxPending" | "WebSocket" | "fetch"> & { begins?: ((data: string) => boolean) | undefined
 *   }} ResumingOptions
 */

/** Messages are missing for good: reload the state, then connect again. */
export const gapCode = 4900;
/** A message that was sent is in no backend's hands. */
export const unsentCode = 4901;
/** The proxy's closes for a token that has run out or is revoked. The others from 3000 on are a backend's, or for good. */
const tokenCode = 4401;
/** How long a close waits for the answers to what was sent before it. */
const lingerMs = 5000;

const connecting = 0;
const open = 1;
const closing = 2;
const closed = 3;

/** The interface of `WebSocket`. Made with options by {@linkcode ResumingWebSocket.with}. */
export class ResumingWebSocket extends EventTarget {
  static CONNECTING = connecting;
  static OPEN = open;
  static CLOSING = closing;
  static CLOSED = closed;
  CONNECTING = connecting;
  OPEN = open;
  CLOSING = closing;
  CLOSED = closed;

  /** Text is all there is. @type {"blob" | "arraybuffer"} */
  binaryType = "blob";
  extensions = "";
  /** @readonly @type {string} */
  url;
  /** The first one that was asked for: the library's, not the proxy's. @readonly @type {string} */
  protocol;
  /** @type {number} */
  readyState = connecting;
  /** Characters that no backend has yet. */
  bufferedAmount = 0;
  /** @type {((event: Event) => unknown) | null} */
  onopen = null;
  /** @type {((event: MessageEvent<string>) => unknown) | null} */
  onmessage = null;
  /** @type {((event: Event) => unknown) | null} */
  onerror = null;
  /** @type {((event: CloseEvent) => unknown) | null} */
  onclose = null;
  /** @type {Connection} */
  #connection;
  /** Why this side closes. @type {import("./wsproxy.js").Close | undefined} */
  #close;
  /** Messages that are waited for before this side closes, and for how long. */
  #unanswered = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #lingering;

  /**
   * A class whose sockets have these options. A socket for a url that an earlier one had goes on where that one ended.
   * @param {ResumingOptions} options
   * @returns {typeof WebSocket}
   */
  static with(options) {
    /** @type {Map<string, string>} */
    const positions = new Map();
    const Bound = class extends ResumingWebSocket {
      /** @param {string | URL} url @param {string | string[]} [protocols] */
      constructor(url, protocols) {
        const position = positions.get(String(url));
        super(url, protocols, {
          ...options,
          ...(position === undefined ? {} : { position, historyLoaded: false }),
          onPosition(position) {
            positions.set(String(url), position);
            options.onPosition?.(position);
          },
        });
      }
    };
    return /** @type {never} */ (Bound);
  }

  /** @param {string | URL} url @param {string | string[] | undefined} protocols @param {ResumingOptions} options */
  constructor(url, protocols, options) {
    super();
    this.url = String(url);
    this.protocol = [protocols ?? ""].flat()[0] ?? "";
    const { begins } = options;
    let begun = begins === undefined;
    let wasOpen = false;
    this.#connection = new Connection({
      ...options,
      url,
      onMessage: (data) => {
        if (this.readyState !== open) return;
        begun ||= begins?.(data) ?? true;
        if (begun) this.#dispatch(new MessageEvent("message", { data }), this.onmessage);
      },
      // What came before is of a former conversation.
      onLive: () => this.#open(),
      // What came after the close was called is left for the next socket.
      onPosition: (position) => this.readyState < closing && options.onPosition?.(position),
      onGap: (reason) => {
        if (!begins || this.readyState === open) this.#fail(gapCode, `messages are missing: ${reason}`);
      },
      onState: (state, close) => {
        if (state === "closed" && close) this.#closed(close);
        else if (wasOpen && close && close.code >= 3000 && close.code !== tokenCode) {
          this.#fail(close.code, close.reason);
        }
        wasOpen = state === "open";
        if (wasOpen && !begins) this.#open();
      },
    });
  }

  /**
   * Sends a text, which is kept until a backend has it.
   * @param {string} data
   */
  send(data) {
    if (this.readyState === connecting) throw new DOMException("the socket is not open yet", "InvalidStateError");
    if (typeof data !== "string") throw new TypeError("only text can be sent");
    if (this.readyState !== open) return;
    this.#unanswered++;
    this.bufferedAmount += data.length;
    this.#connection
      .submit(data)
      .catch((error) => {
        if (error.reason !== "closed") this.#fail(unsentCode, error.reason);
      })
      .then(() => {
        this.bufferedAmount -= data.length;
        if (--this.#unanswered === 0 && this.readyState === closing) this.#connection.close();
      });
  }

  /**
   * Closes, after what was sent has its answer, or a few seconds.
   * @param {number} [code] 1000, or from 3000 to 4999
   * @param {string} [reason]
   */
  close(code = 1000, reason = "") {
    if (code !== 1000 && !(code >= 3000 && code <= 4999)) {
      throw new DOMException(`code must be 1000 or from 3000 to 4999: ${code}`, "InvalidAccessError");
    }
    if (this.readyState >= closing) return;
    const wasOpen = this.readyState === open;
    this.readyState = closing;
    this.#close = { code: wasOpen ? code : 1006, reason: wasOpen ? reason : "" };
    // As with any socket, the event comes after the call.
    if (this.#unanswered === 0) queueMicrotask(() => this.#connection.close());
    else this.#lingering = setTimeout(() => this.#connection.close(), lingerMs);
  }

  #open() {
    if (this.readyState !== connecting) return;
    this.readyState = open;
    this.#dispatch(new Event("open"), this.onopen);
  }

  /** @param {number} code @param {string} reason */
  #fail(code, reason) {
    if (this.readyState === closed) return;
    this.readyState = closing;
    // As a close by a server, it is no `error`: that is for connections which fail, and to libraries it hides the code.
    this.#close = { code, reason };
    this.#connection.close();
  }

  /** The connection has ended: for a reason of ours, or for the proxy's. @param {import("./wsproxy.js").Close} close */
  #closed(close) {
    clearTimeout(this.#lingering);
    this.readyState = closed;
    const { code, reason } = this.#close ?? close;
    this.#dispatch(closeEvent(code, reason), this.onclose);
  }

  /**
   * @template {Event} E
   * @param {E} event
   * @param {((event: E) => unknown) | null} handler
   */
  #dispatch(event, handler) {
    this.dispatchEvent(event);
    handler?.call(this, event);
  }
}

/**
 * Some runtimes have no `CloseEvent`.
 * @param {number} code
 * @param {string} reason
 * @returns {CloseEvent}
 */
function closeEvent(code, reason) {
  const fields = { code, reason, wasClean: code !== 1006 };
  if (typeof CloseEvent === "function") return new CloseEvent("close", fields);
  return /** @type {CloseEvent} */ (Object.assign(new Event("close"), fields));
}
