/** `wsproxy check-config`: what a start with these settings would find, without serving any client. */

import { pino } from "pino";
import { type Config, ConfigError, type PublicKeySettings, readConfig, readEnvironment } from "../config.ts";
import { Deadlines, within } from "../deadline.ts";
import { Bridge } from "../redis/bridge.ts";
import { isReply, reasonOf, SubscribeTimeout, Unavailable } from "../redis/errors.ts";
import type { Endpoint, Link } from "../redis/link.ts";
import { Revocations } from "../revocations.ts";
import { get, hostInUrl } from "./healthcheck.ts";
import { readKeys } from "./keys.ts";
import { UsageError } from "./usage.ts";

/** How long Redis may take to be there, and to answer; and how long when it has refused something. */
const patienceMs = 5000;
const refusedPatienceMs = 1000;
/** How long what listens on a port may take to say what it is. */
const portTimeoutMs = 1000;
/** How long the functions of session logs may take to be there, when all else is. */
const resumableMs = 1000;
/** Time between two looks at what becomes true beside everything else. */
const lookMs = 50;

/** Checks the settings, Redis, and the rights there; prints all that it finds; 1 when the proxy could not serve. */
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
  const outcomes = [await checkPort("PORT", config.listen)];
  if (config.admin) outcomes.push(await checkPort("ADMIN_PORT", config.admin));
  if (config.auth.publicKeys) outcomes.push(await checkKeys(config.auth.publicKeys));
  outcomes.push(await checkRedis(config));
  const canServe = outcomes.every((outcome) => outcome);
  if (canServe) tell("ok", "the proxy can serve");
  return canServe ? 0 : 1;
}

function tell(kind: "ok" | "note" | "setting" | "warning" | "error", text: string): void {
  console.log(`${kind}: ${text}`);
}

/** Whether there are keys of tokens: a proxy would wait for them. */
async function checkKeys(settings: PublicKeySettings): Promise<boolean> {
  const name = settings.source.setting;
  try {
    const { keys, skipped } = await readKeys(settings);
    for (const reason of skipped) tell("note", `${name}: left out: ${reason}`);
    for (const { kid, algorithms } of keys) {
      tell(
        "ok",
        `${name}: a key for ${algorithms.join(" and ")}${kid === undefined ? "" : `, kid ${JSON.stringify(kid)}`}`,
      );
    }
    return true;
  } catch (error) {
    tell("error", `${name}: ${(error as Error).message}`);
    return false;
  }
}

async function checkPort(
  name: "PORT" | "ADMIN_PORT",
  { hostname, port }: Readonly<{ hostname: string; port: number }>,
): Promise<boolean> {
  try {
    Deno.listen({ hostname, port }).close();
    tell("ok", `${hostname}:${port} is free`);
    return true;
  } catch (error) {
    if (!(error instanceof Deno.errors.AddrInUse)) {
      tell("error", `${name}: ${(error as Error).message}`);
      return false;
    }
    // The proxy that the check is about may be running.
    const isOurs = await isProxy(hostname, port);
    if (isOurs) tell("note", `${hostname}:${port} is in use by wsproxy`);
    else tell("error", `${name}: ${hostname}:${port} is in use by something else than wsproxy`);
    return isOurs;
  }
}

/** Whether a proxy answers on a port of this machine. */
async function isProxy(hostname: string, port: number): Promise<boolean> {
  try {
    const { body } = await get(`http://${hostInUrl(hostname)}:${port}/ready`, AbortSignal.timeout(portTimeoutMs));
    return body.includes('{"status":"');
  } catch (error) {
    // It hangs up, or says nothing, and so it is none.
    if (error instanceof Deno.errors.NotCapable) throw error;
    return false;
  }
}

/** What is wrong with Redis: what keeps a proxy from what its settings say, and what it can do without. */
interface Found {
  readonly errors: Set<string>;
  readonly warnings: Set<string>;
}

async function checkRedis(config: Config): Promise<boolean> {
  const found: Found = { errors: new Set(), warnings: new Set() };
  const settled = Promise.withResolvers<void>();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const note = (line: string) => {
    const { level, msg, reason, server } = JSON.parse(line);
    const isError = level >= pino.levels.values["error"]!;
    (isError ? found.errors : found.warnings).add(
      [server, msg, reason].filter((word) => word !== undefined).join(": "),
    );
    const isFinal = isError || /\b(NOAUTH|NOPERM|WRONGPASS)\b/.test(reason ?? "");
    if (isFinal) timer ??= setTimeout(settled.resolve, refusedPatienceMs);
  };
  let entries = 0;
  const bridge = new Bridge({
    address: config.redis.address,
    log: pino({ level: "warn", base: undefined }, { write: note }),
    outageGraceMs: config.redis.outageGraceMs,
    maxPendingCost: config.limits.maxBufferBytes,
    sessionLogs: config.sessionLogs,
    inbox: config.inbox,
    onEntries: (count) => entries += count,
    lastSocket: config.limits.sessionSockets === "last",
    revocations: new Revocations(),
    onOutage() {},
    onRecovery: () => bridge.available && settled.resolve(),
  });
  bridge.listenToControl(unheeding);
  try {
    await within(patienceMs, settled.promise);
    await bridge.tried();
    if (bridge.available) {
      tell("ok", "Redis: messages flow both ways");
      await tryOne(bridge, config, () => entries, found);
    } else found.errors.add(`no messages flow: ${[...found.warnings].join("; ") || `not within ${patienceMs} ms`}`);
    for (const text of found.warnings) tell("warning", `Redis: ${text}`);
    for (const text of found.errors) tell("error", `Redis: ${text}`);
    return found.errors.size === 0;
  } finally {
    clearTimeout(timer);
    await bridge.close(1000);
  }
}

/** One session that no client has, with a log, and in an inbox of its own. */
async function tryOne(bridge: Bridge, config: Config, entries: () => number, found: Found): Promise<void> {
  const session = `wsproxy-check-${crypto.randomUUID()}`;
  const heard = Promise.withResolvers<void>();
  const link = bridge.link(session, { ...unheeding, deliver: () => (heard.resolve(), "taken") });
  // What Redis refuses has been told, with all that needs it.
  const refused = found.errors.size > 0;
  const timeoutMs = refused ? refusedPatienceMs : patienceMs;
  const attempt = async (what: string, action: () => Promise<unknown>) => {
    try {
      await action();
      tell("ok", `Redis: ${what}`);
    } catch (error) {
      if (!(error instanceof Unavailable) && !(error instanceof SubscribeTimeout) && !isReply(error)) throw error;
      if (!refused) found.errors.add(`not true: ${what}: ${reasonOf(error)}`);
    }
  };
  try {
    await attempt("a session's down channel can be subscribed to", () => link.attach(timeoutMs, new Deadlines()));
    let entered = false;
    await attempt("a session's up channel can be published to", async () => {
      ({ entered } = await bridge.publish(unheeding, session, '"wsproxy check-config"'));
    });
    if (config.inbox) await attempt("inboxes can be written", () => tryInbox(link, entered, entries, timeoutMs));
    if (config.limits.sessionSockets === "last") {
      await attempt("a session's other sockets can be closed", () => tryReplacing(link, heard.promise, timeoutMs));
    }
    if (await becomesTrue(() => bridge.isResumable(session) === true, resumableMs)) {
      await attempt("clients can resume", async () => await link.readLog(await link.openLog(), 1));
    } else if (!refused) {
      // Without functions an older Redis serves all other clients.
      const isOlder = [...found.warnings].some((text) => /it needs Redis 7/.test(text));
      (isOlder ? found.warnings : found.errors).add("clients cannot resume, as the log's functions are not there");
    }
  } finally {
    link.detach();
  }
}

/** The entries of a message, and of a connection that comes and goes. */
async function tryInbox(link: Link, entered: boolean, entries: () => number, timeoutMs: number): Promise<void> {
  if (!entered) throw new Unavailable("a message's entry was refused");
  const before = entries();
  link.opened();
  link.ended(1000, undefined);
  if (!await becomesTrue(() => entries() >= before + 2, timeoutMs)) {
    throw new Unavailable("a connection's entries were refused");
  }
}

/** The session hears itself what closes its other sockets. */
async function tryReplacing(link: Link, heard: Promise<void>, timeoutMs: number): Promise<void> {
  const refused = Promise.withResolvers<never>();
  link.replaceOthers("{}", () => refused.reject(new Unavailable("Redis refused the script")));
  await within(timeoutMs, Promise.race([heard, refused.promise]), () => {
    throw new Unavailable(`not heard within ${timeoutMs} ms`);
  });
}

/** Whether a claim is true within `timeoutMs` milliseconds. */
async function becomesTrue(claim: () => boolean, timeoutMs: number): Promise<boolean> {
  for (let left = timeoutMs / lookMs; left > 0 && !claim(); left--) {
    await new Promise((resolve) => setTimeout(resolve, lookMs));
  }
  return claim();
}

/** The session's end of the link, which heeds nothing that it hears. */
const unheeding: Endpoint = {
  traceparent: "",
  claims: "",
  address: "",
  agentId: "wsproxy-check",
  backlog: "none",
  deliver: () => "taken",
  gap() {},
  rejected() {},
  fail() {},
  lost() {},
  unheard() {},
};
