/** Counters and gauges for operators, in the Prometheus text format at `/metrics`. */

import { Counter, Gauge, Registry } from "prom-client";

/** A number that only grows. */
export interface Count {
  /** Adds one, or as many as given. */
  inc(by?: number): void;
}

/** One such number for each combination of labels. */
export interface CountBy<Label extends string> {
  /** Adds one. */
  inc(labels: Record<Label, string | number>): void;
}

/** The metrics of one proxy. Names and help texts are what `/metrics` shows. */
export interface Metrics {
  /** The Content-Type of {@linkcode Metrics.render}'s text. */
  readonly contentType: string;
  /** The text that `/metrics` answers. */
  render(): Promise<string>;
  /** WebSockets opened. */
  readonly opened: Count;
  /** Upgrades whose WebSocket never opened. */
  readonly unopened: Count;
  /** Times that a deaf listener was opened again. */
  readonly relistened: Count;
  /** WebSockets ended, by close code. */
  readonly closed: CountBy<"code">;
  /** Requests refused, by status and the refusal's name. */
  readonly refused: CountBy<"status" | "reason">;
  /** Counted for each message, so as plain numbers: messages handed to clients' sockets, and accepted from clients. */
  readonly messages: { down: number; up: number };
  /** Text frames that were not JSON. */
  readonly invalidJson: Count;
  /** Accepted messages that did not, or may not, have reached Redis. */
  readonly upstreamLost: Count;
  /** Times that a session was told, or not told, of a gap. */
  readonly gaps: Count;
  /** Messages not accepted because a queue was full. */
  readonly upstreamRefused: Count;
}

/** What the gauges read when somebody asks. */
export interface Gauges {
  /** Open WebSockets. */
  connections(): number;
  /** Channels subscribed to, sessions and our own canary. */
  subscriptions(): number;
  /** 1 while Redis carries traffic both ways, else 0. */
  redisUp(): number;
  /** Attempts to connect to Redis that failed. */
  redisConnectFailures(): number;
}

/** New metrics, at zero. `gauges` is asked at each scrape. */
export function createMetrics(gauges: Gauges): Metrics {
  const registry = new Registry();
  const counter = (name: string, help: string) => new Counter({ name, help, registers: [registry] });
  const gauge = (name: string, help: string, read: () => number) =>
    new Gauge({
      name,
      help,
      registers: [registry],
      collect() {
        this.set(read());
      },
    });
  gauge("wsproxy_connections", "Open WebSockets.", gauges.connections);
  gauge("wsproxy_subscriptions", "Redis channels subscribed to, the canary included.", gauges.subscriptions);
  gauge("wsproxy_redis_up", "1 while Redis carries traffic both ways.", gauges.redisUp);
  gauge("wsproxy_resident_memory_bytes", "Resident memory of the process.", () => Deno.memoryUsage().rss);
  const messages = { down: 0, up: 0 };
  const total = (name: string, help: string, read: () => number) =>
    new Counter({
      name,
      help,
      registers: [registry],
      collect() {
        this.reset();
        this.inc(read());
      },
    });
  total("wsproxy_messages_down_total", "Messages handed to clients' sockets.", () => messages.down);
  total(
    "wsproxy_redis_connect_failures_total",
    "Attempts to connect to Redis that failed.",
    gauges.redisConnectFailures,
  );
  total("wsproxy_messages_up_total", "Messages accepted from clients for Redis.", () => messages.up);
  return {
    messages,
    contentType: registry.contentType,
    render: () => registry.metrics(),
    opened: counter("wsproxy_opened_total", "WebSockets opened."),
    unopened: counter(
      "wsproxy_unopened_total",
      "Upgrades whose WebSocket never opened; with WS_ENGINE=deno each may have left a descriptor behind.",
    ),
    relistened: counter("wsproxy_relistened_total", "Times that a listener had gone deaf, and was opened again."),
    closed: new Counter({
      name: "wsproxy_closed_total",
      help: "WebSockets ended, by close code; code 1006 is an end without a close frame.",
      labelNames: ["code"] as const,
      registers: [registry],
    }),
    refused: new Counter({
      name: "wsproxy_refused_total",
      help: "Requests refused, by status and reason.",
      labelNames: ["status", "reason"] as const,
      registers: [registry],
    }),
    invalidJson: counter("wsproxy_invalid_json_total", "Text frames refused because they were not JSON."),
    upstreamLost: counter(
      "wsproxy_upstream_lost_total",
      "Accepted messages that Redis refused, that an outage left unpublished, or whose arrival is unknown.",
    ),
    gaps: counter("wsproxy_gaps_total", "Times that a client may have missed messages, or may not have been heard."),
    upstreamRefused: counter(
      "wsproxy_upstream_refused_total",
      "Messages not accepted because the client's queue for Redis was full.",
    ),
  };
}
