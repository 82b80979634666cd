/**
 * A Cluster: a shard for each master, and a table from slots to shards. Servers are asked for the table every second,
 * and whenever one of them says that something is not, or may not be, where we think it is. When a slot has moved, the
 * channels and what is pending go to the other shard; whoever listened is told of the gap.
 *
 * No client library's cluster class is used: after a slot has moved those of ioredis and node-redis hear nothing, and do
 * not say so.
 */

import type { Redis } from "ioredis";
import { within } from "../deadline.ts";
import type { Log } from "../log.ts";
import type { ClusterAddress, RedisIdentity, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { reasonOf } from "./errors.ts";
import { Shard, type ShardOptions } from "./shard.ts";
import { slotCount, slotOf } from "./slot.ts";
import type { Listener } from "./subscriptions.ts";
import type { Topology } from "./topology.ts";

/** Time between two looks at the table, when nothing calls for one sooner, and the least time between two. */
const watchMs = 1000;
const hurryMs = 100;
/** How long a server may take to say what the table is. */
const timeoutMs = 1000;
/** How long a slot that moves waits for what is under way to its former server. */
const handOverMs = 2000;

/** What one server says. */
interface Answer {
  readonly from: string;
  /** Grows with each change of the table. */
  readonly epoch: number;
  /** It is not cut off, and all slots are served, as far as the Cluster's settings want that. */
  readonly isOk: boolean;
  /** The masters' names, by slot. */
  readonly owners: readonly (string | undefined)[];
  /** All servers by name, replicas too. */
  readonly servers: ReadonlyMap<string, TcpAddress>;
}

/** The shards of a Cluster. */
export class Cluster implements Topology {
  readonly #address: ClusterAddress & RedisIdentity;
  readonly #log: Log;
  readonly #options: Omit<ShardOptions, "address" | "cluster">;
  readonly #bySlot = new Array<Shard | undefined>(slotCount).fill(undefined);
  readonly #byName = new Map<string, Shard>();
  #shards: readonly Shard[] = [];
  /** All servers that were ever named last: whom to ask when no shard answers. */
  #servers: ReadonlyMap<string, TcpAddress>;
  /** Listeners whose slot has had no shard yet. */
  #homeless: { readonly name: string; readonly listener: Listener }[] = [];
  /** Shards that serve nothing any more and are being closed. */
  readonly #leaving = new Set<Promise<void>>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #lookedAtMs = -Infinity;
  #looking: Promise<void> | undefined;
  /** Something has changed since the look that goes on now began. */
  #again = false;
  #toldReason: string | undefined;
  #closed = false;

  /** Looks for the servers, and goes on looking for as long as it lives. */
  constructor(address: ClusterAddress & RedisIdentity, options: Omit<ShardOptions, "address" | "cluster">) {
    this.#address = address;
    this.#log = options.log;
    this.#options = options;
    this.#servers = new Map(address.nodes.map((node) => [nameOf(node), node]));
    this.#look();
  }

  /** See {@linkcode Topology}. */
  get shards(): readonly Shard[] {
    return this.#shards;
  }

  /** See {@linkcode Topology}. */
  slotOf(name: string): number {
    return slotOf(name);
  }

  /** See {@linkcode Topology}. */
  at(slot: number): Shard | undefined {
    return this.#bySlot[slot];
  }

  /** See {@linkcode Topology}. */
  listen(name: string, listener: Listener): void {
    const shard = this.#bySlot[slotOf(name)];
    if (shard) shard.subscriptions.add(name, listener);
    else this.#homeless.push({ name, listener });
  }

  /** See {@linkcode Topology}. */
  async close(timeoutMs: number): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timer);
    await Promise.all(this.#shards.map((shard) => shard.close(timeoutMs)));
    await Promise.all([this.#looking, ...this.#leaving]);
  }

  /** Something is elsewhere: looks soon. */
  #hurry(): void {
    if (this.#looking !== undefined) this.#again = true;
    else this.#lookLater(Math.max(0, this.#lookedAtMs + hurryMs - performance.now()));
  }

  #lookLater(delayMs: number): void {
    clearTimeout(this.#timer);
    if (!this.#closed) this.#timer = setTimeout(() => this.#look(), delayMs);
  }

  #look(): void {
    this.#lookedAtMs = performance.now();
    this.#again = false;
    this.#looking = this.#askAndApply().catch((error) => {
      this.#log.error({ err: error }, "looking at the Cluster failed");
    }).finally(() => {
      this.#looking = undefined;
      this.#lookLater(this.#again || this.#shards.length === 0 ? hurryMs : watchMs);
    });
  }

  async #askAndApply(): Promise<void> {
    const reasons = new Set<string>();
    let answers = await this.#ask(
      [...this.#byName].flatMap(([name, { writable }]) => writable ? [askOver(name, writable)] : []),
      reasons,
    );
    if (answers.length === 0) {
      answers = await this.#ask([...this.#servers].map(([name, server]) => this.#askAnew(name, server)), reasons);
    }
    if (this.#closed) return;
    // A server that was cut off, or has not heard of a change yet, has an older epoch.
    const [newest] = answers.sort((a, b) => Number(b.isOk) - Number(a.isOk) || b.epoch - a.epoch);
    if (newest === undefined) return this.#tell([...reasons].join("; ") || "no server is known");
    if (newest.owners.every((owner) => owner === undefined)) return this.#tell("no slots are assigned");
    this.#toldReason = undefined;
    this.#servers = newest.servers;
    await this.#apply(newest);
  }

  async #ask(questions: readonly Promise<Answer>[], reasons: Set<string>): Promise<Answer[]> {
    const outcomes = await Promise.allSettled(questions);
    for (const outcome of outcomes) if (outcome.status === "rejected") reasons.add(reasonOf(outcome.reason));
    return outcomes.flatMap((outcome) => outcome.status === "fulfilled" ? [outcome.value] : []);
  }

  #askAnew(name: string, server: TcpAddress): Promise<Answer> {
    return askServer({ ...this.#identity, ...server }, timeoutMs, (redis) => askOver(name, redis));
  }

  get #identity(): RedisIdentity {
    const { nodes: _, ...identity } = this.#address;
    return identity;
  }

  #tell(reason: string): void {
    if (reason === this.#toldReason) return;
    this.#toldReason = reason;
    this.#log.warn({ reason }, "the Cluster's servers could not be found");
  }

  /** Makes the table what a server says. A slot that nobody serves stays where it was. */
  async #apply({ owners, servers }: Answer): Promise<void> {
    const kept = new Set<Shard>();
    const moves = new Map<Shard | undefined, number[]>();
    for (let slot = 0; slot < slotCount; slot++) {
      const former = this.#bySlot[slot];
      const name = owners[slot];
      if (name === undefined) {
        if (former) kept.add(former);
        continue;
      }
      const owner = this.#byName.get(name) ?? this.#found(name, servers.get(name)!, owners);
      kept.add(owner);
      if (former === owner) continue;
      const slots = moves.get(former);
      if (slots) slots.push(slot);
      else moves.set(former, [slot]);
    }
    for (const shard of this.#shards) {
      if (!kept.has(shard)) shard.drop("another server has its slots");
    }
    await Promise.all([...moves].map(([former, slots]) => this.#move(former, slots, owners)));
    this.#shards = [...kept];
    for (const [name, shard] of this.#byName) {
      if (kept.has(shard)) continue;
      this.#byName.delete(name);
      this.#retire(name, shard);
    }
    for (const { name, listener } of this.#homeless.splice(0)) this.listen(name, listener);
  }

  /** A master that had no slots when it was last looked at. */
  #found(name: string, server: TcpAddress, owners: Answer["owners"]): Shard {
    const shard = new Shard({
      ...this.#options,
      log: this.#log.child({ server: name }),
      address: { ...this.#identity, ...server },
      cluster: {
        canary: canaryIn((slot) => owners[slot] === name),
        onElsewhere: () => this.#hurry(),
      },
    });
    this.#byName.set(name, shard);
    this.#shards = [...this.#shards, shard];
    this.#log.info({ server: name }, "a server of the Cluster has been found");
    return shard;
  }

  /** Slots have left a shard: what it has of theirs goes to the new ones, behind what is under way. */
  async #move(former: Shard | undefined, slots: readonly number[], owners: Answer["owners"]): Promise<void> {
    const ownerOf = (slot: number) => this.#byName.get(owners[slot]!)!;
    if (former === undefined) {
      for (const slot of slots) this.#bySlot[slot] = ownerOf(slot);
      return;
    }
    const { promise: answered, resolve } = Promise.withResolvers<void>();
    former.publisher.betweenBatches(() => {
      const leaving = new Set(slots);
      const concerns = (name: string) => leaving.has(slotOf(name));
      for (const slot of slots) this.#bySlot[slot] = ownerOf(slot);
      if (concerns(former.canary) && this.#bySlot.includes(former)) {
        former.moveCanary(canaryIn((slot) => this.#bySlot[slot] === former));
      }
      const channels = former.subscriptions.take((name) => name !== former.canary && concerns(name));
      for (const channel of channels) this.#bySlot[slotOf(channel.name)]!.subscriptions.adopt([channel]);
      const pending = Map.groupBy(
        former.publisher.take(concerns),
        ({ channel, key }) => this.#bySlot[slotOf((channel ?? key)!)]!,
      );
      for (const [shard, some] of pending) shard.publisher.adopt(some);
      this.#log.info({ from: former.name, slots: slots.length, channels: channels.length }, "slots have moved");
      resolve();
    });
    await within(handOverMs, answered, () => former.drop("slots leave it, and it does not answer"));
    await answered;
  }

  /** It serves nothing any more: no outage of it concerns anybody. */
  #retire(name: string, shard: Shard): void {
    this.#log.info({ server: name }, "a server of the Cluster serves nothing any more");
    this.#options.onRecovery(shard);
    const left = shard.close(0).finally(() => this.#leaving.delete(left));
    this.#leaving.add(left);
  }
}

const nameOf = ({ host, port }: TcpAddress) => `${host}:${port}`;

/** A canary's channel in a slot that will do. */
function canaryIn(willDo: (slot: number) => boolean): string {
  const id = crypto.randomUUID();
  for (let n = 0;; n++) {
    const channel = `wsproxy:canary:${id}:${n}`;
    if (willDo(slotOf(channel))) return channel;
  }
}

/** What a server says over a connection. */
async function askOver(from: string, redis: Redis): Promise<Answer> {
  const questions = Promise.all([redis.cluster("INFO"), redis.cluster("SLOTS")]);
  const [info, ranges] = await within(timeoutMs, questions, () => {
    throw new Error(`no answer within ${timeoutMs} ms`);
  });
  const fields = new Map(info.split("\r\n").map((line) => line.split(":") as [string, string]));
  const owners = new Array<string | undefined>(slotCount).fill(undefined);
  const servers = new Map<string, TcpAddress>();
  // A server that does not know its own address names none.
  const self = from.slice(0, from.lastIndexOf(":"));
  for (const [first, last, ...nodes] of ranges) {
    const addresses = nodes.map(([host, port]) => ({ host: (host as string | null) ?? "?", port }))
      .map(({ host, port }) => ({ host: host === "" || host === "?" ? self : host, port }));
    for (const address of addresses) servers.set(nameOf(address), address);
    owners.fill(nameOf(addresses[0]!), first, last + 1);
  }
  const epoch = Number(fields.get("cluster_current_epoch"));
  return { from, epoch, isOk: fields.get("cluster_state") === "ok", owners, servers };
}
