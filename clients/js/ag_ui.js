// @ts-check
/**
 * An agent of AG-UI (npm `@ag-ui/client` 1) over a session: runs are asked for until a backend has them, and `connectAgent()`
 * shows the run that is under way from its start, read from the log. The frames are those of docs/chat.md.
 *
 * @module
 */

import { AbstractAgent } from "@ag-ui/client";
import { Observable } from "rxjs";
import { Runs } from "./runs.js";

/** @import { AgentConfig, BaseEvent, RunAgentInput } from "@ag-ui/client" */

/** @import { Subscriber, Watcher } from "./runs.js" */

/** @typedef {import("./runs.js").SessionOptions} SessionOptions */

/** An agent whose runs are a session's. */
export class SessionAgent extends AbstractAgent {
  /** What this agent shares with its clones. @internal @type {Runs} */
  runs;

  /** @param {AgentConfig & { session: SessionOptions }} config `session`: what a {@linkcode Connection} takes */
  constructor({ session, ...config }) {
    super(config);
    this.runs = new Runs(session);
  }

  /** Asks for a run. @override @param {RunAgentInput} input @returns {Observable<BaseEvent>} */
  run(input) {
    return this.watched((subscriber) => this.runs.ask(subscriber, input, input));
  }

  /** Shows the run that is under way, if one is. @override @param {RunAgentInput} input @returns {Observable<BaseEvent>} */
  connect(input) {
    return this.watched((subscriber) => this.runs.join(subscriber, input));
  }

  /** @internal @param {(subscriber: Subscriber) => Watcher} watch @returns {Observable<BaseEvent>} */
  watched(watch) {
    return new Observable((subscriber) => {
      // Its events have no other types than those of AG-UI.
      const watcher = watch(/** @type {Subscriber} */ (/** @type {unknown} */ (subscriber)));
      return () => this.runs.leave(watcher);
    });
  }

  /** Ends the runs that are shown, wherever they are made. @override */
  abortRun() {
    this.runs.stopAll();
  }

  /** An agent of the same session. @override @returns {SessionAgent} */
  clone() {
    return Object.assign(super.clone(), { runs: this.runs });
  }

  /** Leaves for good. */
  close() {
    this.runs.close();
  }
}
