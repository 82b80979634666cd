/** What backends read of an agent's sessions in its inbox. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { Client } from "./client.ts";
import { type Env, ProxyProcess } from "./proxy.ts";
import type { RedisServer } from "./redis.ts";
import { eventually } from "./wait.ts";

/** Settings of a proxy that writes into inboxes. */
export const inboxEnv = { INBOX: "true", VACATED_GRACE_SECS: "0" };

/** What an entry has, by name. */
export type Entry = Record<string, string>;

/** All entries of an agent's inbox, oldest first. */
export async function entriesOf(redis: Redis, agent = "agent"): Promise<Entry[]> {
  const entries = await redis.xrange(`agent:${agent}:inbox`, "-", "+");
  return entries.map(([, words]) => entryOf(words));
}

/** An entry of which Redis has told the words. */
export const entryOf = (words: readonly string[]): Entry =>
  Object.fromEntries(words.flatMap((word, i) => i % 2 === 0 ? [[word, words[i + 1]!]] : []));

/** The entries, once there are so many of a type. */
export async function entriesWith(redis: Redis, type: string, count: number, agent = "agent"): Promise<Entry[]> {
  let entries: Entry[] = [];
  await eventually(`${count} entries ${type}`, async () => {
    entries = await entriesOf(redis, agent);
    return entries.filter((entry) => entry["type"] === type).length >= count;
  });
  return entries;
}

/** A session's story as words: types, with a message's data and a disconnection's code. */
export function storyOf(entries: readonly Entry[], session: string): string[] {
  return entries.filter((entry) => entry["session"] === session).map(({ type, data, code }) =>
    [type, data ?? code].filter((word) => word !== undefined).join(" ")
  );
}

/** Nothing is kept of sessions that have ended and were told vacant. */
export async function assertForgotten(redis: Redis): Promise<void> {
  const keys = (await redis.keys("wsproxy:*")).filter((key) => /:(held:.*|sockets|vacant)$/.test(key));
  assert.deepEqual(keys, []);
}

/** Names of sessions or agents. */
export const names = (prefix: string, count: number) => Array.from({ length: count }, (_, i) => `${prefix}-${i}`);

/** Several proxies as processes of their own. */
export async function startProxies(count: number, redis: RedisServer | string, env: Env): Promise<ProxyProcess[]> {
  return await Promise.all(Array.from({ length: count }, () => ProxyProcess.start(redis, { ...inboxEnv, ...env })));
}

/** A client of each of these sessions. */
export const connectAll = (port: number, names: readonly string[]) =>
  Promise.all(names.map((name) => Client.connect(port, name)));
