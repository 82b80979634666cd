/** One session's way to Redis: its two channels, its log, and its place in an inbox. */

import type { Deadlines } from "../deadline.ts";
import { SubscribeTimeout, Unavailable } from "./errors.ts";
import type { Inbox, Member, Who } from "./inbox.ts";
import { type Entry, formatPosition, type Position } from "./log_entry.ts";
import type { LogReader } from "./log_reader.ts";
import { commandText } from "./publish_batch.ts";
import type { Loss, Receipt, Source } from "./publisher.ts";
import replaceScript from "./replace.lua" with { type: "text" };
import type { Channel, Listener, Room } from "./subscriptions.ts";
import { servingOrThrow, type Topology } from "./topology.ts";

/** The channel that carries messages from a session's backend to its client. */
export const downChannel = (sessionId: string): string => `session:${sessionId}:down`;
/** The channel that carries messages from a session's client to its backend. */
export const upChannel = (sessionId: string): string => `session:${sessionId}:up`;

/** What a link leads to: a session. */
export interface Endpoint extends Listener, Who {
  /** So many of its messages have not arrived, or may not have. They are not sent again. */
  lost(messages: number, why: Loss): void;
  /** So many of its messages were published while no backend was subscribed. */
  unheard(messages: number): void;
}

/** What becomes of a message that its client has given an id, told once; not at all when it is discarded. */
export type OnFate = (
  outcome: Parameters<Receipt["published"]>[0],
  entered: Parameters<Receipt["entered"]>[0],
) => void;

/** One message with an id: its fate is known when it is known of its entry in the inbox, too. */
class Submission implements Receipt {
  #outcome: Parameters<OnFate>[0] | undefined;
  #entered: [Parameters<OnFate>[1]] | undefined;

  constructor(readonly id: string, readonly onFate: OnFate) {}

  published(outcome: Parameters<OnFate>[0]): void {
    this.#outcome = outcome;
    if (this.#entered !== undefined) this.onFate(outcome, ...this.#entered);
  }

  entered(entered: Parameters<OnFate>[1]): void {
    this.#entered = [entered];
    if (this.#outcome !== undefined) this.onFate(this.#outcome, entered);
  }
}

/** A server of Redis, as others know it: something that a link uses or not. */
export type Server = object;

/** What a link is made of. */
export interface LinkOptions {
  readonly topology: Topology;
  readonly inbox: Inbox | undefined;
  readonly sessionId: string;
  /** Names this connection, and no other of any proxy. */
  readonly connection: string;
  readonly endpoint: Endpoint;
  /** What the session may have pending, in characters. */
  readonly maxPendingCost: number;
}

/** One session's way to its two channels. */
export class Link implements Source {
  readonly #topology: Topology;
  readonly #endpoint: Endpoint;
  readonly #down: string;
  readonly #up: string;
  readonly #downSlot: number;
  readonly #upSlot: number;
  readonly #maxPendingCost: number;
  /** In the agent's inbox, if there is one. */
  readonly #member: Member | undefined;
  #channel: Channel | undefined;
  /** Ends the wait for a confirmation, while there is one. */
  #settle: (() => void) | undefined;
  /** See {@linkcode Source}. */
  pendingCost = 0;
  /** See {@linkcode Source}. */
  discarded = false;
  /** See {@linkcode Source}. */
  entered: boolean;

  /** Names this connection, and no other of any proxy. */
  readonly connection: string;

  /** Made by `Bridge.link`. */
  constructor({ topology, inbox, sessionId, connection, endpoint, maxPendingCost }: LinkOptions) {
    this.#topology = topology;
    this.#endpoint = endpoint;
    this.#down = downChannel(sessionId);
    this.#up = upChannel(sessionId);
    this.#downSlot = topology.slotOf(this.#down);
    this.#upSlot = topology.slotOf(this.#up);
    this.#maxPendingCost = maxPendingCost;
    this.connection = connection;
    this.#member = inbox?.member(endpoint, sessionId, connection, this);
    // Another server may tell of the entry when the message has long been published.
    this.entered = this.#member !== undefined && this.#member.slot !== this.#upSlot;
  }

  /** Whether the session's messages go through a server, either way. */
  uses(server: Server): boolean {
    return this.#topology.concerns(server, this.#downSlot) || this.#topology.concerns(server, this.#upSlot);
  }

  /** The client's socket has opened: backends read so before its first message. */
  opened(): void {
    this.#member?.opened();
  }

  /** The client's socket has ended; `position` is the last one that was sent to a resuming client. */
  ended(code: number, position: Position | undefined): void {
    this.#member?.ended(code, position ? formatPosition(position) : "");
  }

  /**
   * The time of the server that has the down channel, which is the same for all proxies, in microseconds since the
   * epoch.
   * @throws {Unavailable} when it cannot be asked now.
   */
  async now(): Promise<number> {
    return await servingOrThrow(this.#topology.at(this.#downSlot)).publisher.now();
  }

  /** Tells every socket of the session, on every proxy, that this one has opened; `json` says which it is. */
  replaceOthers(json: string, onRefused: (error: Error) => void): void {
    const shard = this.#topology.at(this.#downSlot);
    const command = commandText("EVAL", replaceScript, 1, this.#down, json, shard?.publisher.publishCommand ?? "");
    const sent = shard?.publisher.command(this.#down, command, {
      done: (error) => error && onRefused(error),
    });
    if (sent !== "taken") onRefused(new Unavailable("too much is pending"));
  }

  /**
   * Subscribes to the down channel. Resolves when Redis has confirmed it: whatever is published from then on is
   * delivered. A message may be delivered before. On failure the link is detached. Resolves too when it is detached
   * meanwhile.
   * @throws {Unavailable} when Redis cannot be used, or rejects.
   * @throws {SubscribeTimeout} after `timeoutMs` milliseconds without a confirmation.
   */
  async attach(timeoutMs: number, deadlines: Deadlines): Promise<void> {
    const topology = this.#topology;
    const shard = topology.at(this.#downSlot);
    if (shard === undefined || !topology.flowing(this.#downSlot) || !topology.flowing(this.#upSlot)) {
      throw new Unavailable("Redis is unavailable");
    }
    const channel = this.#channel = shard.subscriptions.add(this.#down, this.#endpoint);
    if (channel.confirmed) return;
    try {
      await this.#confirmed(channel, timeoutMs, deadlines);
    } catch (error) {
      this.detach();
      throw error;
    }
  }

  /** Resolves when Redis has confirmed the subscription, or the link is detached. */
  #confirmed(channel: Channel, timeoutMs: number, deadlines: Deadlines): Promise<void> {
    return new Promise((resolve, reject) => {
      const deadline = deadlines.set(timeoutMs, () => {
        reject(new SubscribeTimeout(`no confirmation within ${timeoutMs} ms`));
      });
      const done = (error?: Error) => {
        this.#settle = undefined;
        deadline.cancel();
        if (error) reject(error);
        else resolve();
      };
      this.#settle = done;
      channel.waiting = [...channel.waiting, done];
    });
  }

  /**
   * Queues one message for the up channel, and before it its entry in the inbox. "full", and neither queued, when too
   * much of this session, or of all sessions, is pending already.
   */
  publish(text: string): Room {
    return this.#publish(text, undefined);
  }

  /** The same for a message with an id, which its entry has, too. */
  submit(text: string, id: string, onFate: OnFate): Room {
    return this.#publish(text, new Submission(id, onFate));
  }

  #publish(text: string, submission: Submission | undefined): Room {
    const member = this.#member;
    const publisher = this.#topology.at(this.#upSlot)?.publisher;
    const inbox = member && this.#topology.at(member.slot)?.publisher;
    if (!publisher?.hasRoom(this, this.#maxPendingCost)) return "full";
    if (member !== undefined) {
      if (!inbox?.hasRoom(member, this.#maxPendingCost)) return "full";
      const entry = member.entry(text, submission?.id);
      if (entry === undefined) submission?.entered(member.passes ? undefined : false);
      else inbox.enter(member.key, entry, member, submission);
      if (inbox !== publisher) inbox.resume();
    } else submission?.entered(false);
    publisher.publish(this.#up, text, this, submission);
    return "taken";
  }

  /** Drops what is pending and was never written: the client has been told that it is lost. */
  discard(): void {
    this.discarded = true;
  }

  /** Ends the subscription, unless another link of the session needs it. What is pending still goes. Idempotent. */
  detach(): void {
    this.#settle?.();
    if (this.#channel !== undefined) {
      this.#topology.at(this.#downSlot)?.subscriptions.remove(this.#channel, this.#endpoint);
    }
    this.#channel = undefined;
  }

  /** The position of the log's end; there is a log from then on. Rejects while Redis cannot be asked. */
  async openLog(): Promise<Position> {
    return await this.#reader().open(this.#down);
  }

  /** At most `count` entries of the log, from a position on, that one included. Rejects as `openLog` does. */
  async readLog(from: Position, count: number): Promise<Entry[]> {
    return await this.#reader().read(this.#down, from, count);
  }

  #reader(): LogReader {
    return servingOrThrow(this.#topology.at(this.#downSlot)).reader;
  }

  /** See {@linkcode Source}. */
  unheard(messages: number): void {
    this.#endpoint.unheard(messages);
  }

  /** See {@linkcode Source}. */
  lost(messages: number, why: Loss): void {
    this.#endpoint.lost(messages, why);
  }
}
