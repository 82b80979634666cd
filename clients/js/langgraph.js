// @ts-check
/**
 * A transport of LangGraph's `useStream` (npm `@langchain/langgraph-sdk` 1, of its `/react` and `/ui`) over a session: runs
 * are asked for until a backend has them, and the one that is under way is shown from its start, read from the log. The
 * frames are those of AG-UI in docs/chat.md, with LangGraph's own events as `RAW` ones.
 *
 * @module
 */

import { Runs } from "./runs.js";
import { createId } from "./wsproxy.js";

/** @import { RunEvent, SessionOptions } from "./runs.js" */

/**
 * What `submit` was given.
 * @typedef {object} Payload
 * @property {unknown} input
 * @property {unknown} command
 * @property {unknown} context
 * @property {{ configurable?: { thread_id?: string | null | undefined } | undefined } | undefined} config
 * @property {boolean | undefined} [streamSubgraphs]
 * @property {AbortSignal} signal its abort ends the run
 */

/**
 * One of LangGraph's, such as `{"event":"messages","data":[{"type":"ai","id":"1","content":"hello"},{}]}`.
 * @typedef {{ id?: string, event: string, data: unknown }} GraphEvent
 */

/** The threads of a session, for the option `transport`. */
export class SessionStreamTransport {
  #runs;

  /** @param {SessionOptions} options */
  constructor(options) {
    this.#runs = new Runs(options);
  }

  /**
   * Asks for a run. Without an input and a command, as of `submit(undefined)`, it shows the one that is under way, if one is.
   * @param {Payload} payload
   * @returns {Promise<AsyncGenerator<GraphEvent>>}
   */
  stream(payload) {
    return Promise.resolve(this.#stream(payload));
  }

  /** Leaves for good. */
  close() {
    this.#runs.close();
  }
  /** @param {Payload} payload @returns {AsyncGenerator<GraphEvent>} */
  async *#stream({ signal, ...forwardedProps }) {
    const { input, command, config } = forwardedProps;
    const threadId = config?.configurable?.thread_id;
    const before = { messages: [] };
    if (input === undefined && command === undefined) {
      if ((await this.#runs.underWay())?.["threadId"] !== threadId) return;
      yield* said(this.#runs.read(signal, (subscriber) => this.#runs.join(subscriber, before)));
      return;
    }
    const runId = createId();
    const run = {
      ...{ threadId, runId, state: {}, tools: [], context: [], forwardedProps },
      // A backend of AG-UI expects one.
      messages: [{ id: runId, role: "user", content: "" }],
    };
    yield* said(this.#runs.read(signal, (subscriber) => this.#runs.ask(subscriber, run, before)));
  }
}

/** What a graph says in a run. @param {AsyncIterable<RunEvent>} events @returns {AsyncGenerator<GraphEvent>} */
async function* said(events) {
  /** Messages that a worker has streamed. @type {Set<unknown>} */
  const ids = new Set();
  for await (const event of events) {
    if (event.type === "RAW") {
      const raw = /** @type {GraphEvent} */ (event["event"]);
      if (/^messages(\||$)/.test(raw.event)) ids.add(/** @type {[{ id: unknown }]} */ (raw.data)[0].id);
      yield raw;
    } else if (event.type === "MESSAGES_SNAPSHOT") {
      // Another worker begins the run anew: what the former one has said is taken back.
      for (const id of ids) yield { event: "messages", data: [{ type: "remove", id }, {}] };
    } else if (event.type === "RUN_ERROR") yield { event: "error", data: { message: event["message"] } };
  }
}
