/**
 * Counters and gauges for operators, in the Prometheus text format at `/metrics`. One row declares each; the table in
 * docs/reference.md is generated from them.
 */

import {
  type Aggregator,
  AggregatorRegistry,
  Counter,
  Gauge,
  Histogram,
  type MetricObjectWithValues,
  type MetricValue,
  Registry,
} from "prom-client";
import { pendingOverheadBytes } from "./overhead.ts";

/** Seconds; from what a message takes inside the proxy to what no client waits for. */
const seconds = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5];

interface Row {
  readonly type: "counter" | "gauge" | "histogram";
  readonly name: string;
  readonly help: string;
  readonly labels?: readonly string[];
  /** Read when metrics are asked for, and not counted here. */
  readonly sampled?: true;
  /** How several workers' values become one, where that is not their sum. */
  readonly aggregator?: "min" | "max";
}

/** Every metric. */
export const metricRows = {
  connections: { type: "gauge", name: "wsproxy_connections", help: "Open WebSockets and streams.", sampled: true },
  maxConnections: {
    type: "gauge",
    name: "wsproxy_max_connections",
    help: "MAX_CONNECTIONS, for all workers together; 0 for no limit.",
    sampled: true,
    aggregator: "max",
  },
  subscriptions: {
    type: "gauge",
    name: "wsproxy_subscriptions",
    help: "Redis channels subscribed to, the canary's and the one for control included.",
    sampled: true,
  },
  redisUp: {
    type: "gauge",
    name: "wsproxy_redis_up",
    help: "1 while Redis carries traffic both ways.",
    sampled: true,
    aggregator: "min",
  },
  workers: {
    type: "gauge",
    name: "wsproxy_workers",
    help: "Threads that serve; one that leaves counts no more, though it still has sessions.",
    sampled: true,
  },
  workersConfigured: {
    type: "gauge",
    name: "wsproxy_workers_configured",
    help: "Threads that are to serve: WORKERS.",
    sampled: true,
    aggregator: "max",
  },
  residentMemory: {
    type: "gauge",
    name: "wsproxy_resident_memory_bytes",
    help: "Resident memory of the process.",
    sampled: true,
    aggregator: "max",
  },
  heap: {
    type: "gauge",
    name: "wsproxy_heap_bytes",
    help: "Memory that JavaScript uses, of all workers.",
    sampled: true,
  },
  buffered: {
    type: "gauge",
    name: "wsproxy_buffered_bytes",
    help: "Bytes that clients' connections have not taken yet, those that are closed or given up included.",
    sampled: true,
  },
  pending: {
    type: "gauge",
    name: "wsproxy_pending_bytes",
    help: `Characters from clients that Redis has not taken yet, and ${pendingOverheadBytes} more for each message.`,
    sampled: true,
  },
  redisConnects: {
    type: "counter",
    name: "wsproxy_redis_connects_total",
    help: "Connections to Redis that began to serve.",
    sampled: true,
  },
  redisConnectFailures: {
    type: "counter",
    name: "wsproxy_redis_connect_failures_total",
    help: "Attempts to connect to Redis that failed.",
    sampled: true,
  },
  messagesDown: {
    type: "counter",
    name: "wsproxy_messages_down_total",
    help: "Messages taken for clients' sockets.",
    sampled: true,
  },
  messagesUp: {
    type: "counter",
    name: "wsproxy_messages_up_total",
    help: "Messages accepted from clients for Redis.",
    sampled: true,
  },
  messagesLogged: {
    type: "counter",
    name: "wsproxy_messages_logged_total",
    help: "Of the messages down, those that came with a place in their session's log; all others were plain.",
    sampled: true,
  },
  agentConnections: {
    type: "gauge",
    name: "wsproxy_agent_connections",
    help: "Open WebSockets and streams of each agent in METRICS_AGENTS.",
    sampled: true,
    labels: ["agent"],
  },
  agentMessagesDown: {
    type: "counter",
    name: "wsproxy_agent_messages_down_total",
    help: "Messages taken for clients' sockets, of each agent in METRICS_AGENTS.",
    sampled: true,
    labels: ["agent"],
  },
  agentMessagesUp: {
    type: "counter",
    name: "wsproxy_agent_messages_up_total",
    help: "Messages accepted from clients, of each agent in METRICS_AGENTS.",
    sampled: true,
    labels: ["agent"],
  },
  opened: { type: "counter", name: "wsproxy_opened_total", help: "WebSockets and streams opened." },
  unopened: {
    type: "counter",
    name: "wsproxy_unopened_total",
    help: "Upgrades whose WebSocket never opened; with WS_ENGINE=deno each may have left a descriptor behind.",
  },
  closed: {
    type: "counter",
    name: "wsproxy_closed_total",
    help:
      "WebSockets and streams ended, by close code: 1006 is an end without a close frame, other a code of a client's or a backend's own.",
    labels: ["code"],
  },
  refused: {
    type: "counter",
    name: "wsproxy_refused_total",
    help: "Requests refused, by status and reason.",
    labels: ["status", "reason"],
  },
  relistened: {
    type: "counter",
    name: "wsproxy_relistened_total",
    help: "Times that a listener had gone deaf, and was opened again.",
  },
  slowClients: {
    type: "counter",
    name: "wsproxy_slow_clients_total",
    help: "Clients closed because they read too slowly.",
  },
  invalidJson: {
    type: "counter",
    name: "wsproxy_invalid_json_total",
    help: "Text frames refused because they were not JSON.",
  },
  upstreamLost: {
    type: "counter",
    name: "wsproxy_upstream_lost_total",
    help: "Accepted messages that Redis refused, that an outage left unpublished, or whose arrival is unknown.",
  },
  upstreamRefused: {
    type: "counter",
    name: "wsproxy_upstream_refused_total",
    help: "Messages not accepted because the client's queue for Redis was full.",
  },
  resumes: {
    type: "counter",
    name: "wsproxy_resumes_total",
    help:
      "Times that a resuming client caught up, complete or after a gap, or could not: bare from the start, or closed.",
    labels: ["result"],
  },
  unheard: {
    type: "counter",
    name: "wsproxy_unheard_total",
    help: "Messages from clients that were published while no backend was subscribed.",
  },
  inboxEntries: {
    type: "counter",
    name: "wsproxy_inbox_entries_total",
    help: "Entries written into inboxes.",
    sampled: true,
  },
  inboxLost: {
    type: "counter",
    name: "wsproxy_inbox_lost_total",
    help: "Entries of inboxes that Redis refused, that an outage left unwritten, or whose arrival is unknown.",
    sampled: true,
  },
  commands: {
    type: "counter",
    name: "wsproxy_commands_total",
    help: "Commands of backends: one to many sessions counts once, one to a session for each of its sockets.",
    labels: ["command", "result"],
  },
  downLatency: {
    type: "histogram",
    name: "wsproxy_down_latency_seconds",
    help: "From a read from Redis until a message of it was given to its clients' sockets; one in 64.",
  },
  upLatency: {
    type: "histogram",
    name: "wsproxy_up_latency_seconds",
    help: "From a client's message until Redis had confirmed it; one in 64.",
  },
  redisRoundTrip: {
    type: "histogram",
    name: "wsproxy_redis_round_trip_seconds",
    help: "From publishing the canary until it came back.",
  },
  handshake: {
    type: "histogram",
    name: "wsproxy_handshake_seconds",
    help: "From a client's request for a session until it was decided, by outcome: admitted or refused.",
    labels: ["outcome"],
  },
  catchUp: {
    type: "histogram",
    name: "wsproxy_catch_up_seconds",
    help: "From the moment at which a resuming client began to catch up until it had.",
  },
  eventLoopLag: {
    type: "histogram",
    name: "wsproxy_event_loop_lag_seconds",
    help: "How late a timer was, ten times a second: for so long no client was served.",
  },
  buildInfo: {
    type: "gauge",
    name: "wsproxy_build_info",
    help: "1, with the versions of wsproxy and Deno, and the engine.",
    aggregator: "max",
    labels: ["version", "deno", "engine"],
  },
  logLinesDropped: {
    type: "counter",
    name: "wsproxy_log_lines_dropped_total",
    help: "Log lines that were dropped, as standard output was not read or could not be written.",
    sampled: true,
  },
  keyReads: {
    type: "counter",
    name: "wsproxy_key_reads_total",
    help: "Times that public keys were read from JWT_PUBLIC_KEY_FILE or JWKS_URL, by result: changed, same or failed.",
    labels: ["result"],
  },
  gaps: {
    type: "counter",
    name: "wsproxy_gaps_total",
    help: "Times that a client may have missed messages, or may not have been heard.",
  },
} as const satisfies Record<string, Row>;

type Rows = typeof metricRows;
type SampledName = { [Name in keyof Rows]: Rows[Name] extends { sampled: true } ? Name : never }[keyof Rows];
type LabelsOf<R> = R extends { labels: readonly (infer Label extends string)[] } ? Label : never;

interface Instruments<Label extends string> {
  counter: Counter<Label>;
  gauge: Gauge<Label>;
  histogram: Histogram<Label>;
}

/**
 * What is read when metrics are asked for, by the metrics' names in {@linkcode metricRows}; of one with a label, by its
 * values.
 */
export type Samples = {
  readonly [Name in SampledName]: () => Rows[Name] extends { labels: readonly string[] } ? ReadonlyMap<string, number>
    : number;
};

/** The metrics of one proxy: an instrument for each row that is counted or measured here. */
export type Metrics =
  & {
    readonly [Name in Exclude<keyof Rows, SampledName>]: Instruments<LabelsOf<Rows[Name]>>[Rows[Name]["type"]];
  }
  & {
    /** All values as they are now. */
    report(): Promise<MetricsReport>;
  };

/** Values of all metrics at one moment, as they cross threads. */
export type MetricsReport = MetricObjectWithValues<MetricValue<string>>[];

/** The Content-Type of {@linkcode renderMetrics}' text. */
export const metricsContentType = Registry.PROMETHEUS_CONTENT_TYPE;

/** The text that `/metrics` answers: what several proxies report, as one. */
export function renderMetrics(reports: readonly MetricsReport[]): Promise<string> {
  return aggregate(reports).metrics();
}

/** The sums of all that was counted; what is measured is gone with the worker that has measured it. */
export async function countersOf(reports: readonly MetricsReport[]): Promise<MetricsReport> {
  const all = await aggregate(reports).getMetricsAsJSON() as MetricsReport;
  return all.filter(({ type }) => String(type) === "counter" || String(type) === "histogram");
}

const aggregate = (reports: readonly MetricsReport[]) => AggregatorRegistry.aggregate([...reports]);

/** New metrics, at zero. `samples` are read at each scrape. */
export function createMetrics(samples: Samples): Metrics {
  const registry = new Registry();
  const instruments: Record<string, Counter | Gauge | Histogram> = {};
  for (const [key, { type, name, help, labels = [], sampled, ...row }] of Object.entries<Row>(metricRows)) {
    const aggregator: Aggregator = row.aggregator ?? "sum";
    const options = { name, help, labelNames: [...labels], registers: [registry], aggregator };
    if (sampled) createSampled(type, options, samples[key as SampledName]);
    else if (type === "histogram") instruments[key] = new Histogram({ ...options, buckets: seconds });
    else instruments[key] = type === "gauge" ? new Gauge(options) : new Counter(options);
  }
  return {
    ...instruments as unknown as Metrics,
    report: () => registry.getMetricsAsJSON() as Promise<MetricsReport>,
  };
}

function createSampled(
  type: Row["type"],
  options: { name: string; help: string; labelNames: string[]; registers: Registry[]; aggregator: Aggregator },
  read: () => number | ReadonlyMap<string, number>,
): void {
  const [label = ""] = options.labelNames;
  const each = (tell: (labels: Record<string, string>, value: number) => void) => {
    const value = read();
    if (typeof value === "number") tell({}, value);
    else for (const [name, one] of value) tell({ [label]: name }, one);
  };
  if (type === "gauge") {
    new Gauge({
      ...options,
      collect() {
        each((labels, value) => this.set(labels, value));
      },
    });
  } else {
    new Counter({
      ...options,
      collect() {
        this.reset();
        each((labels, value) => this.inc(labels, value));
      },
    });
  }
}
