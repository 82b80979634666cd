/**
 * `deno task bench:topologies`: what a message costs Redis, all servers together, as one server and as a Cluster of three
 * masters with a replica each. CPU is that of the servers' processes, without what they use when nothing is sent; the
 * ways alternate, and of several rounds the median counts.
 */

import { parseArgs } from "node:util";
import type { Redis } from "ioredis";
import library from "../src/redis/log.lua" with { type: "text" };
import { type ClusterNode, TestCluster } from "../tests/harness/cluster.ts";
import { RedisServer } from "../tests/harness/redis.ts";
import { align } from "./table.ts";

const { values } = parseArgs({
  options: { rounds: { type: "string", default: "5" }, messages: { type: "string", default: "50000" } },
});
const rounds = Number(values.rounds);
const messages = Number(values.messages);
const payload = "x".repeat(64);
const batch = 100;

/** One way to send a message, and the servers that have a part in it. */
interface Way {
  readonly name: string;
  readonly servers: readonly Redis[];
  readonly sender: Redis;
  readonly command: readonly [string, ...string[]];
}

async function load(redis: Redis, sharded: boolean): Promise<void> {
  const text = sharded ? library.replace(/^local SHARDED = .*$/m, "local SHARDED = true") : library;
  await redis.call("FUNCTION", "LOAD", "REPLACE", text);
}

/** CPU that processes have used so far, in microseconds. */
async function cpuUs(servers: readonly Redis[]): Promise<number> {
  const infos = await Promise.all(servers.map((server) => server.info("cpu")));
  return infos.reduce((sum, info) => {
    const seconds = [...info.matchAll(/used_cpu_(?:sys|user):([\d.]+)/g)].map((match) => Number(match[1]));
    return sum + 1e6 * (seconds[0]! + seconds[1]!);
  }, 0);
}

/** What servers use by themselves, in microseconds of CPU for each millisecond. */
async function idleUsPerMs(servers: readonly Redis[]): Promise<number> {
  const [before, startMs] = [await cpuUs(servers), performance.now()];
  await new Promise((resolve) => setTimeout(resolve, 2000));
  return (await cpuUs(servers) - before) / (performance.now() - startMs);
}

async function costUs({ servers, sender, command }: Way, idle: number): Promise<number> {
  const [before, startMs] = [await cpuUs(servers), performance.now()];
  for (let sent = 0; sent < messages; sent += batch) {
    await Promise.all(Array.from({ length: batch }, () => sender.call(...command)));
  }
  return (await cpuUs(servers) - before - idle * (performance.now() - startMs)) / messages;
}

await using server = await RedisServer.start();
await using cluster = await TestCluster.start(3, 1);
const one = server.client();
const channel = "session:bench:down";
const owner = await cluster.ownerOf(channel);
const all = cluster.nodes.map(({ control }: ClusterNode) => control);
await load(one, false);
await load(owner.control, true);
await server.client().subscribe(channel);
await owner.server.client().subscribe(channel);
await owner.server.client().ssubscribe(channel);

const send: [string, ...string[]] = ["FCALL", "wsproxy_send", "1", channel, payload];
const ways: readonly Way[] = [
  { name: "one server, PUBLISH", servers: [one], sender: one, command: ["PUBLISH", channel, payload] },
  { name: "one server, wsproxy_send", servers: [one], sender: one, command: send },
  { name: "Cluster, PUBLISH", servers: all, sender: owner.control, command: ["PUBLISH", channel, payload] },
  { name: "Cluster, SPUBLISH", servers: all, sender: owner.control, command: ["SPUBLISH", channel, payload] },
  { name: "Cluster, wsproxy_send", servers: all, sender: owner.control, command: send },
];
const idle = new Map([[ways[0]!.servers, 0], [all, 0]]);
for (const way of ways) idle.set(way.servers, await idleUsPerMs(way.servers));
const costs = ways.map((): number[] => []);
for (let round = 0; round < rounds; round++) {
  for (const [i, way] of ways.entries()) costs[i]!.push(await costUs(way, idle.get(way.servers)!));
}
const median = (numbers: number[]) => numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
const us = costs.map(median);
console.log(
  `Redis CPU for each message of ${payload.length} bytes, all servers together, one subscriber, ${batch} at once,`,
);
console.log(`median of ${rounds} rounds; a Cluster of 3 masters and 3 replicas\n`);
console.log(
  align([["", "us", "ratio"], ...ways.map(({ name }, i) => [name, us[i]!.toFixed(1), (us[i]! / us[0]!).toFixed(1)])]),
);
