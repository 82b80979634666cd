/**
 * Commands for many sessions, from the channel `wsproxy:control`, which every proxy hears and obeys:
 * `{"command":"close","agent_id"|"issued_before","code","reason"}` and `{"command":"broadcast","agent_id"?,"payload"}`.
 */

import { Buffer } from "node:buffer";
import type { Log } from "../log.ts";
import type { Metrics } from "../metrics.ts";
import type { Revoked } from "../redis/revoked.ts";
import type { Listener } from "../redis/subscriptions.ts";
import { closes } from "../replies.ts";
import type { Revocations } from "../revocations.ts";
import type { Registry } from "./registry.ts";
import { parseClose, type Session } from "./session.ts";

/** Whom commands concern, and where they are told. */
export interface CommanderContext {
  readonly registry: Registry;
  readonly revocations: Revocations;
  /** Keeps them for all proxies. */
  readonly revoked: Pick<Revoked, "keep"> | undefined;
  readonly metrics: Pick<Metrics, "commands">;
  readonly log: Log;
}

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
    context.revocations.onLearnt = (agentId, beforeSecs) => this.#endRevoked(agentId, beforeSecs);
  }

  /** A command has been published. */
  deliver(message: Buffer): boolean {
    const { metrics, log } = this.#context;
    let name = "unknown";
    try {
      const fields = parseFields(message.toString());
      const { command } = fields;
      if (command !== "close" && command !== "broadcast") throw new Malformed("command must be close or broadcast");
      name = command;
      if (command === "close") this.#close(fields);
      else this.#broadcast(fields);
      metrics.commands.inc({ command: name, result: "obeyed" });
    } catch (error) {
      if (!(error instanceof Malformed)) throw error;
      metrics.commands.inc({ command: name, result: "malformed" });
      log.warn({ command: name, reason: error.message }, "malformed command ignored");
    }
    return false;
  }

  #endRevoked(agentId: string, beforeSecs: number): void {
    const { registry, log } = this.#context;
    const sockets = registry.end(
      closes.tokenRevoked,
      (session) => isOf(session, agentId) && session.issuedAtSecs < beforeSecs,
    );
    log.info({ agent: agentId, issuedBefore: beforeSecs, sockets }, "tokens revoked");
  }

  /** What was missed is not sent again; revocations are read from Redis. */
  gap(): void {}

  /** Redis does not let us hear it: everything else goes on. */
  rejected(): void {}

  /** A bug of ours. */
  fail(error: unknown): void {
    this.#context.log.error({ err: error }, "command failed");
  }

  #close(fields: Fields): void {
    const agentId = optionalText(fields, "agent_id");
    const { issued_before: beforeSecs } = fields;
    if (beforeSecs !== undefined && (typeof beforeSecs !== "number" || beforeSecs <= 0)) {
      throw new Malformed("issued_before must be seconds since 1970");
    }
    if (agentId === undefined && beforeSecs === undefined) throw new Malformed("agent_id or issued_before is needed");
    const close = closeOf(fields, beforeSecs === undefined ? closes.closedForGood : closes.tokenRevoked);
    const { registry, revocations, revoked, log } = this.#context;
    if (beforeSecs !== undefined) {
      revocations.add(agentId ?? "*", beforeSecs);
      revoked?.keep(agentId ?? "*", beforeSecs);
    }
    const sockets = registry.end(
      close,
      (session) => isOf(session, agentId ?? "*") && (beforeSecs === undefined || session.issuedAtSecs < beforeSecs),
    );
    log.info(
      { command: "close", agent: agentId, issuedBefore: beforeSecs, code: close.code, sockets },
      "command obeyed",
    );
  }

  #broadcast(fields: Fields): void {
    const agentId = optionalText(fields, "agent_id") ?? "*";
    const { payload } = fields;
    if (payload === undefined) throw new Malformed("payload is needed");
    const message = Buffer.from(typeof payload === "string" ? payload : JSON.stringify(payload));
    const { registry, log } = this.#context;
    const sockets = registry.deliver(message, (session) => isOf(session, agentId));
    log.info({ command: "broadcast", agent: agentId, sockets }, "command obeyed");
  }
}

type Fields = Readonly<Record<string, unknown>>;

const isOf = (session: Session, agentId: string) => agentId === "*" || session.agentId === agentId;

function parseFields(json: string): Fields {
  try {
    const fields: unknown = JSON.parse(json);
    if (typeof fields === "object" && fields !== null && !Array.isArray(fields)) return fields as Fields;
  } catch {
    // Told below.
  }
  throw new Malformed("it must be a JSON object");
}

function optionalText(fields: Fields, name: string): string | undefined {
  const value = fields[name];
  if (value === undefined || (typeof value === "string" && value !== "")) return value;
  throw new Malformed(`${name} must be a text`);
}

function closeOf({ code, reason }: Fields, fallback: typeof closes.closedForGood | typeof closes.tokenRevoked) {
  const close = parseClose(JSON.stringify({ code: code ?? fallback.code, reason: reason ?? fallback.reason }));
  if (close) return close;
  throw new Malformed("code must be 1000 or from 3000 to 4999, and reason at most 123 bytes");
}
