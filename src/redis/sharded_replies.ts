/**
 * What a server of a Cluster says to a subscriber without being asked: SUNSUBSCRIBE, when a slot has left it. ioredis
 * takes that for the reply to the command that was sent last, and is one reply behind from then on. Here the reply is
 * given a command of its own. What this relies on in ioredis is pinned by tests/redis/sharded_replies_test.ts.
 */

import type { Redis } from "ioredis";
import { commandText, type Outcomes, PublishBatch } from "./publish_batch.ts";

/** Subscribes to sharded channels, or ends it, each by a command of its own, as each may belong to another server. */
export function askEach(
  redis: Redis,
  what: "subscribe" | "unsubscribe",
  channels: readonly string[],
): Promise<Outcomes> {
  const commands = channels.map((channel) => ({ channel: undefined, text: textOf(what, channel) }));
  return new PublishBatch(commands, "spublish", what).send(redis);
}

const textOf = (what: "subscribe" | "unsubscribe", channel: string) => commandText(`S${what.toUpperCase()}`, channel);

/** The parts of ioredis that take replies to subscriptions. */
interface Internals {
  condition: { subscriber: unknown };
  commandQueue: { peekFront(): Item | undefined; unshift(item: Item): void };
}
interface Item {
  command: unknown;
}

/**
 * Makes a connection that is in use from now on for sharded subscriptions only: see {@linkcode askEach}. `onLeft` is
 * called with each channel whose subscription the server has ended.
 */
export function expectSharded(redis: Redis, onLeft: (channel: string) => void): void {
  const { condition, commandQueue } = redis as unknown as Internals;
  const subscriber = {
    add() {},
    /** Called with each SUNSUBSCRIBE, before ioredis looks for its command. */
    del(_type: string, channel: string) {
      const command = commandQueue.peekFront()?.command;
      if (command instanceof PublishBatch && command.next === textOf("unsubscribe", channel)) return;
      commandQueue.unshift({
        command: new PublishBatch([{ channel: undefined, text: "" }], "spublish", "unsubscribe"),
      });
      onLeft(channel);
    },
    channels: () => [],
    isEmpty: () => true,
  };
  // With the last channel ioredis would leave the mode in which it tells messages from replies.
  Object.defineProperty(condition, "subscriber", { get: () => subscriber, set() {} });
}
