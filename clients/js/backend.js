// @ts-check
/**
 * A backend's worker: one of any number that answer what an agent's clients ask, each question once. Node, Deno and Bun,
 * over ioredis or node-redis. The proxy needs INBOX=true, Redis 7 or Valkey.
 *
 * @module
 */

import { Answer, Answered, Cancelled, isFenced, Log, Question } from "./answer.js";
import { Commands, fieldsOf, passes, pauseAfter, persist, Queue } from "./queue.js";

export { Answer, Answered, Cancelled, Question };

const readCount = 100;
const eventCount = 64;
const bellMs = 1000;
const retryMs = 1000;
const leaveMs = 2000;
/** A client that has been away for so long may still send a message again. */
const rememberMs = 24 * 3600 * 1000;
const lostReason = "the question is another worker's now, or was stopped";

/**
 * An entry of the inbox, by its fields: `type`, `session`, `connection`, `at`, and what docs/backends.md says.
 * @typedef {Record<string, string>} Entry
 */

/**
 * What ioredis and node-redis have.
 * @typedef {{ duplicate(): unknown }} RedisClient
 */

/**
 * What a worker needs, and whom it tells.
 * @typedef {object} Options
 * @property {RedisClient} redis a client of ioredis or node-redis: of one server, of the master that sentinels name, or of a
 *   Cluster. Two connections are made as its own are; it need not be connected itself
 * @property {string} agent whose inbox
 * @property {(question: Question) => unknown} handle answers a question, which is done when it returns. One that throws is
 *   given the question again
 * @property {(event: Entry) => unknown} [onEvent] is told of `connected`, `disconnected`, `vacated`, in the order of each
 *   session
 * @property {(entry: Entry) => string | undefined} [interrupts] what to send when an entry (a stop, a question that replaces
 *   others, a `vacated`) ends what came before it in its session; undefined when it does not. A message then takes its turn
 *   like any other
 * @property {(question: Question, reason: string) => string} [failed] what to send when a question is given up
 * @property {import("./answer.js").Join} [join] makes one message, or some, of the pieces that came
 *   within `coalesceMs`. Without it each piece is a message
 * @property {number} [coalesceMs] 25 by default
 * @property {string} [group] the consumer group, which these workers have for themselves: "answers"
 * @property {number} [concurrency] questions that are answered at once: 16
 * @property {number} [leaseMs] a worker that was not heard of for so long is dead: 10,000
 * @property {number} [maxDeliveries] a question that was given so often, and never answered, is set aside: 3
 * @property {number} [graceMs] what answers that are under way get when the worker is stopped: 10,000
 * @property {(error: unknown, what: string) => void} [onError] console.error by default
 */

/** An entry that is held here. */
class Job {
  /** What was looked at of what waits behind it. @type {Map<string, Promise<void>>} */
  judged = new Map();
  cancel = new AbortController();
  lost = false;

  /**
   * @param {string} lane
   * @param {string} token
   * @param {string} head
   * @param {number} count
   * @param {string} claims
   * @param {Entry} fields
   * @param {string[]} behind
   */
  constructor(lane, token, head, count, claims, fields, behind) {
    this.lane = lane;
    this.token = token;
    this.mark = head.startsWith("!");
    this.id = this.mark ? head.slice(1) : head;
    this.count = count;
    this.claims = claims;
    this.fields = fields;
    this.behind = behind;
  }

  /** @param {string} why */
  lose(why) {
    this.lost = true;
    this.cancel.abort(new Cancelled(why));
  }
}

/** One of any number of workers that share an agent's questions. */
export class Worker {
  #options;
  #commands;
  #queue;
  #name = crypto.randomUUID();
  #takes = 0;
  /** @type {Set<Job>} what is held here */
  #jobs = new Set();
  /** @type {Set<Promise<void>>} */
  #running = new Set();
  #stopping = false;
  #gone = new AbortController();
  #wake = newWake();
  /** For a command that blocks. */
  #bell;
  /** @type {Promise<void> | undefined} */
  #ringing;
  #renewing = false;
  #last = "0-0";

  /** Nothing is taken yet. @param {Options} options */
  constructor(options) {
    this.#options = {
      coalesceMs: 25,
      group: "answers",
      concurrency: 16,
      leaseMs: 10_000,
      maxDeliveries: 3,
      graceMs: 10_000,
      onError: /** @param {unknown} error @param {string} what */ (error, what) => console.error(`${what}:`, error),
      failed: /** @param {Question} question */ ({ id }) => JSON.stringify({ type: "failed", id }),
      ...options,
    };
    this.#commands = new Commands(options.redis);
    this.#bell = new Commands(options.redis);
    this.#queue = new Queue(this.#commands, options.agent, this.#options.group);
  }

  /** Works until it is stopped, whatever happens to Redis. */
  async run() {
    const renewal = setInterval(() => void this.#renew(), Math.min(500, this.#options.leaseMs / 3));
    try {
      let failures = 0;
      while (!this.#stopping) {
        try {
          if (!await this.#take()) await this.#wait();
          failures = 0;
        } catch (error) {
          if (failures === 0) this.#options.onError(error, "Redis does not let questions be taken");
          await pauseAfter(failures++);
        }
      }
      await this.#leave();
    } finally {
      clearInterval(renewal);
      this.#bell.end();
      this.#commands.end();
    }
  }

  /** Takes no more: what is under way has `graceMs`, and then goes to other workers. `run` resolves after that. */
  stop() {
    this.#stopping = true;
    this.#wake.resolve();
  }

  /** Whether there is more to take at once. */
  async #take() {
    const { leaseMs, concurrency } = this.#options;
    const free = (/** @type {string} */ kind, /** @type {number} */ most) =>
      Math.max(0, most - [...this.#jobs].filter(({ lane }) => lane.startsWith(kind)).length);
    this.#wake = newWake();
    const token = `${this.#name}:${++this.#takes}`;
    const [behind, taken, more, last] = await this.#queue.run(
      "take",
      token,
      leaseMs,
      readCount,
      free("m", concurrency),
      free("e", eventCount),
      rememberMs,
    );
    this.#last = last;
    for (const [lane, head, count, claims, words, ids] of taken) {
      const job = new Job(lane, token, head, count, claims, fieldsOf(words), ids.split(" ").filter(Boolean));
      this.#track(this.#work(job));
    }
    for (const [lane, id, words] of behind) {
      const job = [...this.#jobs].find((each) => each.lane === lane);
      this.#track(this.#judge(lane, [id], job?.judged, fieldsOf(words)));
    }
    return Number(more) === 1;
  }

  /** @param {Promise<void>} work */
  #track(work) {
    const tracked = work.catch((error) => {
      if (!this.#gone.signal.aborted) this.#options.onError(error, "an entry was left to others");
    }).finally(() => {
      this.#running.delete(tracked);
      this.#wake.resolve();
    });
    this.#running.add(tracked);
  }

  /** Until something has come into the inbox, something has ended here, or a lease may have run out. */
  async #wait() {
    this.#ringing ??= this.#ring().finally(() => this.#ringing = undefined);
    // It may fail while no wait is there to see that.
    this.#ringing.catch(() => {});
    await Promise.race([this.#ringing, this.#wake.promise]);
  }

  async #ring() {
    const { inbox } = this.#queue;
    await this.#bell.call(inbox, ["XREAD", "COUNT", 1, "BLOCK", bellMs, "STREAMS", inbox, this.#last], bellMs);
  }

  async #renew() {
    if (this.#renewing || this.#jobs.size === 0) return;
    this.#renewing = true;
    try {
      const jobs = [...this.#jobs];
      const answers = await this.#queue.run(
        "renew",
        this.#options.leaseMs,
        ...jobs.flatMap(({ lane, token }) => [lane, token]),
      );
      for (const [i, job] of jobs.entries()) {
        const ids = answers[i];
        if (ids === null) job.lose(lostReason);
        else if (job.lane.startsWith("m")) {
          this.#track(this.#judge(job.lane, ids.split(" ").filter(Boolean), job.judged));
        }
      }
    } catch (error) {
      // Epochs keep what we write apart from what another worker writes, if we are taken for dead.
      if (!passes(error)) this.#options.onError(error, "questions are not kept");
    } finally {
      this.#renewing = false;
    }
  }

  /** @param {Job} job */
  async #work(job) {
    this.#jobs.add(job);
    try {
      if (job.lane.startsWith("e")) await this.#tell(job);
      else if (job.mark) await this.#announce(job.lane, job.token, job.id, this.#verdict({ ...job.fields }));
      else {
        await this.#judge(job.lane, job.behind, job.judged);
        if (!job.lost) await this.#answer(job);
      }
    } finally {
      this.#jobs.delete(job);
    }
  }

  /** @param {Job} job */
  async #answer(job) {
    const { handle, maxDeliveries, onError } = this.#options;
    const { signal } = job.cancel;
    const confirm = async () => {
      if (!await this.#holds(job.lane, job.token, signal)) job.lose(lostReason);
      signal.throwIfAborted();
    };
    const log = new Log(this.#commands, job.fields["session"] ?? "", signal);
    /** @type {Question | undefined} */
    let question;
    let failure;
    try {
      question = new Question(
        { entry: job.id, fields: job.fields, claims: job.claims, deliveries: job.count },
        log,
        confirm,
        this.#options,
      );
      if (job.count > maxDeliveries) failure = `its workers have died ${maxDeliveries} times`;
      else {
        const aborted = new Promise((_, reject) =>
          signal.addEventListener("abort", () => reject(signal.reason), { once: true })
        );
        aborted.catch(() => {});
        // One that is deaf to `cancelled` has lost its answer all the same.
        await Promise.race([Promise.resolve(question).then(handle), aborted]);
        await question.answer?.settled();
      }
    } catch (error) {
      if (job.lost) return;
      if (this.#stopping && signal.aborted) return await this.#release(job, 0, false);
      if (question?.answer?.lost) return await this.#release(job, 100, false);
      if (!(error instanceof Answered) && !question?.answer?.fenced) {
        onError(error, `question ${job.id} of session ${job.fields["session"]}`);
        if (job.count < maxDeliveries) return await this.#release(job, retryMs * job.count, true);
        failure = String(error);
      }
    }
    if (failure !== undefined && question) await this.#giveUp(job, question, failure);
    await this.#insist("finish", job.lane, job.token);
  }

  /** Told in the log, and kept for people to look at. @param {Job} job @param {Question} question @param {string} reason */
  async #giveUp(job, question, reason) {
    const failed = `${this.#queue.inbox}:failed`;
    const words = Object.entries({ ...job.fields, entry: job.id, reason: reason.slice(0, 1000) }).flat();
    try {
      await persist(job.cancel.signal, () => this.#commands.call(failed, ["XADD", failed, "*", ...words]));
      await question.open(this.#options.failed(question, reason), "end");
    } catch (error) {
      if (!(error instanceof Answered)) throw error;
    }
  }

  /** @param {Job} job */
  async #tell(job) {
    const { onEvent, maxDeliveries, onError } = this.#options;
    const event = { ...job.fields };
    try {
      const payload = this.#verdict(event);
      if (payload !== undefined) await this.#end(event["session"] ?? "", job.id, payload);
      await onEvent?.(event);
    } catch (error) {
      onError(error, `${event["type"]} of session ${event["session"]}`);
      if (job.count < maxDeliveries) return await this.#release(job, retryMs * job.count, true);
    }
    await this.#insist("finish", job.lane, job.token);
  }

  /** @param {Job} job @param {number} delayMs @param {boolean} counts */
  async #release({ lane, token }, delayMs, counts) {
    await this.#insist("release", lane, token, delayMs, counts ? 1 : 0);
  }

  /**
   * One of the script's acts, however long Redis is away.
   * @param {"finish" | "release" | "interrupt"} what
   * @param {...(string | number)} args
   * @returns {Promise<unknown>}
   */
  #insist(what, ...args) {
    return persist(this.#gone.signal, () => this.#queue.run(what, ...args));
  }

  /** Whether the lane is held still; then its lease begins again. @param {string} lane @param {string} token @param {AbortSignal} signal */
  async #holds(lane, token, signal) {
    const [held] = await persist(signal, () => this.#queue.run("renew", this.#options.leaseMs, lane, token));
    return held !== null;
  }

  /** @param {Entry} entry */
  #verdict(entry) {
    try {
      return this.#options.interrupts?.(entry);
    } catch (error) {
      this.#options.onError(error, `whether ${entry["type"]} of session ${entry["session"]} interrupts`);
    }
  }

  /**
   * Looks at what waits in a lane, at each entry once while the lane's job is here: of two that interrupt for one entry, the
   * second would take the lane from the first.
   * @param {string} lane @param {string[]} ids @param {Map<string, Promise<void>>} [judged] @param {Entry} [known] the entry itself, of one
   */
  async #judge(lane, ids, judged = new Map(), known) {
    if (!this.#options.interrupts) return;
    const fresh = ids.filter((id) => !judged.has(id));
    const looking = this.#look(lane, fresh, known);
    for (const id of fresh) judged.set(id, looking);
    await Promise.all(ids.map((id) => judged.get(id)));
  }

  /** Looks for what ends an answer: the newest counts. @param {string} lane @param {string[]} ids @param {Entry} [known] */
  async #look(lane, ids, known) {
    for (const id of ids.toReversed()) {
      const entry = known ?? await persist(this.#gone.signal, () => this.#queue.entry(id));
      const payload = entry && this.#verdict(entry);
      if (payload !== undefined) return await this.#interrupt(lane, id, payload);
    }
  }

  /** First what came before is dropped, so that no worker begins it again, and then its writer is. @param {string} lane @param {string} id @param {string} payload */
  async #interrupt(lane, id, payload) {
    const token = await this.#drop(lane, id);
    if (token !== undefined) await this.#announce(lane, token, id, payload);
  }

  /** Who holds the lane then; undefined when nothing came before. @param {string} lane @param {string} id */
  async #drop(lane, id) {
    const token = `${this.#name}:${++this.#takes}`;
    if (Number(await this.#insist("interrupt", lane, token, this.#options.leaseMs, id)) === 0) return undefined;
    for (const job of this.#jobs) if (job.lane === lane) job.lose("it was stopped");
    return token;
  }

  /** @param {string} lane @param {string} token @param {string} id @param {string | undefined} payload */
  async #announce(lane, token, id, payload) {
    const log = new Log(this.#commands, lane.slice("m ".length), this.#gone.signal);
    const confirm = async () => {
      if (!await this.#holds(lane, token, this.#gone.signal)) throw new Cancelled("another worker says so");
    };
    try {
      if (payload !== undefined) await log.open(payload, id, token, "interrupts", confirm);
    } catch (error) {
      if (!(error instanceof Answered || error instanceof Cancelled)) throw error;
    } finally {
      await this.#insist("release", lane, token, 0, 1);
    }
  }

  /** As an event is in no lane of questions, the next question may begin at once. @param {string} session @param {string} id @param {string} payload */
  async #end(session, id, payload) {
    const lane = `m ${session}`;
    const log = new Log(this.#commands, session, this.#gone.signal);
    const epoch = await log.epoch();
    const token = await this.#drop(lane, id);
    if (token === undefined) return;
    try {
      await log.begin(payload, `${id}/${token}/interrupts`, epoch);
    } catch (error) {
      if (!isFenced(error)) throw error;
    } finally {
      await this.#insist("release", lane, token, 0, 1);
    }
  }

  async #leave() {
    await this.#ended(this.#options.graceMs);
    for (const job of this.#jobs) job.cancel.abort(new Cancelled("the worker stops"));
    // Redis may be away: then leases run out.
    await this.#ended(leaveMs);
    this.#gone.abort(new Cancelled("the worker has stopped"));
  }

  /** What is under way has ended, or has had its time. @param {number} ms */
  async #ended(ms) {
    let timer;
    await Promise.race([Promise.all(this.#running), new Promise((resolve) => timer = setTimeout(resolve, ms))]);
    clearTimeout(timer);
  }
}

/** `Promise.withResolvers`, which Node has from 22 on. */
function newWake() {
  /** @type {() => void} */
  let resolve = () => {};
  const promise = /** @type {Promise<void>} */ (new Promise((done) => resolve = () => done()));
  return { promise, resolve };
}
