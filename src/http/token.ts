/**
 * From a token to a verified grant. HS256 only, whatever the token's header says (RFC 8725, section 3.1); no Redis
 * look-up.
 */

import { errors, jwtVerify } from "jose";
import { Refusal } from "../replies.ts";
import type { Grant, Target } from "../session/session.ts";

/** Verifies a token for a target, or throws a {@linkcode Refusal}. */
export type Verify = (token: string, target: Target) => Promise<Grant>;

/** Longest token looked at. Ours take some 200 bytes; checking a signature costs time in proportion to the length. */
const maxTokenChars = 8192;

/**
 * A verifier for tokens signed with any of the secrets, tried in order: the current one first, then, during a
 * rotation, its predecessor.
 */
export async function createVerifier(secrets: readonly string[]): Promise<Verify> {
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
    return { expiresAtMs: claims.exp === undefined ? undefined : claims.exp * 1000 };
  };
}

const verifyOptions = { algorithms: ["HS256"] };

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
  if (error instanceof errors.JWTExpired) return new Refusal("badToken", "the token has expired");
  if (error instanceof errors.JWSSignatureVerificationFailed) {
    return new Refusal("badToken", "the token's signature does not match");
  }
  if (error instanceof errors.JOSEAlgNotAllowed) return new Refusal("badToken", "the token's algorithm is not HS256");
  if (error instanceof errors.JWTClaimValidationFailed) {
    const early = error.claim === "nbf" && error.reason === "check_failed";
    return new Refusal("badToken", early ? "the token is not valid yet" : `the token's ${error.claim} is malformed`);
  }
  if (error instanceof errors.JOSEError) return new Refusal("badToken", "the token is malformed");
  throw error;
}
