/** A master, two replicas and three sentinels, all real, on spare ports. */

import { Redis } from "ioredis";
import { sparePort } from "../../scripts/spare_port.ts";
import { disconnect, RedisServer, serverCommand } from "./redis.ts";
import { lines } from "./process.ts";
import { eventually, soon } from "./wait.ts";

const masterName = "mymaster";

/** One sentinel of the test's own. */
export class SentinelProcess implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  readonly redis: Redis;

  private constructor(
    process: Deno.ChildProcess,
    readonly port: number,
    readonly directory: string,
    password?: string,
  ) {
    this.#process = process;
    this.redis = new Redis({
      port,
      host: "127.0.0.1",
      password,
      retryStrategy: () => 50,
      maxRetriesPerRequest: null,
      disconnectTimeout: 0,
    });
    this.redis.on("error", () => {});
  }

  /** Starts one that watches the server at a port; with a password it wants one itself. */
  static async start(master: number, password?: string): Promise<SentinelProcess> {
    const port = sparePort();
    const directory = await Deno.makeTempDir();
    await Deno.writeTextFile(
      `${directory}/sentinel.conf`,
      [
        `port ${port}`,
        "bind 127.0.0.1",
        `dir ${directory}`,
        `sentinel monitor ${masterName} 127.0.0.1 ${master} 2`,
        `sentinel down-after-milliseconds ${masterName} 500`,
        `sentinel failover-timeout ${masterName} 2000`,
        ...password === undefined ? [] : [`requirepass ${password}`],
      ].join("\n"),
    );
    const process = new Deno.Command(serverCommand, {
      args: [`${directory}/sentinel.conf`, "--sentinel"],
      stdin: "null",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const output = lines(process.stdout);
    await soon(output.until((line) => line.includes("Sentinel ID is")), "sentinel start");
    output.drain();
    return new SentinelProcess(process, port, directory, password);
  }

  signal(signal: Deno.Signal): void {
    this.#process.kill(signal);
  }

  /** What it knows of the master. */
  async master(): Promise<Record<string, string>> {
    const words = await this.redis.call("SENTINEL", "MASTER", masterName) as string[];
    return Object.fromEntries(words.flatMap((word, i) => i % 2 === 0 ? [[word, words[i + 1]!]] : []));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await disconnect(this.redis);
    this.#process.kill("SIGKILL");
    await this.#process.status;
    await Deno.remove(this.directory, { recursive: true });
  }
}

/** The servers of one master name. */
export class SentinelGroup implements AsyncDisposable {
  private constructor(readonly servers: readonly RedisServer[], readonly sentinels: readonly SentinelProcess[]) {}

  /** Starts all of them; the first server is the master, and every sentinel knows all others. */
  static async start(...args: string[]): Promise<SentinelGroup> {
    const master = await RedisServer.start(...args);
    const replicaOf = ["--replicaof", `127.0.0.1 ${master.port}`, "--repl-diskless-sync-delay", "0", ...args];
    const replicas = await Promise.all([RedisServer.start(...replicaOf), RedisServer.start(...replicaOf)]);
    const sentinels = await Promise.all([0, 1, 2].map(() => SentinelProcess.start(master.port)));
    const group = new SentinelGroup([master, ...replicas], sentinels);
    await eventually("the sentinels know each other", async () => {
      const known = await Promise.all(sentinels.map((sentinel) => sentinel.master()));
      return known.every((each) => each["num-other-sentinels"] === "2" && each["num-slaves"] === "2");
    });
    await eventually("the replicas are in step", async () => {
      const info = await master.client().info("replication");
      return (info.match(/state=online/g) ?? []).length === 2;
    });
    return group;
  }

  get url(): string {
    const hosts = this.sentinels.map(({ port }) => `127.0.0.1:${port}`);
    return `redis+sentinel://${hosts.join(",")}?sentinel_master_name=${masterName}`;
  }

  /** The server that most sentinels name. */
  async master(): Promise<RedisServer> {
    const ports = await Promise.all(this.sentinels.map(async (sentinel) => Number((await sentinel.master())["port"])));
    const port = ports.sort((a, b) => a - b)[1];
    return this.servers.find((server) => server.port === port)!;
  }

  /** Waits until the sentinels have elected another master, which knows that it is one. */
  async elected(former: RedisServer): Promise<RedisServer> {
    let master = former;
    const controls = new Map(this.servers.map((server) => [server, server.client()]));
    await eventually("another master is elected", async () => {
      master = await this.master();
      return master !== former && (await controls.get(master)!.call("ROLE") as string[])[0] === "master";
    });
    return master;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const sentinel of this.sentinels) await sentinel[Symbol.asyncDispose]();
    for (const server of this.servers) await server[Symbol.asyncDispose]();
  }
}
