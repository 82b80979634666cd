/** The ladder from a request to a session, in the order of the refusal table. */

import { RateLimit } from "../rate_limit.ts";
import { SubscribeTimeout, Unavailable } from "../redis/errors.ts";
import { Refusal } from "../replies.ts";
import type { Registry } from "../session/registry.ts";
import { Session, type SessionContext, type Target } from "../session/session.ts";
import type { Request, Upgrade } from "./exchange.ts";
import {
  checkUpgrade,
  decodeId,
  findToken,
  protocolsOf,
  resumeFrom,
  resumeProtocol,
  selectProtocol,
} from "./handshake.ts";

/** What is admitted into, besides what sessions share. */
export interface AdmissionContext extends SessionContext {
  readonly registry: Registry;
}

/** A session's address in a request: the path's segments as sent, and what follows "?". */
export interface Address {
  readonly agent: string;
  readonly session: string;
  readonly query: string | undefined;
}

/** Decides who gets a session. */
export class Admission {
  readonly #context: AdmissionContext;
  readonly #connects: RateLimit | undefined;

  constructor(context: AdmissionContext) {
    this.#context = context;
    const { maxConnectsPerSec } = context.config.limits;
    if (maxConnectsPerSec > 0) this.#connects = new RateLimit(maxConnectsPerSec);
  }

  /**
   * A session that waits for its socket: the engine must open or abandon it.
   * @throws {Refusal} from the first rung that the request does not pass.
   */
  async admit(request: Request, { agent, session, query }: Address): Promise<Upgrade> {
    checkUpgrade(request);
    const target: Target = { agentId: decodeId(agent), sessionId: decodeId(session) };
    const { auth } = this.#context.config;
    const protocols = protocolsOf(request.header("sec-websocket-protocol"));
    const protocol = selectProtocol(protocols, this.#context.bridge.resumable);
    const resume = protocol === resumeProtocol ? resumeFrom(query) : undefined;
    const token = findToken(request.header("authorization"), protocols, auth.allowQueryToken ? query : undefined);
    if (token === undefined) throw new Refusal("noToken");
    const origin = request.header("origin");
    if (origin !== undefined && auth.allowedOrigins && !auth.allowedOrigins.has(origin)) {
      throw new Refusal("wrongOrigin");
    }
    const grant = await this.#context.verify(token, target);
    this.#checkRoom();
    const { registry } = this.#context;
    const admitted = new Session(target, grant, this.#context, (gone) => registry.delete(gone), resume);
    registry.add(admitted);
    try {
      await admitted.attach();
    } catch (error) {
      if (error instanceof Unavailable) throw new Refusal("redisUnavailable");
      if (error instanceof SubscribeTimeout) throw new Refusal("subscribeTimeout");
      throw error;
    }
    if (request.gone) {
      admitted.abandon();
      throw new Refusal("clientGone");
    }
    if (registry.draining) {
      admitted.abandon();
      throw new Refusal("draining");
    }
    if (admitted.isOver) throw new Refusal("redisUnavailable");
    return { kind: "upgrade", session: admitted, protocol };
  }

  #checkRoom(): void {
    const { registry } = this.#context;
    if (registry.draining) throw new Refusal("draining");
    const { maxConnections } = this.#context.config.limits;
    if (maxConnections > 0 && registry.size >= maxConnections) throw new Refusal("tooManyConnections");
    if (this.#connects && !this.#connects.take()) throw new Refusal("tooManyConnects");
  }
}
