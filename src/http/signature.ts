/** Signatures of tokens, as fast-jwt checks them: one algorithm and one key at a time, whatever a token's header says. */

import { createDecoder, createVerifier, type VerifierOptions } from "fast-jwt";
import type { PublicAlgorithm } from "../public_keys.ts";
import type { Claims } from "./claims.ts";

/** Longest token looked at. Ours take some 200 bytes; checking a signature costs time in proportion to the length. */
export const maxTokenChars = 8192;

/** The claims of a token whose signature is good. @throws {TokenError} of fast-jwt for any other. */
export type CheckSignature = (token: string) => Claims;

/** Times are checked with the other claims, to the millisecond and with one leeway for all. */
const verifyOptions: Partial<VerifierOptions> = { ignoreExpiration: true, ignoreNotBefore: true };

/** Checks the signatures of one algorithm and one key: a secret for HS256, else a public key as PEM. */
export const signatureCheck = (algorithm: "HS256" | PublicAlgorithm, key: string): CheckSignature =>
  createVerifier({ key, algorithms: [algorithm], ...verifyOptions });

const decode = createDecoder({ complete: true });

/** A token's parts. */
export interface Decoded {
  readonly header: Claims;
  readonly payload: Claims;
  readonly signature: string;
}

/** A token's parts, of which nothing has been verified. @throws {TokenError} of fast-jwt when it is no JWT. */
export const decodeToken = (token: string): Decoded => decode(token);
