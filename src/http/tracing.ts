/**
 * A handshake as one span of a trace, while Deno exports them (`OTEL_DENO=true`), named after OpenTelemetry's semantic
 * conventions for HTTP servers. Deno makes a span for each request of `Deno.serve`, and ours is said on it; an upgrade
 * of node:http has none, and gets one here. No attribute of ours has a token in it, or a query, where one may be.
 */

import {
  type Context,
  isSpanContextValid,
  ROOT_CONTEXT,
  type Span,
  SpanKind,
  SpanStatusCode,
  trace,
  type Tracer,
} from "@opentelemetry/api";
import type { Refusal } from "../replies.ts";
import type { Target } from "../session/session.ts";
import type { Request } from "./exchange.ts";

/** Makes spans. */
export class Tracing {
  readonly #tracer: Tracer;

  /** `version` is wsproxy's. */
  constructor(version: string) {
    this.#tracer = trace.getTracer("wsproxy", version);
  }

  /** The span of a request for a session; `route` is its path with names in braces. */
  begin(request: Request, route: string): HandshakeSpan {
    const name = `${request.method} ${route}`;
    const active = trace.getActiveSpan();
    const attributes = { "http.request.method": request.method };
    const span = active ??
      this.#tracer.startSpan(name, { kind: SpanKind.SERVER, attributes }, parentOf(request.header("traceparent")));
    span.updateName(name);
    span.setAttribute("http.route", route);
    return new HandshakeSpan(span, active === undefined);
  }
}

/** What happens on the way from a request to a session. */
export class HandshakeSpan {
  readonly #span: Span;
  readonly #isOurs: boolean;

  /** One that is not ours is ended by Deno, which has made it and sees the status as well. */
  constructor(span: Span, isOurs: boolean) {
    this.#span = span;
    this.#isOurs = isOurs;
  }

  /** What a backend's trace goes on from (W3C Trace Context, section 3.2). */
  get traceparent(): string {
    const { traceId, spanId, traceFlags } = this.#span.spanContext();
    return `00-${traceId}-${spanId}-${traceFlags.toString(16).padStart(2, "0")}`;
  }

  /** The session that is asked for. */
  target({ agentId, sessionId }: Target): void {
    this.#span.setAttributes({ "session.id": sessionId, "wsproxy.agent.id": agentId });
  }

  /** A step has been made. */
  step(name: "token_verified" | "subscribed"): void {
    this.#span.addEvent(`wsproxy.${name}`);
  }

  /** It was decided; a status of 500 or more is an error, and others are the client's own matter. */
  end(status: number, refusal?: Refusal): void {
    const span = this.#span;
    if (refusal) span.setAttribute("wsproxy.refusal", refusal.refusal);
    if (status >= 500) {
      span.setAttribute("error.type", String(status));
      span.setStatus({ code: SpanStatusCode.ERROR });
    }
    if (!this.#isOurs) return;
    // As text, as Deno does.
    span.setAttribute("http.response.status_code", String(status));
    span.end();
  }
}

/** The context of a request's `traceparent`; none where that is missing or malformed. */
function parentOf(traceparent: string | undefined): Context {
  const [, traceId = "", spanId = "", flags = ""] =
    /^[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-|$)/.exec(traceparent ?? "") ?? [];
  const parent = { traceId, spanId, traceFlags: parseInt(flags, 16) & 1, isRemote: true };
  return isSpanContextValid(parent) ? trace.setSpanContext(ROOT_CONTEXT, parent) : ROOT_CONTEXT;
}
