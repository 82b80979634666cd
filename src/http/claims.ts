/** What backends read of a client's token: the claims that `INBOX_CLAIMS` names, as one JSON object. */

import { Buffer } from "node:buffer";

/** What a token claims, by name; not what types that has. */
export type Claims = Readonly<Record<string, unknown>>;

/** Longest text of the claims, in bytes: each open connection keeps its own. */
const maxBytes = 1024;

/**
 * Makes that text: JSON, with the claims that a token has, in the order of `names`; empty when it has none of them. One
 * that does not fit any more is `null`.
 */
export function createClaimsText(names: readonly string[]): (claims: Claims) => string {
  const wanted = names.map((name) => ({ name, key: `${JSON.stringify(name)}:` }));
  return (claims) => {
    let text = "";
    // The brace at the end.
    let bytes = 1;
    for (const { name, key } of wanted) {
      if (!Object.hasOwn(claims, name)) continue;
      let value = JSON.stringify(claims[name]);
      const sizeWith = (value: string) => bytes + 1 + key.length + Buffer.byteLength(value);
      if (sizeWith(value) > maxBytes) value = "null";
      bytes = sizeWith(value);
      text += (text === "" ? "{" : ",") + key + value;
    }
    return text && `${text}}`;
  };
}
