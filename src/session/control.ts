/**
 * Commands for many sessions, from the channel `wsproxy:control`, which every proxy hears and obeys:
 * `{"command":"close","agent_id"|"issued_before","code","reason"}`, `{"command":"allow","agent_id"?}`, which takes back
 * an `issued_before`, and `{"command":"broadcast","agent_id"?,"payload"}`.
 */

import { Buffer } from "node:buffer";
import type { Log } from "../log.ts";
import { isId } from "../ids.ts";
import type { Revoked } from "../redis/revoked.ts";
import type { Listener } from "../redis/subscriptions.ts";
import { type Close, closes } from "../replies.ts";
import type { AgentId, Revocation, Revocations } from "../revocations.ts";
import type { Registry } from "./registry.ts";
import type { Told } from "../told.ts";
import { parseClose, type Session } from "./session.ts";

/** Which sessions commands concern, and where they are told. */
export interface CommanderContext {
  readonly registry: Registry;
  readonly revocations: Revocations;
  /** Keeps them for all proxies. */
  readonly revoked: Pick<Revoked, "keep"> | undefined;
  readonly log: Log;
  /** Logs and counts what was done, once for all workers. */
  readonly tell: (told: Told) => void;
}

/** How far the clock of a backend that revokes tokens may be ahead of the proxy's. */
const maxAheadSecs = 60;

/** A command whose fields are not what they must be; the message never holds a payload. */
class Malformed extends Error {}

/** Obeys. */
export class Commander implements Listener {
  readonly #context: CommanderContext;
  /** What it hears is done at once. */
  readonly backlog = "none";

  /** Hears of what is revoked elsewhere from now on. */
  constructor(context: CommanderContext) {
    this.#context = context;
    context.revocations.onLearnt = (agentId, revocation) => this.#learn(agentId, revocation);
  }

  /** A command has been published. */
  deliver(message: Buffer): "taken" {
    const { tell } = this.#context;
    let name = "unknown";
    try {
      const fields = parseFields(message.toString());
      const { command } = fields;
      if (command !== "close" && command !== "allow" && command !== "broadcast") {
        throw new Malformed("command must be close, allow or broadcast");
      }
      name = command;
      const done = this.#obey(command, fields);
      tell({
        level: "info",
        msg: "command obeyed",
        fields: { audit: "control", command, ...done.fields },
        sockets: done.sockets,
        counted: { command, result: "obeyed" },
      });
    } catch (error) {
      if (!(error instanceof Malformed)) throw error;
      tell({
        level: "warn",
        msg: "malformed command ignored",
        fields: { audit: "control", command: name, reason: error.message },
        sockets: undefined,
        counted: { command: name, result: "malformed" },
      });
    }
    return "taken";
  }

  /** Redis says what was revoked, or taken back, while this proxy was away. */
  #learn(agent: AgentId, { beforeSecs }: Revocation): void {
    const { tell } = this.#context;
    if (beforeSecs === 0) {
      const msg = "revocation taken back";
      return tell({ level: "info", msg, fields: { audit: "revoked", agent }, sockets: undefined, counted: undefined });
    }
    const sockets = this.#end(closes.tokenRevoked, agent, beforeSecs);
    const fields = { audit: "revoked", agent, issuedBefore: beforeSecs };
    const [level, msg] = isFuture(beforeSecs)
      ? ["warn" as const, "tokens revoked up to a time in the future"]
      : ["info" as const, "tokens revoked"];
    tell({ level, msg, fields, sockets, counted: undefined });
  }

  /** What was missed is not sent again; revocations are read from Redis. */
  gap(): void {}

  /** Redis does not let us hear it: everything else goes on. */
  rejected(): void {}

  /** A bug of ours. */
  fail(error: unknown): void {
    this.#context.log.error({ err: error }, "command failed");
  }

  #obey(command: "close" | "allow" | "broadcast", fields: Fields): Done {
    switch (command) {
      case "close":
        return this.#close(fields);
      case "allow":
        return this.#allow(fields);
      case "broadcast":
        return this.#broadcast(fields);
    }
  }

  #close(fields: Fields): Done {
    const agentId = optionalAgent(fields);
    const beforeSecs = optionalTime(fields);
    if (agentId === undefined && beforeSecs === undefined) throw new Malformed("agent_id or issued_before is needed");
    const close = closeOf(fields, beforeSecs === undefined ? closes.closedForGood : closes.tokenRevoked);
    if (beforeSecs !== undefined) this.#revoke(agentId, beforeSecs);
    const sockets = this.#end(close, agentId, beforeSecs);
    return { fields: { agent: agentId, issuedBefore: beforeSecs, code: close.code }, sockets };
  }

  /** Ends sessions of an agent, or of all; of these, those whose token is older than a revocation, if one is given. */
  #end(close: Close, agentId: AgentId, beforeSecs: number | undefined): number {
    const { registry, revocations } = this.#context;
    return registry.end(close, (session) =>
      isOf(session, agentId) &&
      (beforeSecs === undefined || revocations.isOlder(session.issuedAtSecs, beforeSecs)));
  }

  #allow(fields: Fields): Done {
    const agent = optionalAgent(fields);
    this.#revoke(agent, 0);
    return { fields: { agent }, sockets: undefined };
  }

  #revoke(agentId: AgentId, beforeSecs: number): void {
    const { revocations, revoked } = this.#context;
    revocations.hear(agentId, beforeSecs);
    void revoked?.keep(agentId);
  }

  #broadcast(fields: Fields): Done {
    const agentId = optionalAgent(fields);
    const { payload } = fields;
    if (payload === undefined) throw new Malformed("payload is needed");
    const message = Buffer.from(typeof payload === "string" ? payload : JSON.stringify(payload));
    const { registry } = this.#context;
    const sockets = registry.deliver(message, (session) => isOf(session, agentId));
    return { fields: { agent: agentId }, sockets };
  }
}

/** What a command has done. */
type Done = Pick<Told, "fields" | "sockets">;

type Fields = Readonly<Record<string, unknown>>;

const isOf = (session: Session, agentId: AgentId) => agentId === undefined || session.agentId === agentId;

const isFuture = (secs: number) => secs > Date.now() / 1000 + maxAheadSecs;

function parseFields(json: string): Fields {
  try {
    const fields: unknown = JSON.parse(json);
    if (typeof fields === "object" && fields !== null && !Array.isArray(fields)) return fields as Fields;
  } catch {
    // Told below.
  }
  throw new Malformed("it must be a JSON object");
}

function optionalAgent({ agent_id: id }: Fields): AgentId {
  if (id === undefined || (typeof id === "string" && isId(id))) return id;
  throw new Malformed("agent_id must be an agent's id");
}

function optionalTime({ issued_before: secs }: Fields): number | undefined {
  if (secs === undefined) return secs;
  if (typeof secs !== "number" || !(secs > 0)) throw new Malformed("issued_before must be seconds since 1970");
  if (isFuture(secs)) throw new Malformed("issued_before must be seconds since 1970, and not in the future");
  return secs;
}

function closeOf({ code, reason }: Fields, fallback: typeof closes.closedForGood | typeof closes.tokenRevoked) {
  const close = parseClose(JSON.stringify({ code: code ?? fallback.code, reason: reason ?? fallback.reason }));
  if (close) return { ...fallback, ...close };
  throw new Malformed("code must be 1000 or from 3000 to 4999, and reason at most 123 bytes");
}
