/**
 * The torture of torture.ts for a Cluster and for servers under sentinels: masters are killed, frozen, demoted, and
 * slots move, while backends log numbered messages. A backend counts a message when all replicas have it, so that no
 * failover may lose it.
 */

import { Redis } from "ioredis";
import { downChannel } from "../../src/redis/link.ts";
import { slotOf } from "../../src/redis/slot.ts";
import { TestCluster } from "../harness/cluster.ts";
import { RedisServer } from "../harness/redis.ts";
import { SentinelGroup } from "../harness/sentinel.ts";
import {
  Backend,
  commonHarms,
  createRandom,
  harass,
  type Harms,
  oneOf,
  pause,
  runOptions,
  type Send,
  type TortureReport,
  Victim,
  Witness,
} from "./parts.ts";

/** A topology under torture. */
interface Ground {
  readonly url: string;
  /** The servers, of which one at a time is harmed. */
  readonly servers: readonly RedisServer[];
  readonly harms: Harms;
  /** One backend's way to log. */
  send(): Send;
}

const names = Array.from({ length: 12 }, (_, n) => `s${n}`);
const commandTimeoutMs = 1500;

/** Commands to the servers, whichever they are; each backend has its own connections. */
class Servers implements Disposable {
  readonly #clients = new Map<number, Redis>();

  at(port: number): Redis {
    let client = this.#clients.get(port);
    if (client === undefined) {
      client = new Redis(port, "127.0.0.1", {
        retryStrategy: () => 50,
        maxRetriesPerRequest: 0,
        commandTimeout: commandTimeoutMs,
      });
      client.on("error", () => {});
      this.#clients.set(port, client);
    }
    return client;
  }

  /** Logs a message on a server, and waits until its replicas have it. */
  async send(port: number, replicas: number, ...[channel, payload, nonce]: Parameters<Send>): Promise<void> {
    const client = this.at(port);
    const [, kept] = await Promise.all([
      client.call("FCALL", "wsproxy_send", 1, channel, payload, nonce),
      client.wait(replicas, 500),
    ]);
    if (Number(kept) < replicas) throw new Error("a replica lacks it");
  }

  [Symbol.dispose](): void {
    for (const client of this.#clients.values()) client.disconnect();
  }
}

/** Kills a server; it comes back later, after a failover or before. */
async function killServer(server: RedisServer, awayMs: number, persistent: boolean): Promise<void> {
  await server.kill();
  await pause(awayMs);
  if (!persistent) await server.forgetDump();
  await server.start();
}

async function freezeServer(server: RedisServer, ms: number): Promise<void> {
  server.signal("SIGSTOP");
  await pause(ms);
  server.signal("SIGCONT");
}

function clusterGround(cluster: TestCluster, persistent: boolean, random: () => number, own: DisposableStack): Ground {
  const some = () => oneOf(cluster.nodes, random);
  const someChannel = () => downChannel(oneOf(names, random));
  const settled = () => cluster.agreed();
  return {
    url: cluster.url,
    servers: cluster.nodes.map(({ server }) => server),
    harms: {
      killPubSub: () => some().control.client("KILL", "TYPE", "pubsub"),
      killNormal: () => some().control.client("KILL", "TYPE", "normal", "SKIPME", "yes"),
      pauseWrites: () => some().control.call("CLIENT", "PAUSE", Math.floor(random() * 300), "WRITE"),
      trim: () => {
        const channel = someChannel();
        return cluster.call(channel, "XTRIM", channel, "MAXLEN", Math.floor(random() * 20));
      },
      delete: () => {
        const channel = someChannel();
        return cluster.call(channel, "DEL", channel);
      },
      killNode: () => killServer(some().server, random() < 0.5 ? random() * 500 : 2000 + random() * 3000, persistent),
      freezeNode: () => freezeServer(some().server, random() * 3000),
      moveSlot: async () => {
        await settled();
        const channel = someChannel();
        const from = await cluster.ownerOf(channel);
        const owners = new Set(await Promise.all(names.map((name) => cluster.ownerOf(downChannel(name)))));
        const others = [...owners].filter((node) => node !== from);
        if (others.length === 0) return;
        const to = oneOf(others, random);
        await cluster.beginMove(slotOf(channel), from, to);
        await pause(random() * 300);
        await cluster.finishMove(slotOf(channel), from, to);
      },
      failOver: async () => {
        await settled();
        const channel = someChannel();
        const { id } = await cluster.ownerOf(channel);
        const lines = String(await cluster.nodes[0]!.control.call("CLUSTER", "NODES")).split("\n");
        const replica = lines.find((line) => line.includes("slave") && line.includes(id))!;
        await cluster.failOver(cluster.nodes.find((node) => replica.startsWith(node.id))!, channel);
      },
    },
    send() {
      const servers = own.use(new Servers());
      let port = some().server.port;
      return async (...words) => {
        try {
          await servers.send(port, 1, ...words);
        } catch (error) {
          const [, moved] = /^MOVED \d+ .*:(\d+)$/.exec((error as Error).message) ?? [];
          port = moved ? Number(moved) : some().server.port;
          throw error;
        }
      };
    },
  };
}

function sentinelGround(group: SentinelGroup, random: () => number, own: DisposableStack): Ground {
  const master = () => group.master();
  const control = own.use(new Servers());
  return {
    url: group.url,
    servers: group.servers,
    harms: {
      killPubSub: async () => control.at((await master()).port).client("KILL", "TYPE", "pubsub"),
      killNormal: async () => control.at((await master()).port).client("KILL", "TYPE", "normal", "SKIPME", "yes"),
      pauseWrites: async () =>
        control.at((await master()).port).call("CLIENT", "PAUSE", Math.floor(random() * 300), "WRITE"),
      trim: async () =>
        control.at((await master()).port).xtrim(downChannel(oneOf(names, random)), "MAXLEN", Math.floor(random() * 20)),
      delete: async () => control.at((await master()).port).del(downChannel(oneOf(names, random))),
      killMaster: async () => {
        const former = await master();
        await former.kill();
        const next = await group.elected(former);
        await former.forgetDump();
        await former.start();
        // The sentinels would need 10 s for that, in which no backend goes on.
        await former.client().replicaof("127.0.0.1", next.port);
      },
      killServer: () => killServer(oneOf(group.servers, random), random() * 300, false),
      freezeMaster: async () => freezeServer(await master(), random() * 3000),
      freezeSentinel: () => {
        const sentinel = oneOf(group.sentinels, random);
        sentinel.signal("SIGSTOP");
        return pause(random() * 1000).then(() => sentinel.signal("SIGCONT"));
      },
      failOver: () => oneOf(group.sentinels, random).redis.call("SENTINEL", "FAILOVER", "mymaster"),
    },
    send() {
      const servers = own.use(new Servers());
      let port: number | undefined;
      return async (...words) => {
        try {
          port ??= (await master()).port;
          await servers.send(port, 2, ...words);
        } catch (error) {
          port = undefined;
          throw error;
        }
      };
    },
  };
}

async function torture(ground: Ground, engine: string, seconds: number, seed: number, random: () => number) {
  const env = { WS_ENGINE: engine, REDIS_OUTAGE_GRACE_SECS: "3600", MAX_BUFFER_SIZE_BYTES: "4000000" };
  await using one = new Victim(ground.url, env);
  await using two = new Victim(ground.url, env);
  const victims = [one, two];
  await Promise.all(victims.map((victim) => victim.start()));
  const backends = names.map((name) => new Backend(ground.send(), name, random));
  const witnesses = names.map((name) => new Witness(name, victims, random));
  const harms = { ...commonHarms(victims, witnesses, random), ...ground.harms };
  const report: TortureReport = await harass({ seconds, seed }, random, harms, backends, witnesses);
  return report;
}

const { seconds, seed } = runOptions(120, {});
for (const engine of ["deno", "ws"]) {
  for (const topology of ["cluster", "forgetful cluster", "sentinel"]) {
    const random = createRandom(seed);
    const persistent = topology === "cluster";
    using own = new DisposableStack();
    let report: TortureReport;
    if (topology === "sentinel") {
      await using group = await SentinelGroup.start();
      report = await torture(sentinelGround(group, random, own), engine, seconds / 6, seed, random);
    } else {
      await using cluster = await TestCluster.start(3, 1, ...persistent ? ["--appendonly", "yes"] : []);
      report = await torture(clusterGround(cluster, persistent, random, own), engine, seconds / 6, seed, random);
    }
    console.log(JSON.stringify({ topology, engine, seed, ...report }));
  }
}
Deno.exit();
