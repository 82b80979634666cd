// @ts-check
/**
 * A client of wsproxy for browsers, Deno, Bun and Node: it stays connected, resumes where it was, tells of gaps, and
 * keeps what it is to send until a backend has it.
 *
 * It offers the subprotocol `wsproxy.resume.v1`; where the proxy does not select it, messages are bare ones. It comes
 * back with full jitter, at once when the page is seen again or the network is back, and not at all after a close that
 * says so. Where WebSockets cannot pass it takes Server-Sent Events, and posts what is sent.
 *
 * At any time a connection has one socket, stream or wait, and one timer.
 *
 * @module
 */

const resumeProtocol = "wsproxy.resume.v1";
/** Closes after which coming back is of no use: malformed, binary, too large, forbidden, replaced. */
const finalCodes = new Set([1002, 1003, 1007, 1009, 4403, 4409]);
/** Refusals that another token may change, or a balancer that has its routes again; in a row they are final. */
const isRefusal = (/** @type {number} */ code) => code >= 4400 && code < 4429;
const maxRefusals = 2;
const firstDelayMs = 500;
const maxDelayMs = 30_000;
/** A connection that stayed open for so long has lived: the next one is as good as the first. */
const livedMs = 10_000;
/** Time for an answer to `!ping`. */
const pongMs = 5000;
/** Time between two questions for a token that is to replace the one which runs out. */
const renewalMs = 5000;
/** WebSockets in a row that never opened, after which Server-Sent Events are tried. */
const failuresBeforeSse = 3;
/** How often a stream has a comment, where it does not say so. */
const streamCommentsMs = 30_000;
const defaultTimeoutMs = 10_000;
const defaultSilenceMs = 60_000;
const defaultMaxPending = 100;
/** The longest that a timer waits; a longer one would fire at once. */
const maxTimerMs = 2 ** 31 - 1;
/** The complaint of a proxy that is too old for `!ping` and `!send`. */
const unknownCommand = "Unknown command";

/** A page, where there is one. */
const { document: page } = /** @type {{ document?: EventTarget & { visibilityState: string } }} */ (globalThis);

/**
 * What a connection needs of a WebSocket: that of the platform, of npm ws, or any other of this shape.
 * @typedef {object} Socket
 * @property {string} protocol
 * @property {number} readyState
 * @property {(data: string) => void} send
 * @property {(code?: number, reason?: string) => void} close
 * @property {((event: never) => unknown) | null} onopen
 * @property {((event: never) => unknown) | null} onmessage
 * @property {((event: never) => unknown) | null} onerror
 * @property {((event: never) => unknown) | null} onclose
 */

/** @typedef {new (url: string | URL, protocols?: string[]) => Socket} SocketConstructor */

/**
 * Why a connection ended: a close code, and a text for people.
 * @typedef {{ code: number, reason: string }} Close
 */

/**
 * Who has a message that was submitted.
 * @typedef {object} Receipt
 * @property {string} id of the message
 * @property {number} receivers backends that were subscribed
 * @property {boolean} entered whether it is in the agent's inbox
 */

/**
 * Why a message was not sent: `unheard` (no backend was there, and no inbox took it), `unconfirmed` (it may have
 * arrived), `refused` (over a limit, or Redis did not take it), `invalid` (not JSON, too large), `full` (too many wait),
 * `closed` (the connection ended for good).
 * @typedef {"unheard" | "unconfirmed" | "refused" | "invalid" | "full" | "closed"} UnsentReason
 */

/**
 * How a connection is made, and what it calls. A callback that throws is told of by `onError`; the connection goes on.
 * @typedef {object} Options
 * @property {string | URL} url of the session: `wss://host/{agent_id}/ws/{session_id}`
 * @property {() => string | Promise<string>} token a token that is valid now; called before each connect and before its end
 * @property {(text: string, position: string | undefined) => unknown} onMessage a message, with its position if it was
 * logged. {@linkcode Connection.close} called in it leaves the position in front of this message
 * @property {((position: string) => unknown) | undefined} [onPosition] the position to go on from has changed: store it
 * @property {((reason: "trimmed" | "lost") => unknown) | undefined} [onGap] messages are missing for good: reload the
 * state. The position is already the one to go on from
 * @property {((position: string | undefined) => unknown) | undefined} [onLive] all that was missed has come
 * @property {((state: "connecting" | "open" | "closed", close?: Close) => unknown) | undefined} [onState] each attempt that
 * fails and each connection that ends is `connecting`, with the reason; `closed` is for good
 * @property {((messages: number) => unknown) | undefined} [onUnheard] so many of what `send` sent reached no backend
 * @property {((error: unknown) => unknown) | undefined} [onError] the proxy's in-band complaints, and what went wrong
 * here; the console unless given
 * @property {string | undefined} [position] the last one handled before, or "0" for the log's beginning, the default
 * @property {boolean | undefined} [historyLoaded] `position` is that of a history just loaded: a log that has expired
 * since is no gap. False by default
 * @property {boolean | undefined} [sse] whether Server-Sent Events may be tried; true by default
 * @property {number | undefined} [timeoutMs] for a token, and for a connection to open; 10,000 by default
 * @property {number | undefined} [silenceMs] after which the connection is tried with a `!ping`; 60,000 by default
 * @property {number | undefined} [maxPending] submitted messages that may wait; 100 by default
 * @property {SocketConstructor | undefined} [WebSocket] for a runtime without one of its own
 * @property {typeof fetch | undefined} [fetch] what Server-Sent Events and posts go through
 */

/** A submitted message that no backend is known to have. */
export class UnsentError extends Error {
  /** @override */
  name = "UnsentError";

  /** @param {UnsentReason} reason @param {string} id of the message @param {string} [detail] */
  constructor(reason, id, detail) {
    super(`message not sent: ${reason}${detail ? `: ${detail}` : ""}`);
    /** @readonly */
    this.reason = reason;
    /** @readonly */
    this.id = id;
  }
}

/**
 * @typedef {object} Pending
 * @property {string} text
 * @property {boolean} named the backend is to see the id, and so to know a message that comes twice
 * @property {(receipt: Receipt) => void} resolve
 * @property {(error: UnsentError) => void} reject
 */

/**
 * The fields of all that the proxy says; each notice has some of them.
 * @typedef {{ id?: string, position?: string, reason: never, messages: number, receivers: number, entered: boolean,
 *   error?: string }} Told
 */

/**
 * What carries a connection: a WebSocket or a stream. It tells its owner of each event until it is stopped, and of its
 * end once.
 * @typedef {object} Carrier
 * @property {boolean} resumes the other end speaks `wsproxy.resume.v1`, and so answers `!ping` and `!send`
 * @property {(text: string) => boolean} send false when it cannot be sent now
 * @property {() => void} stop
 */

/** A session's connection, kept until it is closed. */
export class Connection {
  /** The position to go on from: store it to resume after a reload. @type {string} */
  position;
  /** @type {Options} */
  #options;
  /** @type {"waiting" | "connecting" | "open" | "closed"} */
  #state = "waiting";
  /** What is being connected or is open; an earlier one is heard no more. @type {Carrier | undefined} */
  #carrier;
  /** Counts what was begun: an attempt that was overtaken does nothing more. */
  #attempt = 0;
  /** Connections in a row that did not live. */
  #failures = 0;
  /** Refusals in a row. */
  #refusals = 0;
  /** WebSockets in a row that never opened. */
  #unopened = 0;
  /** Server-Sent Events are the way now. */
  #sse = false;
  /** How often a stream has something to say. */
  #commentsMs = streamCommentsMs;
  #historyLoaded;
  #openedAtMs = 0;
  #heardAtMs = 0;
  /** When the other end was asked by a `!ping` that it has not answered. @type {number | undefined} */
  #askedAtMs;
  /** Counts them: the answer to an earlier one may have been under way. */
  #pings = 0;
  /** The proxy knows neither `!ping` nor `!send`. */
  #isOldProxy = false;
  #token = "";
  /** When the next token is asked for, while the present one runs out. */
  #renewAtMs = Infinity;
  #renewedAtMs = -Infinity;
  /** Submitted messages, by id, in order. @type {Map<string, Pending>} */
  #pending = new Map();
  /** The post that is under way, and when it is given up. @type {{ abort: AbortController, dueMs: number } | undefined} */
  #posting;
  #postAtMs = 0;
  #postFailures = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** Ends what is listened to, when the connection ends for good. */
  #closing = new AbortController();

  /** Connects, after the caller has got it. @param {Options} options @throws {TypeError} for what is no url */
  constructor(options) {
    new URL(options.url);
    this.#options = options;
    this.position = options.position ?? "0";
    this.#historyLoaded = options.historyLoaded ?? false;
    const { signal } = this.#closing;
    globalThis.addEventListener?.("online", this.#wake, { signal });
    globalThis.addEventListener?.("pageshow", this.#wake, { signal });
    page?.addEventListener("visibilitychange", this.#wake, { signal });
    page?.addEventListener("resume", this.#wake, { signal });
    queueMicrotask(() => {
      if (this.#state !== "waiting") return;
      this.#call(this.#options.onState, "connecting", undefined);
      if (this.#state === "waiting") this.#connect();
    });
  }

  /** Messages can be sent now. */
  get open() {
    return this.#state === "open";
  }

  /** The connection has ended for good. */
  get closed() {
    return this.#state === "closed";
  }

  /** Submitted messages that have no answer yet. */
  get pending() {
    return this.#pending.size;
  }

  /**
   * Sends a message that need not arrive; false when it cannot be sent now.
   * @param {string} text
   * @returns {boolean}
   */
  send(text) {
    if (this.#state !== "open" || this.#carrier === undefined) return false;
    // A frame that begins so is a command.
    if (!this.#sse && !(this.#carrier.resumes && text.startsWith("!"))) {
      return this.#carrier.send(text);
    }
    return this.#keep(createId(), {
      text,
      named: false,
      resolve() {},
      reject: (error) => (error.reason === "unheard" ? this.#call(this.#options.onUnheard, 1) : this.#tellError(error)),
    });
  }

  /**
   * Submits a message that must arrive: it is kept, sent when the connection is open, and sent again after a reconnect,
   * until a backend has it. A backend may see it twice, and knows by the id.
   * @param {string} text
   * @param {{ id?: string | undefined }} [options] `id`: 1 to 64 characters of `[A-Za-z0-9_-]`; a UUID unless given
   * @returns {Promise<Receipt>} who has it; rejects with an {@linkcode UnsentError}
   */
  submit(text, { id = createId() } = {}) {
    return new Promise((resolve, reject) => {
      const unsent = (/** @type {UnsentReason} */ reason, detail = "") => reject(new UnsentError(reason, id, detail));
      if (this.#state === "closed") return unsent("closed");
      if (!/^[\w-]{1,64}$/.test(id)) {
        return unsent("invalid", "an id is 1 to 64 characters of [A-Za-z0-9_-]");
      }
      if (this.#pending.has(id)) {
        return unsent("invalid", "a message of this id waits");
      }
      if (!this.#keep(id, { text, named: true, resolve, reject })) {
        unsent("full");
      }
    });
  }

  /** Leaves for good: nothing is delivered afterwards, and what has no answer is rejected. */
  close() {
    this.#end({ code: 1000, reason: "" });
  }

  /** The page is seen again, or the network is back: a wait is over, and an open socket may be dead. */
  #wake = () => {
    this.#watch(true);
    if (this.#state !== "waiting" || page?.visibilityState === "hidden") return;
    // What failed while there was no network says nothing about the proxy.
    this.#failures = 0;
    this.#connect();
  };

  async #connect() {
    const attempt = ++this.#attempt;
    this.#state = "connecting";
    try {
      this.#giveUpAfter("no token");
      this.#token = await this.#options.token();
      if (attempt !== this.#attempt) return;
      this.#giveUpAfter("not open");
      if (this.#sse) this.#listen();
      else this.#dial();
    } catch (error) {
      // No token, or a token that no WebSocket can carry.
      if (attempt !== this.#attempt) return;
      this.#tellError(error);
      if (attempt === this.#attempt) {
        this.#lose({ code: 1006, reason: "could not connect" });
      }
    }
  }

  /** @param {string} what has not come */
  #giveUpAfter(what) {
    this.#arm(this.#timeoutMs, () =>
      this.#lose({
        code: 1006,
        reason: `${what} within ${this.#timeoutMs} ms`,
      }));
  }

  get #timeoutMs() {
    return this.#options.timeoutMs ?? defaultTimeoutMs;
  }

  /** A WebSocket, or a stream where this runtime has none. */
  #dial() {
    const Socket = this.#options.WebSocket ?? /** @type {SocketConstructor | undefined} */ (globalThis.WebSocket);
    if (Socket === undefined) {
      const reason = "this runtime has no WebSocket: give one as the option WebSocket";
      this.#tellError(new Error(reason));
      this.#sse = this.#options.sse !== false;
      if (this.#state === "connecting") {
        this.#sse ? this.#listen() : this.#end({ code: 1006, reason });
      }
      return;
    }
    const url = this.#withPosition(new URL(this.#options.url));
    url.protocol = url.protocol.replace(/^http/, "ws");
    url.searchParams.set("refusal", "close");
    const socket = new Socket(url, [resumeProtocol, "bearer", this.#token]);
    /** @type {Carrier} */
    const carrier = (this.#carrier = {
      resumes: false,
      send(text) {
        // One that is closing takes nothing, and says nothing.
        if (socket.readyState !== 1) return false;
        socket.send(text);
        return true;
      },
      stop() {
        socket.onopen = socket.onmessage = socket.onclose = null;
        // An error without a listener would end a Node process.
        socket.onerror = () => {};
        socket.close();
      },
    });
    const current = () => this.#carrier === carrier;
    socket.onopen = () => {
      if (!current()) return;
      carrier.resumes = socket.protocol === resumeProtocol;
      // A refusal opens, too, and has no frame but its close: whatever answers this is none.
      if (carrier.resumes) return void carrier.send("!ping\n");
      this.#opened();
      this.#call(this.#options.onLive, undefined);
    };
    socket.onmessage = (/** @type {{ data: unknown }} */ { data }) => {
      if (!current() || typeof data !== "string") return;
      this.#heard();
      if (!carrier.resumes) return this.#deliver(data, undefined);
      if (this.#state !== "open") this.#opened();
      if (current()) this.#receive(data);
    };
    // Node 22 tells of no close when a connection fails.
    socket.onerror = (/** @type {Event & { message?: string }} */ event) => {
      event.preventDefault?.();
      if (current()) this.#lose({ code: 1006, reason: event.message ?? "" });
    };
    socket.onclose = (/** @type {Close} */ { code, reason }) => {
      if (current()) this.#lose({ code, reason });
    };
  }

  /** Server-Sent Events, read by `fetch`, which can send a token. What is sent is posted. */
  #listen() {
    const abort = new AbortController();
    /** @type {Carrier} */
    const carrier = (this.#carrier = {
      resumes: false,
      send: () => false,
      stop: () => abort.abort(),
    });
    const current = () => this.#carrier === carrier;
    this.#read(current, abort.signal).then(
      (close) => current() && this.#lose(close),
      (error) => current() && this.#lose({ code: 1006, reason: String(error) }),
    );
  }

  /**
   * Reads a stream to its end, and says why it ended.
   * @param {() => boolean} current
   * @param {AbortSignal} signal
   * @returns {Promise<Close>}
   */
  async #read(current, signal) {
    const headers = {
      Authorization: `Bearer ${this.#token}`,
      Accept: "text/event-stream",
    };
    const response = await this.#fetch(this.#withPosition(this.#httpUrl()), {
      headers,
      signal,
    });
    if (!response.ok || !response.body) return await refusalOf(response);
    const type = response.headers.get("content-type") ?? "";
    if (!/^text\/event-stream\b/.test(type)) {
      return { code: 1006, reason: `a stream of events is not "${type}"` };
    }
    let text = "";
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();;) {
      const { done, value } = await reader.read();
      if (done || !current()) return { code: 1006, reason: "the stream ended" };
      this.#heard();
      if (this.#state !== "open") this.#opened();
      const events = (text + value).split("\n\n");
      text = events.pop() ?? "";
      for (const event of events) {
        const { comment, name, id, data } = parseEvent(event);
        if (comment !== undefined) this.#learnPace(comment);
        if (name === "close") return JSON.parse(data);
        if (name === "message") this.#deliver(data, id);
        else if (name !== undefined) this.#notice(name, data);
        if (!current()) return { code: 1006, reason: "" };
      }
    }
  }

  /** The first comment of a stream says how often they come. @param {string} comment */
  #learnPace(comment) {
    const [, secs] = /\bevery (\d+) s\b/.exec(comment) ?? [];
    if (secs === undefined) return;
    this.#commentsMs = Number(secs) * 1000;
    this.#watch();
  }

  /** @param {string} frame */
  #receive(frame) {
    const end = frame.indexOf("\n");
    const [head, body] = end < 0 ? [frame, ""] : [frame.slice(0, end), frame.slice(end + 1)];
    if (head.startsWith("!")) this.#notice(head.slice(1), body);
    else this.#deliver(body, head || undefined);
  }

  /** @param {string} text @param {string | undefined} position */
  #deliver(text, position) {
    this.#call(this.#options.onMessage, text, position);
    if (position !== undefined && this.#state === "open") {
      this.#moveTo(position);
    }
  }

  /** @param {string} position */
  #moveTo(position) {
    // From here on the log itself says whether something is missing.
    this.#historyLoaded = false;
    if (position === this.position) return;
    this.position = position;
    this.#call(this.#options.onPosition, position);
  }

  /** What the proxy itself says; a word that is not known is a later proxy's. @param {string} name @param {string} body */
  #notice(name, body) {
    const { onLive, onGap, onUnheard } = this.#options;
    if (name === "live") {
      this.#moveTo(body);
      return this.#call(onLive, body);
    }
    if (name === "pong") {
      if (body === String(this.#pings)) this.#askedAtMs = undefined;
      return;
    }
    /** @type {Told} */
    let told;
    try {
      told = JSON.parse(body || "{}");
    } catch (error) {
      return this.#tellError(error);
    }
    const { id = "" } = told;
    switch (name) {
      case "gap":
        // Before it is told: a page that is loaded again for it does not meet the same gap.
        if (told.position !== undefined) this.#moveTo(told.position);
        return this.#call(onGap, told.reason);
      case "unheard":
        return this.#call(onUnheard, told.messages);
      case "expiring":
        // A stream cannot be given another token, and comes back when it has ended.
        if (!this.#carrier?.resumes) return;
        this.#renewAtMs = this.#renewedAtMs + renewalMs;
        return this.#watch();
      case "sent":
        return this.#take(id)?.resolve({ id, receivers: told.receivers, entered: told.entered });
      case "unsent":
        return this.#take(id)?.reject(new UnsentError(told.reason, id));
      case "error":
        if (told.error !== unknownCommand) return this.#tellError(told);
        this.#isOldProxy = true;
        this.#askedAtMs = undefined;
        return this.#watch();
    }
  }

  /** Asks for the next token, and gives it to the proxy. The same one again would run out at the same time. */
  async #renew() {
    const carrier = this.#carrier;
    this.#renewAtMs = Infinity;
    this.#renewedAtMs = performance.now();
    try {
      const token = await this.#options.token();
      if (carrier === this.#carrier && token !== this.#token && carrier?.send(`!token\n${token}`)) this.#token = token;
    } catch (error) {
      if (carrier === this.#carrier) this.#tellError(error);
    }
  }

  /** Keeps a message until it has its answer; false when too many wait. @param {string} id @param {Pending} pending */
  #keep(id, pending) {
    if (this.#pending.size >= (this.#options.maxPending ?? defaultMaxPending)) {
      return false;
    }
    this.#pending.set(id, pending);
    if (this.#state === "open") this.#transmit(id, pending.text);
    this.#watch();
    return true;
  }

  /** @param {string} id @param {string} text */
  #transmit(id, text) {
    if (!this.#posts) this.#carrier?.send(`!send\n${id}\n${text}`);
  }

  /** A message that has its answer waits no more. @param {string} id */
  #take(id) {
    const pending = this.#pending.get(id);
    this.#pending.delete(id);
    return pending;
  }

  /** Messages are posted: what carries the connection has no answers to them. */
  get #posts() {
    return !this.#carrier?.resumes || this.#isOldProxy;
  }

  /** Posts what waits, one after the other; what fails is tried again when the connection is looked at. */
  async #postPending() {
    for (let [first] = this.#pending; first !== undefined && this.#posts; [first] = this.#pending) {
      const [id, { text, named }] = first;
      const abort = new AbortController();
      const posting = this.#posting = { abort, dueMs: performance.now() + this.#timeoutMs };
      const answer = await this.#post(id, text, named, abort.signal).catch((error) => ({ error, retryAfterSecs: 0 }));
      // It was given up, or the connection has ended.
      if (posting !== this.#posting) return;
      if ("retryAfterSecs" in answer) return this.#postFailed(answer.error, answer.retryAfterSecs);
      this.#posting = undefined;
      this.#postFailures = 0;
      if (answer instanceof UnsentError) this.#take(id)?.reject(answer);
      else this.#take(id)?.resolve(answer);
    }
    this.#watch();
  }

  /** @param {unknown} error @param {number} [retryAfterSecs] */
  #postFailed(error, retryAfterSecs = 0) {
    this.#posting?.abort.abort();
    this.#posting = undefined;
    this.#postAtMs = performance.now() + delayMs(this.#postFailures++, retryAfterSecs);
    this.#tellError(error);
    this.#watch();
  }

  /**
   * @param {string} id
   * @param {string} text
   * @param {boolean} named
   * @param {AbortSignal} signal
   * @returns {Promise<Receipt | UnsentError | { error: Error, retryAfterSecs: number }>} a receipt, why there is none, or
   * when to try again
   */
  async #post(id, text, named, signal) {
    /** @type {Record<string, string>} */
    const headers = { Authorization: `Bearer ${this.#token}` };
    // A page of another origin may not send it to a proxy that is too old for it.
    if (named && !this.#isOldProxy) headers["Idempotency-Key"] = id;
    const response = await this.#fetch(this.#httpUrl(), {
      method: "POST",
      body: text,
      headers,
      signal,
    });
    const { status } = response;
    const body = await response.text();
    if (response.ok) {
      const { receivers, entered = false } = JSON.parse(body);
      return receivers > 0 || entered ? { id, receivers, entered } : new UnsentError("unheard", id);
    }
    const detail = `${status} ${body.trim()}`;
    if (status === 400 || status === 413) {
      return new UnsentError("invalid", id, detail);
    }
    // The token may have run out: then the connection ends too, and comes back with another one.
    const isFinal = status < 429 && ((status !== 401 && status !== 403) || this.#postFailures >= maxRefusals);
    if (isFinal) return new UnsentError("refused", id, detail);
    const retryAfterSecs = Number(response.headers.get("retry-after")) || 0;
    return { error: new Error(`not sent yet: ${detail}`), retryAfterSecs };
  }

  #httpUrl() {
    const url = new URL(this.#options.url);
    url.protocol = url.protocol.replace(/^ws/, "http");
    url.pathname = url.pathname.replace(/\/ws\/([^/]*)$/, "/sse/$1");
    return url;
  }

  /** @param {URL} url */
  #withPosition(url) {
    url.searchParams.set("resume", this.position);
    if (this.#historyLoaded) url.searchParams.set("from", "history");
    return url;
  }

  /** @param {URL} url @param {RequestInit} init */
  #fetch(url, init) {
    return (this.#options.fetch ?? fetch)(url, init);
  }

  #opened() {
    this.#openedAtMs = performance.now();
    this.#heard();
    this.#askedAtMs = undefined;
    this.#refusals = 0;
    this.#unopened = 0;
    this.#isOldProxy = false;
    this.#renewAtMs = Infinity;
    this.#postAtMs = 0;
    this.#state = "open";
    this.#call(this.#options.onState, "open", undefined);
    if (this.#state !== "open") return;
    for (const [id, { text }] of this.#pending) this.#transmit(id, text);
    this.#watch();
  }

  #heard() {
    this.#heardAtMs = performance.now();
  }

  /**
   * Does what an open connection has to do now, and sets the timer for what is next: looks for a sign of life, renews
   * the token, posts. A page sees nothing of a WebSocket's own pings: after too long a silence, or when there is
   * `doubt`, the proxy is asked for one. A stream cannot be asked, and in doubt a new one is begun.
   */
  #watch(doubt = false) {
    if (this.#state !== "open") return;
    const nowMs = performance.now();
    // What was under way when it was asked is no answer, and holds the answer up.
    let lifeDueMs = this.#askedAtMs === undefined
      ? this.#heardAtMs + this.#patienceMs
      : Math.max(this.#askedAtMs, this.#heardAtMs) + pongMs;
    if (doubt && this.#sse) lifeDueMs = Math.min(lifeDueMs, this.#heardAtMs + pongMs);
    const isDue = nowMs >= lifeDueMs;
    const { resumes = false } = this.#carrier ?? {};
    if (isDue && (!resumes || this.#askedAtMs !== undefined)) {
      return this.#lose({ code: 1006, reason: "no sign of life" }, true);
    }
    if (resumes && (isDue || doubt)) {
      this.#carrier?.send(`!ping\n${++this.#pings}`);
      if (this.#askedAtMs === undefined) lifeDueMs = nowMs + pongMs;
      this.#askedAtMs ??= nowMs;
    }
    if (nowMs >= this.#renewAtMs) {
      void this.#renew();
      if (this.#state !== "open") return;
    }
    if (this.#posts && this.#pending.size > 0 && !this.#posting && nowMs >= this.#postAtMs) void this.#postPending();
    if (this.#posting && nowMs >= this.#posting.dueMs) return this.#postFailed(new Error("no answer to a post"));
    const postDueMs = this.#posting?.dueMs ?? (this.#posts && this.#pending.size > 0 ? this.#postAtMs : Infinity);
    this.#arm(Math.min(lifeDueMs, this.#renewAtMs, postDueMs) - nowMs, () => this.#watch());
  }

  /** How long the connection may be silent. */
  get #patienceMs() {
    if (this.#sse) return this.#commentsMs + pongMs;
    // Nothing can be asked of a bare one.
    if (!this.#carrier?.resumes) return Infinity;
    return this.#pending.size > 0 ? pongMs : (this.#options.silenceMs ?? defaultSilenceMs);
  }

  /** What was connected, or being connected, is no more. @param {Close} close @param {boolean} [atOnce] */
  #lose(close, atOnce = false) {
    const wasOpen = this.#state === "open";
    const wasDialed = this.#carrier !== undefined;
    if (wasOpen && performance.now() - this.#openedAtMs >= livedMs) {
      this.#failures = 0;
    }
    this.#drop();
    if (!wasOpen && isRefusal(close.code)) this.#refusals++;
    if (finalCodes.has(close.code) || this.#refusals >= maxRefusals) {
      return this.#end(close);
    }
    if (this.#sse) {
      // WebSockets may pass again.
      this.#sse = false;
      this.#unopened = failuresBeforeSse - 1;
    } else if (wasDialed && !wasOpen && close.code === 1006) {
      this.#sse = ++this.#unopened >= failuresBeforeSse && this.#options.sse !== false;
    }
    const [, retryAfterSecs] = /^retry_after_secs=(\d+); /.exec(close.reason) ?? [];
    const waitMs = atOnce && this.#failures === 0 ? 0 : delayMs(this.#failures, Number(retryAfterSecs ?? 0));
    this.#failures++;
    this.#state = "waiting";
    this.#arm(waitMs, () => this.#connect());
    this.#call(this.#options.onState, "connecting", close);
  }

  /** Lets go of what carries the connection. Its end is not waited for. */
  #drop() {
    this.#attempt++;
    clearTimeout(this.#timer);
    this.#posting?.abort.abort();
    this.#posting = undefined;
    const carrier = this.#carrier;
    this.#carrier = undefined;
    carrier?.stop();
  }

  /** @param {Close} close */
  #end(close) {
    if (this.#state === "closed") return;
    this.#drop();
    this.#closing.abort();
    this.#state = "closed";
    this.#invoke(this.#options.onState, "closed", close);
    for (const [id, { reject }] of this.#pending) {
      reject(new UnsentError("closed", id, close.reason));
    }
    this.#pending.clear();
  }

  /** The one timer. @param {number} waitMs @param {() => void} action */
  #arm(waitMs, action) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(action, Math.max(0, Math.min(waitMs, maxTimerMs)));
  }

  /**
   * Calls a callback, unless the connection has ended.
   * @template {unknown[]} A
   * @param {((...args: A) => unknown) | undefined} callback
   * @param {A} args
   */
  #call(callback, ...args) {
    if (this.#state !== "closed") this.#invoke(callback, ...args);
  }

  /**
   * Calls a callback. What it throws, or rejects with, is told, and changes nothing else.
   * @template {unknown[]} A
   * @param {((...args: A) => unknown) | undefined} callback
   * @param {A} args
   */
  #invoke(callback, ...args) {
    try {
      const result = callback?.(...args);
      if (result instanceof Promise) result.catch((error) => this.#tellError(error));
    } catch (error) {
      this.#tellError(error);
    }
  }

  /** @param {unknown} error */
  #tellError(error) {
    try {
      if (this.#options.onError) this.#options.onError(error);
      else console.error("wsproxy:", error);
    } catch (another) {
      console.error("wsproxy: onError failed:", another);
    }
  }
}

/** Full jitter: all that a broken proxy had come back spread out. @param {number} failures @param {number} retryAfterSecs */
function delayMs(failures, retryAfterSecs) {
  const jitterMs = Math.random() * Math.min(maxDelayMs, firstDelayMs * 2 ** failures);
  return Math.min(maxDelayMs, 1000 * retryAfterSecs) + jitterMs;
}

/** A UUID, also in a page without https, which has no `randomUUID`. @internal */
export function createId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * What a refused stream would have been told as a close. A token that is refused with 403 may be replaced by another.
 * @param {Response} response
 * @returns {Promise<Close>}
 */
async function refusalOf(response) {
  const reason = (await response.text()).trim();
  const secs = response.headers.get("retry-after") ?? "";
  const code = response.status === 403 ? 4401 : 4000 + response.status;
  return {
    code,
    reason: /^\d+$/.test(secs) ? `retry_after_secs=${secs}; ${reason}` : reason,
  };
}

/**
 * An event's fields, or a comment. An event with data and without a name is a message (HTML Standard, section 9.2.6).
 * @param {string} event
 */
function parseEvent(event) {
  /** @type {{ comment?: string, name?: string, id?: string, data?: string }} */
  const parsed = {};
  for (const line of event.split("\n")) {
    const colon = line.indexOf(":");
    const value = line.slice(colon + 1).replace(/^ /, "");
    switch (line.slice(0, colon)) {
      case "":
        parsed.comment ??= value;
        break;
      case "event":
        parsed.name = value;
        break;
      case "id":
        parsed.id = value;
        break;
      case "data":
        parsed.data = parsed.data === undefined ? value : `${parsed.data}\n${value}`;
    }
  }
  const { comment, name = "message", id, data } = parsed;
  return { comment, name: data === undefined ? undefined : name, id, data: data ?? "" };
}
