/** A token for the peers in bench/peers that have no library for it: HS256, by hand. */

import { Buffer } from "node:buffer";
import { createHmac, timingSafeEqual } from "node:crypto";

/** @param {string} secret @param {string} token @param {string} session */
export function verify(secret, token, session) {
  const [head, body, signature] = token.split(".");
  const expected = createHmac("sha256", secret).update(`${head}.${body}`).digest();
  const { alg } = JSON.parse(Buffer.from(head, "base64url"));
  const claims = JSON.parse(Buffer.from(body, "base64url"));
  const good = alg === "HS256" && timingSafeEqual(expected, Buffer.from(signature, "base64url"));
  if (!good || claims.session_id !== session || claims.exp * 1000 < Date.now()) throw new Error("bad token");
}
