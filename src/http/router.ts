/** From a request's path to what answers it; a {@linkcode Refusal} thrown on the way becomes its answer. */

import type { Log } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import { Refusal } from "../replies.ts";
import type { Admin } from "./admin.ts";
import type { Address, Admission } from "./admission.ts";
import { type Handle, type Request, type Respond, respondText, type Verdict } from "./exchange.ts";
import { checkHost, routeOf } from "./handshake.ts";
import type { Operator } from "./operator.ts";
import type { RefusalLog } from "./refusal_log.ts";
import type { HandshakeSpan, Tracing } from "./tracing.ts";

/** What a router leads to. */
export interface Routes {
  readonly admission: Admission;
  readonly operator: Operator;
  readonly metrics: Metrics;
  readonly log: Log;
  readonly refusals: RefusalLog;
  /** Undefined while Deno exports no traces. */
  readonly tracing: Tracing | undefined;
  /** Clients may not see the metrics: they are served elsewhere. */
  readonly hidesMetrics: boolean;
}

/** What operators may ask for: the answer to a path, or undefined. @throws {Refusal} for a wrong method. */
function operate(operator: Operator, path: string, method: string): Promise<Respond> | Respond | undefined {
  const answer = operatorRoutes[path];
  if (answer === undefined) return undefined;
  if (method !== "GET" && method !== "HEAD") throw new Refusal("notGetOrHead");
  return answer(operator);
}

const operatorRoutes: Readonly<Record<string, ((operator: Operator) => Respond | Promise<Respond>) | undefined>> = {
  __proto__: null as never,
  "/health": (operator) => operator.health(),
  "/ready": (operator) => operator.ready(),
  "/metrics": (operator) => operator.metrics(),
};

/** The handler of requests to `ADMIN_PORT`. */
export function createAdminRouter(
  operator: Operator,
  admin: Admin,
  log: Log,
  onRefusal: (refusal: Refusal) => void,
): (request: Request) => Promise<Respond> {
  return answering(log, (request) => {
    const { path } = routeOf(request);
    const answer = operate(operator, path, request.method) ?? admin.answer(request, path);
    if (answer === undefined) throw new Refusal("unknownPath");
    return answer;
  }, onRefusal);
}

/** What `route` leads to; a refusal that it throws, or a bug of ours, becomes the answer. */
function answering<V>(
  log: Log,
  route: (request: Request) => V | Promise<V>,
  onRefusal: (refusal: Refusal) => void,
): (request: Request) => Promise<V | Respond> {
  return async (request) => {
    try {
      return await route(request);
    } catch (error) {
      if (error instanceof Refusal) {
        onRefusal(error);
        return respondText(error.row.status, error.message, error.headers());
      }
      log.error({ err: error }, "request failed");
      return respondText(500, "internal error");
    }
  };
}

/** The handler of all requests. */
export function createRouter({ admission, operator, metrics, log, refusals, tracing, hidesMetrics }: Routes): Handle {
  function route(request: Request): Verdict | Promise<Verdict> {
    const { host, path, query } = routeOf(request);
    if (path !== "/metrics" || !hidesMetrics) {
      const answer = operate(operator, path, request.method);
      if (answer !== undefined) return answer;
    }
    // An operator's health check may be of HTTP/1.0, which knows no Host; not every engine shows the version.
    checkHost(host);
    const [, agent, kind, session] = /^\/([^/]*)\/(ws|sse)\/([^/]*)$/.exec(path) ?? [];
    if (agent === undefined || session === undefined) throw new Refusal("unknownPath");
    const address = { agent, session, query: query === undefined ? undefined : new URLSearchParams(query) };
    if (kind === "ws") {
      if (request.method !== "GET") throw new Refusal("notGet");
      return legible(request, address, timed((span) => admission.upgrade(request, address, span), 101, request, kind));
    }
    return readable(request, () => {
      switch (request.method) {
        case "GET":
          return timed((span) => admission.stream(request, address, span), 200, request, kind);
        case "POST":
          return admission.publish(request, address);
        case "OPTIONS":
          return admission.preflight(request);
        default:
          throw new Refusal("notGetOrPost");
      }
    });
  }

  /** A page may read why it is refused. */
  async function readable(request: Request, decide: () => Verdict | Promise<Verdict>): Promise<Verdict> {
    try {
      return await decide();
    } catch (error) {
      if (error instanceof Refusal) error.also = admission.corsHeaders(request);
      throw error;
    }
  }

  /** A page may read why its WebSocket is refused, if it asks for that. */
  async function legible(request: Request, address: Address, decision: Promise<Verdict>): Promise<Verdict> {
    try {
      return await decision;
    } catch (error) {
      const verdict = error instanceof Refusal ? admission.refuse(request, address, error) : undefined;
      if (verdict === undefined) throw error;
      count(error as Refusal);
      return verdict;
    }
  }

  const admitted = metrics.handshake.labels("admitted");
  const refused = metrics.handshake.labels("refused");

  /** Decides on a session; `status` is what the engine answers when it is admitted. */
  async function timed<T>(
    decide: (span: HandshakeSpan | undefined) => Promise<T>,
    status: number,
    request: Request,
    kind: string | undefined,
  ): Promise<T> {
    const startMs = performance.now();
    const span = tracing?.begin(request, `/{agent_id}/${kind}/{session_id}`);
    let outcome = refused;
    try {
      const verdict = await decide(span);
      outcome = admitted;
      span?.end(status);
      return verdict;
    } catch (error) {
      if (error instanceof Refusal) span?.end(error.row.status, error);
      else span?.end(500);
      throw error;
    } finally {
      outcome.observe((performance.now() - startMs) / 1000);
    }
  }

  function count(refusal: Refusal): void {
    metrics.refused.inc({ status: refusal.row.status, reason: refusal.refusal });
    // Clients may leave, and a crowd of them would fill the log.
    if (refusal.refusal !== "clientGone") refusals.add(refusal);
  }

  return answering<Verdict>(log, route, count);
}
