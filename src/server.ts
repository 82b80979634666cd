/**
 * Routes, the ladder of refusals, the set of sessions, and the drain. It knows no WebSocket engine: an engine hands
 * it each request as a {@linkcode Handshake} and gets an answer to write or a session to open.
 */

import { SubscribeTimeout, Unavailable } from "./bridge.ts";
import { Session, type SessionContext } from "./session.ts";
import { closes, Refusal } from "./status.ts";
import { bearerProtocol, findToken, protocolsOf, type Target, type Verify } from "./token.ts";

/** A request, as every engine can show it. */
export interface Handshake {
  readonly method: string;
  /** Path and query as sent, not decoded (RFC 9112, section 3.2.1). */
  readonly target: string;
  /** A header's value, `name` in lower case; several of one name joined by ", ". */
  header(name: string): string | undefined;
  /** The client has gone, as far as the engine can tell. */
  readonly gone: boolean;
}

/** A plain HTTP answer. */
export interface Answer {
  readonly status: number;
  readonly headers: Record<string, string>;
  readonly body: string;
}

/** A session to open with the engine's socket, and the subprotocol to select. */
export interface Admission {
  readonly session: Session;
  readonly protocol: string | undefined;
}

/** A health probe's share of the second that a health check may take. */
const probeTimeoutMs = 900;
/** Characters (code points) of an agent or session id. */
const maxIdChars = 128;
const jsonHeaders = { "Content-Type": "application/json" };

/** What a server is made of, besides what its sessions share. */
export interface ServerContext extends SessionContext {
  readonly verify: Verify;
}

export class Server {
  readonly #context: ServerContext;
  readonly #sessions = new Set<Session>();
  #draining = false;
  #emptied: (() => void) | undefined;
  #probe: Promise<void> | undefined;

  constructor(context: ServerContext) {
    this.#context = context;
  }

  /** Sessions, from the moment a request passed the ladder until nothing is left of it. */
  get sessions(): number {
    return this.#sessions.size;
  }

  /** Open WebSockets. */
  get connections(): number {
    let open = 0;
    for (const session of this.#sessions) if (session.isOpen) open++;
    return open;
  }

  /** Answers a request, or admits it: then the engine must open the session or abandon it. Never rejects. */
  async handle(request: Handshake): Promise<Answer | Admission> {
    try {
      return await this.#route(request);
    } catch (error) {
      if (error instanceof Refusal) return this.#refuse(error);
      this.#context.log.error({ err: error }, "request failed");
      return { status: 500, headers: { "Content-Type": "text/plain; charset=utf-8" }, body: "internal error\n" };
    }
  }

  /**
   * Admits nobody any more, closes every session with 1001, and resolves when they are gone, or `graceMs`
   * milliseconds have passed.
   */
  async drain(graceMs: number): Promise<void> {
    this.#draining = true;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#emptied = resolve;
    const timer = setTimeout(resolve, graceMs);
    for (const session of this.#sessions) session.end(closes.goingAway);
    if (this.#sessions.size > 0) await promise;
    clearTimeout(timer);
  }

  #route(request: Handshake): Answer | Promise<Answer | Admission> {
    const queryAt = request.target.indexOf("?");
    const path = queryAt < 0 ? request.target : request.target.slice(0, queryAt);
    const operator = operatorRoutes[path];
    const segments = operator ? undefined : /^\/([^/]*)\/ws\/([^/]*)$/.exec(path);
    if (operator === undefined && !segments) throw new Refusal("unknownPath");
    if (request.method !== "GET") throw new Refusal("notGet");
    if (operator !== undefined) return this[operator]();
    const query = queryAt < 0 ? undefined : request.target.slice(queryAt + 1);
    return this.#admit(request, segments![1]!, segments![2]!, query);
  }

  /** The ladder, in the order of the refusal table. */
  async #admit(request: Handshake, agent: string, session: string, query: string | undefined): Promise<Admission> {
    checkUpgrade(request);
    const target: Target = { agentId: decodeId(agent), sessionId: decodeId(session) };
    const { config, verify } = this.#context;
    const protocols = protocolsOf(request.header("sec-websocket-protocol"));
    const token = findToken(request.header("authorization"), protocols, config.ALLOW_QUERY_TOKEN ? query : undefined);
    if (token === undefined) throw new Refusal("noToken");
    const origin = request.header("origin");
    if (origin !== undefined && config.ALLOWED_ORIGINS && !config.ALLOWED_ORIGINS.has(origin)) {
      throw new Refusal("wrongOrigin");
    }
    const grant = await verify(token, target);
    this.#checkRoom();
    const admitted = new Session(target, grant, this.#context, (gone) => this.#forget(gone));
    this.#sessions.add(admitted);
    try {
      await admitted.attach();
    } catch (error) {
      if (error instanceof Unavailable) throw new Refusal("redisUnavailable");
      if (error instanceof SubscribeTimeout) throw new Refusal("subscribeTimeout");
      throw error;
    }
    if (this.#draining) {
      admitted.abandon();
      throw new Refusal("draining");
    }
    return { session: admitted, protocol: protocols.includes(bearerProtocol) ? bearerProtocol : undefined };
  }

  #checkRoom(): void {
    if (this.#draining) throw new Refusal("draining");
    const limit = this.#context.config.MAX_CONNECTIONS;
    if (limit > 0 && this.#sessions.size >= limit) throw new Refusal("tooManyConnections");
  }

  #forget(session: Session): void {
    this.#sessions.delete(session);
    if (this.#sessions.size === 0) this.#emptied?.();
  }

  #refuse(refusal: Refusal): Answer {
    const { log, metrics } = this.#context;
    const { status } = refusal.row;
    metrics.refused.inc({ status, reason: refusal.refusal });
    log.info({ status, reason: refusal.message }, "request refused");
    return { status, headers: refusal.headers(), body: `${refusal.message}\n` };
  }

  /** `GET /health`: whether messages flow through Redis now. */
  async health(): Promise<Answer> {
    // One probe serves all who ask at the same time: health checks must not become a load of their own.
    this.#probe ??= this.#context.bridge.probe(probeTimeoutMs).finally(() => this.#probe = undefined);
    try {
      await this.#probe;
      const body = { status: "healthy", redis: "connected", active_connections: this.connections };
      return { status: 200, headers: jsonHeaders, body: JSON.stringify(body) };
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      const body = { status: "unhealthy", redis: "disconnected", error: error.message };
      return { status: 503, headers: jsonHeaders, body: JSON.stringify(body) };
    }
  }

  /** `GET /ready`: whether new clients are welcome. */
  ready(): Answer {
    const [status, word] = this.#draining ? [503, "draining"] : [200, "ready"];
    return { status, headers: jsonHeaders, body: JSON.stringify({ status: word }) };
  }

  /** `GET /metrics`. */
  async metrics(): Promise<Answer> {
    const { registry } = this.#context.metrics;
    return { status: 200, headers: { "Content-Type": registry.contentType }, body: await registry.metrics() };
  }
}

const operatorRoutes: Readonly<Record<string, "health" | "ready" | "metrics" | undefined>> = {
  __proto__: null as never,
  "/health": "health",
  "/ready": "ready",
  "/metrics": "metrics",
};

/** RFC 6455, section 4.2.1: what makes a request a WebSocket's opening handshake. */
function checkUpgrade(request: Handshake): void {
  const hasToken = (name: string, token: string) =>
    request.header(name)?.toLowerCase().split(",").some((item) => item.trim() === token) ?? false;
  if (!hasToken("upgrade", "websocket") || !hasToken("connection", "upgrade")) throw new Refusal("notUpgrade");
  // Sixteen bytes in base64 are 22 characters and the padding.
  const key = request.header("sec-websocket-key");
  if (key === undefined || !/^[A-Za-z0-9+/]{22}==$/.test(key)) throw new Refusal("badHandshake");
  if (request.header("sec-websocket-version") !== "13") throw new Refusal("badVersion");
  const protocols = request.header("sec-websocket-protocol");
  if (protocols !== undefined && !/^[!#$%&'*+.^_`|~\w-]+([ \t]*,[ \t]*[!#$%&'*+.^_`|~\w-]+)*$/.test(protocols)) {
    throw new Refusal("badHandshake", "Sec-WebSocket-Protocol must be a list of tokens");
  }
}

/** Percent-decodes a path segment into an id (RFC 3986, section 2.1). */
function decodeId(segment: string): string {
  let id: string;
  try {
    id = decodeURIComponent(segment);
  } catch {
    throw new Refusal("badId");
  }
  const chars = id.length <= maxIdChars ? id.length : [...id].length;
  if (chars < 1 || chars > maxIdChars || /\p{Cc}/u.test(id)) throw new Refusal("badId");
  return id;
}
