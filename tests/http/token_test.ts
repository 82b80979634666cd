import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHmac } from "node:crypto";
import fc from "fast-check";
import { generateKeyPair, jwtVerify, SignJWT } from "jose";
import { mintToken } from "../../src/cli/token.ts";
import { Refusal, type RefusalName, refusals } from "../../src/replies.ts";
import { Revocations } from "../../src/revocations.ts";
import { findCookie, findToken, protocolsOf } from "../../src/http/handshake.ts";
import { createVerifier, type TokenRules } from "../../src/http/token.ts";
import type { Grant } from "../../src/session/session.ts";
import { type Claims, mint, secret } from "../harness/token.ts";

const target = { agentId: "agent", sessionId: "s1" };
const now = () => Math.floor(Date.now() / 1000);

function verify(token: string, secrets = [secret]): Grant {
  return createVerifier({ secrets })(token, target);
}

function refused(token: string, reason: RegExp, secrets = [secret]): void {
  assert.throws(() => verify(token, secrets), (error) => {
    assert(error instanceof Refusal, String(error));
    assert.equal(error.row.status, 403);
    assert.match(error.message, reason);
    assert(token.length < 10 || !error.message.includes(token), "the token must not be part of the reason");
    return true;
  });
}

const part = (value: unknown) => Buffer.from(JSON.stringify(value)).toString("base64url");

Deno.test("Token with session_id and iat is accepted and never expires", async () => {
  const iat = now();
  assert.deepEqual(verify(await mint("s1", { iat })), { issuedAtSecs: iat, expiresAtMs: undefined, claims: "" });
});

Deno.test("Token with exp says when it expires, in milliseconds", async () => {
  const exp = now() + 60;
  const { expiresAtMs } = verify(await mint("s1", { exp }));
  assert.equal(expiresAtMs, exp * 1000);
});

Deno.test("Token of alg none is refused", () => {
  const unsigned = `${part({ alg: "none" })}.${part({ session_id: "s1", iat: now() })}.`;
  refused(unsigned, /not signed/);
});

Deno.test("Token of HS512 is refused though the secret is right", async () => {
  refused(await mint("s1", {}, secret.repeat(2), { alg: "HS512" }), /not HS256/, [secret.repeat(2)]);
});

Deno.test("Token of RS256 is refused", async () => {
  const { privateKey } = await generateKeyPair("RS256");
  const token = await new SignJWT({ session_id: "s1", iat: now() }).setProtectedHeader({ alg: "RS256" })
    .sign(privateKey);
  refused(token, /not HS256/);
});

Deno.test("Token with an HS256 signature under an RS256 header is refused", async () => {
  const [, payload, signature] = (await mint("s1")).split(".");
  refused(`${part({ alg: "RS256" })}.${payload}.${signature}`, /not HS256/);
});

Deno.test("Token of 100 KB is refused, however well signed", async () => {
  refused(await mint("s1", { filler: "x".repeat(100_000) }), /too long/);
});

Deno.test("Token with a crit header is refused", async () => {
  const key = new TextEncoder().encode(secret);
  const token = await new SignJWT({ session_id: "s1", iat: now() })
    .setProtectedHeader({ alg: "HS256", crit: ["exp"], exp: 1 }).sign(key, { crit: { exp: true } });
  refused(token, /malformed/);
});

for (
  const [what, claims, reason] of [
    ["without session_id", { session_id: undefined }, /not for this session/],
    ["with a numeric session_id", { session_id: 1 }, /not for this session/],
    ["with an array as session_id", { session_id: ["s1"] }, /not for this session/],
    ["for another session", { session_id: "s2" }, /not for this session/],
    ["without iat", { iat: undefined }, /iat/],
    ["with a string iat", { iat: "now" }, /iat/],
    ["with a string exp", { exp: "tomorrow" }, /exp/],
    ["that has expired", { exp: 1 }, /expired/],
    ["that is not valid yet", { nbf: 4_000_000_000 }, /not valid yet/],
    ["with a string nbf", { nbf: "soon" }, /nbf/],
    ["for another agent", { agent_id: "other" }, /not for this agent/],
    ["with a numeric agent_id", { agent_id: 7 }, /not for this agent/],
    ["with null as agent_id", { agent_id: null }, /not for this agent/],
  ] as [string, Claims, RegExp][]
) {
  Deno.test(`Token ${what} is refused`, async () => refused(await mint("s1", claims), reason));
}

Deno.test("Token for this agent, valid since a minute, is accepted", async () => {
  verify(await mint("s1", { agent_id: "agent", nbf: now() - 60 }));
});

for (const token of ["x", "a.b", "a.b.c", "..", "a.b.c.d.e", "ä.ö.ü"]) {
  Deno.test(`Token ${JSON.stringify(token)} is refused as malformed`, () => refused(token, /malformed/));
}

Deno.test("Token signed with a wrong secret, or changed after signing, is refused", async () => {
  refused(await mint("s1", {}, "another secret of 32 bytes or more"), /signature/);
  const [header, , signature] = (await mint("s1")).split(".");
  refused(`${header}.${part({ session_id: "s1", iat: 1 })}.${signature}`, /signature/);
});

Deno.test("Token of the previous secret is accepted during a rotation, and no other", async () => {
  const former = "the former secret, of 32 bytes too";
  verify(await mint("s1", {}, former), [secret, former]);
  verify(await mint("s1", {}, secret), [secret, former]);
  refused(await mint("s1", {}, former), /signature/);
  refused(await mint("s1", {}, "some third secret of 32 bytes, no"), /signature/, [secret, former]);
  refused(await mint("s1", { exp: 1 }, former), /expired/, [secret, former]);
});

for (
  const odd of [
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqh\n-----END PUBLIC KEY-----",
    "-----BEGIN RSA PRIVATE KEY-----0123456789",
    '{"kty":"RSA","n":"0123456789012345678901"}',
    "  ünïcödé, and spaces around the secret  ",
  ]
) {
  Deno.test(`A secret is its bytes, also when it looks like ${JSON.stringify(odd)}`, async () => {
    assert.equal(verify(await mint("s1", { iat: 7 }, odd), [odd]).issuedAtSecs, 7);
    assert.equal(verify(mintToken(odd, { sessionId: "s1", ttlSecs: 60 }), [odd]).expiresAtMs! > Date.now(), true);
    refused(await mint("s1"), /signature/, [odd]);
  });
}

Deno.test("A token is found in the header, then in the subprotocols, then in the query", () => {
  assert.equal(findToken("Bearer one", ["bearer", "two"], new URLSearchParams("token=three")), "one");
  assert.equal(findToken("bearer   one ", [], undefined), "one");
  assert.equal(findToken("Basic abc", ["chat", "bearer", "two", "more"], new URLSearchParams("token=three")), "two");
  assert.equal(findToken(undefined, ["bearer"], new URLSearchParams("token=three")), "three");
  assert.equal(findToken(undefined, [], new URLSearchParams("a=b&token=th%2Eree")), "th.ree");
  assert.equal(findToken(undefined, ["bearer"], undefined), undefined);
  assert.equal(findToken("Bearer ", [], new URLSearchParams("token=")), undefined);
});

Deno.test("A subprotocol list is read with and without spaces", () => {
  assert.deepEqual(protocolsOf("bearer, abc"), ["bearer", "abc"]);
  assert.deepEqual(protocolsOf("bearer,abc ,\tx"), ["bearer", "abc", "x"]);
  assert.deepEqual(protocolsOf(undefined), []);
});

Deno.test("Times are compared as given, to the millisecond, and clocks may differ by the leeway", async () => {
  const strict = createVerifier({ secrets: [secret] });
  const lenient = createVerifier({ secrets: [secret], leewayMs: 5000 });
  const nowSecs = () => Date.now() / 1000;
  // As Python's time.time() gives it: in the second that has begun.
  strict(await mint("s1", { nbf: nowSecs() }), target);
  lenient(await mint("s1", { nbf: nowSecs() + 4 }), target);
  const later = await mint("s1", { nbf: nowSecs() + 60 });
  assert.throws(() => lenient(later, target), /not valid yet/);
  const exp = nowSecs() - 1;
  const justExpired = await mint("s1", { exp });
  assert.throws(() => strict(justExpired, target), /expired/);
  const { expiresAtMs } = lenient(await mint("s1", { exp: exp + 60 }), target);
  assert.equal(expiresAtMs, (exp + 60) * 1000 + 5000);
  lenient(await mint("s1", { exp }), target);
  const longExpired = await mint("s1", { exp: nowSecs() - 6 });
  assert.throws(() => lenient(longExpired, target), /expired/);
});

Deno.test("Whatever a token says and however it is spoilt, it is taken exactly when jose would take it too, in base64url", async () => {
  const key = new TextEncoder().encode(secret);
  const encoded = fc.string({ unit: fc.constantFrom(..."abcXYZ019-_=+/. \n") });
  const anyHeader = fc.record({
    alg: fc.constantFrom("HS256", "HS256", "HS256", "hs256", "HS384", "none", "", 7),
    typ: fc.constantFrom("JWT", "at+jwt", null),
    crit: fc.constantFrom(["exp"], [], ["ext"], "exp"),
    ext: fc.boolean(),
    kid: fc.string(),
  }, { requiredKeys: ["alg"] });
  const header = fc.oneof(anyHeader, fc.constant({ alg: "HS256" }));
  const claims = fc.oneof(
    { arbitrary: fc.dictionary(fc.constantFrom("sub", "aud", "iss", "jti", "admin"), fc.jsonValue()), weight: 5 },
    fc.jsonValue(),
  ).map((value) => isRecord(value) ? { session_id: "s1", iat: 1, ...value } : value);
  const json = fc.oneof({ arbitrary: claims.map((value) => JSON.stringify(value)), weight: 9 }, fc.string());
  const signed = fc.record({
    header: fc.oneof({ arbitrary: header.map((value) => JSON.stringify(value)), weight: 9 }, fc.string()),
    payload: json,
    secret: fc.constantFrom(secret, secret, secret, secret.slice(1)),
    hash: fc.constantFrom("sha256", "sha256", "sha256", "sha384"),
  }).map(({ header, payload, secret, hash }) => {
    const input = [header, payload].map((text) => Buffer.from(text).toString("base64url")).join(".");
    return `${input}.${createHmac(hash, secret).update(input).digest("base64url")}`;
  });
  const spoilt = fc.tuple(signed, fc.nat(), fc.nat(3), encoded).map(([token, at, length, text]) =>
    token.slice(0, at % token.length) + text + token.slice(at % token.length + length)
  );
  // Perhaps other spellings of the same signature: the last character has two bits that mean nothing.
  const respelled = fc.tuple(signed, fc.constantFrom(..."= \n+-BC"), fc.boolean()).map(
    ([token, text, replaces]) => token.slice(0, replaces ? -1 : token.length) + text,
  );
  let taken = 0;
  let tolerated = 0;
  const check = async (token: string) => {
    const isGood = await jwtVerify(token, key, { algorithms: ["HS256"] }).then(() => true, () => false);
    if (!isGood) return refused(token, /^the token/);
    if (!/\.[\w-]+$/.test(token)) {
      // jose tolerates spaces and padding, for which RFC 7515, section 2, has no room.
      tolerated++;
      return refused(token, /signature/);
    }
    taken++;
    assert.deepEqual(verify(token), { issuedAtSecs: 1, expiresAtMs: undefined, claims: "" });
  };
  await fc.assert(fc.asyncProperty(fc.oneof(signed, spoilt, respelled), check), { numRuns: 3000 });
  assert(taken > 30 && tolerated > 10, `only ${taken} were good, and ${tolerated} nearly`);
});

const isRecord = (value: unknown): value is object =>
  typeof value === "object" && value !== null && !Array.isArray(value);

Deno.test("What a token is refused for has a code of its own, and the text of its row", async () => {
  const revocations = new Revocations();
  revocations.hear("agent", now() - 1000);
  const verifyRevocable = createVerifier({ secrets: [secret], revocations });
  const unsigned = `${part({ alg: "none" })}.${part({ session_id: "s1", iat: now() })}.`;
  const tokens: Partial<Record<RefusalName, string>> = {
    tokenTooLong: "x".repeat(8193),
    tokenMalformed: "x.y.z",
    tokenUnsigned: unsigned,
    wrongAlgorithm: await mint("s1", {}, secret, { alg: "HS512" }),
    wrongSignature: await mint("s1", {}, `${secret}!`),
    wrongSession: await mint("s2"),
    wrongAgent: await mint("s1", { agent_id: "other" }),
    tokenRevoked: await mint("s1", { iat: now() - 2000 }),
    tokenNotYetValid: await mint("s1", { nbf: now() + 60 }),
    tokenExpired: await mint("s1", { exp: now() - 60 }),
  };
  for (const [name, token] of Object.entries(tokens)) {
    assert.throws(() => verifyRevocable(token, target), (error) => {
      assert(error instanceof Refusal);
      assert.deepEqual([error.refusal, error.message], [name, refusals[name as RefusalName].reason]);
      return true;
    });
  }
});

/** Whether a token with these claims, and no `session_id`, is taken for a session. */
async function allows(rules: Partial<TokenRules>, claims: Claims, sessionId: string): Promise<boolean> {
  const token = await mint("s1", { session_id: undefined, ...claims });
  try {
    createVerifier({ secrets: [secret], ...rules })(token, { agentId: "agent", sessionId });
    return true;
  } catch (error) {
    assert(error instanceof Refusal && error.refusal === "wrongSession", String(error));
    return false;
  }
}

Deno.test("JWT_SESSION_CLAIM names the claim that must equal the session, or have it in a list", async () => {
  const rules = { sessionClaim: "https://app.example/sessions" };
  const claim = (value: unknown) => ({ [rules.sessionClaim]: value });
  for (const value of ["s1", ["s1"], ["s0", "s1"]]) {
    assert(await allows(rules, claim(value), "s1"), JSON.stringify(value));
  }
  for (const value of ["s2", [], ["s2"], ["s1", 7], [["s1"]], { 0: "s1" }, null, 7, true, "", undefined]) {
    assert(!await allows(rules, claim(value), "s1"), JSON.stringify(value));
  }
  assert(!await allows(rules, { session_id: "s1" }, "s1"));
  for (const sessionClaim of ["constructor", "__proto__", "toString"]) {
    assert(!await allows({ sessionClaim, sessionMatch: "prefix" }, {}, "s1"), sessionClaim);
  }
  // By default no list counts, as ever.
  assert(!await allows({}, { session_id: ["s1"] }, "s1"));
});

Deno.test("With JWT_SESSION_MATCH=prefix a session is the claim's value, or goes on with . or :", async () => {
  const rules = { sessionClaim: "sub", sessionMatch: "prefix" } as const;
  for (const id of ["auth0|7", "auth0|7:", "auth0|7:chat", "auth0|7.chat:1"]) {
    assert(await allows(rules, { sub: "auth0|7" }, id), id);
    assert(await allows(rules, { sub: ["x", "auth0|7"] }, id), id);
  }
  for (const id of ["auth0|77", "auth0|7 :", "auth0|7/", "auth0|", "a", ":auth0|7", "AUTH0|7", "auth0|7\u2024"]) {
    assert(!await allows(rules, { sub: "auth0|7" }, id), id);
  }
  for (const sub of ["", [], [""]]) {
    for (const id of [":a", ".a", "a"]) assert(!await allows(rules, { sub }, id), id);
  }
  assert(await allows({ sessionMatch: "prefix" }, { session_id: ["s1"] }, "s1.a"));
});

Deno.test("JWT_ISSUER and JWT_AUDIENCE are what iss and aud must have, and are looked at when they are set", async () => {
  const rules = { secrets: [secret], issuer: "https://issuer.example/", audiences: ["a", "b"] };
  const verify = createVerifier(rules);
  const good = { iss: rules.issuer, aud: ["c", "b"] };
  const outcome = async (claims: Claims) => {
    const token = await mint("s1", { ...good, ...claims });
    try {
      verify(token, target);
      return "taken";
    } catch (error) {
      assert(error instanceof Refusal, String(error));
      return error.refusal;
    }
  };
  assert.equal(await outcome({}), "taken");
  assert.equal(await outcome({ aud: "a" }), "taken");
  for (const iss of [undefined, "https://issuer.example", [rules.issuer], null]) {
    assert.equal(await outcome({ iss }), "wrongIssuer", String(iss));
  }
  for (const aud of [undefined, "", "c", [], ["c"], [["a"]], null, { a: 1 }, "a,b"]) {
    assert.equal(await outcome({ aud }), "wrongAudience", JSON.stringify(aud));
  }
  createVerifier({ secrets: [secret] })(await mint("s1", { iss: 7, aud: {} }), target);
});

Deno.test("A cookie is found by its name, once", () => {
  assert.equal(findCookie("token=a.b.c", "token"), "a.b.c");
  assert.equal(findCookie("x=token=1; token = a.b.c ;y", "token"), "a.b.c");
  for (const none of [undefined, "", "token", "token=", "Token=a", "xtoken=a", "x=1"]) {
    assert.equal(findCookie(none, "token"), undefined, String(none));
  }
  assert.throws(() => findCookie("token=a; token=a", "token"), /must be sent once/);
});
