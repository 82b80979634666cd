/**
 * A client that talks both ways and comes back: prints what arrives, sends what it is given, and reconnects with
 * exponential backoff and full jitter, as the table of closes in docs/reference.md advises.
 *
 *     deno task client <url> <token, or the http URL of a token service>
 *
 * `Client` uses nothing but `WebSocket` and runs unchanged in a browser.
 */

/** What a client is made of. */
export interface ClientOptions {
  /** Of the WebSocket, without a token. */
  readonly url: string;
  /** Asked before each connect. */
  readonly token: () => Promise<string>;
  /** Whether asking again gives a new token: without one there is no use in coming back after a 4401. */
  readonly renewable: boolean;
  /** Takes each message: the JSON that it is, or else its text. */
  readonly onMessage: (message: unknown) => void;
  /** Past-tense sentences about the connection, for people. */
  readonly onEvent: (event: string) => void;
}

/** After these nothing is better the next time, or a backend wants the client to stay away. */
const finalCodes = new Set([1002, 1003, 1007, 1009, 4403, 4409]);
const firstDelayMs = 250;
const longestDelayMs = 30_000;
/** A connection that held this long was a good one: the next break starts from the shortest delay again. */
const stableMs = 10_000;

/** A connection that comes back. */
export class Client {
  readonly #options: ClientOptions;
  /** What could not be sent yet. */
  readonly #waiting: string[] = [];
  #socket: WebSocket | undefined;

  /** Does not connect yet: {@linkcode Client.run} does. */
  constructor(options: ClientOptions) {
    this.#options = options;
  }

  /** Sends one message, now or after the next connect. One that was sent as the connection broke may be lost. */
  send(message: unknown): void {
    const text = JSON.stringify(message);
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(text);
    else this.#waiting.push(text);
  }

  /** Stays connected until it is told to stop; resolves with the reason. */
  async run(): Promise<string> {
    for (let failures = 0;; failures++) {
      const { code, reason, openMs } = await this.#connectOnce();
      const why = `${code} ${reason}`.trim();
      if (finalCodes.has(code)) return why;
      if (code === 4401 && !this.#options.renewable) return why;
      if (openMs >= stableMs) failures = 0;
      const delayMs = Math.random() * Math.min(longestDelayMs, firstDelayMs * 2 ** failures);
      this.#options.onEvent(`disconnected (${why}), connecting again in ${Math.ceil(delayMs)} ms`);
      await new Promise((resolve) => setTimeout(resolve, delayMs));
    }
  }

  /** One connection, from connect to close. Code 1006 stands for every end without a close frame. */
  async #connectOnce(): Promise<{ code: number; reason: string; openMs: number }> {
    let token: string;
    try {
      token = await this.#options.token();
    } catch (error) {
      return { code: 1006, reason: `no token: ${error instanceof Error ? error.message : error}`, openMs: 0 };
    }
    const { promise, resolve } = Promise.withResolvers<{ code: number; reason: string; openMs: number }>();
    // A browser cannot set headers, so the token travels as a subprotocol, right after "bearer".
    const socket = this.#socket = new WebSocket(this.#options.url, ["bearer", token]);
    let openedAt = Infinity;
    let problem = "";
    socket.onopen = () => {
      openedAt = performance.now();
      this.#options.onEvent("connected");
      for (const text of this.#waiting.splice(0)) socket.send(text);
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    // Browsers keep the reason of a refusal to themselves; Deno has it here.
    socket.onerror = (event) => problem = "message" in event ? String(event.message) : "";
    socket.onclose = ({ code, reason }) =>
      resolve({ code, reason: reason || problem, openMs: Math.max(0, performance.now() - openedAt) });
    return await promise;
  }

  #receive(data: string): void {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      message = data; // backends may publish any text
    }
    if (message?.type === "control" && message.command === "gap") {
      this.#options.onEvent("gap: messages around this point may have been lost, ask the backend what was missed");
    } else this.#options.onMessage(message);
  }
}

/** A line as a message: the JSON that it is, or else a string. */
function toMessage(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return line;
  }
}

/** A token from a service that answers a POST with `{"token": "…"}`, as backend.py does. */
async function fetchToken(url: string): Promise<string> {
  const response = await fetch(url, { method: "POST" });
  if (!response.ok) throw new Error(`${url} answered ${response.status}`);
  return (await response.json()).token;
}

async function main(): Promise<void> {
  const [url, token] = Deno.args;
  if (!url || !token) {
    console.error("usage: deno task client <url> <token, or the http URL of a token service>");
    Deno.exit(1);
  }
  const renewable = /^https?:/.test(token);
  const client = new Client({
    url,
    token: () => renewable ? fetchToken(token) : Promise.resolve(token),
    renewable,
    onMessage: (message) => console.log(JSON.stringify(message)),
    onEvent: (event) => console.error(event),
  });
  readLines(Deno.stdin.readable, (line) => client.send(toMessage(line)));
  console.error(`stopped (${await client.run()})`);
  Deno.exit(1);
}

async function readLines(stream: ReadableStream<Uint8Array<ArrayBuffer>>, take: (line: string) => void) {
  let rest = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) if (line.trim() !== "") take(line);
  }
}

if (import.meta.main) await main();
