/**
 * Everything at once: several proxies on one Redis, backends that log numbered messages, clients that resume, and a
 * devil who kills, freezes, cuts, trims and flushes. An oracle beside each client checks what it sees: every message
 * once and in order, or a gap told before anything newer.
 */

import { Redis } from "ioredis";
import { downChannel } from "../../src/redis/link.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";
import {
  Backend,
  commonHarms,
  createRandom,
  harass,
  type Harms,
  numberOf,
  oneOf,
  pause,
  runOptions,
  type TortureReport,
  Victim,
  Witness,
} from "./parts.ts";

/** What is tortured, and for how long. */
export interface TortureOptions {
  readonly seconds: number;
  /** The same seed does the same things, as far as clocks and the kernel do. */
  readonly seed: number;
  readonly engine: string;
  readonly sessions: number;
  /** Redis keeps what it had when it is killed. */
  readonly persistent: boolean;
  /** Threads of each proxy. */
  readonly workers: number;
}

/** Tortures for a while. @throws what an oracle has seen, or what does not come to rest. */
export async function torture(options: TortureOptions): Promise<TortureReport> {
  const { seed, engine, sessions, persistent, workers } = options;
  const random = createRandom(seed);
  const persistence = persistent ? ["--appendonly", "yes"] : [];
  await using redis = await RedisServer.start("--enable-debug-command", "yes", ...persistence);
  await using replica = await RedisServer.start(...persistence);
  let master = redis;
  let standby = replica;
  await standby.client().replicaof("127.0.0.1", master.port);
  // Backends and ourselves reach Redis as the proxies do: by a name that leads to the master.
  using name = new Relay(master.port);
  const clients: Redis[] = [];
  const connect = () => {
    const client = new Redis(name.url, { retryStrategy: () => 50, maxRetriesPerRequest: 0, commandTimeout: 2000 });
    client.on("error", () => {});
    clients.push(client);
    return client;
  };
  const control = connect();
  const env = {
    WS_ENGINE: engine,
    WORKERS: String(workers),
    REDIS_OUTAGE_GRACE_SECS: "3600",
    MAX_BUFFER_SIZE_BYTES: "4000000",
    SHUTDOWN_GRACE_PERIOD_SECS: "2",
  };
  using relayOfOne = new Relay(master.port);
  using relayOfTwo = new Relay(master.port);
  const relays = [relayOfOne, relayOfTwo];
  await using one = new Victim(relayOfOne.url, env);
  await using two = new Victim(relayOfTwo.url, env);
  const victims = [one, two];
  await Promise.all(victims.map((victim) => victim.start()));
  const names = Array.from({ length: sessions }, (_, n) => `s${n}`);
  const backends = names.map((name) => {
    const client = connect();
    return new Backend((...words) => client.call("FCALL", "wsproxy_send", 1, ...words), name, random);
  });
  const witnesses = names.map((name) => new Witness(name, victims, random));
  const some = <T>(items: readonly T[]) => oneOf(items, random);
  const harms: Harms = {
    ...commonHarms(victims, witnesses, random),
    ...workers > 1 ? { replaceWorkers: () => some(victims).signal("SIGHUP") } : {},
    cut: () => some(relays).cut(),
    cutSoon: () => {
      const relay = some(relays);
      relay.budgets = Array.from({ length: 4 }, () => ({ down: Math.floor(random() * 3000) }));
      relay.cut();
    },
    killPubSub: () => control.client("KILL", "TYPE", "pubsub"),
    pauseWrites: () => control.call("CLIENT", "PAUSE", Math.floor(random() * 300), "WRITE"),
    trim: () => control.xtrim(downChannel(some(names)), "MAXLEN", Math.floor(random() * 20)),
    delete: () => control.del(downChannel(some(names))),
    expire: () => control.pexpire(downChannel(some(names)), 1),
    flushFunctions: () => control.call("FUNCTION", "FLUSH"),
    flush: () => random() < 0.2 && control.flushall(),
    killRedis: async () => {
      if (random() < 0.6) return;
      await master.kill();
      if (!persistent) await master.forgetDump();
      await master.start();
    },
    // The replica that takes over lacks what came while it was cut off.
    failOver: async () => {
      if (random() < 0.5) return;
      const [old, next] = [master.client(), standby.client()];
      await next.replicaof("127.0.0.1", 1);
      await pause(random() * 200);
      await Promise.all(backends.map((backend) => backend.hold()));
      await next.replicaof("NO", "ONE");
      for (const [n, session] of names.entries()) {
        const [entry] = await next.xrevrange(downChannel(session), "+", "-", "COUNT", 1);
        witnesses[n]!.lostTails.push({ from: parseInt(entry?.[1][1] || "0"), to: backends[n]!.sent });
      }
      [master, standby] = [standby, master];
      for (const relay of [name, ...relays]) {
        relay.target = master.port;
        relay.cut();
      }
      for (const backend of backends) backend.go();
      await old.replicaof("127.0.0.1", master.port);
      await eventually(
        "the old master follows",
        async () => /master_link_status:up/.test(await old.info("replication")),
      );
    },
  };
  try {
    return await harass(options, random, harms, backends, witnesses, () => {
      for (const relay of relays) relay.budgets = [];
    });
  } finally {
    for (const client of clients) client.disconnect();
  }
}

if (import.meta.main) {
  const { seconds, seed, ...values } = runOptions(60, { workers: { type: "string", default: "1" } });
  const workers = numberOf("workers", values.workers);
  for (const engine of ["deno", "ws"]) {
    for (const persistent of [true, false]) {
      const options = { seconds: seconds / 4, seed, engine, sessions: 20, persistent, workers };
      console.log(JSON.stringify({ ...options, ...await torture(options) }));
    }
  }
  Deno.exit();
}
