/**
 * From a token to a verified grant. HS256 only, whatever the token's header says (RFC 8725, section 3.1); no Redis
 * look-up. At once, not in another thread: a signature takes a few microseconds, and handing it over takes more.
 */

import { createVerifier as createSignatureVerifier, TokenError, type VerifierOptions } from "fast-jwt";
import { Refusal } from "../replies.ts";
import type { Revocations } from "../revocations.ts";
import type { Grant, Target } from "../session/session.ts";

/**
 * Verifies a token for a target.
 * @throws {Refusal} when it is not good.
 */
export type Verify = (token: string, target: Target) => Grant;

/** Longest token looked at. Ours take some 200 bytes; checking a signature costs time in proportion to the length. */
const maxTokenChars = 8192;

/**
 * A verifier for tokens signed with any of the secrets, tried in order: the current one first, then, during a
 * rotation, its predecessor. `leewayMs` is how far clocks may differ: a token is taken so long before its `nbf`, and
 * granted until so long after its `exp`.
 */
export function createVerifier(secrets: readonly string[], leewayMs = 0, revocations?: Revocations): Verify {
  const verifiers = secrets.map((key) => createSignatureVerifier({ key, ...verifyOptions }));
  return (token, target) => {
    if (token.length > maxTokenChars) throw new Refusal("tokenTooLong");
    const claims = verifySignature(token, verifiers);
    if (typeof claims.session_id !== "string" || claims.session_id !== target.sessionId) {
      throw new Refusal("wrongSession");
    }
    if (typeof claims.iat !== "number") throw new Refusal("tokenMalformed", "the token's iat must be a number");
    if (claims.agent_id !== undefined && claims.agent_id !== target.agentId) {
      throw new Refusal("wrongAgent");
    }
    const issuedAtSecs = claims.iat;
    if (revocations?.covers(target.agentId, issuedAtSecs)) throw new Refusal("tokenRevoked");
    const nowMs = Date.now();
    const notBeforeSecs = timeIn(claims, "nbf");
    if (notBeforeSecs !== undefined && notBeforeSecs * 1000 > nowMs + leewayMs) {
      throw new Refusal("tokenNotYetValid");
    }
    const expirySecs = timeIn(claims, "exp");
    if (expirySecs === undefined) return { issuedAtSecs, expiresAtMs: undefined };
    const expiresAtMs = expirySecs * 1000 + leewayMs;
    if (expiresAtMs <= nowMs) throw new Refusal("tokenExpired");
    return { issuedAtSecs, expiresAtMs };
  };
}

/** Times are checked above, to the millisecond and with one leeway for both. */
const verifyOptions: Partial<VerifierOptions> = {
  algorithms: ["HS256"],
  ignoreExpiration: true,
  ignoreNotBefore: true,
};

/** What a token claims; not what types that has. */
type Claims = Readonly<Record<string, unknown>>;

function verifySignature(token: string, verifiers: readonly ((token: string) => Claims)[]): Claims {
  let failure: unknown;
  for (const verify of verifiers) {
    try {
      return verify(token);
    } catch (error) {
      failure = error;
      if (!(error instanceof TokenError) || error.code !== "FAST_JWT_INVALID_SIGNATURE") break;
    }
  }
  throw refusalFor(failure);
}

function refusalFor(error: unknown): Refusal {
  if (!(error instanceof TokenError)) throw error;
  switch (error.code) {
    case "FAST_JWT_MISSING_SIGNATURE":
      return new Refusal("tokenUnsigned");
    case "FAST_JWT_INVALID_SIGNATURE":
      return new Refusal("wrongSignature");
    case "FAST_JWT_INVALID_ALGORITHM":
      return new Refusal("wrongAlgorithm");
    default:
      return new Refusal("tokenMalformed");
  }
}

/** A claim that is a time, in seconds since the epoch. */
function timeIn(claims: Claims, name: "exp" | "nbf"): number | undefined {
  const secs = claims[name];
  if (secs === undefined || typeof secs === "number") return secs;
  throw new Refusal("tokenMalformed", `the token's ${name} is malformed`);
}
