/**
 * What clients send, on its way to Redis: one queue in order, one batch of it at a time under way. What was never
 * written waits out an outage and goes once; what was written when the connection ended is not repeated, as it may have
 * arrived, and its source is told. In a Cluster, what belongs to a slot that leaves is handed over between two batches,
 * so that its order stays.
 */

import { backoffMs } from "../backoff.ts";
import { within } from "../deadline.ts";
import type { Redis } from "ioredis";
import type { Log } from "../log.ts";
import { pendingOverheadBytes } from "../overhead.ts";
import type { RedisConnection } from "./connection.ts";
import { isPassing, isRedirected, isReply, isTransient, reasonOf, refusedOrThrow, Unavailable } from "./errors.ts";
import { slotOf } from "./slot.ts";
import type { Room } from "./subscriptions.ts";
import { type Outcomes, PublishBatch, type PublishCommand } from "./publish_batch.ts";

/**
 * Why messages have not arrived: Redis `refused` them, or the connection ended and they are `unconfirmed`, or their
 * source had them `discarded`.
 */
export type Loss = "refused" | "unconfirmed" | "discarded";

/** What something pending belongs to: it counts in it, and is settled with it. */
export interface Owner {
  /** What is pending of it, kept by the publisher; undefined for what counts in the sum of all only. */
  pendingCost?: number;
  /** What is pending of it is not to be written any more. */
  readonly discarded?: boolean;
}

/** The owner of messages. */
export interface Source extends Owner {
  pendingCost: number;
  readonly discarded: boolean;
  /** The last entry that was written along with a message of it has been taken: a backend will read that. */
  entered: boolean;
  /** So many of its messages have not arrived. They are not sent again. */
  lost(messages: number, why: Loss): void;
  /** So many of its messages were published while no backend was subscribed. */
  unheard(messages: number): void;
}

/** What is to be known of one message and its entry. */
export interface Receipt {
  /** Its entry has been written, or has not; undefined when it may have been. The entry's issuer is told before. */
  entered(entered: boolean | undefined): void;
  /**
   * So many subscribers have received it, or it has not arrived, or may not have. The message's source is not told of it
   * besides; it is instead, when the message is discarded.
   */
  published(receivers: number | Exclude<Loss, "discarded">): void;
}

/** The owner of a command. */
export interface Issuer extends Owner {
  /**
   * It has been carried out, or has not, or that is not known. Called in the order of the commands; `reply` is what
   * Redis has answered. An error when it was discarded.
   */
  done(error: Error | undefined, reply?: unknown): void;
  /** What it was discarded for passes. */
  readonly passes?: boolean;
  /** Another command must have been answered first: it is not sent along with one that stands before it. */
  readonly waits?: boolean;
  /**
   * What is to be sent instead, before all that came later, as Redis has certainly not carried it out; undefined when it
   * is `done`. Given what was sent, and how Redis has answered.
   */
  again?(text: string, outcome: unknown): string | undefined;
}

/** What waits to be sent. */
export type Pending = PendingMessage | PendingCommand;

interface PendingMessage extends PendingCommon {
  readonly channel: string;
  readonly key: undefined;
  readonly owner: Source;
}

/** Its text is RESP. */
interface PendingCommand extends PendingCommon {
  readonly channel: undefined;
  /** What it is about; undefined for what belongs to the server itself. */
  readonly key: string | undefined;
  readonly owner: Issuer;
}

interface PendingCommon {
  readonly text: string;
  /** What a message or its entry was given to be told of; undefined for other commands. */
  readonly receipt: Receipt | undefined;
  /** What it takes of the bounds. */
  readonly cost: number;
  /** It does no harm when it is carried out twice. */
  readonly repeats: boolean;
  /** When it came, of messages whose time is taken; else 0. */
  readonly timedFromMs: number;
}

/** Messages in one batch, and the cost at which it is full: what a connection that ends can leave unconfirmed. */
const maxBatch = 4096;
const maxBatchCost = 1024 * 1024;
/** All sources' pending messages together, in characters and overhead: what an outage may cost the process. */
const maxPendingCost = 64 * 1024 * 1024;
/** How long one message may take that a request waits for. */
const publishTimeoutMs = 5000;
/** Delays after a refusal that will pass. */
const firstRetryMs = 50;
const maxRetryMs = 1000;

/** What a publisher is made of. */
export interface PublisherOptions {
  readonly connection: RedisConnection;
  readonly log: Log;
  readonly command: PublishCommand;
  /** Redis has said that something belongs to another server. */
  readonly onRedirected: () => void;
  /** A message has taken so many seconds until Redis had confirmed it; told of one in {@linkcode timedOneIn}. */
  readonly onTimed: (seconds: number) => void;
}

/** Taking the time of every message would cost more than some messages do. A power of two. */
export const timedOneIn = 64;

/** The queue to one connection. */
export class Publisher {
  readonly #options: PublisherOptions;
  #queue: Pending[] = [];
  /** Goes before all that. */
  #urgent: Pending[] = [];
  /** Where the queue begins: taking from the front of an array would move the rest. */
  #head = 0;
  #cost = 0;
  #messages = 0;
  #batch: PublishBatch | undefined;
  /** What belongs to another server, and all that came later of the same slots: the other slots need not wait for it. */
  readonly #parked: Pending[] = [];
  readonly #parkedSlots = new Set<number>();
  /** Times in a row that something belonged to another server. */
  #parkings = 0;
  #parkTimer: ReturnType<typeof setTimeout> | undefined;
  /** What is to be done when no batch is under way. */
  #between: (() => void)[] = [];
  #pumping = false;
  #idle: (() => void) | undefined;
  /** Times in a row that Redis has taken none. */
  #failures = 0;
  #retryTimer: ReturnType<typeof setTimeout> | undefined;

  /** Nothing is pending yet. */
  constructor(options: PublisherOptions) {
    this.#options = options;
  }

  /** Publishes one message, in order. There must be room. */
  publish(channel: string, text: string, source: Source, receipt?: Receipt): void {
    const cost = text.length + pendingOverheadBytes;
    this.#charge(source, cost);
    const timedFromMs = (++this.#messages & (timedOneIn - 1)) === 0 ? performance.now() : 0;
    this.#queue.push({ channel, key: undefined, text, cost, owner: source, receipt, repeats: false, timedFromMs });
    this.resume();
  }

  /** What is pending, in characters and overhead. */
  get cost(): number {
    return this.#cost;
  }

  /** The command that its messages are published with. */
  get publishCommand(): PublishCommand {
    return this.#options.command;
  }

  /** Whether there is room for one more: less than `maxCost` characters of this owner, and not too many of all, pend. */
  hasRoom(owner: { readonly pendingCost: number }, maxCost: number): boolean {
    return owner.pendingCost < maxCost && this.#cost < maxPendingCost;
  }

  /** The entry that goes with a message, given in RESP: sent with what is published next. There must be room. */
  enter(key: string, text: string, issuer: Issuer, receipt?: Receipt): void {
    this.#push(this.#queue, key, text, issuer, false, receipt);
  }

  /**
   * Sends a command after all that is pending, given in RESP; it must do no harm when it is carried out twice. "full",
   * and not sent, when too much of all sources is pending already.
   */
  command(key: string | undefined, text: string, issuer: Issuer): Room {
    if (this.#cost >= maxPendingCost) return "full";
    this.#push(this.#queue, key, text, issuer, true);
    this.resume();
    return "taken";
  }

  /** The same, before all that is pending; sent by {@linkcode Publisher.resume}, so that several keep their order. */
  commandFirst(key: string | undefined, text: string, issuer: Issuer): Room {
    if (this.#cost >= maxPendingCost) return "full";
    this.#push(this.#urgent, key, text, issuer, true);
    return "taken";
  }

  /**
   * Publishes one message at once, beside the queue, and says how many have received it.
   * @throws {Unavailable} when that is not known within some seconds; it may have been published.
   */
  async publishNow(channel: string, text: string): Promise<number> {
    return Number(await this.#answer((redis) => redis[this.#options.command](channel, text)));
  }

  /**
   * Sends a command at once, beside the queue, given in RESP.
   * @throws {Unavailable} when it is not known within some seconds whether it was carried out.
   */
  async commandNow(text: string): Promise<void> {
    await this.#answer(async (redis) => {
      const [outcome] = await new PublishBatch([{ channel: undefined, text }]).send(redis);
      if (outcome instanceof Error) throw outcome;
    });
  }

  /**
   * What the server's clock says, in microseconds since the epoch; what ours says where that is a secret.
   * @throws {Unavailable} when it does not answer within some seconds.
   */
  async now(): Promise<number> {
    const time = await this.#answer((redis) => redis.time().catch(refusedOrThrow));
    return time ? Number(time[0]) * 1_000_000 + Number(time[1]) : Date.now() * 1000;
  }

  async #answer<T>(ask: (redis: Redis) => Promise<T>): Promise<T> {
    const redis = this.#options.connection.writable;
    if (redis === undefined) throw new Unavailable("not connected");
    try {
      return await within(publishTimeoutMs, ask(redis), () => {
        throw new Unavailable(`no answer within ${publishTimeoutMs} ms`);
      });
    } catch (error) {
      if (isRedirected(error)) this.#options.onRedirected();
      throw new Unavailable(reasonOf(error));
    }
  }

  /** Something may be sent: the connection serves, or more is pending. */
  resume(): void {
    if (!this.#pumping) void this.#pump();
  }

  /** The connection has ended: what is under way may have arrived or not. */
  interrupt(): void {
    this.#batch?.abort(new Error("the connection ended"));
  }

  /** Does something as soon as no batch is under way, which may be now. */
  betweenBatches(action: () => void): void {
    if (this.#batch === undefined) action();
    else this.#between.push(action);
  }

  /** Gives away what is pending about some names; see {@linkcode Publisher.betweenBatches}. */
  take(concerns: (name: string) => boolean): Pending[] {
    const taken: Pending[] = [];
    this.#unpark();
    this.#putFirst(this.#urgent.splice(0));
    this.#queue = this.#queue.filter((pending) => {
      const name = pending.channel ?? pending.key;
      if (name === undefined || !concerns(name)) return true;
      taken.push(pending);
      this.#cost -= pending.cost;
      return false;
    });
    this.#parkings = 0;
    if (this.#batch === undefined) queueMicrotask(() => this.resume());
    return taken;
  }

  /** Takes what another publisher has given away. */
  adopt(taken: readonly Pending[]): void {
    for (const pending of taken) {
      this.#cost += pending.cost;
      this.#queue.push(pending);
    }
    this.resume();
  }

  /** Waits until nothing is pending, for at most `timeoutMs` milliseconds, and says what is left. */
  async close(timeoutMs: number): Promise<void> {
    if (this.#cost > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#idle = resolve;
      await within(timeoutMs, promise);
    }
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#parkTimer);
    const left = this.#urgent.length + this.#queue.length - this.#head + this.#parked.length;
    if (left > 0) this.#options.log.error({ messages: left }, "messages left unpublished");
  }

  #push(
    queue: Pending[],
    key: string | undefined,
    text: string,
    owner: Issuer,
    repeats: boolean,
    receipt?: Receipt,
  ): void {
    const cost = text.length + pendingOverheadBytes;
    this.#charge(owner, cost);
    queue.push({ channel: undefined, key, text, cost, owner, receipt, repeats, timedFromMs: 0 });
  }

  async #pump(): Promise<void> {
    this.#pumping = true;
    while (this.#retryTimer === undefined) {
      if (this.#urgent.length > 0) this.#putFirst(this.#urgent.splice(0));
      if (this.#head === this.#queue.length) break;
      const redis = this.#options.connection.writable;
      if (redis === undefined) break;
      const pending = this.#takeBatch();
      if (pending.length === 0) continue;
      this.#batch = new PublishBatch(pending, this.#options.command);
      const outcomes = await this.#batch.send(redis);
      this.#batch = undefined;
      this.#account(pending, outcomes);
      if (this.#between.length > 0) { for (const action of this.#between.splice(0)) action(); }
    }
    this.#pumping = false;
    if (this.#head === this.#queue.length && this.#parked.length === 0) this.#idle?.();
  }

  #account(pending: readonly Pending[], outcomes: Outcomes): void {
    const again = firstOfTransient(outcomes);
    let unconfirmed: Map<Source, number> | undefined;
    let silent: Map<Source, number> | undefined;
    let kept: Pending[] | undefined;
    for (let i = 0; i < again; i++) {
      const each = pending[i]!;
      const outcome = outcomes[i];
      if (isRedirected(outcome)) {
        this.#park(each, reasonOf(outcome));
        continue;
      }
      if (each.repeats && outcome instanceof Error && !isReply(outcome)) {
        (kept ??= []).push(each);
        continue;
      }
      if (each.channel === undefined) {
        const instead = this.#settle(each, outcome);
        if (instead !== undefined) (kept ??= []).push(instead);
        continue;
      }
      this.#release(each);
      const { owner: source, receipt, timedFromMs } = each;
      if (timedFromMs > 0 && !(outcome instanceof Error)) {
        this.#options.onTimed((performance.now() - timedFromMs) / 1000);
      }
      if (typeof outcome === "number") {
        if (receipt !== undefined) receipt.published(outcome);
        else if (outcome === 0 && !source.entered) {
          silent ??= new Map();
          silent.set(source, (silent.get(source) ?? 0) + 1);
        }
      } else if (isReply(outcome)) {
        this.#options.log.error({ reason: reasonOf(outcome) }, "Redis refused a message");
        if (receipt !== undefined) receipt.published("refused");
        else source.lost(1, "refused");
      } else if (receipt !== undefined) receipt.published("unconfirmed");
      else {
        unconfirmed ??= new Map();
        unconfirmed.set(source, (unconfirmed.get(source) ?? 0) + 1);
      }
    }
    for (const [source, messages] of unconfirmed ?? []) source.lost(messages, "unconfirmed");
    for (const [source, messages] of silent ?? []) source.unheard(messages);
    const left = pending.slice(again);
    if (kept !== undefined || left.length > 0) this.#putFirst([...kept ?? [], ...left]);
    if (this.#parked.length === 0) this.#parkings = 0;
    if (left.length === 0) this.#failures = 0;
    else this.#retryLater(left.length, reasonOf(outcomes[again]));
  }

  /** Tells what became of a command, or returns what is to be sent instead. */
  #settle(command: PendingCommand, outcome: unknown): PendingCommand | undefined {
    const { owner, receipt } = command;
    this.#release(command);
    const text = owner.again?.(command.text, outcome);
    if (text === undefined) {
      if (outcome instanceof Error) owner.done(outcome);
      else owner.done(undefined, outcome);
      receipt?.entered(outcome instanceof Error ? (isPassing(outcome) ? undefined : false) : true);
      return undefined;
    }
    const instead = { ...command, text, cost: text.length + pendingOverheadBytes };
    this.#charge(owner, instead.cost);
    return instead;
  }

  /** Keeps what this server has redirected: another one will take it, or this one later. */
  #park(pending: Pending, reason: string): void {
    this.#parked.push(pending);
    this.#parkedSlots.add(slotOf(pending.channel ?? pending.key ?? ""));
    if (this.#parkTimer !== undefined) return;
    if (this.#parkings === 0) this.#options.log.warn({ reason }, "messages wait for their slot");
    this.#options.onRedirected();
    this.#parkTimer = setTimeout(() => {
      this.#unpark();
      this.resume();
    }, backoffMs(this.#parkings++, firstRetryMs, maxRetryMs));
  }

  #unpark(): void {
    clearTimeout(this.#parkTimer);
    this.#parkTimer = undefined;
    this.#putFirst(this.#parked.splice(0));
    this.#parkedSlots.clear();
  }

  /** Tries again later: Redis has taken none of these, for a reason that passes. */
  #retryLater(messages: number, reason: string): void {
    this.#options.log.warn({ messages, reason }, "Redis takes no messages now");
    this.#retryTimer = setTimeout(() => {
      this.#retryTimer = undefined;
      this.resume();
    }, backoffMs(this.#failures++, firstRetryMs, maxRetryMs));
  }

  #putFirst(some: readonly Pending[]): void {
    this.#queue = [...some, ...this.#queue.slice(this.#head)];
    this.#head = 0;
  }

  #charge(owner: Owner, cost: number): void {
    if (owner.pendingCost !== undefined) owner.pendingCost += cost;
    this.#cost += cost;
  }

  #release({ owner, cost }: Pending): void {
    if (owner.pendingCost !== undefined) owner.pendingCost -= cost;
    this.#cost -= cost;
  }

  #takeBatch(): Pending[] {
    const queue = this.#queue;
    const first = this.#head;
    let end = first;
    let discarded = false;
    for (let cost = 0; end < queue.length && end - first < maxBatch && cost < maxBatchCost; end++) {
      const each = queue[end]!;
      if (end > first && each.channel === undefined && each.owner.waits) break;
      cost += each.cost;
      discarded ||= each.owner.discarded ?? false;
    }
    let batch = first === 0 && end === queue.length ? queue : queue.slice(first, end);
    if (discarded) batch = batch.filter((pending) => !this.#dropDiscarded(pending));
    if (this.#parkedSlots.size > 0) batch = batch.filter((pending) => !this.#isParked(pending));
    if (end === queue.length) {
      this.#queue = [];
      this.#head = 0;
    } else if (end > queue.length / 2) {
      this.#queue = queue.slice(end);
      this.#head = 0;
    } else this.#head = end;
    return batch;
  }

  #isParked(pending: Pending): boolean {
    const name = pending.channel ?? pending.key;
    if (name === undefined || !this.#parkedSlots.has(slotOf(name))) return false;
    this.#parked.push(pending);
    return true;
  }

  #dropDiscarded(pending: Pending): boolean {
    if (!pending.owner.discarded) return false;
    this.#release(pending);
    if (pending.channel === undefined) {
      pending.owner.done(new Error("discarded"));
      pending.receipt?.entered(pending.owner.passes ? undefined : false);
    } else pending.owner.lost(1, "discarded");
    return true;
  }
}

/**
 * Where the messages begin that can be sent again without a change of order: Redis refused each of them for a reason
 * that passes, and took none after them.
 */
function firstOfTransient(outcomes: Outcomes): number {
  let first = outcomes.length;
  while (first > 0 && isTransient(outcomes[first - 1])) first--;
  return first;
}
