/**
 * A worker as src/worker.ts is one, which does itself harm when a file says so: `{"index":0,"harm":"throw"}`. The file's
 * name is in its settings, which hold nothing else that wsproxy does not know.
 */

import "../../src/worker.ts";
import type { ToWorker } from "../../src/workers.ts";

/** How a worker can end, or be as good as ended; by "start" all that start from now on. */
export type Harm = "throw" | "reject" | "exit" | "close" | "loop" | "start";

const inflict: Record<Harm, () => void> = {
  throw: () => {
    throw new Error("a bug");
  },
  reject: () => void Promise.reject(new Error("a bug")),
  exit: () => Deno.exit(3),
  close: () => self.close(),
  start: () => {},
  loop: () => {
    // As a thread that computes for ever, this one never comes back from JavaScript; the other tests keep the core.
    const never = new Int32Array(new SharedArrayBuffer(4));
    while (true) Atomics.wait(never, 0, 0, 100);
  },
};

self.addEventListener("message", (event) => {
  const { data } = event as MessageEvent<ToWorker>;
  const file = data.kind === "start" ? data.env["HARM_FILE"] : undefined;
  if (data.kind !== "start" || file === undefined) return;
  // What was asked of the worker before this one is not meant for it.
  let last = Deno.readTextFileSync(file);
  if (JSON.parse(last).harm === "start") throw new Error("a bug at the start");
  setInterval(() => {
    const text = Deno.readTextFileSync(file);
    if (text === last) return;
    last = text;
    const { index, harm } = JSON.parse(text);
    if (index === data.index) inflict[harm as Harm]();
  }, 10);
});
