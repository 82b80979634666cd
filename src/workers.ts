/**
 * The main thread of a proxy on several cores: it serves no client itself, and starts workers that do, each a whole
 * proxy on the same port, and speaks for all of them. A worker that fails is replaced; one that says nothing is taken
 * for dead.
 */

import { backoffMs } from "./backoff.ts";
import type { Config } from "./config.ts";
import { within } from "./deadline.ts";
import { Operator } from "./http/operator.ts";
import { createShared, Limits } from "./limits.ts";
import { listenAdmin } from "./engine/admin.ts";
import type { Log } from "./log.ts";
import { countersOf, type MetricsReport } from "./metrics.ts";
import { type Client, type QuotaExcess, Quotas } from "./quotas.ts";
import type { Ask, Kind, Question, Reports } from "./report.ts";
import { type Environment, withSecrets } from "./settings.ts";
import { logTold, type Told, ToldOnce } from "./told.ts";

/** What a worker is started with. */
export interface WorkerStart {
  readonly kind: "start";
  /** The settings as text: what is parsed from them does not cross threads. */
  readonly env: Environment;
  /** The worker's place in what all share, and its name in the log. */
  readonly index: number;
  /** Names the process, whose sockets are counted together. */
  readonly process: string;
  readonly port: number;
  readonly limits: SharedArrayBuffer;
  /** Whether no other one serves: then it listens before it is connected to Redis. */
  readonly listensAtOnce: boolean;
}

/** What the main thread tells a worker. */
export type ToWorker =
  | WorkerStart
  | { readonly kind: "beat" }
  | { readonly kind: "report"; readonly question: number; readonly what: Question }
  | { readonly kind: "reports"; readonly question: number; readonly reports: readonly Reports[Kind][] }
  | { readonly kind: "count"; readonly told: Told }
  | { readonly kind: "entered"; readonly entry: number; readonly excess: QuotaExcess | undefined }
  | { readonly kind: "leave" }
  | { readonly kind: "stop" };

/** What a worker tells the main thread. */
export type FromWorker =
  | { readonly kind: "listening"; readonly hostname: string; readonly port: number }
  | { readonly kind: "beat"; readonly heapBytes: number; readonly unopened: number }
  | { readonly kind: "report"; readonly question: number; readonly report: Reports[Kind] }
  | { readonly kind: "ask"; readonly question: number; readonly what: Question }
  | { readonly kind: "told"; readonly told: Told }
  | { readonly kind: "enter"; readonly entry: number; readonly client: Client; readonly released: readonly Client[] }
  | { readonly kind: "release"; readonly released: readonly Client[] }
  | { readonly kind: "left"; readonly metrics: MetricsReport };

/** How many times a worker may fail to show that it lives. */
const maxMissedBeats = 10;
/** How long a worker may take from its start until it listens. */
const startTimeoutMs = 30_000;
/** How long a worker may take to report: more than a probe of Redis may. */
const reportTimeoutMs = 1000;
/** Delays before a failed worker is started again. */
const firstDelayMs = 100;
const maxDelayMs = 5000;
/** Starts in vain, while no worker serves, after which the process gives up. */
const maxFailures = 5;
/** How long a connection may go unanswered that is made to see whether a worker has really ended; and how many are. */
const probeTimeoutMs = 2000;
const probesForEach = 16;
/** How much longer than its grace a worker's end may take, at a stop and when it leaves the port to others. */
const stopMarginMs = 1000;
const leaveMarginMs = 3000;

/** What main.ts hands over, and what tests change. */
export interface WorkersOptions {
  /** The workers' entry. */
  readonly script?: URL;
  /** How often each worker must show that it lives. */
  readonly beatMs?: number;
  /** How long a worker must live to count as sound, and to be weighed. */
  readonly soundAfterMs?: number;
  /** Resolves when the process is told to stop, also while workers start. */
  readonly stopped?: Promise<void>;
}

interface Thread {
  readonly index: number;
  readonly worker: Worker;
  readonly startedAtMs: number;
  readonly listening: PromiseWithResolvers<{ readonly hostname: string; readonly port: number }>;
  readonly gone: PromiseWithResolvers<void>;
  /**
   * What it is asked, and has not answered; called without an answer when it is gone. What it answers a question with is
   * of the question's kind.
   */
  readonly reports: Map<number, (report?: never) => void>;
  state: "starting" | "serving" | "leaving" | "gone";
  missedBeats: number;
  /** As last reported. */
  metrics: MetricsReport;
}

/** The workers of one process. */
export class Workers {
  readonly #config: Config;
  readonly #env: Environment;
  readonly #log: Log;
  readonly #script: URL;
  readonly #soundAfterMs: number;
  /** Twice as many places as workers: a new one begins before the old one has left. */
  readonly #places: number;
  readonly #limits: SharedArrayBuffer;
  readonly #quotas: Quotas<Thread>;
  readonly #process = crypto.randomUUID();
  readonly #threads = new Set<Thread>();
  readonly #finished = Promise.withResolvers<void>();
  readonly #told = new ToldOnce<Thread>((told, last) => this.#tellOnce(told, last));
  /** What workers that are gone have counted. */
  #past: Promise<MetricsReport> = Promise.resolve([]);
  #port: number;
  #lastQuestion = 0;
  /** Of workers, in a row: one that was sound ends it. */
  #failuresSinceSound = 0;
  #failures = 0;
  readonly #restarts = new Set<ReturnType<typeof setTimeout>>();
  #beats: ReturnType<typeof setInterval> | undefined;
  #replacing: Promise<void> | undefined;
  #stopping = false;
  #closeAdmin: (() => Promise<void>) | undefined;

  private constructor(
    config: Config,
    env: Environment,
    log: Log,
    { script = new URL("./worker.ts", import.meta.url), soundAfterMs = 10_000 }: WorkersOptions,
  ) {
    this.#script = script;
    this.#soundAfterMs = soundAfterMs;
    this.#config = config;
    // Read once: a worker that starts later has the same secrets, whatever the files hold by then.
    this.#env = withSecrets(env);
    this.#log = log;
    this.#places = 2 * config.workers.count;
    this.#limits = createShared(this.#places);
    this.#quotas = new Quotas(config.limits);
    this.#port = config.listen.port;
  }

  /**
   * Starts them; resolves when all of them listen, or have failed and will be tried again, or when it is to stop. `env`
   * is what `config` was read from.
   * @throws what keeps the first one from listening, such as `Deno.errors.AddrInUse`.
   */
  static async start(
    config: Config,
    env: Environment,
    log: Log,
    options: WorkersOptions = {},
  ): Promise<Workers> {
    const { hostname, port, engine } = config.listen;
    // Workers share the port with any program that asks for that, another wsproxy too: it must be free.
    if (port !== 0) Deno.listen({ hostname, port }).close();
    const workers = new Workers(config, env, log, options);
    workers.#listenAdmin();
    const { stopped = new Promise<never>(() => {}) } = options;
    const first = workers.#launch(true);
    try {
      const listening = await Promise.race([first.listening.promise, stopped]);
      if (listening === undefined) return workers;
      workers.#port = listening.port;
    } catch (error) {
      workers.#end(first);
      await workers.#closeAdmin?.();
      throw error;
    }
    const others = Array.from({ length: config.workers.count - 1 }, () => workers.#serve());
    if (await Promise.race([Promise.all(others), stopped]) === undefined) return workers;
    workers.#beats = setInterval(() => workers.#beat(), options.beatMs ?? 1000);
    const settings = config.shown;
    log.info({ hostname, port: workers.#port, engine, workers: workers.#serving.length, settings }, "listening");
    return workers;
  }

  /** Resolves when all have stopped, and rejects when no worker can be kept alive. */
  get finished(): Promise<void> {
    return this.#finished.promise;
  }

  /** The port that they listen on. */
  get port(): number {
    return this.#port;
  }

  /** Drains all of them at once, within the grace period; with a `reason` that is a failure. */
  async stop(reason?: Error): Promise<void> {
    this.#stopping = true;
    for (const timer of this.#restarts) clearTimeout(timer);
    const ends = [...this.#threads].map((thread) => this.#dismiss(thread, "stop"));
    await Promise.all(ends);
    clearInterval(this.#beats);
    this.#told.close();
    await within(stopMarginMs, this.#closeAdmin?.() ?? Promise.resolve());
    if (reason) this.#finished.reject(reason);
    else this.#finished.resolve();
  }

  /** Replaces all of them, one by one: a new one serves before an old one leaves. One time after the other. */
  replace(): Promise<void> {
    return this.#replaceInTurn([...this.#serving]);
  }

  #listenAdmin(): void {
    if (this.#config.admin === undefined) return;
    const ask: Ask = (question) => this.#gather(question);
    const operator = new Operator({ draining: () => this.#stopping, canAdmit: () => false, ask });
    const { admin, forwarding } = this.#config;
    this.#closeAdmin = listenAdmin(admin, { operator, ask, log: this.#log, forwarding });
  }

  get #serving(): readonly Thread[] {
    return [...this.#threads].filter(({ state }) => state === "serving");
  }

  /** One that leaves still has sessions. */
  get #able(): readonly Thread[] {
    return [...this.#threads].filter(({ state }) => state === "serving" || state === "leaving");
  }

  get #starting(): number {
    return [...this.#threads].filter(({ state }) => state === "starting").length;
  }

  #launch(listensAtOnce: boolean): Thread {
    const taken = new Set([...this.#threads].map(({ index }) => index));
    let index = 0;
    while (taken.has(index)) index++;
    if (index >= this.#places) throw new Error("there is no place for another worker");
    Limits.forget(this.#limits, index);
    const worker = new Worker(this.#script, { type: "module", name: `wsproxy-${index}` });
    const thread: Thread = {
      index,
      worker,
      startedAtMs: performance.now(),
      listening: Promise.withResolvers(),
      gone: Promise.withResolvers(),
      reports: new Map(),
      state: "starting",
      missedBeats: 0,
      metrics: [],
    };
    // Whether it is awaited or not.
    thread.listening.promise.catch(() => {});
    this.#threads.add(thread);
    worker.onmessage = ({ data }: MessageEvent<FromWorker>) => this.#hear(thread, data);
    worker.onerror = (event) => {
      event.preventDefault();
      this.#fail(thread, event.message);
    };
    this.#tell(thread, {
      kind: "start",
      env: this.#env,
      index,
      process: this.#process,
      port: this.#port,
      limits: this.#limits,
      listensAtOnce,
    });
    return thread;
  }

  /** Starts one more, and takes it in when it listens; if it does not, another one is started later. */
  async #serve(): Promise<boolean> {
    const thread = this.#launch(false);
    const tooLate = () => this.#fail(thread, `not listening after ${startTimeoutMs} ms`);
    try {
      await within(startTimeoutMs, thread.listening.promise, tooLate);
    } catch {
      // It has been told, and another one is on its way.
    }
    return thread.state === "serving";
  }

  #tell(thread: Thread, message: ToWorker): void {
    thread.worker.postMessage(message);
  }

  #hear(thread: Thread, message: FromWorker): void {
    switch (message.kind) {
      case "listening":
        if (thread.state === "starting") thread.state = "serving";
        return thread.listening.resolve(message);
      case "beat":
        thread.missedBeats = 0;
        return this.#weigh(thread, message);
      case "report":
        thread.reports.get(message.question)?.(message.report as never);
        return void thread.reports.delete(message.question);
      case "ask":
        return void this.#gather(message.what).then((reports) =>
          this.#tell(thread, { kind: "reports", question: message.question, reports })
        );
      case "told":
        return this.#told.hear(message.told, thread, this.#able);
      case "enter": {
        // What it said before its end may come after it.
        if (thread.state === "gone") return;
        this.#release(thread, message.released);
        const excess = this.#quotas.enter(thread, message.client);
        return this.#tell(thread, { kind: "entered", entry: message.entry, excess });
      }
      case "release":
        return this.#release(thread, message.released);
      case "left":
        thread.metrics = message.metrics;
        return this.#end(thread);
    }
  }

  #release(thread: Thread, clients: readonly Client[]): void {
    for (const client of clients) this.#quotas.release(thread, client);
  }

  /** What all workers report, and what is known of those that are gone; one that does not answer is told of. */
  async #gather<K extends Kind>(what: Question<K>): Promise<readonly Reports[K][]> {
    // At one moment: a worker that goes while the others are asked counts once, here or there.
    const past: { readonly [Each in Kind]?: Promise<Reports[Each]> } = { metrics: this.#past };
    const [ofPast, reports] = await Promise.all([
      past[what.kind],
      Promise.all(this.#able.map((thread) => this.#ask(thread, what))),
    ]);
    return ofPast === undefined ? reports : [...reports, ofPast];
  }

  /** Counted by one of them, as the process counts what its workers do. */
  #tellOnce(told: Told, last: Thread): void {
    logTold(this.#log, told);
    const counter = last.state === "gone" ? this.#able[0] : last;
    if (counter) this.#tell(counter, { kind: "count", told });
  }

  async #ask<K extends Kind>(thread: Thread, what: Question<K>): Promise<Reports[K]> {
    const question = ++this.#lastQuestion;
    const { promise, resolve } = Promise.withResolvers<Reports[K] | undefined>();
    thread.reports.set(question, resolve);
    this.#tell(thread, { kind: "report", question, what: what as Question });
    const report = await within(reportTimeoutMs, promise) ?? silent[what.kind](thread);
    thread.reports.delete(question);
    kept[what.kind]?.(thread, report);
    return report;
  }

  #beat(): void {
    for (const thread of this.#serving) {
      // Counted by our own ticks: a stall of the whole process is no worker's fault.
      if (thread.missedBeats++ < maxMissedBeats) this.#tell(thread, { kind: "beat" });
      else {
        this.#fail(thread, "it gives no sign of life");
        void this.#assertEnded(thread);
      }
    }
  }

  /**
   * Deno does not end a thread that never comes back from JavaScript, and the kernel goes on giving connections to its
   * listener. If that is so, nothing but the end of the process helps: the other workers drain first.
   */
  async #assertEnded(thread: Thread): Promise<void> {
    await within(probeTimeoutMs, this.#finished.promise.catch(() => {}));
    if (this.#stopping) return;
    const probes = Array.from({ length: probesForEach * this.#config.workers.count }, () => this.#isAnswered());
    const answers = await Promise.all(probes);
    // A stop that has begun meanwhile closes the listeners, too.
    if (this.#stopping || answers.every((answered) => answered)) return;
    this.#log.error({ worker: thread.index }, "worker cannot be ended");
    await this.stop(new Error("a worker hangs, and only the end of the process frees its port"));
  }

  /** Whether a new connection is answered; refused ones do not count, as the listener that had them is closed. */
  async #isAnswered(): Promise<boolean> {
    try {
      using connection = await Deno.connect({ hostname: this.#config.listen.hostname, port: this.#port });
      await connection.write(
        new TextEncoder().encode("GET /ready HTTP/1.1\r\nHost: wsproxy\r\nConnection: close\r\n\r\n"),
      );
      const answered = connection.read(new Uint8Array(1)).then(() => true);
      return await within(probeTimeoutMs, answered, () => false);
    } catch {
      return true;
    }
  }

  /** Replaces a worker that has become too heavy. */
  #weigh(thread: Thread, { heapBytes, unopened }: { readonly heapBytes: number; readonly unopened: number }): void {
    const { maxHeapBytes, maxUnopened } = this.#config.workers;
    const heavy = (maxHeapBytes > 0 && heapBytes > maxHeapBytes) || (maxUnopened > 0 && unopened >= maxUnopened);
    const young = performance.now() - thread.startedAtMs < this.#soundAfterMs;
    if (!heavy || young || thread.state !== "serving" || this.#replacing !== undefined) return;
    this.#log.info({ worker: thread.index, heapBytes, unopened }, "worker is due to be replaced");
    void this.#replaceInTurn([thread]);
  }

  #replaceInTurn(threads: readonly Thread[]): Promise<void> {
    const before = this.#replacing;
    const replacing = (async () => {
      await before;
      for (const thread of threads) await this.#replaceOne(thread);
    })().finally(() => {
      if (this.#replacing === replacing) this.#replacing = undefined;
    });
    return this.#replacing = replacing;
  }

  async #replaceOne(thread: Thread): Promise<void> {
    if (this.#stopping || thread.state !== "serving") return;
    if (!await this.#serve()) return;
    this.#log.info({ worker: thread.index }, "worker leaves");
    await this.#dismiss(thread, "leave");
  }

  /** Lets one go: it has its grace period. */
  async #dismiss(thread: Thread, kind: "leave" | "stop"): Promise<void> {
    if (thread.state === "starting") return this.#end(thread);
    thread.state = "leaving";
    this.#tell(thread, { kind });
    const handOverMs = kind === "leave" ? leaveMarginMs : stopMarginMs;
    await within(this.#config.timing.shutdownGraceMs + handOverMs, thread.gone.promise);
    this.#end(thread);
  }

  #fail(thread: Thread, reason: string): void {
    if (thread.state === "gone") return;
    this.#log.error({ worker: thread.index, reason }, "worker failed");
    const { state } = thread;
    this.#end(thread, reason);
    if (this.#stopping || state === "leaving" || this.#beats === undefined && this.#serving.length === 0) return;
    if (performance.now() - thread.startedAtMs >= this.#soundAfterMs) this.#failuresSinceSound = 0;
    this.#failures = state === "starting" && this.#serving.length === 0 ? this.#failures + 1 : 0;
    if (this.#failures >= maxFailures) return this.#finished.reject(new Error("no worker becomes ready"));
    const timer = setTimeout(() => {
      this.#restarts.delete(timer);
      // One that was to replace another is not missed: that one still serves.
      if (this.#serving.length + this.#starting < this.#config.workers.count) void this.#serve();
    }, backoffMs(this.#failuresSinceSound++, firstDelayMs, maxDelayMs));
    this.#restarts.add(timer);
  }

  /** It is no more, and what it held is free. */
  #end(thread: Thread, reason = "it has ended"): void {
    if (thread.state === "gone") return;
    thread.state = "gone";
    thread.worker.terminate();
    this.#threads.delete(thread);
    Limits.forget(this.#limits, thread.index);
    this.#quotas.forget(thread);
    const { metrics } = thread;
    this.#past = this.#past.then((past) => countersOf([past, metrics]));
    for (const resolve of thread.reports.values()) resolve();
    thread.listening.reject(new Error(reason));
    thread.gone.resolve();
  }
}

/** What stands for the report of a worker that does not answer. */
const silent: { readonly [K in Kind]: (thread: Thread) => Reports[K] } = {
  health: ({ index, state }) => ({
    connections: 0,
    servers: state === "serving" ? { [`worker ${index}`]: "does not answer" } : {},
  }),
  metrics: ({ metrics }) => metrics,
  missing: () => null,
  busiest: () => [],
  session: () => [],
  end: () => 0,
};

/** What is kept of a worker's report. */
const kept: { readonly [K in Kind]?: (thread: Thread, report: Reports[K]) => void } = {
  metrics(thread, metrics) {
    thread.metrics = metrics;
  },
};
