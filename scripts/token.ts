/**
 * `deno task token <session_id> [--agent <agent_id>] [--ttl <duration>]`: prints a token made with `JWT_SECRET`, and
 * nothing else. Without `--ttl` it never expires.
 */

import { parseArgs } from "node:util";
import { SignJWT } from "jose";
import { settings } from "../src/config.ts";

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
export async function mintToken(secret: string, { sessionId, agentId, ttlSecs }: Claims): Promise<string> {
  const token = new SignJWT({ session_id: sessionId, ...(agentId === undefined ? {} : { agent_id: agentId }) })
    .setProtectedHeader({ alg: "HS256" })
    .setIssuedAt();
  if (ttlSecs !== undefined) token.setExpirationTime(Math.floor(Date.now() / 1000) + ttlSecs);
  return await token.sign(new TextEncoder().encode(secret));
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

/** The caller's mistake, in one line. */
export class UsageError extends Error {
  /** Tells it from a bug. */
  override readonly name = "UsageError";
}

const usage = "usage: deno task token <session_id> [--agent <agent_id>] [--ttl <seconds, or 15m, 1h, 7d>]";

/** The claims a command line asks for. */
function parseCommandLine(args: string[]): Claims {
  const { values, positionals } = parseOrExplain(args);
  const [sessionId, ...more] = positionals;
  if (!sessionId || more.length > 0) throw new UsageError(usage);
  if (values.agent === "") throw new UsageError("--agent must not be empty");
  return { sessionId, agentId: values.agent, ttlSecs: values.ttl === undefined ? undefined : parseTtl(values.ttl) };
}

function parseOrExplain(args: string[]) {
  try {
    return parseArgs({ args, options: { agent: { type: "string" }, ttl: { type: "string" } }, allowPositionals: true });
  } catch (error) {
    throw new UsageError(`${error instanceof Error ? error.message : error}\n${usage}`);
  }
}

/** `JWT_SECRET`, under the rule that the proxy itself has for it. */
function readSecret(): string {
  const text = Deno.env.get("JWT_SECRET");
  if (!text) throw new UsageError('JWT_SECRET is not set: put it into .env; make one with "openssl rand -hex 32"');
  const secret = settings.JWT_SECRET.parse(text);
  if (typeof secret !== "string") throw new UsageError(`JWT_SECRET ${secret.rule}`);
  return secret;
}

if (import.meta.main) {
  try {
    const claims = parseCommandLine(Deno.args);
    console.log(await mintToken(readSecret(), claims));
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    console.error(error.message);
    Deno.exit(1);
  }
}
