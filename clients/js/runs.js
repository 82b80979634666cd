// @ts-check
/**
 * The runs of a session, as events of AG-UI: asked for until a backend has them, and read again from the log. It needs no
 * library; `ag_ui.js`, `tanstack.js` and `langgraph.js` are what libraries see of it.
 *
 * @module
 */

import { Connection } from "./wsproxy.js";

/**
 * An event, whichever it is.
 * @typedef {{ type: string, [name: string]: unknown }} RunEvent
 */

/** @typedef {Omit<import("./wsproxy.js").Options, "onMessage" | "onPosition">} SessionOptions */

/**
 * Who is told of a run.
 * @typedef {{ next(event: RunEvent): void, error(error: Error): void, complete(): void }} Subscriber
 */

/**
 * What there was before a run.
 * @typedef {{ messages: readonly { id?: string | undefined }[], state?: unknown }} Before
 */

const missing = "part of the run is missing: ask again";

/** What ends what has begun, and the field that names it. @type {Map<string, [end: string, name: string]>} */
const ends = new Map([
  ["TEXT_MESSAGE_START", ["TEXT_MESSAGE_END", "messageId"]],
  ["REASONING_MESSAGE_START", ["REASONING_MESSAGE_END", "messageId"]],
  ["REASONING_START", ["REASONING_END", "messageId"]],
  ["TOOL_CALL_START", ["TOOL_CALL_END", "toolCallId"]],
  ["STEP_STARTED", ["STEP_FINISHED", "stepName"]],
]);
/** That field, by what ends. */
const names = new Map(ends.values());

/** One who watches a run. @internal */
export class Watcher {
  /** What is open, by what ends it. @type {Map<string, RunEvent>} */
  #open = new Map();
  started = false;
  /** A backend has what was asked. */
  sent = false;
  /** It had that before this connection. */
  sentBefore = false;
  /** It had that before messages went missing: the run may have begun in these, or begins in what comes now. */
  doubtful = false;
  #before;

  /** @param {Subscriber} subscriber @param {Before} before @param {string | undefined} runId */
  constructor(subscriber, before, runId) {
    this.subscriber = subscriber;
    this.runId = runId;
    this.#before = before;
  }

  /** @param {RunEvent} event */
  push(event) {
    if (event.type === "RUN_STARTED" && this.started) return;
    this.started = true;
    // Most events, such as deltas, neither begin nor end anything.
    const [end, name] = ends.get(event.type) ?? [];
    if (end && name) this.#open.set(`${end} ${event[name]}`, { type: end, [name]: event[name] });
    const ended = names.get(event.type);
    if (ended) this.#open.delete(`${event.type} ${event[ended]}`);
    this.subscriber.next(event);
  }

  /** Shows a run from its start. The page may have a part of its messages already. @param {RunEvent[]} events */
  replay([started, ...events]) {
    if (!started) return;
    const ids = new Set(events.flatMap(({ messageId, parentMessageId }) => [messageId, parentMessageId]));
    const messages = this.#before.messages.filter(({ id }) => !ids.has(id));
    this.push(started);
    this.#before = { ...this.#before, messages };
    this.restart();
    for (const event of events) this.push(event);
  }

  /** Another worker begins the run anew: the messages are again what they were before it. */
  restart() {
    this.shut();
    this.push({ type: "MESSAGES_SNAPSHOT", messages: this.#before.messages });
    this.push({ type: "STATE_SNAPSHOT", snapshot: this.#before.state });
  }

  /** Ends what is open. */
  shut() {
    for (const event of [...this.#open.values()].reverse()) this.push(event);
  }
}

/** The runs of a session. There is one at a time. @internal */
export class Runs {
  #options;
  /** @type {Connection | undefined} */
  #connection;
  #live = false;
  /** Of the run that is under way, from its start. @type {RunEvent[]} */
  #events = [];
  /** @type {Set<Watcher>} */
  #watchers = new Set();
  /** What waits for the log; an error is the end of the connection. @type {Set<(error?: Error) => void>} */
  #waiting = new Set();

  /** @param {SessionOptions} options */
  constructor(options) {
    this.#options = options;
  }

  /**
   * Asks for a run, and watches it.
   * @param {Subscriber} subscriber
   * @param {{ runId: string }} input
   * @param {Before} before
   */
  ask(subscriber, input, before) {
    const { runId: requestId } = input;
    const watcher = new Watcher(subscriber, before, requestId);
    this.#watchers.add(watcher);
    this.#open().submit(JSON.stringify({ type: "run", requestId, input }), { id: requestId })
      .then(() => watcher.sent = true, (error) => this.#watchers.has(watcher) && this.#end(watcher, error));
    return watcher;
  }

  /** Watches the run that is under way, if one is. @param {Subscriber} subscriber @param {Before} before */
  join(subscriber, before) {
    const watcher = new Watcher(subscriber, before, undefined);
    this.#watchers.add(watcher);
    this.#ready((error) => {
      if (!this.#watchers.has(watcher)) return;
      if (error || !this.started) return this.#end(watcher, error);
      watcher.runId = String(this.started["runId"]);
      watcher.replay(this.#events);
    });
    return watcher;
  }

  /**
   * The events of a run that is watched.
   * @param {AbortSignal | undefined} signal its abort ends the run
   * @param {(subscriber: Subscriber) => Watcher} watch
   * @returns {AsyncGenerator<RunEvent, void>}
   */
  async *read(signal, watch) {
    if (signal?.aborted) return;
    /** @type {ReadableStreamDefaultController<RunEvent>} */
    let controller;
    const stream = new ReadableStream({ start: (its) => void (controller = its) });
    const watcher = watch({
      next: (event) => controller.enqueue(event),
      error: (error) => controller.error(error),
      complete: () => controller.close(),
    });
    const stop = () => this.stop(watcher);
    signal?.addEventListener("abort", stop, { once: true });
    const reader = stream.getReader();
    try {
      for (let each = await reader.read(); !each.done; each = await reader.read()) yield each.value;
    } finally {
      signal?.removeEventListener("abort", stop);
      this.leave(watcher);
    }
  }

  /** How the run that is under way has begun. */
  get started() {
    return this.#events[0];
  }

  /** The same, once the log has been read. @returns {Promise<RunEvent | undefined>} */
  underWay() {
    return new Promise((resolve) => this.#ready(() => resolve(this.started)));
  }

  /** Watches no more. @param {Watcher} watcher */
  leave(watcher) {
    this.#watchers.delete(watcher);
  }

  /** Ends the run. What is open ends at once, and the writer when it hears of it. @param {Watcher} watcher */
  stop(watcher) {
    const { runId } = watcher;
    if (!this.#watchers.has(watcher)) return;
    if (runId !== undefined) {
      this.#connection?.submit(JSON.stringify({ type: "abort", requestId: runId }), { id: `${runId}-abort` })
        .catch(() => {});
    }
    watcher.shut();
    this.#end(watcher);
  }

  /** Ends the runs that are watched here. */
  stopAll() {
    for (const watcher of this.#watchers) this.stop(watcher);
  }

  close() {
    this.#connection?.close();
  }

  /** @param {(error?: Error) => void} done is called when all of the log has been read, or the connection has ended */
  #ready(done) {
    this.#open();
    if (this.#live) done();
    else this.#waiting.add(done);
  }

  #open() {
    const options = this.#options;
    return this.#connection ??= new Connection({
      ...options,
      onMessage: (text) => this.#receive(text),
      onGap: (reason) => {
        for (const watcher of this.#watchers) {
          // What a connection finds missing when it begins is from before it.
          watcher.doubtful ||= !watcher.started && (this.#live ? watcher.sent : watcher.sentBefore);
        }
        this.#events = [];
        this.#fail(missing, ({ started }) => started);
        return options.onGap?.(reason);
      },
      onLive: (position) => {
        // All that the log still has has come.
        this.#fail(missing, ({ doubtful, started }) => doubtful && !started);
        this.#live = true;
        this.#release();
        return options.onLive?.(position);
      },
      onState: (state, close) => {
        this.#live &&= state === "open";
        if (state === "connecting") { for (const watcher of this.#watchers) watcher.sentBefore = watcher.sent; }
        if (state === "closed") {
          const why = `the connection has ended: ${close?.code} ${close?.reason}`.trim();
          this.#connection = undefined;
          this.#events = [];
          this.#fail(why, () => true);
          this.#release(new Error(why));
        }
        return options.onState?.(state, close);
      },
    });
  }

  /** @param {Error} [error] */
  #release(error) {
    const waiting = [...this.#waiting];
    this.#waiting.clear();
    for (const done of waiting) done(error);
  }

  /** Of those that watch a run, or have asked for one. @param {string} why @param {(watcher: Watcher) => boolean} which */
  #fail(why, which) {
    for (const watcher of this.#watchers) {
      if (watcher.runId !== undefined && which(watcher)) this.#end(watcher, new Error(why));
    }
  }

  /** @param {Watcher} watcher @param {Error} [error] */
  #end(watcher, error) {
    this.#watchers.delete(watcher);
    if (error) watcher.subscriber.error(error);
    else watcher.subscriber.complete();
  }

  /** A run has failed before it began: the first one that waits, as there is one at a time. @param {RunEvent} event */
  #refuse(event) {
    const { runId } = event;
    const watcher = [...this.#watchers].find((each) => runId === undefined ? !each.started : each.runId === runId);
    if (!watcher) return;
    watcher.push(event);
    this.#end(watcher);
  }

  /** @param {string} text */
  #receive(text) {
    /** @type {RunEvent} */
    let event;
    try {
      event = JSON.parse(text);
    } catch {
      return;
    }
    const isStart = event?.type === "RUN_STARTED";
    if (event?.type === "RUN_ERROR" && this.#events.length === 0) return this.#refuse(event);
    // Without its start a run is none.
    if (!isStart && (typeof event?.type !== "string" || this.#events.length === 0)) return;
    const isAgain = isStart && this.started?.["runId"] === event["runId"];
    if (isStart) this.#events = [];
    this.#events.push(event);
    const runId = this.started?.["runId"];
    const watchers = [...this.#watchers].filter((watcher) => watcher.runId === runId);
    const isEnd = event.type === "RUN_FINISHED" || event.type === "RUN_ERROR";
    if (isEnd) this.#events = [];
    for (const watcher of watchers) {
      if (isAgain) watcher.restart();
      else watcher.push(event);
      if (isEnd) this.#end(watcher);
    }
  }
}
