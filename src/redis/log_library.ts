/**
 * The library of Redis Functions in log.lua: with our settings written into it, and loaded where it is missing or
 * another one. Redis keeps it, replicates it and saves it, so it is one for all proxies of a Redis.
 */

import { createHash } from "node:crypto";
import type { LogSettings } from "../config.ts";
import type { Log } from "../log.ts";
import { isLasting, isRefused, isReply, reasonOf } from "./errors.ts";
import { logCommands, wordsOf } from "./rights.ts";
import source from "./log.lua" with { type: "text" };

/** What loading needs of a connection: ioredis has it. */
export interface Commands {
  /** Sends one command; rejects with what Redis answers when that is an error. */
  call(command: string, ...args: (string | number)[]): Promise<unknown>;
}

/** What is written into the library. */
export interface LibraryOptions extends LogSettings {
  /** The server is part of a Cluster: messages are published to sharded channels. */
  readonly sharded: boolean;
  /** When the proxy that loads it was started, in milliseconds since 1970. */
  readonly startedMs: number;
}

/** What is known of a library that is loaded. */
interface Loaded extends LibraryOptions {
  readonly version: string;
}

/** Which text the library is, whatever is written into it. */
const version = createHash("sha1").update(source).digest("hex").slice(0, 12);

/** The library's text for a proxy. */
export function renderLibrary(options: LibraryOptions): string {
  const constants = {
    VERSION: JSON.stringify(version),
    STARTED_MS: options.startedMs,
    MAX_MESSAGES: options.maxMessages,
    TTL_MS: options.ttlMs,
    MAX_MESSAGE_BYTES: options.maxMessageBytes,
    SHARDED: options.sharded,
  };
  let text = source;
  for (const [name, value] of Object.entries(constants)) {
    const line = new RegExp(`^local ${name} = .*$`, "m");
    if (!line.test(text)) throw new Error(`log.lua must have a line that begins with "local ${name} = "`);
    text = text.replace(line, `local ${name} = ${value}`);
  }
  return text;
}

/** The library as one proxy wants it, on every server that it connects to. */
export class LogLibrary {
  readonly #options: LibraryOptions;
  readonly #text: string;
  readonly #log: Log;
  /** Why clients cannot resume, as it was last logged; forgotten when they can. */
  #toldReason: string | undefined;
  #mayLoad = true;
  /** How settings differ, as it was last logged. */
  #toldDifference: string | undefined;

  /** Nothing is loaded yet. */
  constructor(options: LibraryOptions, log: Log) {
    this.#options = options;
    this.#text = renderLibrary(options);
    this.#log = log;
  }

  /**
   * Sees to it that a master has the functions: ours, unless a proxy that was started later has loaded others; and that
   * we may do what they do. False when clients cannot resume, as it is older than Redis 7, or does not permit it. That
   * is logged once. Rejects when it is worth another try.
   */
  async load(redis: Commands): Promise<boolean> {
    this.#mayLoad = true;
    try {
      await this.keep(redis);
    } catch (error) {
      if (!isRefused(error) && !isNameTaken(error)) throw error;
      const reason = reasonOf(error);
      this.#mayLoad = !/unknown command/i.test(reason);
      this.#tell(this.#mayLoad ? reason : "it needs Redis 7 or Valkey");
      return false;
    }
    const missing = await missingRights(redis);
    if (missing.length > 0) {
      this.#tell(missing.join("; "));
      return false;
    }
    this.#toldReason = undefined;
    return true;
  }

  /** Whether another try may end otherwise on the same server: not if that knows no functions. */
  get mayLoad(): boolean {
    return this.#mayLoad;
  }

  /**
   * Loads the functions if they are not there, or not there any more, as after FUNCTION FLUSH; ours replace those of a
   * proxy that was started earlier. Rejects as Redis does.
   */
  async keep(redis: Commands): Promise<void> {
    const loaded = await loadedLibrary(redis) ?? await this.#loadFirst(redis);
    if (loaded === undefined) return;
    const differing = (Object.keys(names) as Agreed[]).filter((key) => loaded[key] !== this.#options[key]);
    if (loaded.version === version && differing.length === 0) return;
    const replaced = loaded.startedMs <= this.#options.startedMs && await this.#replace(redis, loaded);
    if (differing.length === 0) return;
    const difference = {
      loaded: describe(loaded, differing),
      ours: describe(this.#options, differing),
      inForce: replaced ? "ours" : "loaded",
    };
    const told = this.#toldDifference;
    this.#toldDifference = JSON.stringify(difference);
    if (told === this.#toldDifference) return;
    this.#log.warn(difference, "Session log's settings differ from those that another proxy has loaded");
  }

  /** Undefined when ours is loaded now; what another proxy has loaded meanwhile, when it was faster. */
  async #loadFirst(redis: Commands): Promise<Loaded | undefined> {
    try {
      await redis.call("FUNCTION", "LOAD", this.#text);
    } catch (error) {
      const loaded = isNameTaken(error) && await loadedLibrary(redis);
      if (loaded) return loaded;
      throw error;
    }
    this.#log.info({ version }, "Session log's functions loaded");
  }

  /** False when the server refuses it: what is loaded serves as well. */
  async #replace(redis: Commands, loaded: Loaded): Promise<boolean> {
    try {
      await redis.call("FUNCTION", "LOAD", "REPLACE", this.#text);
    } catch (error) {
      if (!isRefused(error)) throw error;
      return false;
    }
    this.#log.info({ version, replaced: loaded.version }, "Session log's functions replaced");
    return true;
  }

  #tell(reason: string): void {
    if (reason === this.#toldReason) return;
    this.#toldReason = reason;
    this.#log.warn({ reason }, "Redis keeps no session logs: clients cannot resume");
  }
}

/** Whether there is a library of our name, ours or not. */
const isNameTaken = (error: unknown) => isReply(error) && error.message.includes("already exists");

/**
 * Which rights are missing for logs, in Redis's own words. Each command that our functions and we ourselves use is tried
 * on a log that no session has, where it does nothing; any answer but a refusal is as good as success.
 */
async function missingRights(redis: Commands): Promise<string[]> {
  const id = `wsproxy-check-${crypto.randomUUID()}`;
  const answers = await Promise.allSettled(logCommands.map((command) => {
    const [name = "", ...args] = wordsOf(command, id);
    return redis.call(name, ...args);
  }));
  const missing = new Set<string>();
  for (const answer of answers) {
    if (answer.status === "fulfilled") continue;
    if (!isReply(answer.reason)) throw answer.reason;
    const message = reasonOf(answer.reason);
    if (isLasting(answer.reason)) missing.add(/\bkeys?\b/.test(message) ? `${message} (session:*:down)` : message);
  }
  return [...missing];
}

/** What all proxies must agree on, as an operator knows it. */
const names = {
  maxMessages: "LOG_MAX_MESSAGES",
  ttlMs: "LOG_TTL_SECS",
  maxMessageBytes: "LOG_MAX_MESSAGE_BYTES",
  sharded: "sharded",
} as const;
type Agreed = keyof typeof names;

function describe(options: LibraryOptions, which: readonly Agreed[]): Record<string, number | boolean> {
  return Object.fromEntries(which.map((key) => [names[key], key === "ttlMs" ? options.ttlMs / 1000 : options[key]]));
}

/** What is loaded; undefined when nothing is. */
async function loadedLibrary(redis: Commands): Promise<Loaded | undefined> {
  let answer: unknown[];
  try {
    answer = await redis.call("FCALL", "wsproxy_settings", 0) as unknown[];
  } catch (error) {
    if (isReply(error) && error.message.startsWith("ERR Function not found")) return undefined;
    throw error;
  }
  const value = (name: string) => answer[answer.indexOf(name) + 1];
  return {
    version: String(value("version")),
    startedMs: Number(value("started_ms")),
    maxMessages: Number(value("max_messages")),
    ttlMs: Number(value("ttl_ms")),
    maxMessageBytes: Number(value("max_message_bytes")),
    sharded: value("sharded") === 1,
  };
}
