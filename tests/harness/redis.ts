/** A real redis-server on a spare port, and what a backend does with it. */

import type { Buffer } from "node:buffer";
import { Redis } from "ioredis";
import { Inbox } from "./inbox.ts";
import { lines } from "./process.ts";
import { onSparePort, writeAll } from "./wire.ts";
import { eventually, soon } from "./wait.ts";

/**
 * The server under test, which may be another make or version, or a script that holds it up as a busy machine does:
 * `exec strace -D -f -qq -o /dev/null -e inject=write,read:delay_exit=5000 redis-server "$@"`.
 */
export const serverCommand = Deno.env.get("REDIS_SERVER") || "redis-server";

/**
 * What keeps everything that was answered when the process is killed: each answer comes after the write to the file. A
 * sync for each would only matter to the machine's end, and waits for a disk that others keep busy, for seconds.
 */
export const kept = ["--appendonly", "yes", "--appendfsync", "no"] as const;

/** A redis-server of the test's own, which can be killed, frozen and started again on the same port. */
export class RedisServer implements AsyncDisposable {
  #process: Deno.ChildProcess | undefined;
  #clients: Redis[] = [];
  readonly url: string;
  /** Of its own: a replica leaves a dump there, which the next server would load. */
  readonly #directory = Deno.makeTempDirSync();

  private constructor(readonly port: number, readonly args: readonly string[]) {
    this.url = `redis://127.0.0.1:${port}`;
  }

  /** Starts one; `args` are redis-server's own. Resolves when it accepts connections. */
  static async start(...args: string[]): Promise<RedisServer> {
    return await onSparePort(async (port) => {
      const server = new RedisServer(port, args);
      try {
        await server.start();
      } catch (error) {
        await server[Symbol.asyncDispose]();
        throw error;
      }
      return server;
    });
  }

  async start(): Promise<void> {
    const child = new Deno.Command(serverCommand, {
      args: [
        ...["--port", String(this.port), "--bind", "127.0.0.1", "--dir", this.#directory],
        ...["--save", "", "--appendonly", "no", ...this.args],
      ],
      stdin: "null",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    this.#process = child;
    const output = lines(child.stdout);
    await soon(output.until((line) => line.includes("Ready to accept connections")), "redis-server start");
    output.drain();
  }

  /** What a replica was sent once and wrote down: without persistence, nothing of it may come back at a restart. */
  async forgetDump(): Promise<void> {
    await Deno.remove(`${this.#directory}/dump.rdb`).catch((error) => {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    });
  }

  /** An ordinary connection for the test, closed with the server. */
  client(password?: string): Redis {
    const client = new Redis(this.url, {
      password,
      retryStrategy: () => 50,
      maxRetriesPerRequest: null,
      // A stream that has closed already would be waited for in a timer of its own.
      disconnectTimeout: 0,
    });
    client.on("error", () => {});
    this.#clients.push(client);
    return client;
  }

  /** It was started, and not killed. */
  get isRunning(): boolean {
    return this.#process !== undefined;
  }

  /** Sends a signal to the process: SIGSTOP freezes it, SIGCONT wakes it. */
  signal(signal: Deno.Signal): void {
    this.#process?.kill(signal);
  }

  /** Kills it with SIGKILL and waits until it is dead. */
  async kill(): Promise<void> {
    this.#process?.kill("SIGKILL");
    await this.#process?.status;
    this.#process = undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.#clients) await disconnect(client);
    if (this.#process) await this.kill();
    await Deno.remove(this.#directory, { recursive: true });
    await eventually("redis-parser's interval has ended", () => intervals.size === 0);
  }
}

/**
 * After a large reply redis-parser shrinks its buffer by and by, on an interval of its own that cannot be stopped: a
 * test that provokes it has to wait for its end.
 */
const intervals = new Set<unknown>();
const { setInterval, clearInterval } = globalThis;
globalThis.setInterval = ((...args: Parameters<typeof setInterval>) => {
  const interval = setInterval(...args);
  intervals.add(interval);
  return interval;
}) as typeof setInterval;
globalThis.clearInterval = (interval) => {
  intervals.delete(interval);
  clearInterval(interval);
};

/** Ends a client for good. */
export async function disconnect(client: Redis): Promise<void> {
  if (client.status === "end") return;
  // Between two attempts it just makes no other one, and does not tell.
  if (client.status === "reconnecting") return client.disconnect();
  const ended = new Promise((resolve) => client.once("end", resolve));
  client.disconnect();
  await ended;
}

/**
 * What servers are told to publish, in order by their clock, which is one. What is heard of two servers is in no order:
 * Redis answers the publisher before it writes to the subscribers.
 */
export class Published implements AsyncDisposable {
  readonly #seen: { readonly at: number; readonly channel: string; readonly text: string }[] = [];
  readonly #connections: Deno.TcpConn[] = [];
  readonly #ended: Promise<void>[] = [];

  /** Begins to watch, after this has been awaited. */
  static async on(servers: readonly RedisServer[]): Promise<Published> {
    const published = new Published();
    for (const { port } of servers) {
      // ioredis has MONITOR too, and stumbles over a command that comes together with the answer.
      const connection = await Deno.connect({ hostname: "127.0.0.1", port });
      published.#connections.push(connection);
      await writeAll(connection, new TextEncoder().encode("MONITOR\r\n"));
      const output = lines(connection.readable);
      await soon(output.until((line) => line.startsWith("+OK")), "MONITOR");
      published.#ended.push(output.until((line) => published.#note(line)).then(() => {}, () => {}));
    }
    return published;
  }

  #note(line: string): false {
    const [, at, channel, text] = /^\+([\d.]+) \[.*?\] "s?publish" "(.*?)" "(.*)"\r$/i.exec(line) ?? [];
    // Redis escapes quotes, and Valkey 8.1 does not.
    if (channel !== undefined) this.#seen.push({ at: Number(at), channel, text: text!.replaceAll('\\"', '"') });
    return false;
  }

  /** All that was published to a channel so far. */
  to(channel: string): string[] {
    const seen = this.#seen.filter((message) => message.channel === channel);
    return seen.sort((a, b) => a.at - b.at).map(({ text }) => text);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const connection of this.#connections) connection.close();
    await Promise.all(this.#ended);
  }
}

/** A backend's ear: what is published to one channel, kept until the test asks for it. */
export class Listener {
  readonly #inbox = new Inbox();

  private constructor(redis: Redis, encoding: "utf8" | "latin1") {
    redis.on("messageBuffer", (_channel, message: Buffer) => this.#inbox.add(message.toString(encoding)));
  }

  /** Subscribes. With `latin1` each character of a text is one byte of the message. */
  static async to(redis: RedisServer, channel: string, encoding: "utf8" | "latin1" = "utf8"): Promise<Listener> {
    const client = redis.client();
    const listener = new Listener(client, encoding);
    await client.subscribe(channel);
    return listener;
  }

  /** How many have arrived and were not taken. */
  get waiting(): number {
    return this.#inbox.size;
  }

  /** The next `count` messages. */
  take(count: number): Promise<string[]> {
    return this.#inbox.take(count);
  }

  /** All that has arrived and was not taken. */
  takeAll(): string[] {
    return this.#inbox.takeAll();
  }
}

/** Waits until a proxy has loaded the functions that write the logs. */
export const functionsLoaded = (redis: Redis): Promise<void> =>
  eventually("the functions are loaded", async () => {
    return (await redis.call("FUNCTION", "LIST", "LIBRARYNAME", "wsproxy") as unknown[]).length > 0;
  });

/** Subscribers of a channel, as Redis itself counts them. */
export async function subscribers(redis: Redis, channel: string): Promise<number> {
  const [, count] = await redis.pubsub("NUMSUB", channel) as [string, number];
  return Number(count);
}
