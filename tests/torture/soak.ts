/**
 * A day in minutes: thousands of short sessions of every kind, slow readers, tokens that run out, and now and then a
 * fault. In the end nothing may be left of them: objects of any class in the heap after a collection, descriptors, keys of
 * Redis, subscriptions.
 */

import { type Heap, Inspector } from "../harness/heap.ts";
import { Client } from "../harness/client.ts";
import { type Env, ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { onSparePort, openRaw, readToEnd } from "../harness/wire.ts";
import { count, createRandom, numberOf, oneOf, pause, runOptions } from "./parts.ts";

/** What is soaked, and for how long. */
export interface SoakOptions {
  readonly seconds: number;
  readonly seed: number;
  readonly engine: string;
  readonly workers: number;
  /** Sessions at a time. */
  readonly sessions: number;
}

/** What happened, and what the process had before and after. */
export interface SoakReport {
  readonly ended: Record<string, number>;
  readonly faults: Record<string, number>;
  readonly heapBytes: readonly [before: number, after: number];
  readonly residentBytes: readonly [before: number, after: number];
  readonly descriptors: readonly [before: number, after: number];
}

/** Objects of a class that may be more than before: caches, code that was compiled meanwhile. */
const moreObjects = 500;
/** The heap of an isolate may have grown by so much, for what was run the first time. */
const moreBytes = 3_000_000;
/** Its array buffers, too: redis-parser keeps a pool that is as large as what the largest messages once took. */
const moreBufferBytes = 8_000_000;

/** Soaks a proxy for a while. @throws what is left in the end. */
export async function soak({ seconds, seed, engine, workers, sessions }: SoakOptions): Promise<SoakReport> {
  const random = createRandom(seed);
  await using redis = await RedisServer.start();
  const control = redis.client();
  const env: Env = {
    WS_ENGINE: engine,
    WORKERS: String(workers),
    INBOX: "true",
    INBOX_MAX_ENTRIES: "1000",
    VACATED_GRACE_SECS: "1",
    LOG_TTL_SECS: "16",
    REDIS_OUTAGE_GRACE_SECS: "60",
    MAX_BUFFER_SIZE_BYTES: "2000000",
    LOG_LEVEL: "error",
  };
  const [proxy, inspectorPort] = await onSparePort(async (port) => {
    const denoArgs = [`--inspect=127.0.0.1:${port}`];
    return [await ProxyProcess.start(redis, { ...env, LOG_LEVEL: "info" }, { denoArgs }), port] as const;
  });
  await using _proxy = proxy;
  proxy.log.drain();
  using inspector = await Inspector.connect(inspectorPort);
  const ended: Record<string, number> = {};
  const faults: Record<string, number> = {};
  let next = 0;

  // A connection that is kept for the next request is a descriptor of the proxy's.
  using http = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });
  const send = (session: string, text: string) =>
    control.call("FCALL", "wsproxy_send", 1, `session:${session}:down`, text).catch(() => {});
  const within = async (client: Client, work: () => Promise<unknown>) => {
    try {
      await Promise.race([work(), client.closed]);
    } finally {
      client.socket.close();
    }
    await client.ended();
  };
  const kinds: Record<string, (session: string) => Promise<void>> = {
    async bare(session) {
      const client = await Client.connect(proxy.port, session);
      await within(client, async () => {
        await control.publish(`session:${session}:down`, '"down"');
        client.send('"up"');
        await client.take(1);
      });
    },
    async resuming(session) {
      await send(session, '"before"');
      const client = await Client.connect(proxy.port, session, { resume: "0" });
      await within(client, async () => {
        client.send("!ping\nx");
        client.send(`!send\n${crypto.randomUUID()}\n"up"`);
        client.send(`!token\n${await mint(session)}`);
        await send(session, '"after"');
        await client.take(4);
      });
    },
    async streaming(session) {
      const headers = { Authorization: `Bearer ${await mint(session)}` };
      const url = `http://127.0.0.1:${proxy.port}/agent/sse/${session}`;
      const ending = new AbortController();
      try {
        const response = await fetch(url, { client: http, headers, signal: ending.signal });
        await send(session, '"event"');
        await response.body!.getReader().read();
        const posted = await fetch(url, { client: http, method: "POST", headers, body: '"up"' });
        await posted.body?.cancel();
      } finally {
        ending.abort();
      }
    },
    async refused(session) {
      const token = await mint(session, {}, "another-secret-of-32-bytes-or-more!!");
      const url = new URL(`ws://127.0.0.1:${proxy.port}/agent/ws/${session}?refusal=close`);
      const client = await Client.open(url, { protocols: ["wsproxy.resume.v1", "bearer", token] }).catch(() =>
        undefined
      );
      await client?.ended();
    },
    async expiring(session) {
      const exp = Math.floor(Date.now() / 1000) + 2;
      const client = await Client.connect(proxy.port, session, { claims: { exp } });
      await client.ended();
    },
    async vanishing(session) {
      using _connection = await openRaw(proxy.port, session);
      await send(session, '"never read"');
    },
    async slow(session) {
      using connection = await openRaw(proxy.port, session);
      const text = JSON.stringify("x".repeat(400_000));
      for (let n = 0; n < 20; n++) await control.publish(`session:${session}:down`, text);
      await Promise.race([readToEnd(connection), pause(3000)]);
    },
  };
  const names = Object.keys(kinds);
  // Most are short ones.
  const weights = (name: string) => name === "slow" ? 1 : name === "expiring" ? 4 : 12;
  const bag = names.flatMap((name) => Array<string>(weights(name)).fill(name));

  async function live(until: number): Promise<void> {
    while (performance.now() < until) {
      const kind = oneOf(bag, random);
      // One session in three has had a client before.
      const session = `s${random() < 0.33 ? Math.floor(random() * next) : next++}`;
      try {
        await kinds[kind]!(session);
        count(ended, kind);
      } catch {
        // A fault of Redis, or a worker that leaves.
        count(ended, `${kind}, by a fault`);
      }
    }
  }
  const churn = async (forMs: number) => {
    const until = performance.now() + forMs;
    await Promise.all(Array.from({ length: sessions }, () => live(until)));
  };
  const harms: Record<string, () => unknown> = {
    killConnections: () => control.client("KILL", "TYPE", "normal", "SKIPME", "yes"),
    killPubSub: () => control.client("KILL", "TYPE", "pubsub"),
    pauseWrites: () => control.call("CLIENT", "PAUSE", 300, "WRITE"),
    flushFunctions: () => control.call("FUNCTION", "FLUSH"),
    restartRedis: async () => {
      await redis.kill();
      await redis.start();
    },
    ...workers > 1 ? { replaceWorkers: () => proxy.signal("SIGHUP") } : {},
  };

  /** Waits until nobody is there, and looks at what is left. */
  async function rest(): Promise<{ heap: Heap; descriptors: number; residentBytes: number; keys: string[] }> {
    let found = {};
    await eventually("no sessions are left", async () => {
      try {
        const connections = await proxy.metric("wsproxy_connections");
        const healthy = await proxy.isHealthy();
        found = { connections, healthy, workers: inspector.workers };
        return connections === 0 && healthy && inspector.workers === (workers > 1 ? workers : 0);
      } catch (error) {
        // The worker that was asked has just left.
        found = { error: String(error) };
        return false;
      }
    }, 60_000).catch((error) => {
      throw new Error(`${error.message}: ${JSON.stringify(found)}`);
    });
    // Logs and what is known of departures live on for a while.
    let keys: string[] = [];
    await eventually("Redis has forgotten the sessions", async () => {
      keys = (await control.keys("*")).sort();
      return !keys.some((key) => /^session:|:held:|:vacant$|:sockets$/.test(key));
    }, 60_000).catch(() => {
      throw new Error(`Redis still has ${keys.filter((key) => key !== "agent:agent:inbox").slice(0, 10).join(", ")}`);
    });
    await eventually("no subscription of a session is left", async () => {
      return (await control.pubsub("CHANNELS", "session:*") as string[]).length === 0;
    });
    const lasting: string[] = [];
    // Workers have other names when they have been replaced.
    for (const key of keys) if (await control.pttl(key) === -1) lasting.push(key.replace(/[-0-9a-f]{36}/g, "*"));
    const heap = await inspector.heap();
    return {
      heap,
      keys: lasting,
      descriptors: proxy.descriptors,
      residentBytes: await proxy.metric("wsproxy_resident_memory_bytes"),
    };
  }

  // What is made the first time, and stays.
  await churn(Math.min(5000, seconds * 200));
  for (const name of Object.keys(harms)) {
    await harms[name]!();
    await eventually("healthy", () => proxy.isHealthy());
    await churn(300);
  }
  const before = await rest();

  const endMs = performance.now() + seconds * 1000;
  await Promise.all([
    churn(seconds * 1000),
    (async () => {
      while (performance.now() < endMs - 5000) {
        await pause(Math.min(20_000, seconds * 80));
        const name = oneOf(Object.keys(harms), random);
        count(faults, name);
        await harms[name]!();
      }
    })(),
  ]);
  const after = await rest();

  const left: string[] = [];
  for (const [name, number] of after.heap.objects) {
    // Named by scripts, which have other numbers in another worker.
    if (name.startsWith("system / ")) continue;
    const more = number - (before.heap.objects.get(name) ?? 0);
    if (more > moreObjects) left.push(`${more} more objects ${name}`);
  }
  const isolates = workers > 1 ? workers + 1 : 1;
  const more = after.heap.bytes - before.heap.bytes;
  if (more > moreBytes * isolates) left.push(`${more} bytes more in the heap`);
  const moreBuffers = after.heap.bufferBytes - before.heap.bufferBytes;
  if (moreBuffers > moreBufferBytes * isolates) left.push(`${moreBuffers} bytes more in array buffers`);
  if (after.descriptors > before.descriptors + 3) {
    left.push(`${after.descriptors} descriptors, where there were ${before.descriptors}`);
  }
  // What a proxy is, which agents it has, and what Redis knows of it; and an inbox that may have expired before.
  if (after.keys.length > before.keys.length + 4 * workers) left.push(`keys ${after.keys.join(", ")}`);
  const report: SoakReport = {
    ended,
    faults,
    heapBytes: [before.heap.bytes, after.heap.bytes],
    residentBytes: [before.residentBytes, after.residentBytes],
    descriptors: [before.descriptors, after.descriptors],
  };
  if (left.length > 0) throw new Error(`seed ${seed}: ${left.join("; ")}; ${JSON.stringify(report)}`);
  return report;
}

if (import.meta.main) {
  const { seconds, seed, ...values } = runOptions(600, { sessions: { type: "string", default: "60" } });
  const sessions = numberOf("sessions", values.sessions);
  for (const engine of ["deno", "ws"]) {
    for (const workers of [1, 2]) {
      const options = { seconds: seconds / 4, seed, engine, workers, sessions };
      console.log(JSON.stringify({ ...options, ...await soak(options) }));
    }
  }
  Deno.exit();
}
