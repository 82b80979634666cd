/**
 * Routes, the ladder of refusals, the set of sessions, and the drain. It knows no WebSocket engine: an engine hands
 * it each request as a {@linkcode Handshake} and gets an answer to write or a session to open.
 */

import { SubscribeTimeout, Unavailable } from "./bridge.ts";
import { Session, type SessionContext } from "./session.ts";
import { closes, Refusal } from "./status.ts";
import { RateLimit } from "./rate.ts";
import { bearerProtocol, findToken, protocolsOf, type Target, type Verify } from "./token.ts";

/** A request, as every engine can show it. */
export interface Handshake {
  /** The request's method, in capitals. */
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
  /** The HTTP status. */
  readonly status: number;
  /** The headers, without Content-Length. */
  readonly headers: Record<string, string>;
  /** The body, as text. */
  readonly body: string;
}

/** A session to open with the engine's socket, and the subprotocol to select. */
export interface Admission {
  /** Waits to be opened. */
  readonly session: Session;
  /** The subprotocol to select, if any. */
  readonly protocol: string | undefined;
}

/** A health probe's share of the second that a health check may take. */
const probeTimeoutMs = 900;
/** Characters (code points) of an agent or session id. */
const maxIdChars = 128;
/** A moment without a message either way, in which a session is closed without tearing an answer apart. */
const quietMomentMs = 1000;
/** Sessions are closed at most so many at a time, when that is fast enough: 200 a second. */
const closesPerStep = 10;
const closeStepMs = 50;
/** Sessions that an outage ends are closed within about a quarter of this. */
const outageSpreadMs = 10_000;
const jsonHeaders = { "Content-Type": "application/json" };

/** What a server is made of, besides what its sessions share. */
export interface ServerContext extends SessionContext {
  /** Verifies tokens. */
  readonly verify: Verify;
}

/** Decides who gets a session, and keeps the sessions. */
export class Server {
  readonly #context: ServerContext;
  readonly #sessions = new Set<Session>();
  readonly #connects: RateLimit | undefined;
  #draining = false;
  #emptied: (() => void) | undefined;
  #probe: Promise<void> | undefined;

  /** A server without sessions. */
  constructor(context: ServerContext) {
    this.#context = context;
    const { MAX_CONNECTS_PER_SEC } = context.config;
    if (MAX_CONNECTS_PER_SEC > 0) this.#connects = new RateLimit(MAX_CONNECTS_PER_SEC);
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
   * Admits nobody any more, closes sessions with 1001, and resolves when they are gone, or `graceMs` milliseconds have
   * passed. A session is closed in a quiet moment, or after half of the grace; many are not closed at once.
   */
  async drain(graceMs: number): Promise<void> {
    this.#draining = true;
    const emptied = Promise.withResolvers<void>();
    this.#emptied = emptied.resolve;
    const timer = setTimeout(emptied.resolve, graceMs);
    const startMs = performance.now();
    // The other half has room for closing all of them in turn, and for their answers.
    const patientMs = graceMs / 2;
    // One that has its 101 but is not open yet is waited for: it could not be told to leave.
    const quiet = (session: Session) =>
      session.isOpen && (session.quietMs >= quietMomentMs || performance.now() - startMs > patientMs);
    const spreading = this.#closeSpread((session) => session.end(closes.goingAway), quiet, graceMs);
    if (this.#sessions.size > 0) await emptied.promise;
    this.#emptied = undefined;
    clearTimeout(timer);
    spreading.stop();
  }

  /** Redis is gone for longer than the grace: sessions are closed with 1013, spread out, until it is back. */
  outage(): void {
    const { bridge } = this.#context;
    const spreading = this.#closeSpread(
      (session) => {
        if (bridge.available) spreading.stop();
        else session.forsake();
      },
      () => true,
      outageSpreadMs,
    );
  }

  /**
   * Ends every session that is `due`, not too many in the same instant, so that their clients do not come back as one:
   * at least so fast that all of them can be done within a quarter of `withinMs`.
   */
  #closeSpread(end: (session: Session) => void, due: (session: Session) => boolean, withinMs: number) {
    const steps = Math.max(1, withinMs / 4 / closeStepMs);
    const perStep = Math.max(closesPerStep, Math.ceil(this.#sessions.size / steps));
    const left = new Set(this.#sessions);
    let timer: ReturnType<typeof setTimeout> | undefined;
    const stop = () => {
      clearTimeout(timer);
      left.clear();
    };
    const step = () => {
      let room = perStep;
      for (const session of left) {
        if (room === 0) break;
        if (!session.isOver && !due(session)) continue;
        left.delete(session);
        if (session.isOver) continue;
        room--;
        end(session);
      }
      if (left.size > 0) timer = setTimeout(step, closeStepMs);
    };
    step();
    return { stop };
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
    if (admitted.isOver) throw new Refusal("redisUnavailable");
    if (request.gone) {
      admitted.abandon();
      throw new Refusal("clientGone");
    }
    return { session: admitted, protocol: protocols.includes(bearerProtocol) ? bearerProtocol : undefined };
  }

  #checkRoom(): void {
    if (this.#draining) throw new Refusal("draining");
    const limit = this.#context.config.MAX_CONNECTIONS;
    if (limit > 0 && this.#sessions.size >= limit) throw new Refusal("tooManyConnections");
    if (this.#connects && !this.#connects.take()) throw new Refusal("tooManyConnects");
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
    const { metrics } = this.#context;
    return { status: 200, headers: { "Content-Type": metrics.contentType }, body: await metrics.render() };
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
