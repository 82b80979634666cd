/**
 * Tortures workers that share an inbox: they are killed, stopped, and frozen for longer than their lease; Redis and the
 * proxies are killed; clients ask, stop, ask again, and lose their sockets. An oracle reads the logs.
 *
 *     deno task test:answers --seconds 60 --seed 1 [--python PATH] [--mutate]
 *
 * With --python every other worker is a Python one. With --mutate the log does not look at epochs, and the oracle must
 * find that out.
 */

import assert from "node:assert/strict";
import { parseArgs } from "node:util";
import type { Redis } from "ioredis";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { Client } from "../harness/client.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";
import { createRandom, oneOf, pause } from "./parts.ts";

const leaseMs = 800;
const sessions = 8;
const workers = 4;

/** What a torture is. */
export interface Options {
  readonly seconds: number;
  readonly seed: number;
  /** A Python that has redis-py, for every other worker. */
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
  constructor(readonly redis: RedisServer, readonly python: string | undefined) {
    for (let i = 0; i < workers; i++) this.start(i);
  }

  start(i: number): void {
    const folder = new URL(".", import.meta.url).pathname;
    const env = {
      REDIS_URL: this.redis.url,
      LEASE_MS: String(leaseMs),
      PYTHONPATH: `${folder}../../clients/python`,
    };
    const options = { env, stdin: "null", stdout: "null", stderr: "inherit" } as const;
    const command = this.python && i % 2 === 1
      ? new Deno.Command(this.python, { ...options, args: ["-u", `${folder}answers_worker.py`] })
      : new Deno.Command(Deno.execPath(), {
        ...options,
        args: [
          "run",
          "--quiet",
          "--no-check",
          "--allow-net",
          "--allow-env",
          "--allow-read",
          `${folder}answers_worker.ts`,
        ],
      });
    this.#running[i] = command.spawn();
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
  #position = "0";
  #client: Client | undefined;
  #confirmed = new Set<string>();
  #done = false;

  constructor(readonly session: string, readonly ports: () => number[], readonly random: () => number) {}

  async run(until: () => boolean): Promise<void> {
    const receiving = this.#receive();
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
    await receiving;
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
          else if (head === "!gap") throw new Error(`a gap: ${body}`);
          else if (!head.startsWith("!") && head !== "") {
            this.heard.push(body);
            this.#position = head;
          }
        }
      } catch (error) {
        assert.doesNotMatch(String(error), /a gap/);
      }
      this.#client = undefined;
      await pause(50);
    }
  }

  /** Cuts the socket. */
  cut(): void {
    this.#client?.socket.close();
  }

  end(): void {
    this.#done = true;
    this.cut();
  }
}

/** What must hold of one session's log. Returns how many answers another worker went on with. */
export function judge(asked: readonly Asked[], said: readonly Said[]): number {
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
    if (count === undefined) continue;
    if (finals.get(q) === "end") assert.equal(words.get(q), count, `${q} is whole`);
    else assert(finals.has(q) || order.get(q)! < stoppedBefore, `${q} has no answer`);
  }
  return [...starts.values()].filter((count) => count > 1).length;
}

/** Runs one, and judges it. @throws what the oracle finds. */
export async function torture({ seconds, seed, python, mutate = false }: Options): Promise<Report> {
  const random = createRandom(seed);
  const report: Report = { questions: 0, stops: 0, answers: 0, takenOver: 0, faults: {} };
  await using redis = await RedisServer.start("--appendonly", "yes", "--appendfsync", "always");
  const control: Redis = redis.client();
  const env = { INBOX: "true", LOG_MAX_MESSAGES: "100000", REDIS_OUTAGE_GRACE_SECS: "60" };
  const proxies = await Promise.all([ProxyProcess.start(redis, env), ProxyProcess.start(redis, env)]);
  let done = false;
  const askers = Array.from(
    { length: sessions },
    (_, i) => new Asker(`s${i}`, () => proxies.map(({ port }) => port), createRandom(seed + i + 1)),
  );
  try {
    for (const proxy of proxies) proxy.log.drain();
    if (mutate) {
      const options = { maxMessages: 100_000, ttlMs: 3_600_000, maxMessageBytes: 1_048_576, sharded: false };
      const text = renderLibrary({ ...options, startedMs: Date.now() + 3_600_000 });
      const mutated = text.replace(/^ {2}local fenced = .*$/m, "  local fenced = false");
      assert.notEqual(mutated, text);
      await control.call("FUNCTION", "LOAD", "REPLACE", mutated);
    }
    await using crew = new Crew(redis, python);
    const asking = askers.map((asker) => asker.run(() => done));
    const frozen: Promise<void>[] = [];
    const faults: Record<string, (i: number) => Promise<void> | void> = {
      kill: (i) => crew.replace(i, "SIGKILL"),
      freeze: (i) => {
        crew.signal(i, "SIGSTOP");
        frozen.push(pause(leaseMs * (0.5 + 2 * random())).then(() => crew.signal(i, "SIGCONT")));
      },
      stop: (i) => crew.replace(i, "SIGTERM"),
      cut: () => oneOf(askers, random).cut(),
      redis: async () => {
        await redis.kill();
        await pause(200 * random());
        await redis.start();
      },
      proxy: async (i) => {
        const former = proxies[i % 2]!;
        proxies[i % 2] = proxies[(i + 1) % 2]!;
        await former[Symbol.asyncDispose]();
        proxies[i % 2] = await ProxyProcess.start(redis, env);
        proxies[i % 2]!.log.drain();
      },
    };
    const weights = ["freeze", "freeze", "freeze", "kill", "kill", "kill", "stop", "cut", "cut", "redis", "proxy"];
    const endMs = performance.now() + 1000 * seconds;
    await eventually("the first answers", async () => await control.exists("session:s0:down") === 1);
    while (performance.now() < endMs) {
      await pause(100 + 400 * random());
      const fault = oneOf(weights, random);
      // One that is frozen must not be stopped, and waits for.
      if (fault === "stop" || fault === "kill") await Promise.all(frozen.splice(0));
      await faults[fault]!(Math.floor(random() * workers));
      report.faults[fault] = (report.faults[fault] ?? 0) + 1;
    }
    await Promise.all(frozen);
    done = true;
    await eventually("every question is done", async () => {
      const [pending] = await control.xpending("agent:agent:inbox", "answers") as [number];
      const entered = await control.xinfo("GROUPS", "agent:agent:inbox") as [string[]];
      return pending === 0 && Number(entered[0][entered[0].indexOf("lag") + 1]) === 0;
    });
    for (const asker of askers) {
      const log = (await control.xrange(`session:${asker.session}:down`, "-", "+"))
        .filter(([, fields]) => fields[0] === "d").map(([, fields]) => fields[1]!);
      const said: Said[] = log.map((text) => JSON.parse(text));
      report.questions += asker.asked.filter(({ stop }) => !stop).length;
      report.stops += said.filter(({ kind }) => kind === "stopped").length;
      report.answers += said.filter(({ kind }) => kind === "end").length;
      report.takenOver += judge(asker.asked, said);
      await eventually(`${asker.session} has heard all`, () => asker.heard.length >= log.length);
      assert.deepEqual(asker.heard, log, `what ${asker.session} has heard`);
    }
    for (const asker of askers) asker.end();
    await Promise.all(asking);
  } finally {
    done = true;
    for (const asker of askers) asker.end();
    for (const proxy of new Set(proxies)) await proxy[Symbol.asyncDispose]();
  }
  return report;
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: {
      seconds: { type: "string", default: "60" },
      seed: { type: "string", default: String(Date.now() % 1e9) },
      python: { type: "string" },
      mutate: { type: "boolean", default: false },
    },
  });
  console.log(`seed ${values.seed}`);
  const { python, mutate } = values;
  console.log(
    JSON.stringify(await torture({ seconds: Number(values.seconds), seed: Number(values.seed), python, mutate })),
  );
}
