/**
 * The limits that hold for each session and for each address. They are counted in one place for all workers of a proxy:
 * by the proxy itself when it is alone, else by the main thread, which the workers ask. So they are exact, and what a
 * worker had is forgotten with it. Only what has connections is kept, and addresses that connected a second ago.
 */

import type { Config } from "./config.ts";
import { Rates } from "./rate_limit.ts";

/** These limits; 0 is none. */
export type QuotaLimits = Pick<
  Config["limits"],
  "maxConnectionsPerSession" | "maxConnectionsPerAddress" | "maxConnectsPerAddressPerSec"
>;

/** By what a client is counted. */
export interface Client {
  readonly session: string;
  /** See `IpAddress.site`; empty where no limit asks for it. */
  readonly site: string;
}

/** What keeps a client out. */
export type QuotaExcess = "tooManyOfSession" | "tooManyOfAddress" | "tooManyConnectsOfAddress";

/** What counts clients: at once, or by asking another thread. */
export interface Quota {
  /** Admits one connection, or says why not. Its end must {@linkcode Quota.release} it. */
  enter(client: Client): QuotaExcess | undefined | Promise<QuotaExcess | undefined>;
  /** A connection is gone. */
  release(client: Client): void;
}

/** Whether any of these limits is set. */
export const hasQuotas = (limits: QuotaLimits): boolean => limits.maxConnectionsPerSession > 0 || hasSites(limits);

/** Whether any of them asks for addresses. */
export const hasSites = (limits: QuotaLimits): boolean =>
  limits.maxConnectionsPerAddress > 0 || limits.maxConnectsPerAddressPerSec > 0;

/** Connections by name. */
class Counts {
  readonly #counts = new Map<string, number>();

  of(name: string): number {
    return this.#counts.get(name) ?? 0;
  }

  add(name: string, change: 1 | -1): void {
    const count = this.of(name) + change;
    if (count > 0) this.#counts.set(name, count);
    else this.#counts.delete(name);
  }
}

/** What one holder has. */
interface Held {
  readonly sessions: Counts;
  readonly sites: Counts;
}

/** Counts the clients of several holders: the workers of a proxy. */
export class Quotas<Holder> {
  readonly #limits: QuotaLimits;
  readonly #held = new Map<Holder, Held>();
  readonly #rates: Rates;

  /** Nothing is held yet. */
  constructor(limits: QuotaLimits) {
    this.#limits = limits;
    this.#rates = new Rates(limits.maxConnectsPerAddressPerSec, 1000);
  }

  /** Addresses whose last connect is remembered. */
  get remembered(): number {
    return this.#rates.size;
  }

  /** Admits one connection of a holder, or says why not. Its end must {@linkcode Quotas.release} it. */
  enter(holder: Holder, { session, site }: Client): QuotaExcess | undefined {
    const { maxConnectionsPerSession, maxConnectionsPerAddress, maxConnectsPerAddressPerSec } = this.#limits;
    if (this.#isFull("sessions", session, maxConnectionsPerSession)) return "tooManyOfSession";
    if (this.#isFull("sites", site, maxConnectionsPerAddress)) return "tooManyOfAddress";
    // The last one, as it takes something that is not given back.
    if (maxConnectsPerAddressPerSec > 0 && !this.#rates.take(site)) return "tooManyConnectsOfAddress";
    this.#change(holder, { session, site }, 1);
    return undefined;
  }

  /** A connection of a holder is gone. */
  release(holder: Holder, client: Client): void {
    if (this.#held.has(holder)) this.#change(holder, client, -1);
  }

  /** A holder is gone, and its connections with it. */
  forget(holder: Holder): void {
    this.#held.delete(holder);
  }

  #isFull(kind: keyof Held, name: string, max: number): boolean {
    if (max === 0) return false;
    let count = 0;
    for (const held of this.#held.values()) count += held[kind].of(name);
    return count >= max;
  }

  #change(holder: Holder, { session, site }: Client, change: 1 | -1): void {
    let held = this.#held.get(holder);
    if (held === undefined) this.#held.set(holder, held = { sessions: new Counts(), sites: new Counts() });
    if (this.#limits.maxConnectionsPerSession > 0) held.sessions.add(session, change);
    if (this.#limits.maxConnectionsPerAddress > 0) held.sites.add(site, change);
  }
}

/** The quotas of a proxy that is alone. */
export function createQuota(limits: QuotaLimits): Quota {
  const quotas = new Quotas<"alone">(limits);
  return {
    enter: (client) => quotas.enter("alone", client),
    release: (client) => quotas.release("alone", client),
  };
}
