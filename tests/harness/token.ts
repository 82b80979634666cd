/** Tokens. */

import { SignJWT } from "jose";

/** The secret of every proxy here, unless a test sets another. */
export const secret = "a-secret-of-the-tests-32-bytes-long!";

/** Claims to sign; `iat` is now unless given. */
export type Claims = Record<string, unknown>;

/** A token for a session, signed with HS256. */
export function mint(sessionId: string, claims: Claims = {}, key = secret, header: object = {}): Promise<string> {
  return new SignJWT({ session_id: sessionId, iat: Math.floor(Date.now() / 1000), ...claims })
    .setProtectedHeader({ alg: "HS256", ...header })
    .sign(new TextEncoder().encode(key));
}
