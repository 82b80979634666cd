/**
 * `deno task bench:redis`: what a message costs Redis, by PUBLISH, with an entry in an inbox, and by `wsproxy_send`. CPU is that of Redis's main
 * thread, kernel included; the ways alternate, and of several rounds the median counts.
 */

import { parseArgs } from "node:util";
// As it stands it has the settings' defaults.
import library from "../src/redis/log.lua" with { type: "text" };
import { startRedis } from "./processes.ts";
import { align } from "./table.ts";

const { values } = parseArgs({
  options: { rounds: { type: "string", default: "7" }, bytes: { type: "string", default: "64" } },
});
const rounds = Number(values.rounds);
const payload = "x".repeat(Number(values.bytes));
const sessions = 16;
/** Commands in one write. */
const batch = 160;

/** One way to send a message. */
interface Way {
  readonly name: string;
  /** The command for a session; `number` is another one for each. */
  words(channel: string, number: number): string[];
  /** A command that goes before it. */
  readonly before?: readonly string[];
  /** Lines of its answer. */
  readonly lines: number;
}

const ways: readonly Way[] = [
  { name: "PUBLISH", words: (channel) => ["PUBLISH", channel, payload], lines: 1 },
  { name: "wsproxy_send", words: (channel) => ["FCALL", "wsproxy_send", "1", channel, payload], lines: 4 },
  {
    name: "PUBLISH, inbox",
    words: (channel) => ["PUBLISH", channel, payload],
    before: ["XADD", "agent:bench:inbox", "MAXLEN", "~", "100000", "*", "type", "message", "session", "bench-1"].concat(
      ["connection", "01234567-1", "at", "1767225600000", "data", payload],
    ),
    lines: 3,
  },
  {
    name: "wsproxy_send, nonce",
    words: (channel, number) => ["FCALL", "wsproxy_send", "1", channel, payload, `nonce-${number % batch}`],
    lines: 4,
  },
];
const channelOf = (session: number) => `session:bench-${session}:down`;

/** A connection that writes bytes which were made before, and counts the lines that come back. */
class Wire {
  readonly #connection: Deno.TcpConn;
  readonly #chunk = new Uint8Array(65_536);
  private constructor(connection: Deno.TcpConn) {
    this.#connection = connection;
  }
  static async connect(port: number): Promise<Wire> {
    const connection = await Deno.connect({ hostname: "127.0.0.1", port });
    connection.setNoDelay();
    return new Wire(connection);
  }
  /** Sends commands in one write, and waits for the lines of their answers. Returns the end of what came. */
  async ask(bytes: Uint8Array, lines: number): Promise<string> {
    for (let written = 0; written < bytes.length;) written += await this.#connection.write(bytes.subarray(written));
    let end = "";
    for (let seen = 0; seen < lines;) {
      const size = await this.#connection.read(this.#chunk);
      if (size === null) throw new Error("Redis hung up");
      if (this.#chunk[0] === 0x2d) throw new Error(new TextDecoder().decode(this.#chunk.subarray(0, size)));
      for (let i = 0; i < size; i++) if (this.#chunk[i] === 0x0a) seen++;
      end = new TextDecoder().decode(this.#chunk.subarray(0, size));
    }
    return end;
  }
  /** Reads for ever what is published to it. */
  async drain(): Promise<void> {
    while (await this.#connection.read(this.#chunk).catch(() => null) !== null);
  }
  close(): void {
    this.#connection.close();
  }
}

const resp = (...words: string[]) => `*${words.length}\r\n${words.map((w) => `$${w.length}\r\n${w}\r\n`).join("")}`;
const encode = (text: string) => new TextEncoder().encode(text);

await using redis = await startRedis();
const wire = await Wire.connect(redis.port);
await wire.ask(encode(`*3\r\n$8\r\nFUNCTION\r\n$4\r\nLOAD\r\n$${encode(library).length}\r\n${library}\r\n`), 2);

/** What the main thread has used so far, in microseconds. */
async function cpuUs(): Promise<number> {
  const info = await wire.ask(encode(resp("INFO", "cpu")), 8);
  const seconds = [...info.matchAll(/used_cpu_(?:sys|user)_main_thread:([\d.]+)/g)].map((match) => Number(match[1]));
  if (seconds.length !== 2) throw new Error("INFO cpu must tell of the main thread: Redis 7 is needed");
  return 1e6 * (seconds[0]! + seconds[1]!);
}

/** What one message costs. */
async function costUs(way: Way, pipelined: boolean): Promise<number> {
  const commands = Array.from(
    { length: batch },
    (_, i) => encode((way.before ? resp(...way.before) : "") + resp(...way.words(channelOf(i % sessions), i))),
  );
  const all = encode(commands.map((command) => new TextDecoder().decode(command)).join(""));
  const repeats = pipelined ? 250 : 20;
  const before = await cpuUs();
  for (let i = 0; i < repeats; i++) {
    if (pipelined) await wire.ask(all, batch * way.lines);
    else for (const command of commands) await wire.ask(command, way.lines);
  }
  return (await cpuUs() - before) / (repeats * batch);
}

const median = (numbers: number[]) => numbers.sort((a, b) => a - b)[numbers.length >> 1]!;

const rows = [["", ...ways.flatMap(({ name }, i) => i === 0 ? [`${name} us`] : [`${name} us`, "ratio"])]];
for (const subscribed of [false, true]) {
  const subscriber = await Wire.connect(redis.port);
  if (subscribed) {
    const channels = Array.from({ length: sessions }, (_, session) => channelOf(session));
    await subscriber.ask(encode(resp("SUBSCRIBE", ...channels)), 6 * sessions);
  }
  const drained = subscriber.drain();
  for (const pipelined of [true, false]) {
    // Logs that are full, as they are trimmed then.
    for (let i = 0; i < 2; i++) await costUs(ways[1]!, true);
    const costs = ways.map((): number[] => []);
    for (let round = 0; round < rounds; round++) {
      for (const [i, way] of ways.entries()) costs[i]!.push(await costUs(way, pipelined));
    }
    const us = costs.map(median);
    const name = `${pipelined ? `${batch} in one write` : "awaited one by one"}, ${
      subscribed ? "one" : "no"
    } subscriber`;
    rows.push([
      name,
      ...us.flatMap((cost, i) => i === 0 ? [cost.toFixed(2)] : [cost.toFixed(2), (cost / us[0]!).toFixed(1)]),
    ]);
  }
  subscriber.close();
  await drained;
}
wire.close();
console.log(`Redis CPU for each message of ${payload.length} bytes, median of ${rounds} rounds\n`);
console.log(align(rows));
