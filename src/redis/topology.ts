/** How many servers a Redis is, and on which of them a name lives. */

import type { ServerAddress } from "../redis_url.ts";
import { Unavailable } from "./errors.ts";
import { Shard, type ShardOptions } from "./shard.ts";
import type { Listener } from "./subscriptions.ts";

/** The shards of a Redis. */
export interface Topology {
  /** All that serve something now. */
  readonly shards: readonly Shard[];
  /** Why parts of it are down for which no shard stands: a reason for each part. */
  readonly faults: ReadonlyMap<string, string>;
  /** Where a channel or a key lives: what {@linkcode Topology.at} takes. */
  slotOf(name: string): number;
  /** The shard that serves a slot now, or did last; undefined while none is known. */
  at(slot: number): Shard | undefined;
  /** Whether messages in a slot flow now, as far as the last canaries tell. */
  flowing(slot: number): boolean;
  /** Whether an outage of `server` concerns a slot: it is what `onOutage` was told. */
  concerns(server: object, slot: number): boolean;
  /** Listens to a channel for good. */
  listen(name: string, listener: Listener): void;
  /** Publishes what is pending, for at most `timeoutMs` milliseconds, then closes all connections. */
  close(timeoutMs: number): Promise<void>;
}

/** The shard that serves a channel or a key: see {@linkcode Topology.at}. */
export function shardOf(topology: Topology, name: string): Shard | undefined {
  return topology.at(topology.slotOf(name));
}

/**
 * For what cannot be done without a shard.
 * @throws {Unavailable} when none is known.
 */
export function servingOrThrow(shard: Shard | undefined): Shard {
  if (shard === undefined) throw new Unavailable("no server serves it");
  return shard;
}

/** One server, or one master that sentinels name. */
export class SingleServer implements Topology {
  readonly #shard: Shard;
  readonly shards: readonly Shard[];
  readonly faults: ReadonlyMap<string, string> = new Map();

  /** Connects, and goes on trying for as long as it lives. */
  constructor(address: ServerAddress, options: Omit<ShardOptions, "address" | "cluster">) {
    this.#shard = new Shard({ ...options, address, cluster: undefined });
    this.shards = [this.#shard];
  }

  /** There are no slots. */
  slotOf(): number {
    return 0;
  }

  /** See {@linkcode Topology}. */
  at(): Shard {
    return this.#shard;
  }

  /** See {@linkcode Topology}. */
  flowing(): boolean {
    return this.#shard.flowing;
  }

  /** See {@linkcode Topology}. */
  concerns(server: object): boolean {
    return server === this.#shard;
  }

  /** See {@linkcode Topology}. */
  listen(name: string, listener: Listener): void {
    this.#shard.subscriptions.add(name, listener);
  }

  /** See {@linkcode Topology}. */
  close(timeoutMs: number): Promise<void> {
    return this.#shard.close(timeoutMs);
  }
}
