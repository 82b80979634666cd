/** What operators ask for: health, readiness, metrics. */

import { metricsContentType, renderMetrics } from "../metrics.ts";
import type { Ask, HealthReport } from "../report.ts";
import { type Respond, respondJson } from "./exchange.ts";

/** What an operator asks about. */
export interface OperatorContext {
  /** No client is admitted any more. */
  readonly draining: () => boolean;
  /** The one that is asked can admit clients itself. */
  readonly canAdmit: () => boolean;
  /** What each proxy of this port says of itself. */
  readonly ask: Ask;
}

/** Answers operators. */
export class Operator {
  readonly #context: OperatorContext;
  #health: Promise<readonly HealthReport[]> | undefined;

  constructor(context: OperatorContext) {
    this.#context = context;
  }

  /**
   * `GET /health`: whether messages flow through Redis now. A Cluster that has lost some of its servers still serves the
   * sessions of the others: that is told, and no reason to take the proxy away. A worker that does not answer counts as
   * such a server.
   */
  async health(): Promise<Respond> {
    // One probe serves all checks of the same time: health checks must not become a load of their own.
    this.#health ??= this.#context.ask({ kind: "health" }).finally(() => this.#health = undefined);
    const servers: Record<string, string | null> = {};
    let active_connections = 0;
    for (const report of await this.#health) {
      active_connections += report.connections;
      for (const [name, error] of Object.entries(report.servers)) servers[name] ??= error;
    }
    const errors = Object.values(servers).filter((error) => error !== null);
    if (errors.length === Object.keys(servers).length) {
      const error = errors[0] ?? "no server of the Cluster has been found";
      return respondJson(503, { status: "unhealthy", redis: "disconnected", error });
    }
    if (errors.length === 0) return respondJson(200, { status: "healthy", redis: "connected", active_connections });
    const shards = Object.fromEntries(Object.entries(servers).map(([name, error]) => [name, error ?? "connected"]));
    return respondJson(200, { status: "degraded", redis: "connected", active_connections, shards });
  }

  /** `GET /ready`: whether new clients are welcome. */
  async ready(): Promise<Respond> {
    const { draining, canAdmit, ask } = this.#context;
    if (draining()) return respondJson(503, { status: "draining" });
    // While one worker can admit clients, those that it gets are welcome. The others are asked only when it matters.
    const missing = canAdmit() ? [null] : await ask({ kind: "missing" });
    if (missing.includes(null)) return respondJson(200, { status: "ready" });
    return respondJson(503, { status: "starting", waiting_for: missing[0] });
  }

  /** `GET /metrics`. */
  async metrics(): Promise<Respond> {
    const body = await renderMetrics(await this.#context.ask({ kind: "metrics" }));
    return { kind: "respond", status: 200, headers: { "Content-Type": metricsContentType }, body };
  }
}
