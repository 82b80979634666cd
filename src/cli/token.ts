/** `wsproxy token`: makes a token with `JWT_SECRET`, or says what the proxy thinks of one. */

import { parseArgs } from "node:util";
import { createDecoder, createSigner } from "fast-jwt";
import { settings } from "../settings.ts";
import { createVerifier } from "../http/token.ts";
import { Refusal } from "../replies.ts";
import { tokenUsage, UsageError } from "./usage.ts";

/** What a token says. */
export interface Claims {
  /** The session it allows. */
  readonly sessionId: string;
  /** The only agent id that the token is good for; any, when undefined. */
  readonly agentId?: string | undefined;
  /** Seconds until it expires; never, when undefined. */
  readonly ttlSecs?: number | undefined;
}

/** A token, signed with HS256. */
export function mintToken(secret: string, { sessionId, agentId, ttlSecs }: Claims): string {
  const sign = createSigner({
    key: secret,
    algorithm: "HS256",
    ...(ttlSecs === undefined ? {} : { expiresIn: ttlSecs * 1000 }),
  });
  return sign({ session_id: sessionId, ...(agentId === undefined ? {} : { agent_id: agentId }) });
}

const unitSecs: Readonly<Record<string, number>> = { "": 1, s: 1, m: 60, h: 3600, d: 86_400 };

/**
 * Seconds in a duration such as `90`, `90s`, `15m`, `1h` or `7d`.
 * @throws {UsageError} for anything else.
 */
export function parseTtl(text: string): number {
  const [, digits, unit] = /^([1-9]\d{0,9})([smhd]?)$/.exec(text) ?? [];
  if (digits === undefined) {
    throw new UsageError(`--ttl must be seconds, or a number with s, m, h or d: current value is "${text}"`);
  }
  return Number(digits) * unitSecs[unit!]!;
}

const usage = `usage: ${tokenUsage}`;

/** Carries out the command; returns the exit code. @throws {UsageError} for a command line that it is not. */
export function token(args: string[]): number {
  const { values, positionals } = parseOrExplain(args);
  const { agent, session, ttl, verify } = values;
  if (agent === "") throw new UsageError("--agent must not be empty");
  if (verify !== undefined) {
    if (positionals.length > 0 || ttl !== undefined) throw new UsageError(usage);
    return verifyToken(verify, session, agent);
  }
  const [sessionId, ...more] = positionals;
  if (!sessionId || more.length > 0 || session !== undefined) throw new UsageError(usage);
  const ttlSecs = ttl === undefined ? undefined : parseTtl(ttl);
  console.log(mintToken(readSecret("JWT_SECRET")!, { sessionId, agentId: agent, ttlSecs }));
  return 0;
}

/**
 * Says whether the proxy would take a token, and if not, why. For the session and the agent that it names, if not told.
 */
function verifyToken(text: string, session?: string, agent?: string): number {
  const leewayMs = settings.JWT_LEEWAY_SECS.parse(Deno.env.get("JWT_LEEWAY_SECS") || settings.JWT_LEEWAY_SECS.default);
  if (typeof leewayMs !== "number") throw new UsageError(`JWT_LEEWAY_SECS ${leewayMs.rule}`);
  const secrets = [readSecret("JWT_SECRET")!, readSecret("JWT_SECRET_PREVIOUS")].filter((secret) =>
    secret !== undefined
  );
  const verify = createVerifier(secrets, leewayMs);
  const claims = claimsOf(text);
  const target = {
    sessionId: session ?? String(claims["session_id"] ?? ""),
    agentId: agent ?? String(claims["agent_id"] ?? ""),
  };
  try {
    const { issuedAtSecs, expiresAtMs } = verify(text, target);
    const expiry = expiresAtMs === undefined ? "never expires" : `expires ${new Date(expiresAtMs).toISOString()}`;
    const agents = claims["agent_id"] === undefined ? "any agent" : `agent ${JSON.stringify(claims["agent_id"])}`;
    const issued = new Date(issuedAtSecs * 1000).toISOString();
    console.log(`valid for session ${JSON.stringify(target.sessionId)} of ${agents}: issued ${issued}, ${expiry}`);
    return 0;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    console.log(`refused with ${error.row.status}: ${error.message}`);
    return 1;
  }
}

function claimsOf(text: string): Record<string, unknown> {
  try {
    return createDecoder()(text);
  } catch {
    return {};
  }
}

function parseOrExplain(args: string[]) {
  const text = { type: "string" } as const;
  try {
    const options = { agent: text, ttl: text, verify: text, session: text };
    return parseArgs({ args, options, allowPositionals: true });
  } catch (error) {
    throw new UsageError(`${error instanceof Error ? error.message : error}\n${usage}`);
  }
}

/** A secret, under the rule that the proxy itself has for it. Undefined only for the previous one. */
function readSecret(name: "JWT_SECRET" | "JWT_SECRET_PREVIOUS"): string | undefined {
  const text = Deno.env.get(name);
  if (!text && name === "JWT_SECRET_PREVIOUS") return undefined;
  if (!text) throw new UsageError('JWT_SECRET is not set: "./dev init" writes one into .env');
  const secret = settings[name].parse(text);
  if (typeof secret !== "string") throw new UsageError(`${name} ${secret.rule}`);
  return secret;
}
