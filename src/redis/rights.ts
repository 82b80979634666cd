/**
 * What the proxy asks of a Redis server, as one list, and whether the server permits it. A missing right shows at the
 * start, with the command's name, and not when the first client needs it.
 *
 * Each command is tried by the server itself: within MULTI a server looks a command up, checks the user's rights to it,
 * its keys and its channels, and carries out nothing. The connection ends without EXEC. That needs a connection of its
 * own, as a command that follows a refused MULTI would be carried out.
 */

import type { Redis } from "ioredis";
import type { Log } from "../log.ts";
import type { ServerAddress } from "../redis_url.ts";
import { askServer, handshakeTimeoutMs } from "./client.ts";
import { isRefused, isReply, reasonOf, refusedOrThrow } from "./errors.ts";
import { commandText, PublishBatch } from "./publish_batch.ts";
import { findMasters } from "./sentinel.ts";

/** What a proxy's settings ask for. */
export interface Wants {
  /** The number of the database. */
  readonly db: number;
  /** The server is part of a Cluster. */
  readonly sharded: boolean;
  readonly inbox: boolean;
  /** A new socket of a session closes the others. */
  readonly lastSocket: boolean;
}

/** Commands that something needs. */
export interface Need {
  /** Ends the sentence "Redis refuses what … needs". */
  readonly what: string;
  /** How much it is missed; undefined for an error. */
  readonly level?: "warn";
  /** One each, with names as ACL patterns. All arguments are of the right number, and mean nothing. Never EXEC. */
  readonly commands: readonly string[];
}

/** What the proxy does without when a server refuses it: nothing is lost by that. */
export const needless = ["PING", "CLIENT SETNAME name", "INFO memory", "MULTI"] as const;

/** What the functions of a session's log and its reader use. Nothing happens to a log that is not there. */
export const logCommands = [
  "XRANGE session:*:down - +",
  "XREVRANGE session:*:down + -",
  "XADD session:*:down NOMKSTREAM * field value",
  "XINFO STREAM session:*:down",
  "PEXPIRE session:*:down 1",
  "EXISTS session:*:down",
  "TIME",
] as const;

/** All that a proxy needs. */
export function needsOf({ db, sharded, inbox, lastSocket }: Wants): Need[] {
  const s = sharded ? "S" : "";
  const needs: Need[] = [
    {
      what: "every session",
      commands: [
        ...db === 0 ? [] : [`SELECT ${db}`],
        ...sharded ? ["CLUSTER INFO", "CLUSTER SLOTS"] : [],
        `${s}PUBLISH wsproxy:canary:* text`,
        `${s}SUBSCRIBE wsproxy:canary:*`,
        `${s}PUBLISH session:*:up text`,
        `${s}SUBSCRIBE session:*:down`,
        `${s}UNSUBSCRIBE session:*:down`,
      ],
    },
    { what: "the watch for a master that was demoted", level: "warn", commands: ["ROLE"] },
    // Another user may have loaded them.
    { what: "loading the session log's functions", level: "warn", commands: ["FUNCTION LOAD text"] },
    {
      what: "resuming",
      commands: ["FCALL function 1 session:*:down", ...logCommands, ...sharded ? ["ASKING"] : []],
    },
    { what: "the control channel", commands: [`${s}SUBSCRIBE wsproxy:control`] },
    {
      what: "revocation",
      commands: [
        "HGETALL wsproxy:revoked",
        "EVAL text 1 wsproxy:revoked",
        "HGET wsproxy:revoked field",
        "HSET wsproxy:revoked field value",
      ],
    },
  ];
  if (lastSocket) {
    needs.push({
      what: "SESSION_SOCKETS=last",
      commands: ["EVAL text 1 session:*:down", `${s}PUBLISH session:*:down text`, "TIME"],
    });
  }
  if (inbox) needs.push({ what: "INBOX=true", commands: inboxCommands });
  return needs;
}

const [stream, beside, proxies] = ["agent:*:inbox", "wsproxy:{agent:*:inbox}:*", "wsproxy:{proxies}"] as const;
const inboxCommands = [
  "SCRIPT LOAD text",
  `EVALSHA hash 2 ${stream} ${beside}`,
  `XADD ${stream} * field value`,
  `XREVRANGE ${stream} + -`,
  `XINFO GROUPS ${stream}`,
  `EXISTS ${stream}`,
  `DEL ${stream}`,
  "TIME",
  `HSET ${proxies} field value`,
  `HGETALL ${proxies}`,
  `HDEL ${proxies} field`,
  `SMEMBERS ${proxies}:*`,
  `SADD ${proxies}:* member`,
  `SREM ${proxies}:* member`,
  `DEL ${proxies}:*`,
  `ZADD ${proxies}:* 1 member`,
  `ZREM ${proxies}:* member`,
  `ZRANGEBYSCORE ${proxies}:* 0 0`,
  `GET ${beside}`,
  `SET ${beside} value`,
  `DEL ${beside}`,
  `EXISTS ${beside}`,
  `HSCAN ${beside} 0`,
  `HGET ${beside} field`,
  `HMGET ${beside} field`,
  `HSET ${beside} field value`,
  `HDEL ${beside} field`,
  `HINCRBY ${beside} field 1`,
  `ZADD ${beside} 1 member`,
  `ZREM ${beside} member`,
  `ZRANGE ${beside} 0 0`,
  `ZRANGEBYSCORE ${beside} 0 0`,
];

/** What names a command and what it is about, without the arguments that mean nothing. */
export function describe(command: string): string {
  const words = command.split(" ");
  const nameWords = /^(CLIENT|CLUSTER|FUNCTION|INFO|SCRIPT|XINFO) /.test(command) ? 2 : 1;
  return [...words.slice(0, nameWords), ...words.slice(nameWords).filter((word) => word.includes(":"))].join(" ");
}

/** What one server permits: tried whenever it may have changed, and told when it has. */
export class Rights {
  readonly #address: ServerAddress;
  readonly #needs: readonly Need[];
  readonly #log: Log;
  /** What was told last. */
  #told: ReadonlySet<string> = new Set();
  #trying: Promise<void> | undefined;
  #closing = new AbortController();

  /** Nothing is tried yet. */
  constructor(address: ServerAddress, wants: Omit<Wants, "db">, log: Log) {
    this.#address = address;
    this.#needs = needsOf({ ...wants, db: address.db });
    this.#log = log;
  }

  /** Resolves when nothing is being tried. */
  get tried(): Promise<void> {
    return this.#trying ?? Promise.resolve();
  }

  /** Tries all, and tells what is refused. */
  try(): void {
    this.#trying ??= this.#try().catch((error) => {
      // Why there is no connection is told by those that are to serve.
      this.#log.debug({ reason: reasonOf(error) }, "rights could not be tried");
    }).finally(() => this.#trying = undefined);
  }

  /** Gives up what is being tried. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#trying;
  }

  async #try(): Promise<void> {
    const { signal } = this.#closing = new AbortController();
    const address = this.#address;
    const server = "sentinels" in address ? { ...address, ...(await findMasters(address))[0]! } : address;
    const faults = await askServer(server, handshakeTimeoutMs, (redis) => findFaults(redis, this.#needs), signal);
    const told = new Set<string>();
    for (const { level, event, reason } of faults) {
      const text = `${event}: ${reason}`;
      told.add(text);
      if (!this.#told.has(text)) this.#log[level]({ reason }, event);
    }
    this.#told = told;
  }
}

/** What an operator should know of a server. */
interface Fault {
  readonly level: "warn" | "error";
  readonly event: string;
  readonly reason: string;
}

/** The connection is of no use for anything else afterwards. */
async function findFaults(redis: Redis, needs: readonly Need[]): Promise<Fault[]> {
  const faults = faultsOfMemory(await redis.info("memory").catch(refusedOrThrow));
  const commands = [...new Set(needs.flatMap((need) => need.commands))];
  const [multi] = await send(redis, ["MULTI"]);
  if (isRefused(multi)) {
    return [...faults, { level: "warn", event: "Redis does not let rights be tried", reason: `MULTI (${why(multi)})` }];
  }
  const answers = await send(redis, commands);
  const outcomes = new Map(commands.map((command, i) => [command, answers[i]]));
  for (const { what, level = "error", commands } of needs) {
    const refused = commands.filter((command) => isRefused(outcomes.get(command)));
    // An older Redis has no functions: whatever loads them tells of that.
    if (refused.length === 0 || commands.some((command) => isOlder(command, outcomes.get(command)))) continue;
    faults.push({
      level,
      event: `Redis refuses what ${what} needs`,
      reason: refused.map((command) => `${describe(command)} (${why(outcomes.get(command))})`).join(", "),
    });
  }
  return faults;
}

async function send(redis: Redis, commands: readonly string[]): Promise<readonly unknown[]> {
  const publications = commands.map((command) => ({
    channel: undefined,
    text: commandText(...wordsOf(command)),
  }));
  const outcomes = await new PublishBatch(publications).send(redis);
  for (const outcome of outcomes) if (outcome instanceof Error && !isReply(outcome)) throw outcome;
  return outcomes;
}

/** The words of a command, about things whose names fit its patterns. */
export function wordsOf(command: string, id = "wsproxy-check"): string[] {
  return command.split(" ").map((word) => word.length > 1 ? word.replaceAll("*", id) : word);
}

const why = (refusal: unknown) => /\bNOPERM\b/.test(reasonOf(refusal)) ? "NOPERM" : reasonOf(refusal);

const isOlder = (command: string, outcome: unknown) =>
  command.startsWith("FCALL ") && /unknown command/i.test(reasonOf(outcome));

function faultsOfMemory(memory: string | void): Fault[] {
  const [, policy = ""] = /^maxmemory_policy:(\S+)/m.exec(memory ?? "") ?? [];
  if (policy.startsWith("allkeys")) {
    const event = "Redis may evict inboxes, records of connections, revoked tokens and session logs";
    return [{ level: "error", event, reason: `maxmemory-policy ${policy}` }];
  }
  if (!policy.startsWith("volatile")) return [];
  return [{ level: "warn", event: "Redis may evict session logs early", reason: `maxmemory-policy ${policy}` }];
}
