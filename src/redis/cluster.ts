/**
 * A Cluster: a shard for each master, and a table from slots to shards. The servers are asked for the table every
 * second, twice as often while one of them is away, and at once when one of them says that a slot has moved, or may
 * have. The channels of a slot that has moved, and what is pending for them, go to the other shard; their listeners are
 * told of the gap. Neither a look nor a move waits for a server that does not answer.
 *
 * No client library's cluster class is used: after a slot has moved those of ioredis and node-redis hear nothing, and do
 * not say so.
 */

import type { Redis } from "ioredis";
import { after, settled, within } from "../deadline.ts";
import type { Log } from "../log.ts";
import type { ClusterAddress, RedisIdentity, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { reasonOf } from "./errors.ts";
import { Shard, type ShardOptions } from "./shard.ts";
import { slotCount, slotOf } from "./slot.ts";
import type { Listener } from "./subscriptions.ts";
import type { Topology } from "./topology.ts";

/** Time from one look at the table to the next while a server is away; while none is, every other look is left out. */
const watchMs = 500;
/** The least time between two looks, when something calls for one. */
const hurryMs = 100;
/** How long a look waits for a server to answer. */
const timeoutMs = 1000;
/** How long slots wait for what is under way to the server that they leave, unless it has been silent for so long. */
const handOverMs = 1000;

/** What one server says. */
interface Answer {
  /** Grows with each change of the table. */
  readonly epoch: number;
  /** The server is not cut off, and all slots are served if the Cluster's settings require it. */
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
  /** All servers, replicas too, as they were named last: they are asked when no shard answers. */
  #servers: ReadonlyMap<string, TcpAddress>;
  /** What the shards' servers have been asked and have not answered yet: each is asked one thing at a time. */
  readonly #questions = new Map<string, { readonly answer: Promise<Answer>; readonly sinceMs: number }>();
  /** Listeners to channels in slots that have had no shard yet. */
  #homeless: { readonly name: string; readonly listener: Listener }[] = [];
  /** See {@linkcode Topology}. */
  faults: ReadonlyMap<string, string> = new Map();
  /** Slots that no server serves, as the servers say. */
  #unserved: ReadonlySet<number> = new Set();
  #outageTimer: ReturnType<typeof setTimeout> | undefined;
  /** Shards that serve nothing any more and are being closed. */
  readonly #leaving = new Set<Promise<void>>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  /** The last look has been left out, as no server was away. */
  #leftOut = false;
  #lookedAtMs = -Infinity;
  #looking: Promise<void> | undefined;
  /** Something may have changed since the present look began. */
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
  flowing(slot: number): boolean {
    return !this.#unserved.has(slot) && this.#bySlot[slot]?.flowing === true;
  }

  /** See {@linkcode Topology}. The table itself stands for the slots that no server serves. */
  concerns(server: object, slot: number): boolean {
    return server === this.#bySlot ? this.#unserved.has(slot) : server === this.#bySlot[slot];
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
    clearTimeout(this.#outageTimer);
    await Promise.all(this.#shards.map((shard) => shard.close(timeoutMs)));
    await Promise.all([this.#looking, ...this.#leaving]);
  }

  /** Something has moved, or may have: looks soon. */
  #hurry(): void {
    if (this.#looking !== undefined) this.#again = true;
    else this.#schedule(this.#lookedAtMs + hurryMs - performance.now(), () => this.#look());
  }

  #schedule(delayMs: number, action: () => void): void {
    clearTimeout(this.#timer);
    if (!this.#closed) this.#timer = after(delayMs, action);
  }

  /** Looks while a server is away, as another one may take its slots at any moment; else every other time. */
  #watch(): void {
    const isAway = this.#questions.size > 0 || this.#shards.some(({ writable }) => writable === undefined);
    this.#leftOut = !isAway && !this.#leftOut;
    if (this.#leftOut) this.#schedule(watchMs, () => this.#watch());
    else this.#look();
  }

  #look(): void {
    this.#lookedAtMs = performance.now();
    this.#again = false;
    this.#looking = this.#askAndApply().catch((error) => {
      this.#log.error({ err: error }, "looking at the Cluster failed");
    }).finally(() => {
      this.#looking = undefined;
      if (this.#again || this.#shards.length === 0) this.#schedule(hurryMs, () => this.#look());
      else this.#schedule(watchMs, () => this.#watch());
    });
  }

  async #askAndApply(): Promise<void> {
    const reasons = new Set<string>();
    const reachable = [...this.#byName].flatMap(([name, { writable }]) => writable ? [this.#ask(name, writable)] : []);
    let answers = await majority(reachable, reasons);
    if (answers.length === 0) {
      const enough = new AbortController();
      const all = [...this.#servers].map(([name, server]) => this.#askAnew(name, server, enough.signal));
      answers = await majority(all, reasons);
      enough.abort();
      await Promise.allSettled(all);
    }
    if (this.#closed) return;
    // A server that was cut off, or has not heard of a change yet, has an older epoch.
    const [newest] = answers.toSorted((a, b) => Number(b.isOk) - Number(a.isOk) || b.epoch - a.epoch);
    if (newest === undefined) return this.#tell([...reasons].join("; ") || "no server is known");
    if (newest.owners.every((owner) => owner === undefined)) return this.#tell("no slots are assigned");
    this.#toldReason = undefined;
    this.#servers = newest.servers;
    this.#note(newest);
    await this.#apply(newest);
  }

  /** Asks a shard's server, unless it has not answered the last time yet. */
  #ask(name: string, redis: Redis): Promise<Answer> {
    let question = this.#questions.get(name);
    if (question === undefined) {
      question = { answer: askOver(name, redis), sinceMs: performance.now() };
      this.#questions.set(name, question);
      const done = () => this.#questions.delete(name);
      question.answer.then(done, done);
    }
    return within(timeoutMs, question.answer, () => {
      throw new Error(`no answer within ${timeoutMs} ms`);
    });
  }

  #askAnew(name: string, server: TcpAddress, signal: AbortSignal): Promise<Answer> {
    return askServer({ ...this.#identity, ...server }, timeoutMs, (redis) => askOver(name, redis), signal);
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

  /** Notes what is down though each server that is named may be well. */
  #note({ owners, isOk }: Answer): void {
    const unserved = new Set(owners.keys().filter((slot) => owners[slot] === undefined));
    const former = this.faults;
    const faults = new Map<string, string>();
    if (unserved.size > 0) faults.set(`slots ${rangesOf(unserved)}`, "no server serves them");
    // Sharded Pub/Sub is let through then, unless cluster-allow-pubsubshard-when-down says otherwise.
    if (!isOk) faults.set("keys", "cluster_state is not ok: no log or inbox can be read or written");
    this.faults = faults;
    for (const [part, reason] of faults) {
      if (!former.has(part)) this.#log.warn({ part, reason }, "a part of the Cluster is down");
    }
    if (former.size > 0 && faults.size === 0) this.#log.info("all parts of the Cluster are up again");
    if (unserved.symmetricDifference(this.#unserved).size === 0) return;
    this.#unserved = unserved;
    clearTimeout(this.#outageTimer);
    this.#options.onRecovery(this.#bySlot);
    if (unserved.size === 0) return;
    this.#outageTimer = setTimeout(() => {
      this.#log.error({ slots: rangesOf(unserved) }, "slots are served by no server for longer than the grace");
      this.#options.onOutage(this.#bySlot);
    }, this.#options.outageGraceMs);
  }

  /** Makes the table what a server says. A slot that no server serves stays where it was. */
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
    for (const shard of kept) {
      if (!this.#unserved.has(slotOf(shard.canary)) || !owners.includes(shard.name)) continue;
      shard.moveCanary(canaryIn((slot) => owners[slot] === shard.name));
    }
    for (const [name, shard] of this.#byName) {
      if (kept.has(shard)) continue;
      this.#byName.delete(name);
      this.#retire(name, shard);
    }
    for (const { name, listener } of this.#homeless.splice(0)) this.listen(name, listener);
  }

  /** A master that had no slots at the last look. */
  #found(name: string, server: TcpAddress, owners: Answer["owners"]): Shard {
    const shard = new Shard({
      ...this.#options,
      log: this.#log.child({ server: name }),
      address: { ...this.#identity, ...server },
      cluster: {
        canary: canaryIn((slot) => owners[slot] === name),
        onRedirected: () => this.#hurry(),
      },
    });
    this.#byName.set(name, shard);
    this.#shards = [...this.#shards, shard];
    this.#log.info({ server: name }, "a server of the Cluster has been found");
    return shard;
  }

  /** Slots have left a shard: their channels and what is pending go to the new owners, after the batch under way. */
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
    const nowMs = performance.now();
    const silentMs = nowMs - (this.#questions.get(former.name)?.sinceMs ?? nowMs);
    await within(handOverMs - silentMs, answered, () => {
      former.drop("slots leave it, and it does not answer");
    });
    await answered;
  }

  /** The server serves no slot any more: its outages concern no session. */
  #retire(name: string, shard: Shard): void {
    this.#log.info({ server: name }, "a server of the Cluster serves nothing any more");
    this.#options.onRecovery(shard);
    const left = shard.close(0).finally(() => this.#leaving.delete(left));
    this.#leaving.add(left);
  }
}

const nameOf = ({ host, port }: TcpAddress) => `${host}:${port}`;

/** Slots for operators: 5, 7-9. */
function rangesOf(slots: ReadonlySet<number>): string {
  const ranges: string[] = [];
  for (const first of slots) {
    if (slots.has(first - 1)) continue;
    let last = first;
    while (slots.has(last + 1)) last++;
    ranges.push(first === last ? `${first}` : `${first}-${last}`);
  }
  const most = 10;
  return ranges.length <= most
    ? ranges.join(", ")
    : `${ranges.slice(0, most).join(", ")} and ${ranges.length - most} more`;
}

/** A canary's channel in a slot that will do. */
function canaryIn(willDo: (slot: number) => boolean): string {
  const id = crypto.randomUUID();
  for (let n = 0;; n++) {
    const channel = `wsproxy:canary:${id}:${n}`;
    if (willDo(slotOf(channel))) return channel;
  }
}

/**
 * The answers of more than half of the servers that are asked, or of all that answer in time. An election takes more
 * than half of them, too: at least one of these answers knows of it.
 */
async function majority(questions: readonly Promise<Answer>[], reasons: Set<string>): Promise<readonly Answer[]> {
  const { values, errors } = await settled(questions, (answers) => answers.length * 2 > questions.length);
  for (const error of errors) reasons.add(reasonOf(error));
  return values;
}

/** What a server says over a connection. */
async function askOver(name: string, redis: Redis): Promise<Answer> {
  const [info, ranges] = await Promise.all([redis.cluster("INFO"), redis.cluster("SLOTS")]);
  const fields = new Map(info.split("\r\n").map((line) => line.split(":") as [string, string]));
  const owners = new Array<string | undefined>(slotCount).fill(undefined);
  const servers = new Map<string, TcpAddress>();
  // A server that does not know its own address names none.
  const self = name.slice(0, name.lastIndexOf(":"));
  for (const [first, last, ...nodes] of ranges) {
    const addresses = nodes.map(([host, port]) => ({ host: (host as string | null) ?? "?", port }))
      .map(({ host, port }) => ({ host: host === "" || host === "?" ? self : host, port }));
    for (const address of addresses) servers.set(nameOf(address), address);
    owners.fill(nameOf(addresses[0]!), first, last + 1);
  }
  const epoch = Number(fields.get("cluster_current_epoch"));
  return { epoch, isOk: fields.get("cluster_state") === "ok", owners, servers };
}
