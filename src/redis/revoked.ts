/** Revoked tokens, as Redis keeps them for all proxies: who connects reads them, so that no request needs a look-up. */

import type { Redis } from "ioredis";
import type { Log } from "../log.ts";
import type { Revocations } from "../revocations.ts";
import { isReply, reasonOf, Unavailable } from "./errors.ts";
import { commandText } from "./publish_batch.ts";
import { commands } from "./publisher.ts";
import script from "./revoke.lua" with { type: "text" };
import type { Shard } from "./shard.ts";
import type { Topology } from "./topology.ts";

/** Whose older tokens are revoked: a hash from an agent, or "*" for all, to seconds since the epoch. */
const revokedKey = "wsproxy:revoked";

/** The hash in Redis. */
export class Revoked {
  readonly #topology: Topology;
  readonly #revocations: Revocations;
  readonly #log: Log;

  /** `revocations` is what this proxy knows of them. */
  constructor(topology: Topology, revocations: Revocations, log: Log) {
    this.#topology = topology;
    this.#revocations = revocations;
    this.#log = log;
  }

  /** Lets all proxies know when they connect that older tokens of an agent, or of all by "*", are revoked. */
  keep(agentId: string, beforeSecs: number): void {
    const command = commandText("EVAL", script, 1, revokedKey, agentId, beforeSecs);
    const done = (error: Error | undefined) => {
      if (error) this.#log.error({ reason: reasonOf(error) }, "revocation could not be kept in Redis");
    };
    const sent = this.#shard?.publisher.command(revokedKey, command, commands, { done });
    if (!sent) done(new Unavailable("too much is pending"));
  }

  /** Reads them over a connection to a server that may have them. */
  async learn(redis: Redis, shard: Shard): Promise<void> {
    if (this.#shard !== shard) return;
    try {
      const revoked = await redis.hgetall(revokedKey);
      for (const [agentId, secs] of Object.entries(revoked)) this.#revocations.learn(agentId, Number(secs));
    } catch (error) {
      // It has the wrong type, or we may not read it: that must not keep everybody out.
      if (!isReply(error)) throw error;
      this.#log.warn({ reason: reasonOf(error) }, "revoked tokens could not be read from Redis");
    }
  }

  get #shard(): Shard | undefined {
    return this.#topology.at(this.#topology.slotOf(revokedKey));
  }
}
