/** What operators ask for: health, readiness, metrics. */

import type { Metrics } from "../metrics.ts";
import type { Bridge } from "../redis/bridge.ts";
import type { Registry } from "../session/registry.ts";
import { type Respond, respondJson } from "./exchange.ts";

/** A health probe's share of the second that a health check may take. */
const probeTimeoutMs = 900;

/** What an operator asks about. */
export interface OperatorContext {
  readonly bridge: Bridge;
  readonly registry: Registry;
  readonly metrics: Metrics;
}

/** Answers operators. */
export class Operator {
  readonly #context: OperatorContext;
  #probe: ReturnType<Bridge["probe"]> | undefined;

  constructor(context: OperatorContext) {
    this.#context = context;
  }

  /**
   * `GET /health`: whether messages flow through Redis now. A Cluster that has lost some of its servers still serves the
   * sessions of the others: that is told, and no reason to take the proxy away.
   */
  async health(): Promise<Respond> {
    const { bridge, registry } = this.#context;
    // One probe serves all who ask at the same time: health checks must not become a load of their own.
    this.#probe ??= bridge.probe(probeTimeoutMs).finally(() => this.#probe = undefined);
    const servers = await this.#probe;
    const errors = [...servers.values()].filter((error) => error !== undefined);
    if (errors.length === servers.size) {
      const error = errors[0]?.message ?? "no server of the Cluster has been found";
      return respondJson(503, { status: "unhealthy", redis: "disconnected", error });
    }
    const active_connections = registry.open;
    if (errors.length === 0) return respondJson(200, { status: "healthy", redis: "connected", active_connections });
    const shards = Object.fromEntries([...servers].map(([name, error]) => [name, error?.message ?? "connected"]));
    return respondJson(200, { status: "degraded", redis: "connected", active_connections, shards });
  }

  /** `GET /ready`: whether new clients are welcome. */
  ready(): Respond {
    return this.#context.registry.draining
      ? respondJson(503, { status: "draining" })
      : respondJson(200, { status: "ready" });
  }

  /** `GET /metrics`. */
  async metrics(): Promise<Respond> {
    const { contentType, render } = this.#context.metrics;
    return { kind: "respond", status: 200, headers: { "Content-Type": contentType }, body: await render() };
  }
}
