/** What a file or an identity provider may give as keys. */

import { Buffer } from "node:buffer";
import assert from "node:assert/strict";
import { generateKeyPairSync, type KeyObject } from "node:crypto";
import type { JWK } from "jose";
import { parsePublicKeys, type PublicAlgorithm, publicAlgorithms } from "../src/public_keys.ts";
import { createKeyPair } from "./harness/key_server.ts";

const pairs = {
  RS256: await createKeyPair("RS256", "rsa"),
  PS256: await createKeyPair("PS256", "pss"),
  ES256: await createKeyPair("ES256", "ec"),
  EdDSA: await createKeyPair("EdDSA", "ed"),
};
const all = Object.values(pairs);

const parse = (text: string, algorithms: readonly PublicAlgorithm[] = publicAlgorithms) =>
  parsePublicKeys(text, algorithms);
const set = (...keys: readonly unknown[]) => JSON.stringify({ keys });
const fitting = (text: string, algorithms?: readonly PublicAlgorithm[]) =>
  parse(text, algorithms).keys.map(({ kid, algorithms }) => [kid, ...algorithms]);

/** What of a JWK keeps it from being used. */
function skippedAs(jwk: object): string {
  const { keys, skipped } = parse(set(pairs.ES256.jwk, jwk));
  assert.equal(keys.length, 1);
  assert.equal(skipped.length, 1);
  return skipped[0]!;
}

const { privateKey: _, publicKey: p384 } = generateKeyPairSync("ec", { namedCurve: "P-384" });
const rsaOf = (modulusLength: number) => generateKeyPairSync("rsa", { modulusLength }).publicKey;
const jwkOf = (key: KeyObject) => key.export({ format: "jwk" });
const pemOf = (key: KeyObject) => String(key.export({ type: "spki", format: "pem" }));

Deno.test("A JWK is for its own algorithm, and one that names none is for all that its kind fits", () => {
  assert.deepEqual(fitting(set(...all.map(({ jwk }) => jwk))), all.map(({ alg, kid }) => [kid, alg]));
  const { alg: _, ...anyRsa } = pairs.RS256.jwk;
  assert.deepEqual(fitting(set(anyRsa)), [["rsa", "RS256", "PS256"]]);
  assert.deepEqual(fitting(set(anyRsa), ["PS256"]), [["rsa", "PS256"]]);
  const bare: JWK[] = all.map(({ jwk: { alg: _, use: __, kid: ___, ...jwk } }) => jwk);
  assert.deepEqual(fitting(set(...bare)).map(([kid]) => kid), [undefined, undefined, undefined, undefined]);
});

Deno.test("PEM blocks are keys without a name, for all that their kind fits", () => {
  const text = all.map(({ alg, pem }) => `a comment: ${alg}\n${pem}`).join("\n");
  assert.deepEqual(fitting(text).map(([, ...algorithms]) => algorithms), [
    ["RS256", "PS256"],
    ["RS256", "PS256"],
    ["ES256"],
    ["EdDSA"],
  ]);
  assert(parse(text).keys.every(({ anyKid }) => anyKid));
  const pkcs1 = String(rsaOf(2048).export({ type: "pkcs1", format: "pem" }));
  assert.match(pkcs1, /BEGIN RSA PUBLIC KEY/);
  assert.deepEqual(fitting(pkcs1, ["PS256"]), [[undefined, "PS256"]]);
});

const modulusOf = (bits: number) => Buffer.alloc(bits / 8, 0xff).toString("base64url");

Deno.test("A key of another use, kind, curve, length or algorithm is left out, and the others are taken", () => {
  const { jwk } = pairs.RS256;
  const told = {
    use: skippedAs({ ...jwk, use: "enc" }),
    ops: skippedAs({ ...jwk, key_ops: ["encrypt"] }),
    alg: skippedAs({ ...jwk, alg: "RS512" }),
    foreignAlg: skippedAs({ ...jwk, alg: "ES256" }),
    oddAlg: skippedAs({ ...jwk, alg: { toString: 7 } }),
    kid: skippedAs({ ...jwk, kid: 7 }),
    curve: skippedAs(jwkOf(p384)),
    short: skippedAs(jwkOf(rsaOf(1024))),
    secret: skippedAs({ kty: "oct", k: "c2VjcmV0" }),
    x25519: skippedAs(jwkOf(generateKeyPairSync("x25519").publicKey)),
    damaged: skippedAs({ ...pairs.ES256.jwk, y: pairs.ES256.jwk.x }),
    exponent: skippedAs({ ...jwk, e: "AQ" }),
    long: skippedAs({ ...jwk, n: modulusOf(4104) }),
    nothing: skippedAs({}),
  };
  assert.deepEqual(told, {
    use: 'key 2 (kid "rsa") is not for signatures (use)',
    ops: 'key 2 (kid "rsa") is not for verifying (key_ops)',
    alg: 'key 2 (kid "rsa") is for another algorithm (alg "RS512")',
    foreignAlg: 'key 2 (kid "rsa") is for another algorithm (alg "ES256")',
    oddAlg: 'key 2 (kid "rsa") is for another algorithm (alg of type object)',
    kid: "key 2 has a kid that is no text",
    curve: "key 2 is on another curve than P-256 (secp384r1)",
    short: "key 2 has 1024 bits, and RSA keys must have 2048 to 4096",
    secret: "key 2 is a secret, which belongs into JWT_SECRET",
    x25519: "key 2 is of a kind that is not supported (x25519)",
    damaged: 'key 2 (kid "ec") is damaged, or of a kind that is not supported, such as RSA of more than 4096 bits',
    exponent: 'key 2 (kid "rsa") is damaged, or of a kind that is not supported, such as RSA of more than 4096 bits',
    long: 'key 2 (kid "rsa") is damaged, or of a kind that is not supported, such as RSA of more than 4096 bits',
    nothing: "key 2 is damaged, or of a kind that is not supported, such as RSA of more than 4096 bits",
  });
  assert.deepEqual(fitting(set({ ...jwk, alg: undefined, n: modulusOf(4096) })), [["rsa", "RS256", "PS256"]]);
  assert.deepEqual(fitting(set({ ...jwk, key_ops: ["verify"] }, null, "x", 7)), [["rsa", "RS256"]]);
  assert.deepEqual(parse(pairs.ES256.pem + pairs.RS256.pem, ["RS256"]).skipped, ["key 1 (line 1) is for ES256"]);
});

for (
  const [what, text, reason] of [
    ["Nothing", "", /^must hold public keys, as PEM or as a JWK Set$/],
    ["What is not JSON", "{", /^must be a JWK Set, and is not JSON$/],
    ["One JWK", JSON.stringify(pairs.RS256.jwk), /^must be a JWK Set: an object with a list "keys"$/],
    ["An empty set", set(), /^must hold a public key for RS256, PS256, ES256, EdDSA: it holds none$/],
    ["A set for other algorithms", set(jwkOf(p384)), /^must hold a public key .*: key 1 is on another curve/],
    ["A private JWK", set({ ...pairs.RS256.jwk, d: "AQAB" }), /^must hold public keys: key 1 is a private one$/],
    ["A private key", pemOf(p384).replaceAll("PUBLIC", "PRIVATE"), /the block that begins in line 1 is a private one$/],
    ["A cut file", pairs.RS256.pem.slice(0, 100), /^must hold whole PEM blocks/],
    ["A damaged file", pairs.RS256.pem.replace("MII", "MIJ"), /key 1 \(line 1\) is damaged/],
    ["A certificate", pairs.RS256.pem.replaceAll("PUBLIC KEY", "CERTIFICATE"), /is a certificate: "openssl x509/],
    ["Too many keys", pairs.ES256.pem.repeat(33), /^must hold at most 32 keys that can be used$/],
    ["Very many keys", set(...Array(257).fill({})), /^must hold at most 256 keys$/],
    ["A large text", " ".repeat(262_145), /^must be at most 262144 bytes long$/],
  ] as const
) {
  Deno.test(`${what} is refused as keys`, () => assert.throws(() => parse(text), { message: reason }));
}
