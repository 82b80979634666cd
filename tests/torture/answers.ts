/**
 * Tortures workers that share an inbox: they are killed, stopped, and frozen for longer than their lease; Redis and the
 * proxies are killed, and masters fail over; clients ask, stop, ask again, and lose their sockets. An oracle reads the logs.
 *
 *     deno task test:answers --seconds 60 --seed 1 [--redis server|sentinel|cluster] [--lose] [--python PATH] [--mutate]
 *
 * Workers are over ioredis and node-redis; with --python, a Python that has redis-py, every third one is in Python. With
 * --lose failovers of sentinels lose what was acknowledged, and the oracle lets that pass where it was lost. With --mutate
 * the log does not look at epochs, and the oracle must find that out.
 */

import assert from "node:assert/strict";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { Client } from "../harness/client.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { eventually, soon } from "../harness/wait.ts";
import { startWorker } from "./crew.ts";
import { grounds } from "./grounds.ts";
import { count, createRandom, oneOf, pause, runOptions } from "./parts.ts";

const leaseMs = 800;
const sessions = 8;
const workers = 4;
const inbox = "agent:agent:inbox";

/** What a torture is. */
export interface Options {
  readonly seconds: number;
  readonly seed: number;
  /** What Redis is: "server" unless it is given. */
  readonly redis?: keyof typeof grounds;
  /** Failovers lose what was acknowledged. */
  readonly lose?: boolean;
  /** A Python that has redis-py, for every third worker. */
  readonly python?: string;
  /** The log does not look at epochs. */
  readonly mutate?: boolean;
}

/** What has happened. */
export interface Report {
  questions: number;
  stops: number;
  answers: number;
  takenOver: number;
  /** From a stop's entry in the inbox to what the log says of it, in ms, at the median and at the 99th percentile. */
  stopMs: number[];
  /** From a stop's entry to the last that was said of what it ends; 0 when nothing was. */
  lastWordMs: number[];
  /** Sessions of which a failover has lost something. */
  lost: number;
  faults: Record<string, number>;
}

/** What a client has asked, in its order. */
interface Asked {
  readonly q: string;
  readonly words?: number;
  readonly stop?: true;
}

/** A message of a log. */
interface Said {
  readonly kind: "start" | "word" | "end" | "stopped" | "failed";
  readonly q: string;
  readonly by?: string;
  readonly at?: number;
}

/** Workers as processes, which can be killed and frozen. */
class Crew implements AsyncDisposable {
  readonly #running: Deno.ChildProcess[] = [];
  constructor(readonly url: string, readonly python: string | undefined) {
    for (let i = 0; i < workers; i++) this.start(i);
  }

  start(i: number): void {
    const library = this.python && i % 3 === 2 ? { python: this.python } : i % 3 === 0 ? "ioredis" : "node-redis";
    this.#running[i] = startWorker(this.url, library, leaseMs);
  }

  signal(i: number, signal: Deno.Signal): void {
    this.#running[i]!.kill(signal);
  }

  async replace(i: number, signal: Deno.Signal): Promise<void> {
    this.signal(i, signal);
    await this.#running[i]!.status;
    this.start(i);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const worker of this.#running) worker.kill("SIGKILL");
    await Promise.all(this.#running.map(({ status }) => status));
  }
}

/** A client that asks and stops, and sends again what it has no answer for. */
class Asker {
  readonly asked: Asked[] = [];
  readonly heard: string[] = [];
  readonly gaps: string[] = [];
  #position = "0";
  #client: Client | undefined;
  #confirmed = new Set<string>();
  #done = false;
  #receiving: Promise<void> | undefined;

  constructor(readonly session: string, readonly ports: () => number[], readonly random: () => number) {}

  /** Asks, until it is told to end and all of it is confirmed. It goes on hearing. */
  async run(until: () => boolean): Promise<void> {
    this.#receiving = this.#receive();
    while (!until()) {
      const q = `${this.session}-${this.asked.length}`;
      const last = this.asked.at(-1);
      const asked: Asked = last && !last.stop && this.random() < 0.4
        ? { q, stop: true }
        : { q, words: 1 + Math.floor(this.random() * 15) };
      this.asked.push(asked);
      while (!this.#confirmed.has(q)) {
        try {
          this.#client?.send(`!send\n${q}\n${JSON.stringify(asked)}`);
        } catch {
          // It is sent again.
        }
        for (let i = 0; i < 50 && !this.#confirmed.has(q); i++) await pause(10);
      }
      await pause(this.random() * 400);
    }
  }

  /** A reader: it comes back whenever its socket ends, and goes on from its position. */
  async #receive(): Promise<void> {
    while (!this.#done) {
      try {
        const ports = this.ports();
        const port = oneOf(ports, this.random);
        await using client = await Client.connect(port, this.session, { resume: this.#position });
        this.#client = client;
        while (!this.#done) {
          const frame = await client.next();
          const end = frame.indexOf("\n");
          const [head, body] = [frame.slice(0, end), frame.slice(end + 1)];
          if (head === "!sent") this.#confirmed.add(JSON.parse(body).id);
          else if (head === "!gap") {
            this.gaps.push(`after ${this.#position}: ${body}`);
            this.#position = JSON.parse(body).position;
          } else if (!head.startsWith("!") && head !== "") {
            this.heard.push(body);
            this.#position = head;
          }
        }
      } catch {
        // The socket has ended.
      }
      this.#client = undefined;
      await pause(50);
    }
  }

  /** Cuts the socket. */
  cut(): void {
    this.#client?.socket.close();
  }

  async end(): Promise<void> {
    this.#done = true;
    this.cut();
    await this.#receiving;
  }
}

/**
 * What must hold of one session's log; questions that Redis has forgotten need no end. Returns how many answers another
 * worker went on with.
 */
export function judge(asked: readonly Asked[], said: readonly Said[], forgotten = new Set<string>()): number {
  const order = new Map(asked.map(({ q }, i) => [q, i]));
  const stops = new Set(asked.filter(({ stop }) => stop).map(({ q }) => q));
  const words = new Map<string, number>();
  const finals = new Map<string, string>();
  const starts = new Map<string, number>();
  let writer: string | undefined;
  let stoppedBefore = -1;
  let newest = -1;
  for (const { kind, q, by, at } of said) {
    const seq = order.get(q);
    assert(seq !== undefined, `${q} was never asked`);
    if (kind === "stopped") {
      assert(stops.has(q), `${q} is no stop`);
      assert(seq > stoppedBefore, `${q} stops twice`);
      stoppedBefore = seq;
      writer = undefined;
      continue;
    }
    assert(seq > stoppedBefore, `${q} goes on after a stop that came later (${kind})`);
    assert(!finals.has(q), `${q} goes on after its end (${kind})`);
    if (kind === "start") {
      assert(seq >= newest, `${q} begins after a question that came later`);
      newest = seq;
      writer = by;
      starts.set(q, (starts.get(q) ?? 0) + 1);
    } else if (kind === "failed") {
      writer = undefined;
      finals.set(q, kind);
    } else {
      assert.equal(by, writer, `a word of ${q} by a writer after another has begun`);
      if (kind === "word") {
        assert.equal(at, words.get(q) ?? 0, `the words of ${q}`);
        words.set(q, at! + 1);
      } else {
        finals.set(q, kind);
        writer = undefined;
      }
    }
  }
  for (const { q, words: count } of asked) {
    if (count === undefined || forgotten.has(q)) continue;
    if (finals.get(q) === "end") assert.equal(words.get(q), count, `${q} is whole`);
    else assert(finals.has(q) || order.get(q)! < stoppedBefore, `${q} has no answer`);
  }
  return [...starts.values()].filter((count) => count > 1).length;
}

/** What a message of the log says, and when. */
interface Line {
  readonly atMs: number;
  readonly text: string;
}

/** From each stop's entry in the inbox to what the log says of it, and to the last that was said of what it ends. */
function stopTimes(entries: readonly [string, string[]][], logs: readonly Line[][]) {
  const askedAtMs = new Map(entries.flatMap(([id, fields]) => {
    const data = fields[fields.indexOf("data") + 1] ?? "";
    return data.includes('"stop"') ? [[JSON.parse(data).q as string, parseInt(id)]] : [];
  }));
  const told: number[] = [];
  const obeyed: number[] = [];
  for (const lines of logs) {
    let lastMs = 0;
    for (const { atMs, text } of lines) {
      const { kind, q } = JSON.parse(text) as Said;
      const sinceMs = askedAtMs.get(q);
      if (kind !== "stopped") lastMs = atMs;
      else if (sinceMs !== undefined) {
        told.push(atMs - sinceMs);
        obeyed.push(Math.max(0, lastMs - sinceMs));
      }
    }
  }
  return [told, obeyed].map((times) => {
    times.sort((one, other) => one - other);
    return [0.5, 0.99].map((part) => times[Math.floor(part * times.length)] ?? 0);
  });
}

/** Runs one, and judges it. @throws what the oracle finds. */
export async function torture(options: Options): Promise<Report> {
  const { seconds, seed, python, lose = false, mutate = false } = options;
  const random = createRandom(seed);
  const report: Report = {
    questions: 0,
    stops: 0,
    answers: 0,
    takenOver: 0,
    stopMs: [],
    lastWordMs: [],
    lost: 0,
    faults: {},
  };
  const names = Array.from({ length: sessions }, (_, i) => `s${i}`);
  const logOf = (session: string) => `session:${session}:down`;
  await using ground = await grounds[options.redis ?? "server"](random, [inbox, ...names.map(logOf)]);
  const { control } = ground;
  const env = { INBOX: "true", LOG_MAX_MESSAGES: "100000", REDIS_OUTAGE_GRACE_SECS: "60" };
  const proxies = await Promise.all([ProxyProcess.start(ground.url, env), ProxyProcess.start(ground.url, env)]);
  let done = false;
  const askers = names.map((name, i) =>
    new Asker(name, () => proxies.map(({ port }) => port), createRandom(seed + i + 1))
  );
  // Of these sessions a failover has lost something of the log, and of these questions the entry.
  const lost = new Set<string>();
  const forgotten = new Set<string>();
  try {
    for (const proxy of proxies) proxy.log.drain();
    if (mutate) {
      const sharded = options.redis === "cluster";
      const settings = { maxMessages: 100_000, ttlMs: 3_600_000, maxMessageBytes: 1_048_576, sharded };
      const text = renderLibrary({ ...settings, startedMs: Date.now() + 3_600_000 });
      const mutated = text.replace(/^ {2}local fenced = .*$/m, "  local fenced = false");
      assert.notEqual(mutated, text);
      await ground.load(mutated);
    }
    await using crew = new Crew(ground.url, python);
    const asking = askers.map((asker) => asker.run(() => done));
    const frozen: Promise<void>[] = [];
    const some = () => Math.floor(random() * workers);
    const faults: Record<string, () => Promise<void> | void> = {
      ...ground.faults,
      ...lose && ground.lose
        ? {
          async lose() {
            for (const { key, fields } of await ground.lose!([inbox, ...names.map(logOf)])) {
              if (key !== inbox) lost.add(key);
              else if (fields.includes("data")) forgotten.add(JSON.parse(fields[fields.indexOf("data") + 1]!).q);
            }
          },
        }
        : {},
      kill: () => crew.replace(some(), "SIGKILL"),
      freeze: () => {
        const i = some();
        crew.signal(i, "SIGSTOP");
        frozen.push(pause(leaseMs * (0.5 + 2 * random())).then(() => crew.signal(i, "SIGCONT")));
      },
      stop: () => crew.replace(some(), "SIGTERM"),
      cut: () => oneOf(askers, random).cut(),
      proxy: async () => {
        const i = some() % 2;
        const former = proxies[i]!;
        proxies[i] = proxies[1 - i]!;
        await former[Symbol.asyncDispose]();
        proxies[i] = await ProxyProcess.start(ground.url, env);
        proxies[i]!.log.drain();
      },
    };
    const often = ["freeze", "freeze", "kill", "kill", "cut"];
    const endMs = performance.now() + 1000 * seconds;
    await eventually("the first answers", async () => await control.exists(logOf("s0")) === 1);
    while (performance.now() < endMs) {
      await pause(100 + 400 * random());
      const fault = oneOf([...Object.keys(faults), ...often], random);
      // One that is frozen must not be stopped, and waits for.
      if (fault === "stop" || fault === "kill") await Promise.all(frozen.splice(0));
      await faults[fault]!();
      count(report.faults, fault);
    }
    await Promise.all(frozen);
    done = true;
    await soon(Promise.all(asking), "all is confirmed");
    let left = "";
    const isDone = async () => {
      const [last] = await control.xrevrange(inbox, "+", "-", "COUNT", 1);
      const [group] = await control.xinfo("GROUPS", inbox) as [(string | number)[]];
      const of = (name: string) => group[group.indexOf(name) + 1];
      left = `${of("pending")} pending, delivered up to ${of("last-delivered-id")} of ${last?.[0]}`;
      // Of a replica that has become the master, the lag is wrong.
      return of("pending") === 0 && of("last-delivered-id") === last?.[0];
    };
    const isCalm = () => isDone().catch((error) => ((left = error.message), false));
    await eventually("every question is done", isCalm, 40_000).catch((error) => {
      throw new Error(`${error.message}: ${left}`);
    });
    const logs: Line[][] = [];
    for (const asker of askers) {
      const log = (await control.xrange(logOf(asker.session), "-", "+"))
        .filter(([, fields]) => fields[0] === "d").map(([id, fields]) => ({ atMs: parseInt(id), text: fields[1]! }));
      logs.push(log);
      const said: Said[] = log.map(({ text }) => JSON.parse(text));
      report.questions += asker.asked.filter(({ stop }) => !stop).length;
      report.stops += said.filter(({ kind }) => kind === "stopped").length;
      report.answers += said.filter(({ kind }) => kind === "end").length;
      // An epoch that comes again may have had two writers: there is only that each question is done, as was seen above.
      if (lost.has(logOf(asker.session))) continue;
      report.takenOver += judge(asker.asked, said, forgotten);
      assert.deepEqual(asker.gaps, [], `gaps of ${asker.session}`);
      await eventually(`${asker.session} has heard all`, () => asker.heard.length >= log.length);
      assert.deepEqual(asker.heard, log.map(({ text }) => text), `what ${asker.session} has heard`);
    }
    [report.stopMs, report.lastWordMs] = stopTimes(await control.xrange(inbox, "-", "+"), logs) as [number[], number[]];
    report.lost = lost.size;
  } finally {
    done = true;
    await Promise.all(askers.map((asker) => asker.end()));
    for (const proxy of new Set(proxies)) await proxy[Symbol.asyncDispose]();
  }
  return report;
}

if (import.meta.main) {
  const { redis, ...rest } = runOptions(60, {
    redis: { type: "string", default: "server" },
    python: { type: "string" },
    lose: { type: "boolean", default: false },
    mutate: { type: "boolean", default: false },
  });
  if (!(redis in grounds)) {
    throw new Error(`--redis must be one of ${Object.keys(grounds)}: current value is "${redis}"`);
  }
  console.log(JSON.stringify(await torture({ ...rest, redis: redis as keyof typeof grounds })));
}
