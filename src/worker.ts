/** The entry of a worker: a thread that runs a whole proxy on the port of all, and is told what to do by `Workers`. */

import { readConfig } from "./config.ts";
import { createLog, flushLog, type Log } from "./log.ts";
import { compose, type Composed } from "./proxy.ts";
import type { Client, Quota, QuotaExcess } from "./quotas.ts";
import type { Kind, Question, Reports } from "./report.ts";
import type { FromWorker, ToWorker, WorkerStart } from "./workers.ts";

declare const self: {
  onmessage: (event: MessageEvent<ToWorker>) => void;
  postMessage(message: FromWorker): void;
};

const composed = Promise.withResolvers<{ readonly proxy: Composed; readonly log: Log }>();
/** What the main thread was asked for. What it answers a question with is of the question's kind. */
const questions = new Map<number, (reports: readonly never[]) => void>();
let lastQuestion = 0;

/** What all workers report. */
function askAll<K extends Kind>(what: Question<K>): Promise<readonly Reports[K][]> {
  const { promise, resolve } = Promise.withResolvers<readonly Reports[K][]>();
  questions.set(++lastQuestion, resolve);
  self.postMessage({ kind: "ask", question: lastQuestion, what: what as Question });
  return promise;
}

/** Clients that the main thread is asked about. */
const entering = new Map<number, (excess: QuotaExcess | undefined) => void>();
let lastEntry = 0;
/** Clients that have gone. They are told of together, as a message to another thread costs as much as a handshake's step. */
let released: Client[] = [];
let releaseTimer: ReturnType<typeof setTimeout> | undefined;
const releaseMs = 5;

function takeReleased(): readonly Client[] {
  clearTimeout(releaseTimer);
  releaseTimer = undefined;
  const clients = released;
  released = [];
  return clients;
}

/** Counted by the main thread, for all workers. */
const quota: Quota = {
  enter(client) {
    const { promise, resolve } = Promise.withResolvers<QuotaExcess | undefined>();
    entering.set(++lastEntry, resolve);
    self.postMessage({ kind: "enter", entry: lastEntry, client, released: takeReleased() });
    return promise;
  },
  release(client) {
    released.push(client);
    releaseTimer ??= setTimeout(() => self.postMessage({ kind: "release", released: takeReleased() }), releaseMs);
  },
};

async function start({ env, index, process, port, limits, listensAtOnce }: WorkerStart): Promise<void> {
  const config = readConfig(env);
  const log = createLog(config.logging).child({ worker: index });
  const proxy = await compose(config, log, {
    port,
    limits,
    quota,
    index,
    process,
    workers: config.workers.count,
    listensAtOnce,
    askAll,
    tell: (told) => self.postMessage({ kind: "told", told }),
  });
  log.info("worker listening");
  composed.resolve({ proxy, log });
  self.postMessage({ kind: "listening", hostname: proxy.hostname, port: proxy.port });
  await proxy.finished;
}

self.onmessage = async ({ data }) => {
  if (data.kind === "start") return await start(data);
  const { proxy, log } = await composed.promise;
  switch (data.kind) {
    case "beat":
      return self.postMessage({ kind: "beat", ...await proxy.load() });
    case "report":
      return self.postMessage({ kind: "report", question: data.question, report: await proxy.report(data.what) });
    case "reports":
      questions.get(data.question)?.(data.reports as readonly never[]);
      return void questions.delete(data.question);
    case "entered":
      entering.get(data.entry)?.(data.excess);
      return void entering.delete(data.entry);
    case "count":
      return proxy.count(data.told);
    case "leave":
      await proxy.leave();
      break;
    case "stop":
      await proxy.stop();
  }
  const metrics = await proxy.report({ kind: "metrics" });
  // The thread is ended when the main one hears of it.
  await flushLog(log);
  self.postMessage({ kind: "left", metrics });
};
