/** Tokens of every algorithm, by keys of every kind, as they should not be: jose, another implementation, is the judge. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { constants, createHmac, generateKeyPairSync, type KeyObject, sign as signWith } from "node:crypto";
import fc from "fast-check";
import { createLocalJWKSet, decodeProtectedHeader, errors, type JWK, jwtVerify, type JWTVerifyGetKey } from "jose";
import { Keys, KeySet, type KeySource, keyUrl } from "../../src/http/keys.ts";
import { createVerifier, type TokenRules } from "../../src/http/token.ts";
import { parsePublicKeys, type PublicAlgorithm, publicAlgorithms } from "../../src/public_keys.ts";
import { Refusal } from "../../src/replies.ts";
import { createKeyPair, jwks, KeyServer } from "../harness/key_server.ts";
import { secret } from "../harness/token.ts";

const target = { agentId: "agent", sessionId: "s1" };

/** How signatures are made that fit a kind of key, whatever a header says. */
const signers: Record<string, (input: string, key: KeyObject) => Buffer> = {
  RS256: (input, key) => signWith("sha256", Buffer.from(input), key),
  RS512: (input, key) => signWith("sha512", Buffer.from(input), key),
  PS256: (input, key) =>
    signWith("sha256", Buffer.from(input), { key, padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: 32 }),
  /** The salt has another length than the hash (RFC 7518, section 3.5). */
  PS256salt: (input, key) =>
    signWith("sha256", Buffer.from(input), { key, padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: 20 }),
  ES256: (input, key) => signWith("sha256", Buffer.from(input), { key, dsaEncoding: "ieee-p1363" }),
  ES256der: (input, key) => signWith("sha256", Buffer.from(input), key),
  EdDSA: (input, key) => signWith(null, Buffer.from(input), key),
};

const rsa = (modulusLength: number) => generateKeyPairSync("rsa", { modulusLength });
const curve = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve });
const fitRsa = ["RS256", "RS512", "PS256", "PS256salt"];
const fitEc = ["ES256", "ES256der"];

/** Key pairs, and what signs with them. */
const pairs = [
  { ...rsa(2048), fit: fitRsa },
  { ...rsa(2048), fit: fitRsa },
  { ...rsa(1024), fit: fitRsa },
  { ...curve("P-256"), fit: fitEc },
  { ...curve("P-256"), fit: fitEc },
  { ...curve("P-384"), fit: fitEc },
  { ...generateKeyPairSync("ed25519"), fit: ["EdDSA"] },
  { ...generateKeyPairSync("ed25519"), fit: ["EdDSA"] },
];
const publicTexts = pairs.flatMap(({ publicKey }) => [
  String(publicKey.export({ type: "spki", format: "pem" })),
  JSON.stringify(publicKey.export({ format: "jwk" })),
]);

const kids = ["a", "b"];

/** The first value in most cases, else one of the others. */
const mostly = <T>(usual: T, ...others: T[]): fc.Arbitrary<T> =>
  fc.oneof({ arbitrary: fc.constant(usual), weight: 4 }, { arbitrary: fc.constantFrom(...others), weight: 1 });

const jwk = fc.record({
  pair: fc.constantFrom(...pairs),
  kid: fc.constantFrom(...kids, undefined),
  alg: mostly(undefined, ...publicAlgorithms, "ES384", "HS256"),
  use: mostly(undefined, "sig", "enc"),
  key_ops: mostly<string[] | undefined>(undefined, ["verify"], ["encrypt"], []),
}).map(({ pair, ...rest }) => {
  const given = Object.entries(rest).filter(([, value]) => value !== undefined);
  return { ...pair.publicKey.export({ format: "jwk" }), ...Object.fromEntries(given) } as JWK;
});

const header = fc.record({
  alg: fc.oneof(
    { arbitrary: fc.constantFrom(...publicAlgorithms), weight: 6 },
    fc.constantFrom("HS256", "RS512", "none", "es256", "ES384"),
  ),
  kid: fc.oneof(
    { arbitrary: fc.constantFrom(...kids, undefined), weight: 6 },
    fc.constantFrom<unknown[]>(7, null, "d"),
  ),
  extra: mostly<object>(
    {},
    { jku: "http://127.0.0.1:1/" },
    { x5u: "http://127.0.0.1:1/" },
    { jwk: pairs[3]!.publicKey.export({ format: "jwk" }) },
    { x5c: ["MIIB"] },
    { crit: ["ext"], ext: true },
    { crit: [] },
  ),
}).map(({ alg, kid, extra }) => ({ alg, ...kid === undefined ? {} : { kid }, ...extra }));

/** A token with a header, and a signature by a key that may or may not be what the header says. */
const signed: fc.Arbitrary<string> = fc.record({
  header,
  pair: fc.constantFrom(...pairs),
  fit: fc.nat(3),
  hmac: mostly<string | undefined>(undefined, secret, ...publicTexts),
  follows: mostly(true, false),
}).map(({ header, pair, fit, hmac, follows }) => {
  const input = [header, { session_id: "s1", iat: 1 }].map((part) =>
    Buffer.from(JSON.stringify(part)).toString("base64url")
  ).join(".");
  // Most are signed as the header says, where a key can do that.
  const wanted = pairs.filter((each) => each.fit.includes(header.alg));
  const { privateKey, ...chosen } = follows && wanted.length > 0 ? wanted[fit % wanted.length]! : pair;
  const algorithm = follows && chosen.fit.includes(header.alg) ? header.alg : chosen.fit[fit % chosen.fit.length]!;
  const isHmac = header.alg === "HS256" || (hmac !== undefined && !follows);
  const signature = isHmac
    ? createHmac("sha256", hmac ?? secret).update(input).digest()
    : signers[algorithm]!(input, privateKey);
  return `${input}.${signature.toString("base64url")}`;
});

/** Now and then a character of it is another one. */
const spoilt = fc.oneof(
  { arbitrary: signed, weight: 4 },
  fc.tuple(signed, fc.nat(), fc.constantFrom(..."AZaz09-_.")).map(([token, nat, character]) => {
    const at = nat % token.length;
    return token.slice(0, at) + character + token.slice(at + 1);
  }),
);

/** Whether jose takes a token, by any of the keys that it finds fitting. */
async function joseTakes(token: string, set: { keys: JWK[] }, algorithms: readonly string[]): Promise<boolean> {
  const isGood = (verified: Promise<unknown>) => verified.then(() => true, () => false);
  try {
    if (decodeProtectedHeader(token).alg === "HS256") {
      const key = new TextEncoder().encode(secret);
      return algorithms.includes("HS256") && await isGood(jwtVerify(token, key, { algorithms: ["HS256"] }));
    }
    const options = { algorithms: algorithms.filter((algorithm) => algorithm !== "HS256") };
    const keyOf: JWTVerifyGetKey = createLocalJWKSet(set);
    try {
      await jwtVerify(token, keyOf, options);
      return true;
    } catch (error) {
      if (!(error instanceof errors.JWKSMultipleMatchingKeys)) return false;
      for await (const key of error) if (await isGood(jwtVerify(token, key, options))) return true;
      return false;
    }
  } catch {
    return false;
  }
}

/** What becomes of a token. */
function outcome(rules: TokenRules, token: string): string {
  try {
    createVerifier(rules)(token, target);
    return "taken";
  } catch (error) {
    assert(error instanceof Refusal, String(error));
    return error.refusal;
  }
}

/** A verifier's keys that stay. */
function keysIn(set: KeySet): TokenRules["keys"] {
  return {
    checksFor(algorithm, kid) {
      const checks = set.checksFor(algorithm, kid);
      if (checks.length === 0) throw new Refusal("unknownKey");
      return checks;
    },
  };
}

Deno.test("Whatever key signed a token, whatever its header says and whatever the set holds, it is taken exactly when jose takes it", async () => {
  let taken = 0;
  let confused = 0;
  const property = fc.asyncProperty(
    fc.array(jwk, { minLength: 1, maxLength: 8 }),
    fc.subarray([...publicAlgorithms], { minLength: 2 }),
    fc.boolean(),
    fc.array(spoilt, { minLength: 8, maxLength: 8 }),
    async (keys, algorithms, withSecret, tokens) => {
      let set: KeySet;
      try {
        set = new KeySet(parsePublicKeys(JSON.stringify({ keys }), algorithms).keys);
      } catch {
        return; // no key fits: such a set is kept out
      }
      const rules: TokenRules = {
        secrets: withSecret ? [secret] : [],
        publicAlgorithms: algorithms as PublicAlgorithm[],
        keys: keysIn(set),
      };
      const all = [...withSecret ? ["HS256"] : [], ...algorithms];
      for (const token of tokens) {
        const found = outcome(rules, token);
        // RFC 7515, section 4.1.4: it is a text. jose takes any other as none.
        const isText = isKidText(token);
        const isGood = await joseTakes(token, { keys }, all) && isText;
        assert.equal(found === "taken", isGood, `${found}: ${token} by ${JSON.stringify(keys)} for ${all}`);
        if (isGood) taken++;
        else if (found === "wrongSignature") confused++;
      }
    },
  );
  await fc.assert(property, { numRuns: 250 });
  assert(taken > 50 && confused > 50, `only ${taken} were good, and ${confused} had another key's signature`);
});

/** Whether a token that is looked for among public keys names one by text, or none. */
function isKidText(token: string): boolean {
  try {
    const { kid, alg } = decodeProtectedHeader(token);
    return alg === "HS256" || kid === undefined || typeof kid === "string";
  } catch {
    return true;
  }
}

Deno.test("While sets rotate under load, a token is taken by a key that was in force, and refused for one that was not", async () => {
  const pool = await Promise.all(
    [...publicAlgorithms, "ES256", "EdDSA"].map((alg, i) => createKeyPair(alg, `key${i}`)),
  );
  const tokens = await Promise.all(pool.map((pair) => pair.sign("s1")));
  const step = fc.oneof(
    {
      arbitrary: fc.record({ kind: fc.constant("rotate" as const), kept: fc.subarray(pool, { minLength: 1 }) }),
      weight: 1,
    },
    { arbitrary: fc.record({ kind: fc.constant("token" as const), at: fc.nat(pool.length - 1) }), weight: 6 },
    { arbitrary: fc.constant({ kind: "pause" as const }), weight: 1 },
  );
  let taken = 0;
  let refused = 0;
  const property = fc.asyncProperty(fc.array(step, { minLength: 40, maxLength: 80 }), async (steps) => {
    /** Every set that the server has had; the one that it has; and the one in force, as it was last read. */
    const sets = [pool.slice(0, 1)];
    let answered = 0;
    let inForce = 0;
    await using server = new KeyServer("");
    server.answer = () => {
      answered = sets.length - 1;
      return new Response(jwks(...sets[answered]!));
    };
    const source: KeySource = { ...keyUrl(server.url, 3_600_000), soughtEveryMs: 0 };
    const keys = new Keys(source, publicAlgorithms, { tell() {}, onRead: () => inForce = answered });
    try {
      await keys.available;
      const verify = createVerifier({ secrets: [], publicAlgorithms, keys });
      const tryToken = async (at: number) => {
        await keys.awaits(tokens[at]!);
        const isInForce = sets[inForce]!.includes(pool[at]!);
        try {
          verify(tokens[at]!, target);
          taken++;
          assert(isInForce, "taken by a key that was not in force");
        } catch (error) {
          assert(error instanceof Refusal, String(error));
          refused++;
          assert(!isInForce, `${error.refusal} for a key that was in force`);
        }
      };
      const running: Promise<void>[] = [];
      for (const step of steps) {
        if (step.kind === "rotate") sets.push(step.kept);
        else if (step.kind === "token") running.push(tryToken(step.at));
        else await new Promise((resolve) => setTimeout(resolve));
      }
      await Promise.all(running);
    } finally {
      await keys.close();
    }
  });
  await fc.assert(property, { numRuns: 40 });
  assert(taken > 100 && refused > 100, `${taken} taken, ${refused} refused`);
});
