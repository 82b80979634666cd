/**
 * From a token to a verified grant. What counts is which algorithms and keys the settings name, not what a token's
 * header says (RFC 8725, section 3.1); no Redis look-up. At once, not in another thread: HS256 takes a few
 * microseconds, and handing it over takes more; what other algorithms take is in docs/performance.md.
 */

import { TokenError } from "fast-jwt";
import type { PublicAlgorithm } from "../public_keys.ts";
import { Refusal } from "../replies.ts";
import type { Revocations } from "../revocations.ts";
import type { Grant, Target } from "../session/session.ts";
import type { Claims } from "./claims.ts";
import type { Keys } from "./keys.ts";
import { type CheckSignature, type Decoded, decodeToken, maxTokenChars, signatureCheck } from "./signature.ts";

/**
 * Verifies a token for a target.
 * @throws {Refusal} when it is not good.
 */
export type Verify = (token: string, target: Target) => Grant;

/** What makes a token a good one. */
export interface TokenRules {
  /** For HS256, tried in order: the current one first, then, during a rotation, its predecessor. None: no HS256. */
  readonly secrets: readonly string[];
  /** What else may sign. */
  readonly publicAlgorithms?: readonly PublicAlgorithm[] | undefined;
  /** Their keys; required where there are any. */
  readonly keys?: Pick<Keys, "checksFor"> | undefined;
  /**
   * How far clocks may differ: a token is taken so long before its `nbf`, and granted until so long after its `exp`.
   */
  readonly leewayMs?: number;
  /** What `iss` must be, and one of what `aud` must have; undefined for anything. */
  readonly issuer?: string | undefined;
  readonly audiences?: readonly string[] | undefined;
  /** The claim that says which sessions a token allows: those that it names, or also those that begin so. */
  readonly sessionClaim?: string;
  readonly sessionMatch?: "exact" | "prefix";
  /** Tokens that are none any more. */
  readonly revocations?: Revocations;
  /** Makes what backends read of a token. */
  readonly claimsText?: ((claims: Claims) => string) | undefined;
}

/** A verifier of tokens by these rules. */
export function createVerifier(rules: TokenRules): Verify {
  const { leewayMs = 0, revocations, claimsText = () => "" } = rules;
  const { issuer, audiences } = rules;
  const verifySignature = createSignatureVerifier(rules);
  const allows = createSessionCheck(rules);
  return (token, target) => {
    if (token.length > maxTokenChars) throw new Refusal("tokenTooLong");
    const claims = verifySignature(token);
    if (issuer !== undefined && claims.iss !== issuer) throw new Refusal("wrongIssuer");
    if (audiences !== undefined && !isFor(audiences, claims.aud)) throw new Refusal("wrongAudience");
    if (!allows(claims, target.sessionId)) throw new Refusal("wrongSession");
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
    if (expirySecs === undefined) return { issuedAtSecs, expiresAtMs: undefined, claims: claimsText(claims) };
    const expiresAtMs = expirySecs * 1000 + leewayMs;
    if (expiresAtMs <= nowMs) throw new Refusal("tokenExpired");
    return { issuedAtSecs, expiresAtMs, claims: claimsText(claims) };
  };
}

/** Whether a token's `aud`, a text or a list of texts, has one of the audiences (RFC 7519, section 4.1.3). */
function isFor(audiences: readonly string[], aud: unknown): boolean {
  return (Array.isArray(aud) ? aud : [aud]).some((name) => audiences.includes(name));
}

/** Whether the claims allow a session. */
function createSessionCheck(
  { sessionClaim = "session_id", sessionMatch = "exact" }: TokenRules,
): (claims: Claims, sessionId: string) => boolean {
  const allows = sessionMatch === "exact"
    ? (value: string, sessionId: string) => value === sessionId
    : (value: string, sessionId: string) =>
      value === sessionId || (value !== "" && sessionId.startsWith(value) && /[.:]/.test(sessionId[value.length]!));
  // The Rust service's tokens never had a list there.
  const takesLists = sessionClaim !== "session_id" || sessionMatch !== "exact";
  return (claims, sessionId) => {
    const value = claims[sessionClaim];
    if (typeof value === "string") return allows(value, sessionId);
    return takesLists && Array.isArray(value) && value.every((item) => typeof item === "string") &&
      value.some((item) => allows(item, sessionId));
  };
}

/** The claims of a token whose signature is good. @throws {Refusal} for any other. */
function createSignatureVerifier({ secrets, publicAlgorithms = [], keys }: TokenRules): CheckSignature {
  const bySecret = secrets.map((secret) => signatureCheck("HS256", secret));
  if (keys === undefined) return (token) => checkByAny(token, bySecret);
  const algorithms = [...secrets.length > 0 ? ["HS256"] : [], ...publicAlgorithms].join(", ");
  return (token) => {
    const { header: { alg, kid }, signature } = decodeOrRefuse(token);
    if (signature === "") throw new Refusal("tokenUnsigned");
    // A key and an algorithm belong together: what verifies HS256 is a secret, and never a public key.
    if (alg === "HS256" && bySecret.length > 0) return checkByAny(token, bySecret);
    const algorithm = publicAlgorithms.find((algorithm) => algorithm === alg);
    if (algorithm === undefined) {
      throw new Refusal("wrongAlgorithm", `the token's algorithm is none of ${algorithms}`);
    }
    if (kid !== undefined && typeof kid !== "string") throw new Refusal("tokenMalformed");
    return checkByAny(token, keys.checksFor(algorithm, kid));
  };
}

function decodeOrRefuse(token: string): Decoded {
  try {
    return decodeToken(token);
  } catch (error) {
    throw refusalFor(error);
  }
}

/** Tries one after the other. */
function checkByAny(token: string, checks: readonly CheckSignature[]): Claims {
  let failure: unknown;
  for (const check of checks) {
    try {
      return check(token);
    } catch (error) {
      failure = error;
      if (!(error instanceof TokenError) || !isOfKey(error)) break;
    }
  }
  throw refusalFor(failure);
}

/** Whether another key might verify the token. A signature of a wrong length is an error of its own. */
const isOfKey = ({ code }: TokenError) => code === "FAST_JWT_INVALID_SIGNATURE" || code === "FAST_JWT_VERIFY_ERROR";

function refusalFor(error: unknown): Refusal {
  if (!(error instanceof TokenError)) throw error;
  if (isOfKey(error)) return new Refusal("wrongSignature");
  switch (error.code) {
    case "FAST_JWT_MISSING_SIGNATURE":
      return new Refusal("tokenUnsigned");
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
