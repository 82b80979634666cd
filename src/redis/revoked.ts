/**
 * Revoked tokens, as Redis keeps them for all proxies: a proxy that connects reads them, so that no request needs a
 * look-up. Redis may lose them (eviction, a flush, a failover), and the proxies that live bring them back.
 */

import type { Redis } from "ioredis";
import type { Log } from "../log.ts";
import type { AgentId, Revocation, Revocations } from "../revocations.ts";
import { isReply, reasonOf } from "./errors.ts";
import { commandText } from "./publish_batch.ts";
import script from "./revoke.lua" with { type: "text" };
import type { Shard } from "./shard.ts";
import { servingOrThrow, shardOf, type Topology } from "./topology.ts";

/** The hash: see revoke.lua. */
const revokedKey = "wsproxy:revoked";
/** Beats of the heartbeat between two looks at it: two seconds. */
const beatsPerLook = 4;
/** Agents in one call of the script. */
const perCall = 100;

/** The field of an agent. "*" is all of them; an agent of that name has the field that no agent's name can be. */
const fieldOf = (agentId: AgentId): string => agentId === undefined ? "*" : agentId === "*" ? "" : agentId;
const agentOf = (field: string): AgentId => field === "*" ? undefined : field === "" ? "*" : field;

const valueOf = ({ beforeSecs, atMs }: Revocation): number => beforeSecs > 0 ? beforeSecs : -atMs;

/** The hash in Redis. */
export class Revoked {
  readonly #topology: Topology;
  readonly #revocations: Revocations;
  readonly #log: Log;
  #beats = 0;
  /** What is wrong with it, as it was last logged. */
  #toldReason: string | undefined;

  /** `revocations` is what this proxy knows of them. */
  constructor(topology: Topology, revocations: Revocations, log: Log) {
    this.#topology = topology;
    this.#revocations = revocations;
    this.#log = log;
  }

  /** Keeps what has been heard about an agent's tokens, or about those of all. */
  async keep(agentId: AgentId): Promise<void> {
    const heard = this.#revocations.known.get(agentId);
    if (heard === undefined) return;
    const text = commandText("EVAL", script, 1, revokedKey, fieldOf(agentId), valueOf(heard), "any");
    try {
      // Beside the queue, where it would be sent again after an outage, when it may long be wrong.
      await servingOrThrow(this.#shard).publisher.commandNow(text);
      heard.kept = true;
    } catch (error) {
      this.#log.error({ reason: reasonOf(error) }, "revocation could not be kept in Redis");
      // Tokens that are revoked stay so, and the next look tries again; of what was taken back Redis decides.
      if (heard.beforeSecs === 0) heard.kept = true;
    }
  }

  /** Reads the hash over a connection that does not serve yet, and brings back what is missing there. */
  async learn(redis: Redis, shard: Shard): Promise<void> {
    if (this.#shard === shard) await this.#look(redis);
  }

  /** A server's heart has beaten: from time to time that is a reason to look. */
  beat(shard: Shard): void {
    if (this.#shard !== shard || ++this.#beats % beatsPerLook !== 0 || shard.writable === undefined) return;
    this.#look(shard.writable).catch((error) => {
      this.#log.debug({ reason: reasonOf(error) }, "the connection ended while revoked tokens were read");
    });
  }

  /** @throws what ended the connection meanwhile. */
  async #look(redis: Redis): Promise<void> {
    try {
      // A Map, as an agent may have the name of what every object has.
      const inRedis = new Map(Object.entries(await redis.hgetall(revokedKey)));
      const malformed = [...inRedis].filter(([field, text]) => !this.#learn(field, text));
      await this.#bringBack(redis, inRedis);
      const fields = malformed.map(([field]) => JSON.stringify(field));
      this.#tell(fields.length > 0 ? `not seconds since 1970: ${fields.join(", ")}` : undefined);
    } catch (error) {
      // It has the wrong type, or we have no right to it: that must not keep all clients out.
      if (!isReply(error)) throw error;
      this.#tell(reasonOf(error));
    }
  }

  async #bringBack(redis: Redis, inRedis: ReadonlyMap<string, string>): Promise<void> {
    const missing = [...this.#revocations.known].filter(([agentId, known]) =>
      // What was just taken back is on its way.
      Number(inRedis.get(fieldOf(agentId))) !== valueOf(known) && (known.kept || known.beforeSecs > 0)
    );
    for (let at = 0; at < missing.length; at += perCall) {
      const words = missing.slice(at, at + perCall).flatMap(([agentId, known]) => {
        const field = fieldOf(agentId);
        return [field, valueOf(known), inRedis.get(field) ?? ""];
      });
      await redis.eval(script, 1, revokedKey, ...words);
    }
    for (const [, known] of missing) known.kept = true;
    if (missing.length > 0) this.#log.warn({ agents: missing.length }, "revocations were missing in Redis");
  }

  /** What is wrong with the hash is logged once, and not at each look. */
  #tell(reason: string | undefined): void {
    if (reason !== undefined && reason !== this.#toldReason) {
      this.#log.warn({ reason }, "revoked tokens in Redis cannot be used");
    }
    this.#toldReason = reason;
  }

  /** False when it means nothing. */
  #learn(field: string, text: string): boolean {
    const value = Number(text);
    if (text.trim() === "" || Number.isNaN(value)) return false;
    const learnt = value > 0 ? { beforeSecs: value, atMs: 0 } : { beforeSecs: 0, atMs: -value };
    this.#revocations.learn(agentOf(field), { ...learnt, kept: true });
    return true;
  }

  get #shard(): Shard | undefined {
    return shardOf(this.#topology, revokedKey);
  }
}
