/**
 * The signals to this process, taken from before the rest of the program is evaluated. Until something listens to a
 * signal, the kernel ends the process with it at once, without a drain; and as PID 1 the process never sees it.
 *
 * main.ts imports this module first. In a program that imports main.ts for its parts it does nothing.
 */

const names = ["SIGTERM", "SIGINT", "SIGHUP"] as const;

/** What is listened to. */
export type SignalName = typeof names[number];

/** Keeps signals until they are listened to. */
export class Signals {
  readonly #early: SignalName[] = [];
  #hear = (signal: SignalName): void => void this.#early.push(signal);

  constructor() {
    for (const signal of names) Deno.addSignalListener(signal, () => this.#hear(signal));
  }

  /** Calls `hear` for each signal, those that have come already included. */
  listen(hear: (signal: SignalName) => void): void {
    this.#hear = hear;
    for (const signal of this.#early.splice(0)) hear(signal);
  }
}

/** The command in `args` is to serve. */
const serves = Deno.args.length === 0 || (Deno.args.length === 1 && Deno.args[0] === "start");

/** Undefined in a process that does not serve: the other commands, and other programs, leave signals as they are. */
export const signals = Deno.mainModule === new URL("../main.ts", import.meta.url).href && serves
  ? new Signals()
  : undefined;
