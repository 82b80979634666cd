// @ts-check
/**
 * A connection adapter of TanStack AI (npm `@tanstack/ai-client` 0.33, `@tanstack/ai-react` 0.27) over a session, for
 * `useChat` and `ChatClient` with `persistence: true`: runs are asked for until a backend has them, and the one that is under
 * way is shown from its start, read from the log. The frames are those of AG-UI in docs/chat.md.
 *
 * @module
 */

import { uiMessagesToWire } from "@tanstack/ai/client";
import { Runs } from "./runs.js";

/** @import { ResumableConnectConnectionAdapter } from "@tanstack/ai-client" */
/** @import { StreamChunk } from "@tanstack/ai/client" */
/** @import { Subscriber, Watcher } from "./runs.js" */

/** @typedef {Parameters<ResumableConnectConnectionAdapter["connect"]>} Asked */
/** @typedef {Awaited<ReturnType<NonNullable<ResumableConnectConnectionAdapter["hydrate"]>>>} Hydration */

/**
 * What a backend keeps of a thread: its messages, and what it waits for.
 * @typedef {Pick<Hydration, "messages"> & Partial<Pick<Hydration, "interrupts">>} History
 */

/**
 * What a connection is made of: a session, and what loads the history of a thread.
 * @typedef {import("./runs.js").SessionOptions & { history: (threadId: string) => History | Promise<History> }} ConnectionOptions
 */

/**
 * The threads of a session, for the option `connection`.
 * @implements {ResumableConnectConnectionAdapter}
 */
export class SessionConnection {
  #history;
  #runs;
  /** The messages that were loaded, by thread. @type {Map<string, History["messages"]>} */
  #loaded = new Map();

  /** @param {ConnectionOptions} options */
  constructor({ history, ...session }) {
    this.#history = history;
    this.#runs = new Runs(session);
  }

  /**
   * Asks for a run.
   * @param {Asked[0]} messages
   * @param {Asked[1]} [data]
   * @param {AbortSignal} [signal] its abort ends the run
   * @param {Asked[3]} [context]
   * @returns {AsyncGenerator<StreamChunk>}
   */
  connect(messages, data, signal, context) {
    const { threadId, runId, parentRunId, resume, clientTools: tools = [], forwardedProps } =
      /** @type {NonNullable<Asked[3]>} */ (context);
    const input = {
      ...{ threadId, runId, parentRunId, resume, tools, messages: uiMessagesToWire(messages) },
      ...{ state: {}, context: [], forwardedProps: { ...forwardedProps, ...data } },
    };
    return this.#read(signal, (subscriber) => this.#runs.ask(subscriber, input, { messages }));
  }

  /**
   * What the backend keeps, and which run is under way. A history from before its question is loaded again. TanStack calls
   * it without its object.
   * @type {(threadId: string) => Promise<Hydration>}
   */
  hydrate = async (threadId) => {
    let started, history;
    do {
      started = await this.#runs.underWay();
      history = await this.#history(threadId);
    } while (this.#runs.started?.["runId"] !== started?.["runId"]);
    this.#loaded.set(threadId, history.messages);
    const activeRun = started?.["threadId"] === threadId ? { runId: String(started["runId"]) } : null;
    return { interrupts: null, ...history, activeRun };
  };

  /**
   * The run that is under way, from its start.
   * @param {string} runId
   * @param {AbortSignal} [signal] its abort ends the run
   * @returns {AsyncGenerator<StreamChunk>}
   */
  async *joinRun(runId, signal) {
    const started = await this.#runs.underWay();
    const messages = this.#loaded.get(String(started?.["threadId"]));
    if (started?.["runId"] !== runId || !messages) throw new Error("the run is not under way");
    yield* this.#read(signal, (subscriber) => this.#runs.join(subscriber, { messages }));
  }

  /** Leaves for good. */
  close() {
    this.#runs.close();
  }

  /** @param {AbortSignal | undefined} signal @param {(subscriber: Subscriber) => Watcher} watch */
  #read(signal, watch) {
    // Its events have no other types than those of AG-UI.
    return /** @type {AsyncGenerator<StreamChunk>} */ (this.#runs.read(signal, watch));
  }
}
