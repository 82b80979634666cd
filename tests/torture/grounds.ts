/** Where workers are tortured: one server, servers under sentinels, or a Cluster, and what may happen to each. */

import { Cluster, Redis } from "ioredis";
import { type ClusterNode, TestCluster } from "../harness/cluster.ts";
import { kept, RedisServer } from "../harness/redis.ts";
import { SentinelGroup } from "../harness/sentinel.ts";
import { eventually } from "../harness/wait.ts";
import { oneOf, pause } from "./parts.ts";

/** A key's entries, by id, as texts. */
type Entries = Map<string, string[]>;

/** What a failover has lost of a stream. */
export interface Loss {
  readonly key: string;
  readonly fields: string[];
}

/** A Redis, and what may happen to it. */
export interface Ground extends AsyncDisposable {
  readonly url: string;
  readonly control: Redis | Cluster;
  /** Each by its name, of which none loses what Redis has acknowledged. */
  readonly faults: Record<string, () => Promise<void>>;
  /** A failover that loses what was acknowledged; says what of these streams. */
  lose?(keys: readonly string[]): Promise<Loss[]>;
  /** Loads a library on each server that takes writes. */
  load(library: string): Promise<void>;
}

const offsetOf = (info: string, name: string) => Number(new RegExp(`${name}:(\\d+)`).exec(info)?.[1] ?? -1);

/** Holds up all writes until these replicas have what was written: whatever happens to the master now, nothing is lost. */
async function hold(master: Redis, replicas: readonly Redis[]): Promise<void> {
  await master.call("CLIENT", "PAUSE", 60_000, "WRITE");
  const end = offsetOf(await master.info("replication"), "master_repl_offset");
  await eventually("the replicas are in step", async () => {
    const infos = await Promise.all(replicas.map((replica) => replica.info("replication")));
    return infos.every((info) => offsetOf(info, "slave_repl_offset") >= end);
  });
}

const isLinked = async (replica: Redis) => (await replica.info("replication")).includes("master_link_status:up");

/** One server, which keeps what it has acknowledged. */
export async function server(random: () => number): Promise<Ground> {
  const redis = await RedisServer.start(...kept);
  const control = redis.client();
  return {
    url: redis.url,
    control,
    faults: {
      async restart() {
        await redis.kill();
        await pause(200 * random());
        await redis.start();
      },
    },
    load: async (library) => void await control.call("FUNCTION", "LOAD", "REPLACE", library),
    [Symbol.asyncDispose]: () => redis[Symbol.asyncDispose](),
  };
}

/** A master and two replicas, under three sentinels. */
export async function sentinel(random: () => number): Promise<Ground> {
  const group = await SentinelGroup.start();
  // No failover but those that are asked for: one that a busy machine causes loses what was acknowledged.
  for (const { redis } of group.sentinels) {
    await redis.call("SENTINEL", "SET", "mymaster", "down-after-milliseconds", 60_000);
  }
  const controls = new Map(group.servers.map((each) => [each, each.client()]));
  const sentinels = group.sentinels.map(({ port }) => ({ host: "127.0.0.1", port }));
  const control = new Redis({
    name: "mymaster",
    sentinels,
    maxRetriesPerRequest: null,
    sentinelRetryStrategy: () => 50,
  });
  control.on("error", () => {});
  const others = (master: RedisServer) => group.servers.filter((each) => each !== master);
  /** Both replicas follow the master, and the sentinels know that. */
  const settled = async () => {
    const master = await group.master();
    await eventually("both replicas follow", async () => {
      for (const replica of others(master)) if (!await isLinked(controls.get(replica)!)) return false;
      const known = await Promise.all(group.sentinels.map((each) => each.master()));
      return known.every((each) => each["flags"] === "master" && each["port"] === String(master.port));
    });
    return master;
  };
  /** The sentinels make another server the master. */
  const failOver = async (former: RedisServer) => {
    let next = former;
    await eventually("another master", async () => {
      await oneOf(group.sentinels, random).redis.call("SENTINEL", "FAILOVER", "mymaster").catch((error) => {
        if (!/INPROG|NOGOODSLAVE/.test(error.message)) throw error;
      });
      return await group.elected(former).then((elected) => (next = elected) !== former, () => false);
    }, 60_000);
    return next;
  };
  /** A dead master comes back as a replica; the sentinels would take their time for that. */
  const rejoin = async (former: RedisServer, next: RedisServer) => {
    await former.forgetDump();
    await former.start();
    for (const replica of others(next)) await controls.get(replica)!.replicaof("127.0.0.1", next.port);
  };
  const entriesOf = async (redis: Redis, key: string): Promise<Entries> => new Map(await redis.xrange(key, "-", "+"));
  return {
    url: group.url,
    control,
    faults: {
      async failOver() {
        const master = await settled();
        const former = controls.get(master)!;
        await hold(former, others(master).map((each) => controls.get(each)!));
        const next = await failOver(master);
        for (const replica of others(next)) await controls.get(replica)!.replicaof("127.0.0.1", next.port);
        await former.call("CLIENT", "UNPAUSE");
      },
      async crash() {
        const master = await settled();
        await hold(controls.get(master)!, others(master).map((each) => controls.get(each)!));
        await master.kill();
        await rejoin(master, await failOver(master));
      },
    },
    async lose(keys) {
      const master = await settled();
      const [former, replicas] = [controls.get(master)!, others(master).map((each) => controls.get(each)!)];
      for (const replica of replicas) await replica.replicaof("127.0.0.1", 1);
      await pause(200 * random());
      await former.call("CLIENT", "PAUSE", 60_000, "WRITE");
      const acknowledged = await Promise.all(keys.map((key) => entriesOf(former, key)));
      await master.kill();
      const next = await failOver(master);
      await rejoin(master, next);
      // Its newer entries are those of the next master's own.
      const left = await Promise.all(keys.map((key) => entriesOf(controls.get(next)!, key)));
      return keys.flatMap((key, i) =>
        [...acknowledged[i]!]
          .filter(([id, fields]) => String(left[i]!.get(id)) !== String(fields))
          .map(([, fields]) => ({ key, fields }))
      );
    },
    load: async (library) => void await control.call("FUNCTION", "LOAD", "REPLACE", library),
    async [Symbol.asyncDispose]() {
      control.disconnect();
      await group[Symbol.asyncDispose]();
    },
  };
}

/** Three masters with a replica each. */
export async function cluster(random: () => number, names: readonly string[]): Promise<Ground> {
  // No failover but those that are asked for.
  const servers = await TestCluster.start(3, 1, ...kept, "--cluster-node-timeout", "60000");
  const control = new Cluster(servers.nodes.map(({ server }) => ({ host: "127.0.0.1", port: server.port })), {
    clusterRetryStrategy: () => 50,
    redisOptions: { maxRetriesPerRequest: null },
  });
  control.on("error", () => {});
  /** A master, a name that is on it, and its replica. */
  const some = async () => {
    await servers.agreed();
    const name = oneOf(names, random);
    const master = await servers.ownerOf(name);
    let replica = master;
    await eventually("its replica follows", async () => {
      const lines = String(await master.control.call("CLUSTER", "NODES")).split("\n");
      const line = lines.find((each) => each.includes("slave") && each.includes(master.id));
      replica = servers.nodes.find(({ id }) => line?.startsWith(id)) ?? master;
      return replica !== master && await isLinked(replica.control);
    });
    return { name, master, replica };
  };
  /** Nobody is asked, as masters give their votes to the same one at long intervals only. */
  const takeOver = async (name: string, replica: ClusterNode) => {
    await replica.control.call("CLUSTER", "FAILOVER", "TAKEOVER");
    await eventually("the replica is the master", async () => await servers.ownerOf(name) === replica);
  };
  return {
    url: servers.url,
    control,
    faults: {
      async failOver() {
        const { name, master, replica } = await some();
        await hold(master.control, [replica.control]);
        await takeOver(name, replica);
        await eventually("the former master follows", () => isLinked(master.control));
        await master.control.call("CLIENT", "UNPAUSE");
      },
      async crash() {
        const { name, master, replica } = await some();
        await hold(master.control, [replica.control]);
        await master.server.kill();
        await takeOver(name, replica);
        await master.server.start();
      },
      async restart() {
        const { master } = await some();
        await master.server.kill();
        await pause(200 * random());
        await master.server.start();
      },
    },
    async load(library) {
      for (const node of servers.nodes) {
        if (/role:master/.test(await node.control.info("replication"))) {
          await node.control.call("FUNCTION", "LOAD", "REPLACE", library);
        }
      }
    },
    async [Symbol.asyncDispose]() {
      control.disconnect();
      await servers[Symbol.asyncDispose]();
    },
  };
}

/** By their names. */
export const grounds = { server, sentinel, cluster };
