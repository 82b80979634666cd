/**
 * A command for each message of a batch, in one write. In a Cluster subscriptions are made likewise, as each channel
 * needs a command of its own. To ioredis it is the same command, sent once a message: its text,
 * asked for with the first, is that of all, and the replies come in order. ioredis's own commands take four objects
 * and two promises each. What this relies on in ioredis is pinned by tests/redis/publish_batch_test.ts.
 */

import { Buffer } from "node:buffer";
import type { Command, Redis } from "ioredis";

/** One message to publish; or without a channel any command, in RESP. */
export interface Publication {
  readonly channel: string | undefined;
  readonly text: string;
}

/** How messages are published: to all subscribers, or in a Cluster where the channel's slot is. */
export type PublishCommand = "publish" | "spublish";

/** A command in RESP, as Redis reads it. */
export function commandText(...words: readonly (string | number)[]): string {
  let text = `*${words.length}\r\n`;
  for (const word of words) text += bulk(String(word));
  return text;
}

/** A word of a command in RESP. */
export const bulk = (text: string): string => `$${Buffer.byteLength(text)}\r\n${text}\r\n`;

/** What became of each message of a batch: an error, or what Redis has answered, which is the number of receivers. */
export type Outcomes = readonly unknown[];

/** A batch, sent once. */
export class PublishBatch {
  /** For ioredis, which takes replies by it: neither is sent. */
  readonly name: "publish" | "subscribe" | "unsubscribe";
  /** For ioredis, which awaits as many replies of a subscription: each command has one. */
  readonly args: readonly string[] = [""];
  /** Keeps ioredis from building a trace for each message. */
  readonly isTraced = true;
  readonly #publications: readonly Publication[];
  readonly #head: string;
  readonly #outcomes: unknown[];
  readonly #answered = Promise.withResolvers<Outcomes>();
  /** For ioredis. */
  readonly promise = this.#answered.promise;
  #replies = 0;

  /** A batch of one message or more. */
  constructor(
    publications: readonly Publication[],
    command: PublishCommand = "publish",
    name: PublishBatch["name"] = "publish",
  ) {
    this.name = name;
    this.#publications = publications;
    this.#head = command === "publish" ? publishHead : spublishHead;
    this.#outcomes = new Array(publications.length);
  }

  /** Resolves when each message has been answered, or with `abort`. Never rejects. */
  send(redis: Redis): Promise<Outcomes> {
    const command = this as unknown as Command;
    redis.sendCommand(command);
    for (let i = 1; i < this.#publications.length; i++) redis.sendCommand(command, sentAlready);
    return this.promise;
  }

  /** The text of what is answered next. */
  get next(): string | undefined {
    return this.#publications[this.#replies]?.text;
  }

  /** The connection is gone: what has not been answered has this error. */
  abort(error: Error): void {
    while (this.#replies < this.#outcomes.length) this.#reply(error);
  }

  /** RESP, as ioredis writes it. Asked for once with a stream to write to. */
  toWritable(stream: unknown): string {
    if (stream === sentAlready) return "";
    const head = this.#head;
    let text = "";
    for (const { channel, text: message } of this.#publications) {
      if (channel === undefined) text += message;
      else {text += `${head}${Buffer.byteLength(channel)}\r\n${channel}\r\n` +
          `$${Buffer.byteLength(message)}\r\n${message}\r\n`;}
    }
    return text;
  }

  /** ioredis has a reply. */
  resolve(reply: unknown): void {
    this.#reply(reply);
  }

  /** ioredis has an error instead of a reply. */
  reject(error: Error): void {
    this.#reply(error);
  }

  #reply(outcome: unknown): void {
    if (this.#replies === this.#outcomes.length) return;
    this.#outcomes[this.#replies++] = outcome;
    if (this.#replies === this.#outcomes.length) this.#answered.resolve(this.#outcomes);
  }
}

/** Up to the length of the channel's name. */
const publishHead = "*3\r\n$7\r\npublish\r\n$";
const spublishHead = "*3\r\n$8\r\nspublish\r\n$";

/** Where the commands of a batch after the first are written to. */
const sentAlready = { write: () => true } as unknown as NetStream;
type NetStream = NonNullable<Parameters<Redis["sendCommand"]>[1]>;
