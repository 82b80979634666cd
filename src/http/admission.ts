/** The ladder from a request to a session, in the order of the refusal table. */

import { isMessageId } from "../ids.ts";
import type { IpAddress } from "../ip.ts";
import type { Limits } from "../limits.ts";
import { type Client, hasSites, type Quota } from "../quotas.ts";
import { Rates } from "../rate_limit.ts";
import { SubscribeTimeout, Unavailable } from "../redis/errors.ts";
import { currently, Refusal, refusals } from "../replies.ts";
import type { Registry } from "../session/registry.ts";
import { dialects } from "../session/frames.ts";
import {
  type Grant,
  isJson,
  Session,
  type SessionContext,
  type SessionOptions,
  type Target,
} from "../session/session.ts";
import { type Request, type Respond, respondJson, type Stream, type Upgrade } from "./exchange.ts";
import { clientAddress } from "./client_address.ts";
import type { HandshakeSpan } from "./tracing.ts";
import { RefusedSockets } from "./refused_sockets.ts";
import { Turns } from "./turns.ts";
import { EventStream, streamHeaders } from "./sse.ts";
import {
  checkUpgrade,
  decodeId,
  findCookie,
  findToken,
  isFromHistory,
  isHandshake,
  protocolsOf,
  resumeFrom,
  resumeProtocol,
  selectProtocol,
} from "./handshake.ts";

/** What is admitted into, besides what sessions share. */
export interface AdmissionContext extends SessionContext {
  readonly registry: Registry;
  readonly limits: Limits;
  /** Undefined while no limit of a session or an address is set. */
  readonly quota: Quota | undefined;
}

/** A session's address in a request: the path's segments as sent, and what follows "?". */
export interface Address {
  readonly agent: string;
  readonly session: string;
  readonly query: URLSearchParams | undefined;
}

/** Decides which requests get a session. */
export class Admission {
  readonly #context: AdmissionContext;
  /** What is posted to each session; asked only while there is a limit. */
  readonly #posts: Rates;
  readonly #turns = new Turns();
  readonly #refused: RefusedSockets;
  /** A limit asks for clients' addresses. */
  readonly #countsSites: boolean;
  /** One for all sessions. */
  readonly #onGone = (session: Session): void => {
    this.#context.limits.release();
    this.#context.registry.delete(session);
  };

  constructor(context: AdmissionContext) {
    this.#context = context;
    this.#posts = new Rates(context.config.limits.maxMessagesPerSec, 1000);
    this.#countsSites = hasSites(context.config.limits);
    this.#refused = new RefusedSockets(context.deadlines, () => context.metrics.unopened.inc());
  }

  /**
   * A session that waits for its socket: the engine must open or abandon it.
   * @throws {Refusal} from the first rung that the request does not pass.
   */
  async upgrade(request: Request, address: Address, span?: HandshakeSpan): Promise<Upgrade> {
    checkUpgrade(request);
    const protocols = protocolsOf(request.header("sec-websocket-protocol"));
    const target = targetOf(address);
    const offersResume = protocols.includes(resumeProtocol);
    const planFor = (isResumable: boolean) => {
      const protocol = selectProtocol(protocols, isResumable);
      const resume = protocol === resumeProtocol ? resumeFrom(parameter(address, "resume")) : undefined;
      const isHistory = resume !== undefined && isFromHistory(parameter(address, "from"));
      return { protocol, resume, isHistory, dialect: dialects.socket[resume === undefined ? "bare" : "resuming"] };
    };
    const isResumable = offersResume ? this.#context.bridge.isResumable(target.sessionId) : false;
    const known = isResumable === undefined ? undefined : planFor(isResumable);
    span?.target(target);
    const grant = await this.#authorize(request, address, target, protocols);
    const { protocol, ...options } = known ?? planFor(await this.#whenResumable(target));
    const session = await this.#admit(request, target, grant, options, span);
    if (options.resume === undefined && offersResume) {
      this.#context.metrics.resumes.inc({ result: "bare" });
    }
    return { kind: "upgrade", owner: session, protocol };
  }

  /**
   * A socket that is closed at once, for a client that asks for that with `refusal=close` and offers the subprotocol:
   * a page can read a close, and no status. Undefined where the refusal is to be a status.
   */
  refuse(request: Request, address: Address, refusal: Refusal): Upgrade | undefined {
    if (parameter(address, "refusal") !== "close") return undefined;
    const { close } = refusal;
    if (close === undefined) return undefined;
    if (!protocolsOf(request.header("sec-websocket-protocol")).includes(resumeProtocol)) return undefined;
    const origin = request.header("origin");
    if (origin !== undefined && !this.#allows(origin)) return undefined;
    // On a socket a client could send without a bound, which takes a token of ours everywhere else.
    if ((refusal.row.isOfStranger && !request.isBounded) || request.gone) return undefined;
    const owner = this.#refused.take(close);
    return owner && { kind: "upgrade", owner, protocol: resumeProtocol };
  }

  /** Cuts what is left of sockets that were refused. */
  close(): void {
    this.#refused.close();
  }

  /**
   * A session over Server-Sent Events.
   * @throws {Refusal} as {@linkcode Admission.upgrade} does.
   */
  async stream(request: Request, address: Address, span?: HandshakeSpan): Promise<Stream> {
    if (isHandshake(request)) throw new Refusal("handshakeForStream");
    const { bridge, config } = this.#context;
    const lastEventId = request.header("last-event-id") || undefined;
    const position = lastEventId ?? parameter(address, "resume");
    const target = targetOf(address);
    const planFor = (isResumable: boolean) => {
      const resume = isResumable ? resumeFrom(position) : undefined;
      // A browser that comes back has a position of the log itself, and the same query.
      const isHistory = resume !== undefined && isFromHistory(parameter(address, "from")) && lastEventId === undefined;
      return { resume, isHistory, dialect: dialects.stream[resume === undefined ? "bare" : "resuming"] };
    };
    const isResumable = bridge.isResumable(target.sessionId);
    const known = isResumable === undefined ? undefined : planFor(isResumable);
    span?.target(target);
    const grant = await this.#authorize(request, address, target, []);
    const options = known ?? planFor(await this.#whenResumable(target));
    const session = await this.#admit(request, target, grant, options, span);
    if (options.resume === undefined && position !== undefined) this.#context.metrics.resumes.inc({ result: "bare" });
    return {
      kind: "stream",
      session,
      headers: { ...streamHeaders, ...this.corsHeaders(request) },
      open(sink) {
        const stream = new EventStream(sink, config.timing.pingIntervalMs);
        session.open(stream);
        return {
          closed() {
            stream.ended();
            session.closed(1006);
          },
        };
      },
    };
  }

  /**
   * One message up, from a client that has no WebSocket: 202, how many have received it, whether it is in an inbox, and
   * the id that the client has given it.
   * @throws {Refusal} when it is not published, or that is not known.
   */
  async publish(request: Request, address: Address): Promise<Respond> {
    const target = targetOf(address);
    const { claims } = await this.#authorize(request, address, target, []);
    if (this.#context.registry.draining) throw new Refusal("draining");
    const id = request.header("idempotency-key");
    if (id !== undefined && !isMessageId(id)) {
      throw new Refusal("badMessageId", `${refusals.badMessageId.reason}: ${currently(id)}`);
    }
    const { limits } = this.#context.config;
    if (limits.maxMessagesPerSec > 0 && !this.#posts.take(target.sessionId)) {
      throw new Refusal("postedTooFast");
    }
    const who = { agentId: target.agentId, claims, address: this.#isTold ? String(this.#clientAddress(request)) : "" };
    const text = await request.text(limits.maxMessageBytes);
    if (limits.validateJson && !isJson(text)) {
      this.#context.metrics.invalidJson.inc();
      throw new Refusal("notJson");
    }
    try {
      const { bridge, metrics, traffic } = this.#context;
      const { receivers: published, entered } = await bridge.publish(who, target.sessionId, text, id);
      const receivers = published ?? 0;
      traffic.of(target.agentId).up++;
      if (published === undefined) metrics.upstreamLost.inc();
      else if (published === 0 && !entered) metrics.unheard.inc();
      const { headers, ...answer } = respondJson(202, { id, receivers, entered });
      return { ...answer, headers: { ...headers, ...this.corsHeaders(request) } };
    } catch (error) {
      if (error instanceof Unavailable) throw new Refusal("notPublished", `not published: ${error.message}`);
      throw error;
    }
  }

  /** What a browser asks before it sends a token to another origin (Fetch Standard, section 3.2.2). */
  preflight(request: Request): Respond {
    this.#checkOrigin(request);
    const headers = {
      ...this.corsHeaders(request),
      "Access-Control-Allow-Methods": "GET, POST",
      "Access-Control-Allow-Headers": "authorization, content-type, idempotency-key, last-event-id",
      "Access-Control-Max-Age": "600",
    };
    return { kind: "respond", status: 204, headers, body: "" };
  }

  /** A client that resumes is not served as a bare one only because it came before that was known, as after a start. */
  async #whenResumable({ sessionId }: Target): Promise<boolean> {
    const { bridge, config } = this.#context;
    try {
      return await bridge.whenResumable(sessionId, config.timing.handshakeTimeoutMs);
    } catch (error) {
      if (error instanceof Unavailable) throw new Refusal("redisUnavailable");
      throw error;
    }
  }

  async #authorize(
    request: Request,
    { query }: Address,
    target: Target,
    protocols: readonly string[],
  ): Promise<Grant> {
    const turn = this.#turns.take();
    if (turn) {
      await turn;
      // In a storm clients give up before it is their turn.
      if (request.gone) throw new Refusal("clientGone");
    }
    const { auth } = this.#context.config;
    const shown = findToken(request.header("authorization"), protocols, auth.allowQueryToken ? query : undefined);
    const token = shown ?? (auth.cookie && findCookie(request.header("cookie"), auth.cookie));
    if (token === undefined) throw new Refusal("noToken");
    if (shown === undefined) this.#checkPage(request);
    this.#checkOrigin(request);
    const known = this.#context.awaitKey?.(token);
    if (known) await known;
    return this.#context.verify(token, target);
  }

  /**
   * Checks that a cookie comes from a page of an allowed origin: a browser sends it whatever page asks. No Origin comes
   * with a page's GET to its own host, of which the browser tells in a header that no page can set (Fetch Metadata).
   */
  #checkPage(request: Request): void {
    if (request.header("origin") !== undefined) return;
    const host = request.header("host");
    const isOwnPage = request.header("sec-fetch-site") === "same-origin" &&
      (this.#allows(`https://${host}`) || this.#allows(`http://${host}`));
    if (!isOwnPage) throw new Refusal("cookieWithoutOrigin");
  }

  #checkOrigin(request: Request): void {
    const origin = request.header("origin");
    if (origin === undefined || this.#allows(origin)) return;
    throw new Refusal("wrongOrigin", `${refusals.wrongOrigin.reason}: ${currently(origin)}`);
  }

  #allows(origin: string): boolean {
    const { allowedOrigins } = this.#context.config.auth;
    return allowedOrigins === undefined || allowedOrigins.has(origin);
  }

  /** What lets a page of an allowed origin read an answer, a refusal too (Fetch Standard, section 3.2). */
  corsHeaders(request: Request): Record<string, string> {
    const origin = request.header("origin");
    if (origin === undefined || !this.#allows(origin)) return {};
    return {
      "Access-Control-Allow-Origin": origin,
      ...this.#context.config.auth.cookie === undefined ? {} : { "Access-Control-Allow-Credentials": "true" },
      "Access-Control-Expose-Headers": "Retry-After",
      Vary: "Origin",
    };
  }

  /** Backends are told where clients are. */
  get #isTold(): boolean {
    return this.#context.config.inbox?.address ?? false;
  }

  #clientAddress(request: Request): IpAddress {
    const address = clientAddress(request, this.#context.config.forwarding);
    if (address === undefined) throw new Refusal("clientGone");
    return address;
  }

  /** A session that is subscribed, and waits to be opened. */
  async #admit(
    request: Request,
    target: Target,
    grant: Grant,
    options: SessionOptions,
    span: HandshakeSpan | undefined,
  ): Promise<Session> {
    const { registry, limits, quota } = this.#context;
    span?.step("token_verified");
    if (registry.draining) throw new Refusal("draining");
    const address = this.#isTold || this.#countsSites ? this.#clientAddress(request) : undefined;
    const client: Client = { session: target.sessionId, site: this.#countsSites ? address!.site : "" };
    const beyondQuota = quota && await quota.enter(client);
    if (beyondQuota !== undefined) throw new Refusal(beyondQuota);
    const excess = registry.draining ? "draining" : limits.enter();
    if (excess !== undefined) {
      quota?.release(client);
      throw new Refusal(excess);
    }
    const onGone = quota === undefined ? this.#onGone : (session: Session) => {
      quota.release(client);
      this.#onGone(session);
    };
    const admitted = new Session(target, grant, this.#context, onGone, {
      ...options,
      traceparent: span?.traceparent,
      address: this.#isTold ? String(address) : "",
    });
    registry.add(admitted);
    try {
      await admitted.attach();
    } catch (error) {
      if (error instanceof Unavailable) throw new Refusal("redisUnavailable");
      if (error instanceof SubscribeTimeout) throw new Refusal("subscribeTimeout");
      throw error;
    }
    span?.step("subscribed");
    // The answers of Redis to many come as one.
    const turn = this.#turns.take(true);
    if (turn) await turn;
    if (request.gone) {
      admitted.abandon();
      throw new Refusal("clientGone");
    }
    if (registry.draining) {
      admitted.abandon();
      throw new Refusal("draining");
    }
    if (admitted.isOver) {
      const { refusedAs = "endedMeanwhile", reason } = admitted.endedAs;
      throw new Refusal(refusedAs, reason || undefined);
    }
    admitted.awaitSocket();
    return admitted;
  }
}

const targetOf = ({ agent, session }: Address): Target => ({ agentId: decodeId(agent), sessionId: decodeId(session) });

const parameter = ({ query }: Address, name: string) => query?.get(name) || undefined;
