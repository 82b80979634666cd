/**
 * From a token to a verified grant. HS256 only, whatever the token's header says (RFC 8725, section 3.1); no Redis
 * look-up.
 */

import { errors, jwtVerify } from "jose";
import { Refusal } from "../replies.ts";
import type { Revocations } from "../revocations.ts";
import type { Grant, Target } from "../session/session.ts";

/** Verifies a token for a target, or throws a {@linkcode Refusal}. */
export type Verify = (token: string, target: Target) => Promise<Grant>;

/** Longest token looked at. Ours take some 200 bytes; checking a signature costs time in proportion to the length. */
const maxTokenChars = 8192;

/**
 * A verifier for tokens signed with any of the secrets, tried in order: the current one first, then, during a
 * rotation, its predecessor. `leewayMs` is how far clocks may differ: a token is taken so long before its `nbf`, and
 * granted until so long after its `exp`.
 */
export async function createVerifier(
  secrets: readonly string[],
  leewayMs = 0,
  revocations?: Revocations,
): Promise<Verify> {
  const keys = await Promise.all(secrets.map((secret) =>
    crypto.subtle.importKey(
      "raw",
      new TextEncoder().encode(secret),
      { name: "HMAC", hash: "SHA-256" },
      false,
      ["verify"],
    )
  ));
  return async (token, target) => {
    if (token.length > maxTokenChars) throw new Refusal("badToken", "the token is too long");
    const claims = await verifySignature(token, keys);
    if (typeof claims.session_id !== "string" || claims.session_id !== target.sessionId) {
      throw new Refusal("badToken", "the token is not for this session");
    }
    if (typeof claims.iat !== "number") throw new Refusal("badToken", "the token's iat must be a number");
    if (claims.agent_id !== undefined && claims.agent_id !== target.agentId) {
      throw new Refusal("badToken", "the token is not for this agent");
    }
    const issuedAtSecs = claims.iat;
    if (revocations?.covers(target.agentId, issuedAtSecs)) throw new Refusal("badToken", "the token has been revoked");
    const nowMs = Date.now();
    if (claims.nbf !== undefined && claims.nbf * 1000 > nowMs + leewayMs) {
      throw new Refusal("badToken", "the token is not valid yet");
    }
    if (claims.exp === undefined) return { issuedAtSecs, expiresAtMs: undefined };
    const expiresAtMs = claims.exp * 1000 + leewayMs;
    if (expiresAtMs <= nowMs) throw new Refusal("badToken", "the token has expired");
    return { issuedAtSecs, expiresAtMs };
  };
}

/** Times are compared above, as they are given: jose floors the present to a second. Their types are checked here. */
const verifyOptions = { algorithms: ["HS256"], clockTolerance: Number.MAX_SAFE_INTEGER };

async function verifySignature(token: string, keys: readonly CryptoKey[]) {
  let failure: unknown;
  for (const key of keys) {
    try {
      return (await jwtVerify(token, key, verifyOptions)).payload;
    } catch (error) {
      failure = error;
      if (!(error instanceof errors.JWSSignatureVerificationFailed)) break;
    }
  }
  throw refusalFor(failure);
}

function refusalFor(error: unknown): Refusal {
  if (error instanceof errors.JWSSignatureVerificationFailed) {
    return new Refusal("badToken", "the token's signature does not match");
  }
  if (error instanceof errors.JOSEAlgNotAllowed) return new Refusal("badToken", "the token's algorithm is not HS256");
  if (error instanceof errors.JWTClaimValidationFailed) {
    return new Refusal("badToken", `the token's ${error.claim} is malformed`);
  }
  if (error instanceof errors.JOSEError) return new Refusal("badToken", "the token is malformed");
  throw error;
}
