/**
 * What clients send, on its way to Redis: one queue in order, one batch of it at a time under way. What was never
 * written waits out an outage and goes once; what was written when the connection ended is not repeated, as it may
 * have arrived, and its source is told.
 */

import { within } from "../deadline.ts";
import type { Log } from "../log.ts";
import type { Connection } from "./connection.ts";
import { isPassing, isReply, reasonOf, Unavailable } from "./errors.ts";
import { type Outcomes, PublishBatch, unheard } from "./publish_batch.ts";

/**
 * Why messages have not arrived: Redis `refused` them, or the connection ended and they are `unconfirmed`, or their
 * source had them `discarded`.
 */
export type Loss = "refused" | "unconfirmed" | "discarded";

/** Whose messages are published. */
export interface Source {
  /** What its pending messages take of the bounds; kept by the publisher. */
  pendingCost: number;
  /** Its pending messages are not to be written any more. */
  readonly discarded: boolean;
  /** The last entry that was written along with a message of it has been taken: somebody will read that. */
  entered: boolean;
  /** So many of its messages have not arrived. They are not sent again. */
  lost(messages: number, why: Loss): void;
  /** So many of its messages were published while nobody was subscribed. */
  unheard(messages: number): void;
}

/** Who sends a command that is no message. */
export interface Issuer {
  /** Its next command has been carried out, or has not, or that is not known. Called in the order of the commands. */
  done(error: Error | undefined): void;
}

interface Pending {
  /** Undefined for a command, whose text is RESP. */
  readonly channel: string | undefined;
  readonly text: string;
  /** What it takes of the bounds. */
  readonly cost: number;
  readonly source: Source;
  /** Who sends the command. */
  readonly issuer: Issuer | undefined;
  /** It does no harm when it is carried out twice. */
  readonly repeats: boolean;
}

/** Messages in one batch, and the cost at which it is full: what a connection that ends can leave unconfirmed. */
const maxBatch = 4096;
const maxBatchCost = 1024 * 1024;
/** Cost of a pending message besides its characters. */
const messageOverhead = 256;
/** All sources' pending messages together, in characters and overhead: what an outage may cost the process. */
const maxPendingCost = 64 * 1024 * 1024;
/** How long one message may take that somebody waits for. */
const publishTimeoutMs = 5000;
/** Delays after a refusal that will pass. */
const firstRetryMs = 50;
const maxRetryMs = 1000;

/** The queue to one connection. */
export class Publisher {
  readonly #connection: Connection;
  readonly #log: Log;
  #queue: Pending[] = [];
  /** Where the queue begins: taking from the front of an array would move the rest. */
  #head = 0;
  #cost = 0;
  #batch: PublishBatch | undefined;
  #pumping = false;
  #idle: (() => void) | undefined;
  #retryDelayMs = firstRetryMs;
  #retryTimer: ReturnType<typeof setTimeout> | undefined;

  /** Nothing is pending yet. */
  constructor(connection: Connection, log: Log) {
    this.#connection = connection;
    this.#log = log;
  }

  /**
   * Publishes one message, in order. False, and nothing pending, when `maxCost` characters of this source, or too many
   * of all sources, are pending already. An `entry` is a command in RESP that goes before it.
   */
  publish(
    channel: string,
    text: string,
    source: Source,
    maxCost: number,
    entry?: string,
    issuer?: Issuer,
  ): boolean {
    if (source.pendingCost >= maxCost || this.#cost >= maxPendingCost) return false;
    if (entry !== undefined) this.#push(undefined, entry, source, issuer, false);
    this.#push(channel, text, source, undefined, false);
    if (!this.#pumping) void this.#pump();
    return true;
  }

  /**
   * Sends a command after all that is pending, given in RESP; it must do no harm when it is carried out twice. False,
   * and nothing pending, when too much of all sources is pending already.
   */
  command(text: string, source: Source, issuer: Issuer): boolean {
    if (this.#cost >= maxPendingCost) return false;
    this.#push(undefined, text, source, issuer, true);
    if (!this.#pumping) void this.#pump();
    return true;
  }

  /**
   * Publishes one message at once, beside the queue, and says how many have received it.
   * @throws {Unavailable} when that is not known within some seconds; it may have been published.
   */
  async publishNow(channel: string, text: string, entry?: string, issuer?: Issuer): Promise<number> {
    const redis = this.#connection.writable;
    if (redis === undefined) throw new Unavailable("not connected");
    if (entry !== undefined) {
      new PublishBatch([{ channel: undefined, text: entry }]).send(redis).then(([outcome]) =>
        issuer?.done(outcome instanceof Error ? outcome : undefined)
      );
    }
    try {
      return await within(publishTimeoutMs, redis.publish(channel, text), () => {
        throw new Unavailable(`no answer within ${publishTimeoutMs} ms`);
      });
    } catch (error) {
      throw new Unavailable(reasonOf(error));
    }
  }

  /** The connection serves. */
  resume(): void {
    if (!this.#pumping) void this.#pump();
  }

  /** The connection has ended: what is under way may have arrived or not. */
  interrupt(): void {
    this.#batch?.abort(new Error("the connection ended"));
  }

  /** Waits until nothing is pending, for at most `timeoutMs` milliseconds, and says what is left. */
  async close(timeoutMs: number): Promise<void> {
    if (this.#cost > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#idle = resolve;
      await within(timeoutMs, promise);
    }
    clearTimeout(this.#retryTimer);
    const left = this.#queue.length - this.#head;
    if (left > 0) this.#log.error({ messages: left }, "messages left unpublished");
  }

  #push(
    channel: string | undefined,
    text: string,
    source: Source,
    issuer: Issuer | undefined,
    repeats: boolean,
  ): void {
    const cost = text.length + messageOverhead;
    source.pendingCost += cost;
    this.#cost += cost;
    this.#queue.push({ channel, text, cost, source, issuer, repeats });
  }

  async #pump(): Promise<void> {
    this.#pumping = true;
    while (this.#head < this.#queue.length && this.#retryTimer === undefined) {
      const redis = this.#connection.writable;
      if (redis === undefined) break;
      const pending = this.#takeBatch();
      if (pending.length === 0) continue;
      this.#batch = new PublishBatch(pending);
      const outcomes = await this.#batch.send(redis);
      this.#batch = undefined;
      this.#account(pending, outcomes);
    }
    this.#pumping = false;
    if (this.#head === this.#queue.length) this.#idle?.();
  }

  #account(pending: readonly Pending[], outcomes: Outcomes): void {
    const again = firstOfPassing(outcomes);
    let unconfirmed: Map<Source, number> | undefined;
    let silent: Map<Source, number> | undefined;
    let repeated: Pending[] | undefined;
    for (let i = 0; i < again; i++) {
      const { source, cost, issuer, repeats } = pending[i]!;
      const error = outcomes[i];
      if (repeats && error instanceof Error && !isReply(error)) {
        (repeated ??= []).push(pending[i]!);
        continue;
      }
      this.#release(source, cost);
      if (issuer !== undefined) {
        issuer.done(error instanceof Error ? error : undefined);
        continue;
      }
      if (error === undefined) continue;
      if (error === unheard) {
        if (source.entered) continue;
        silent ??= new Map();
        silent.set(source, (silent.get(source) ?? 0) + 1);
      } else if (isReply(error)) {
        this.#log.error({ reason: reasonOf(error) }, "Redis refused a message");
        source.lost(1, "refused");
      } else {
        unconfirmed ??= new Map();
        unconfirmed.set(source, (unconfirmed.get(source) ?? 0) + 1);
      }
    }
    for (const [source, messages] of unconfirmed ?? []) source.lost(messages, "unconfirmed");
    for (const [source, messages] of silent ?? []) source.unheard(messages);
    if (repeated !== undefined) this.#queue = [...repeated, ...this.#takeQueue()];
    if (again === pending.length) this.#retryDelayMs = firstRetryMs;
    else this.#putBack(pending.slice(again), reasonOf(outcomes[again]));
  }

  /** Redis has published none of these, and will, later. */
  #putBack(pending: readonly Pending[], reason: string): void {
    this.#log.warn({ messages: pending.length, reason }, "Redis takes no messages now");
    this.#queue = [...pending, ...this.#takeQueue()];
    this.#retryTimer = setTimeout(() => {
      this.#retryTimer = undefined;
      this.resume();
    }, this.#retryDelayMs);
    this.#retryDelayMs = Math.min(maxRetryMs, this.#retryDelayMs * 2);
  }

  #takeQueue(): Pending[] {
    const queue = this.#queue.slice(this.#head);
    this.#head = 0;
    return queue;
  }

  #release(source: Source, cost: number): void {
    source.pendingCost -= cost;
    this.#cost -= cost;
  }

  #takeBatch(): Pending[] {
    const queue = this.#queue;
    const first = this.#head;
    let end = first;
    let discarded = false;
    for (let cost = 0; end < queue.length && end - first < maxBatch && cost < maxBatchCost; end++) {
      cost += queue[end]!.cost;
      discarded ||= queue[end]!.source.discarded;
    }
    let batch = first === 0 && end === queue.length ? queue : queue.slice(first, end);
    if (discarded) batch = batch.filter((pending) => !this.#dropDiscarded(pending));
    if (end === queue.length) {
      this.#queue = [];
      this.#head = 0;
    } else if (end > queue.length / 2) {
      this.#queue = queue.slice(end);
      this.#head = 0;
    } else this.#head = end;
    return batch;
  }

  #dropDiscarded({ source, cost, issuer }: Pending): boolean {
    if (!source.discarded) return false;
    this.#release(source, cost);
    if (issuer !== undefined) issuer.done(new Error("discarded"));
    else source.lost(1, "discarded");
    return true;
  }
}

/**
 * Where the messages begin that can be sent again without a change of order: Redis refused each of them for a reason
 * that passes, and took none after them.
 */
function firstOfPassing(outcomes: Outcomes): number {
  let first = outcomes.length;
  while (first > 0 && isPassing(outcomes[first - 1])) first--;
  return first;
}
