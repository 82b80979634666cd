/** `wsproxy check-config`: what a start with these settings would find, without serving anybody. */

import { Deadlines } from "../deadline.ts";
import { type Config, ConfigError, readConfig, readEnvironment } from "../config.ts";
import { within } from "../deadline.ts";
import { pino } from "pino";
import { Bridge } from "../redis/bridge.ts";
import type { Endpoint } from "../redis/link.ts";
import { SubscribeTimeout, Unavailable } from "../redis/errors.ts";
import { UsageError } from "./usage.ts";

/** How long Redis may take to be there, and to answer. */
const patienceMs = 5000;
/** How often it is looked whether clients can resume, and how long between. */
const resumableLooks = 20;
const lookMs = 50;

/** Checks the settings, Redis, and the rights there; prints what it finds; 1 when the proxy could not serve. */
export async function checkConfig(args: string[]): Promise<number> {
  if (args.length > 0) throw new UsageError("usage: wsproxy check-config");
  let config: Config;
  try {
    config = readConfig(readEnvironment());
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    for (const problem of error.problems) tell("error", problem);
    return 1;
  }
  for (const notice of config.notices) tell("note", notice);
  for (const [name, value] of Object.entries(config.shown)) tell("setting", `${name}=${value}`);
  const port = checkPort(config);
  const redis = await checkRedis(config);
  if (port && redis) tell("ok", "the proxy can serve");
  return port && redis ? 0 : 1;
}

function tell(kind: "ok" | "note" | "setting" | "warning" | "error", text: string): void {
  console.log(`${kind}: ${text}`);
}

function checkPort({ listen: { hostname, port } }: Config): boolean {
  try {
    Deno.listen({ hostname, port }).close();
    tell("ok", `${hostname}:${port} is free`);
    return true;
  } catch (error) {
    const { name, message } = error as Error;
    // The proxy that the check is about may be running.
    const inUse = name === "AddrInUse";
    tell(inUse ? "note" : "error", inUse ? `${hostname}:${port} is in use, perhaps by wsproxy` : `PORT: ${message}`);
    return inUse;
  }
}

async function checkRedis(config: Config): Promise<boolean> {
  const reasons = new Set<string>();
  const bridge = new Bridge({
    address: config.redis.address,
    log: pino({ level: "warn", base: undefined }, { write: (line) => void reasons.add(reasonIn(line)) }),
    outageGraceMs: config.redis.outageGraceMs,
    maxPendingCost: config.limits.maxBufferBytes,
    logs: config.logs,
    inbox: config.inbox,
    onOutage() {},
    onRecovery: () => bridge.available && connected.resolve(),
  });
  const connected = Promise.withResolvers<void>();
  try {
    await within(patienceMs, connected.promise);
    if (!bridge.available) {
      tell("error", `Redis: no messages flow: ${[...reasons].join("; ") || `not within ${patienceMs} ms`}`);
      return false;
    }
    tell("ok", "Redis: messages flow both ways");
    const served = await tryOne(bridge, config.inbox !== undefined);
    for (const reason of reasons) tell("warning", `Redis: ${reason}`);
    return served;
  } finally {
    await bridge.close(1000);
  }
}

/** What a line of the log has to say, without its fields of time and level. */
function reasonIn(line: string): string {
  const { msg, reason } = JSON.parse(line);
  return reason === undefined ? msg : `${msg}: ${reason}`;
}

/** One session that nobody else has; with inboxes one entry, in an inbox of its own. */
async function tryOne(bridge: Bridge, hasInbox: boolean): Promise<boolean> {
  const session = `wsproxy-check-${crypto.randomUUID()}`;
  const link = bridge.link(session, nobody);
  try {
    await link.attach(patienceMs, new Deadlines());
    tell("ok", "Redis: a session's down channel can be subscribed to");
    const { entered } = await bridge.publish(nobody.agentId, session, '"wsproxy check-config"');
    tell("ok", "Redis: a session's up channel can be published to");
    if (hasInbox && entered) tell("ok", "Redis: inboxes can be written");
    else if (hasInbox) tell("warning", "Redis: inboxes cannot be written");
    if (await becomesResumable(bridge, session)) tell("ok", "Redis: clients can resume");
    else tell("warning", "Redis: clients cannot resume, as the log's functions are not there");
    return true;
  } catch (error) {
    if (!(error instanceof Unavailable) && !(error instanceof SubscribeTimeout)) throw error;
    tell("error", `Redis: a session would be refused: ${error.message}`);
    return false;
  } finally {
    link.detach();
  }
}

/** The functions are looked for, and loaded, beside everything else. */
async function becomesResumable(bridge: Bridge, session: string): Promise<boolean> {
  for (let left = resumableLooks; left > 0 && !bridge.isResumable(session); left--) {
    await new Promise((resolve) => setTimeout(resolve, lookMs));
  }
  return bridge.isResumable(session);
}

/** The session's end of the link. */
const nobody: Endpoint = {
  traceparent: "",
  agentId: "wsproxy-check",
  backlog: "none",
  deliver: () => false,
  gap() {},
  rejected() {},
  fail() {},
  lost() {},
  unheard() {},
};
