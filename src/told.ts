/**
 * What several workers have heard alike, told once for the process. Each obeys at once, and says so; when all have said
 * it, or after a while, it is logged and counted.
 */

import type { Log } from "./log.ts";

/** What a proxy has done on a command for many sessions, for its log and its metrics. */
export interface Told {
  readonly level: "info" | "warn";
  readonly msg: string;
  /** What is the same for all that have heard it. */
  readonly fields: Readonly<Record<string, unknown>>;
  /** How many of its own sockets it concerned; undefined when that is not told. */
  readonly sockets: number | undefined;
  /** How it is counted; undefined for what is no command. */
  readonly counted: { readonly command: string; readonly result: "obeyed" | "malformed" } | undefined;
}

/** Logs it, with the sum of the sockets. */
export function logTold(log: Log, { level, msg, fields, sockets }: Told): void {
  log[level]({ ...fields, sockets }, msg);
}

/** One command, as those that have heard it tell of it. */
interface Round<Teller> {
  readonly key: string;
  told: Told;
  readonly heard: Set<Teller>;
  readonly awaited: Set<Teller>;
  isOver: boolean;
  timer: ReturnType<typeof setTimeout> | undefined;
}

/** How long a round waits for those that have not heard the command yet, and takes in those that are late. */
const waitMs = 5000;

/** The rounds of a process. */
export class ToldOnce<Teller> {
  readonly #rounds = new Set<Round<Teller>>();
  readonly #tell: (told: Told, last: Teller) => void;

  /** `tell` is called once for each command, with the sum of the sockets, and the worker that told of it last. */
  constructor(tell: (told: Told, last: Teller) => void) {
    this.#tell = tell;
  }

  /** One of `all` tells of a command. */
  hear(told: Told, by: Teller, all: Iterable<Teller>): void {
    const { sockets: _, ...alike } = told;
    const key = JSON.stringify(alike);
    // The same command again is another round: each tells of it once.
    let round = [...this.#rounds].find((it) => it.key === key && !it.heard.has(by));
    if (round === undefined) {
      round = { key, told, heard: new Set(), awaited: new Set(all), isOver: false, timer: undefined };
      this.#begin(round, by);
    } else if (!round.isOver && round.told.sockets !== undefined) {
      round.told = { ...told, sockets: round.told.sockets + (told.sockets ?? 0) };
    }
    round.heard.add(by);
    round.awaited.delete(by);
    if (round.awaited.size === 0) this.#end(round, by);
  }

  /** Tells what has not been told yet, and waits no longer. */
  close(): void {
    for (const round of this.#rounds) this.#forget(round, round.heard.values().next().value!);
  }

  #begin(round: Round<Teller>, by: Teller): void {
    this.#rounds.add(round);
    round.timer = setTimeout(() => this.#forget(round, by), waitMs);
  }

  #end(round: Round<Teller>, last: Teller): void {
    if (!round.isOver) this.#tell(round.told, last);
    round.isOver = true;
  }

  #forget(round: Round<Teller>, last: Teller): void {
    clearTimeout(round.timer);
    this.#rounds.delete(round);
    this.#end(round, last);
  }
}
