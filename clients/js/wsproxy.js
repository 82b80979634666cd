// @ts-check
/**
 * A client of wsproxy for browsers, Deno and Node: it stays connected, resumes where it was, and tells of gaps.
 *
 * It offers the subprotocol `wsproxy.resume.v1`; where the proxy does not select it, messages are bare ones. It comes
 * back with full jitter, at once when the page is seen again or the network is back, and not at all after a close that
 * says so. Where WebSockets cannot pass it takes Server-Sent Events, and posts what is sent.
 *
 * @module
 */

const resumeProtocol = "wsproxy.resume.v1";
/** Closes after which coming back is of no use: malformed, binary, too large, forbidden, replaced. */
const finalCodes = new Set([1002, 1003, 1007, 1009, 4403, 4409]);
const tokenExpired = 4401;
const firstDelayMs = 500;
const maxDelayMs = 30_000;
/** WebSockets in a row that never opened, after which Server-Sent Events are tried. */
const failuresBeforeSse = 3;

/** A page, where there is one. */
const { document: page } = /** @type {{ document?: EventTarget & { visibilityState: string } }} */ (globalThis);

/**
 * @typedef {object} Options
 * @property {string | URL} url of the session: `wss://host/{agent_id}/ws/{session_id}`
 * @property {() => string | Promise<string>} token a token that is valid now; asked for at each connect and before its end
 * @property {(text: string, position: string | undefined) => void} onMessage a message, with its position if it was logged
 * @property {(reason: string) => void} [onGap] messages are missing for good: reload the state
 * @property {(position: string | undefined) => void} [onLive] all that was missed has come; store the position
 * @property {(state: "connecting" | "open" | "closed", close?: { code: number, reason: string }) => void} [onState] `closed` is for good
 * @property {(messages: number) => void} [onUnheard] so many of what was sent reached no backend
 * @property {(error: unknown) => void} [onError] the proxy's in-band complaints, and what went wrong here
 * @property {string} [position] the last one handled before, or "0" for the log's beginning, which is the default
 * @property {boolean} [sse] whether Server-Sent Events may be tried; true by default
 * @property {typeof WebSocket} [WebSocket] for a Node without one of its own
 */

/** A session's connection, kept until it is closed. */
export class Connection {
  /** The last position handled: store it to resume after a reload. @type {string} */
  position;
  /** @type {Options} */
  #options;
  /** @type {WebSocket | undefined} */
  #socket;
  /** @type {AbortController | undefined} */
  #stream;
  #open = false;
  #closed = false;
  #attempts = 0;
  #neverOpened = 0;
  #sse = false;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  /** Back at once: the page is seen again, or the network is there again. */
  #wake = () => {
    if (this.#timer === undefined || page?.visibilityState === "hidden") return;
    this.#attempts = 0;
    clearTimeout(this.#timer);
    this.#connect();
  };

  /** Connects. @param {Options} options */
  constructor(options) {
    this.#options = options;
    this.position = options.position ?? "0";
    globalThis.addEventListener?.("online", this.#wake);
    page?.addEventListener("visibilitychange", this.#wake);
    this.#connect();
  }

  /** Messages can be sent now. */
  get open() {
    return this.#open;
  }

  /** Sends a message; false when it cannot be sent now. Keep what must not be lost until a backend has answered it. @param {string} text */
  send(text) {
    if (!this.#open) return false;
    if (this.#socket) this.#socket.send(text);
    else void this.#post(text);
    return true;
  }

  /** Leaves for good. */
  close() {
    this.#end(1000, "");
  }

  async #connect() {
    this.#timer = undefined;
    this.#options.onState?.("connecting");
    let token;
    try {
      token = await this.#options.token();
    } catch (error) {
      this.#options.onError?.(error);
      return this.#later();
    }
    if (this.#closed) return;
    if (this.#sse) await this.#listen(token);
    else this.#dial(token);
  }

  /** @param {string} token */
  #dial(token) {
    const url = new URL(this.#options.url);
    url.searchParams.set("resume", this.position);
    const Socket = this.#options.WebSocket ?? WebSocket;
    const socket = this.#socket = new Socket(url, [resumeProtocol, "bearer", token]);
    let opened = false;
    socket.onopen = () => {
      opened = true;
      this.#neverOpened = 0;
      this.#opened();
      if (socket.protocol !== resumeProtocol) this.#options.onLive?.(undefined);
    };
    socket.onmessage = ({ data }) => {
      if (socket.protocol === resumeProtocol) this.#receive(data);
      else this.#options.onMessage(data, undefined);
    };
    // A close follows.
    socket.onerror = (event) => event.preventDefault?.();
    socket.onclose = ({ code, reason }) => {
      if (this.#socket !== socket) return;
      this.#socket = undefined;
      if (!opened && ++this.#neverOpened >= failuresBeforeSse && this.#options.sse !== false) this.#sse = true;
      this.#lost(code, reason);
    };
  }

  /** @param {string} frame */
  #receive(frame) {
    const end = frame.indexOf("\n");
    const [head, body] = [frame.slice(0, end), frame.slice(end + 1)];
    if (head.startsWith("!")) return this.#notice(head.slice(1), body);
    this.#options.onMessage(body, head || undefined);
    if (head) this.position = head;
  }

  /** @param {string} name @param {string} body */
  #notice(name, body) {
    switch (name) {
      case "live":
        this.position = body;
        return this.#options.onLive?.(body);
      case "gap":
        return this.#options.onGap?.(JSON.parse(body).reason);
      case "unheard":
        return this.#options.onUnheard?.(JSON.parse(body).messages);
      case "expiring":
        return void this.#renew();
      case "error":
        return this.#options.onError?.(JSON.parse(body));
    }
  }

  /** The token runs out: a stream cannot be given a new one, and comes back when it has ended. */
  async #renew() {
    const socket = this.#socket;
    try {
      const token = await this.#options.token();
      if (socket && socket === this.#socket && this.#open) socket.send(`!token\n${token}`);
    } catch (error) {
      this.#options.onError?.(error);
    }
  }

  /** Server-Sent Events, read by `fetch`, which can send a token. @param {string} token */
  async #listen(token) {
    const abort = this.#stream = new AbortController();
    let last = { code: 1006, reason: "" };
    try {
      const url = this.#httpUrl();
      url.searchParams.set("resume", this.position);
      const response = await fetch(url, { headers: { Authorization: `Bearer ${token}` }, signal: abort.signal });
      if (!response.ok || !response.body) throw new Error(`refused with ${response.status}`);
      this.#opened();
      let text = "";
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let read = await reader.read(); !read.done; read = await reader.read()) {
        text += read.value;
        const events = text.split("\n\n");
        text = events.pop() ?? "";
        for (const event of events) {
          const { name, id, data } = parseEvent(event);
          if (name === "close") last = JSON.parse(data);
          else if (name !== undefined) this.#notice(name, data);
          else if (data !== undefined) {
            this.#options.onMessage(data, id);
            if (id) this.position = id;
          }
        }
      }
    } catch (error) {
      if (!abort.signal.aborted) this.#options.onError?.(error);
    }
    if (this.#stream !== abort) return;
    this.#stream = undefined;
    // WebSockets may pass again.
    this.#sse = false;
    this.#neverOpened = failuresBeforeSse - 1;
    this.#lost(last.code, last.reason);
  }

  /** @param {string} text */
  async #post(text) {
    try {
      const headers = { Authorization: `Bearer ${await this.#options.token()}` };
      const response = await fetch(this.#httpUrl(), { method: "POST", body: text, headers });
      if (!response.ok) throw new Error(`not sent: ${response.status} ${(await response.text()).trim()}`);
      const { receivers, entered } = await response.json();
      if (receivers === 0 && !entered) this.#options.onUnheard?.(1);
    } catch (error) {
      this.#options.onError?.(error);
    }
  }

  #httpUrl() {
    const url = new URL(this.#options.url);
    url.protocol = url.protocol.replace(/^ws/, "http");
    url.pathname = url.pathname.replace(/\/ws\/([^/]*)$/, "/sse/$1");
    return url;
  }

  #opened() {
    this.#open = true;
    this.#attempts = 0;
    this.#options.onState?.("open");
  }

  /** @param {number} code @param {string} reason */
  #lost(code, reason) {
    this.#open = false;
    if (this.#closed) return;
    if (finalCodes.has(code)) return this.#end(code, reason);
    if (code === tokenExpired) this.#attempts = 0;
    this.#later();
  }

  /** Full jitter: all that a broken proxy had come back spread out. */
  #later() {
    if (this.#closed) return;
    const delayMs = Math.random() * Math.min(maxDelayMs, firstDelayMs * 2 ** this.#attempts++);
    this.#timer = setTimeout(() => this.#connect(), delayMs);
  }

  /** @param {number} code @param {string} reason */
  #end(code, reason) {
    if (this.#closed) return;
    this.#closed = true;
    this.#open = false;
    clearTimeout(this.#timer);
    globalThis.removeEventListener?.("online", this.#wake);
    page?.removeEventListener("visibilitychange", this.#wake);
    const socket = this.#socket;
    this.#socket = undefined;
    socket?.close();
    this.#stream?.abort();
    this.#options.onState?.("closed", { code, reason });
  }
}

/**
 * An event's name, id and data; all undefined for a comment.
 * @param {string} event
 */
function parseEvent(event) {
  /** @type {Record<string, string | undefined>} */
  const fields = {};
  for (const line of event.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon <= 0) continue;
    const [name, value] = [line.slice(0, colon), line.slice(colon + 2)];
    fields[name] = name === "data" && fields["data"] !== undefined ? `${fields["data"]}\n${value}` : value;
  }
  return { name: fields["event"], id: fields["id"], data: /** @type {string} */ (fields["data"]) };
}
