/** Logs: past-tense events with fields, one line each. Nothing secret, no token and no payload ever goes in. */

import { pino } from "pino";
import pretty from "pino-pretty";
import type { Config } from "./config.ts";

/** What wsproxy logs with: pino's own logger. */
export type Log = pino.Logger;

/**
 * A logger to standard output. `json` has one object a line with ISO times; `text` is for people, and what
 * `auto` takes on a terminal.
 */
export function createLog({ level, format }: Config["log"]): Log {
  const options: pino.LoggerOptions = {
    level,
    base: undefined,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (level) => ({ level }) },
  };
  const isTerminal = Deno.stdout.isTerminal();
  if (format === "json" || (format === "auto" && !isTerminal)) return pino(options);
  return pino(options, pretty({ sync: true, colorize: isTerminal, singleLine: true }));
}
