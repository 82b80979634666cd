/**
 * Public keys that verify tokens, as a file or an identity provider gives them: PEM blocks, or a JWK Set (RFC 7517).
 * A key is taken for the algorithms that fit its kind and that it says it is for, and for no other.
 */

import { createPublicKey, type KeyObject } from "node:crypto";
import { type Block, parseBlocks } from "./pem.ts";

/** Algorithms whose signatures a public key verifies (RFC 7518, section 3.1; RFC 8037, section 3.1). */
export const publicAlgorithms = ["RS256", "PS256", "ES256", "EdDSA"] as const;

/** One of them. */
export type PublicAlgorithm = typeof publicAlgorithms[number];

/** A key that can be used. */
export interface PublicKey {
  /** Its name in a JWK Set, which the header of a token repeats; undefined where it has none. */
  readonly kid: string | undefined;
  /** It is for tokens that name another key, too: PEM has no place for a name. */
  readonly anyKid: boolean;
  /** What it may verify, at least one. */
  readonly algorithms: readonly PublicAlgorithm[];
  /** The key as SubjectPublicKeyInfo. */
  readonly pem: string;
}

/** What a text holds. */
export interface PublicKeys {
  /** Those that can be used, at least one. */
  readonly keys: readonly PublicKey[];
  /** Those that cannot, each with the reason, as sentences. */
  readonly skipped: readonly string[];
}

/** Largest text that is looked at, in bytes: sets with certificates in them have some 20 KB. */
export const maxKeysBytes = 262_144;
/** Keys of a set that can be used: a token that names none of them is tried with all that fit. */
const maxKeys = 32;
/** Keys that are looked at. */
const maxListed = 256;
/** RFC 7518, sections 3.3 and 3.5; and the largest that Deno reads, which bounds what a signature may cost. */
const minRsaBits = 2048;
const maxRsaBits = 4096;

/** Why a key cannot be used, after "key N". */
class Unusable extends Error {}

/**
 * The keys in a text that fit any of `algorithms`.
 * @throws {Error} whose message begins with "must" and holds nothing of a key, when none fits, when one is private, or
 * when the text is neither PEM nor a JWK Set.
 */
export function parsePublicKeys(text: string, algorithms: readonly PublicAlgorithm[]): PublicKeys {
  if (text.length > maxKeysBytes) throw new Error(`must be at most ${maxKeysBytes} bytes long`);
  const listed = text.trimStart().startsWith("{") ? listJwks(text) : listPem(text);
  const keys: PublicKey[] = [];
  const skipped: string[] = [];
  for (const [i, { name, read }] of listed.entries()) {
    try {
      const key = read();
      const fitting = key.algorithms.filter((algorithm) => algorithms.includes(algorithm));
      if (fitting.length === 0) throw new Unusable(`is for ${key.algorithms.join(" and ")}`);
      keys.push({ ...key, algorithms: fitting });
    } catch (error) {
      if (!(error instanceof Unusable)) throw error;
      skipped.push(`key ${i + 1}${name} ${error.message}`);
    }
  }
  if (keys.length === 0) {
    const why = skipped.length === 0 ? "it holds none" : skipped.slice(0, 8).join("; ");
    throw new Error(`must hold a public key for ${algorithms.join(", ")}: ${why}`);
  }
  if (keys.length > maxKeys) throw new Error(`must hold at most ${maxKeys} keys that can be used`);
  return { keys, skipped };
}

/** A key of a text: how it is named to people, and what it is. */
interface Listed {
  readonly name: string;
  /** @throws {Unusable} when no token can be verified with it. */
  readonly read: () => PublicKey;
}

function listPem(text: string): Listed[] {
  const blocks = parseBlocks(text);
  if (typeof blocks === "string") throw new Error(blocks);
  if (blocks.length === 0) throw new Error("must hold public keys, as PEM or as a JWK Set");
  return checkCount(blocks).map((block) => ({ name: ` (line ${block.line})`, read: () => readBlock(block) }));
}

function readBlock({ label, text, line }: Block): PublicKey {
  if (label.endsWith("PRIVATE KEY")) {
    throw new Error(`must hold public keys: the block that begins in line ${line} is a private one`);
  }
  if (label === "CERTIFICATE") {
    // It has dates and an issuer, which would have to be looked at.
    throw new Unusable('is a certificate: "openssl x509 -pubkey -noout -in FILE" prints its public key');
  }
  if (label !== "PUBLIC KEY" && label !== "RSA PUBLIC KEY") throw new Unusable(`is a ${label}`);
  return { kid: undefined, anyKid: true, ...read(() => createPublicKey(text)) };
}

/** A member of a JWK Set, before any of it is looked at. */
type Jwk = Readonly<Record<string, unknown>>;

function listJwks(text: string): Listed[] {
  let set: { readonly keys?: unknown };
  try {
    set = JSON.parse(text);
  } catch {
    throw new Error("must be a JWK Set, and is not JSON");
  }
  const { keys } = set;
  if (!Array.isArray(keys)) throw new Error('must be a JWK Set: an object with a list "keys"');
  return checkCount<unknown>(keys).map((jwk, i) => {
    if (typeof jwk !== "object" || jwk === null) return { name: "", read: () => unusable("is no object") };
    const { kid } = jwk as Jwk;
    const name = typeof kid === "string" ? ` (kid ${JSON.stringify(kid.slice(0, 64))})` : "";
    return { name, read: () => readJwk(jwk as Jwk, i + 1) };
  });
}

function readJwk(jwk: Jwk, at: number): PublicKey {
  const { kty, kid, use, key_ops, alg } = jwk;
  if (kty === "oct") unusable("is a secret, which belongs into JWT_SECRET");
  if (jwk["d"] !== undefined) throw new Error(`must hold public keys: key ${at} is a private one`);
  if (kid !== undefined && typeof kid !== "string") unusable("has a kid that is no text");
  if (use !== undefined && use !== "sig") unusable("is not for signatures (use)");
  if (key_ops !== undefined && !(Array.isArray(key_ops) && key_ops.includes("verify"))) {
    unusable("is not for verifying (key_ops)");
  }
  const key = read(() => createPublicKey({ key: jwk, format: "jwk" }));
  if (alg === undefined) return { kid, anyKid: false, ...key };
  const algorithms = key.algorithms.filter((algorithm) => algorithm === alg);
  if (algorithms.length === 0) {
    unusable(
      `is for another algorithm (alg ${
        typeof alg === "string" ? JSON.stringify(alg.slice(0, 16)) : `of type ${typeof alg}`
      })`,
    );
  }
  return { kid, anyKid: false, ...key, algorithms };
}

function read(create: () => KeyObject): Pick<PublicKey, "algorithms" | "pem"> {
  let key: KeyObject;
  let pem: string;
  try {
    key = create();
    pem = key.export({ type: "spki", format: "pem" }) as string;
  } catch {
    return unusable(`is damaged, or of a kind that is not supported, such as RSA of more than ${maxRsaBits} bits`);
  }
  return { algorithms: algorithmsOf(key), pem };
}

/** The algorithms that a kind of key fits. @throws {Unusable} when there is none. */
function algorithmsOf({ asymmetricKeyType, asymmetricKeyDetails = {} }: KeyObject): readonly PublicAlgorithm[] {
  switch (asymmetricKeyType) {
    case "rsa": {
      const { modulusLength = 0 } = asymmetricKeyDetails;
      if (modulusLength >= minRsaBits && modulusLength <= maxRsaBits) return ["RS256", "PS256"];
      return unusable(`has ${modulusLength} bits, and RSA keys must have ${minRsaBits} to ${maxRsaBits}`);
    }
    case "ec":
      if (asymmetricKeyDetails.namedCurve === "prime256v1") return ["ES256"];
      return unusable(`is on another curve than P-256 (${asymmetricKeyDetails.namedCurve})`);
    case "ed25519":
      return ["EdDSA"];
    default:
      return unusable(`is of a kind that is not supported (${asymmetricKeyType})`);
  }
}

function checkCount<T>(listed: readonly T[]): readonly T[] {
  if (listed.length > maxListed) throw new Error(`must hold at most ${maxListed} keys`);
  return listed;
}

function unusable(reason: string): never {
  throw new Unusable(reason);
}
