/** `wsproxy token`: makes a token with `JWT_SECRET`, or says what the proxy thinks of one. */

import { parseArgs } from "node:util";
import { createDecoder, createSigner } from "fast-jwt";
import { type Config, ConfigError, type PublicKeySettings, readConfig } from "../config.ts";
import { KeySet } from "../http/keys.ts";
import { createVerifier, type TokenRules } from "../http/token.ts";
import { settings } from "../settings.ts";
import { readKeys } from "./keys.ts";
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

/** What the settings want of every token. */
type Rules = Pick<Config["auth"], "sessionClaim" | "issuer" | "audiences">;

const defaultRules: Rules = {
  sessionClaim: settings.JWT_SESSION_CLAIM.default,
  issuer: undefined,
  audiences: undefined,
};

/** A token, signed with HS256. */
export function mintToken(secret: string, { sessionId, agentId, ttlSecs }: Claims, rules = defaultRules): string {
  const sign = createSigner({
    key: secret,
    algorithm: "HS256",
    ...(ttlSecs === undefined ? {} : { expiresIn: ttlSecs * 1000 }),
  });
  return sign({
    [rules.sessionClaim]: sessionId,
    ...(agentId === undefined ? {} : { agent_id: agentId }),
    ...(rules.issuer === undefined ? {} : { iss: rules.issuer }),
    ...(rules.audiences === undefined ? {} : { aud: rules.audiences[0] }),
  });
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
export async function token(args: string[]): Promise<number> {
  const { values, positionals } = parseOrExplain(args);
  const { agent, session, ttl, verify } = values;
  if (agent === "") throw new UsageError("--agent must not be empty");
  if (verify !== undefined) {
    if (positionals.length > 0 || ttl !== undefined) throw new UsageError(usage);
    return await verifyToken(verify, session, agent);
  }
  const [sessionId, ...more] = positionals;
  if (!sessionId || more.length > 0 || session !== undefined) throw new UsageError(usage);
  const ttlSecs = ttl === undefined ? undefined : parseTtl(ttl);
  const rules = readRules();
  const [secret] = rules.secrets;
  if (secret === undefined) {
    throw new UsageError("JWT_ALGORITHM has no HS256: only the holder of a private key can sign");
  }
  console.log(mintToken(secret, { sessionId, agentId: agent, ttlSecs }, rules));
  return 0;
}

/**
 * Says whether the proxy would take a token, and if not, why. For the session and the agent that it names, if not told.
 */
async function verifyToken(text: string, session?: string, agent?: string): Promise<number> {
  const rules = readRules();
  const claims = claimsOf(text);
  const named = [claims[rules.sessionClaim]].flat()[0];
  const target = {
    sessionId: session ?? String(named ?? ""),
    agentId: agent ?? String(claims["agent_id"] ?? ""),
  };
  const keys = rules.publicKeys && await keysOf(rules.publicKeys);
  const verify = createVerifier({ ...rules, publicAlgorithms: rules.publicKeys?.algorithms, keys });
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

/** The keys as they are now, as a verifier asks for them. */
async function keysOf(settings: PublicKeySettings): Promise<TokenRules["keys"]> {
  try {
    const set = new KeySet((await readKeys(settings)).keys);
    return {
      checksFor(algorithm, kid) {
        const checks = set.checksFor(algorithm, kid);
        if (checks.length === 0) throw new Refusal("unknownKey");
        return checks;
      },
    };
  } catch (error) {
    throw new UsageError(`${settings.source.setting}: ${(error as Error).message}`);
  }
}

/** What the proxy wants of tokens. @throws {UsageError} when its settings are wrong. */
function readRules(): Config["auth"] {
  const names = Object.keys(settings).filter((name) => /^(JWT|JWKS)_/.test(name));
  const env = Object.fromEntries(names.map((name) => [name, Deno.env.get(name)]));
  try {
    return readConfig(env).auth;
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    const isMissing = error.message.startsWith("JWT_SECRET is required");
    throw new UsageError(isMissing ? 'JWT_SECRET is not set: "./dev init" writes one into .env' : error.message);
  }
}
