/** The settings that docs/security.md prints for identity providers, with tokens as those document them. */

import assert from "node:assert/strict";
import { createKeyPair, jwks, KeyServer } from "../harness/key_server.ts";
import { type Block, blockOf } from "../harness/pages.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import type { Claims } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { handshakeHeaders } from "../harness/wire.ts";

const uuid = "6f0e2c1a-93a5-4b59-8f2b-0d6f3a0f8a11";
const exp = Math.floor(Date.now() / 1000) + 3600;

const providers: readonly (readonly [block: Block, claims: Claims & { readonly sub: string }])[] = [
  [blockOf("docs/security.md", "TENANT.auth0.com"), {
    ...{ iss: "https://TENANT.auth0.com/", sub: "auth0|64a7f0e1c2d3b4a5968778aa", azp: "client", scope: "openid" },
    aud: ["https://api.example.com", "https://TENANT.auth0.com/userinfo"],
  }],
  [blockOf("docs/security.md", "clerk.example.com"), {
    ...{ iss: "https://clerk.example.com", sub: "user_2abcDEF", azp: "https://app.example.com", sid: "sess_1", v: 2 },
  }],
  [blockOf("docs/security.md", "PROJECT.supabase.co"), {
    ...{ iss: "https://PROJECT.supabase.co/auth/v1", sub: uuid, aud: "authenticated", role: "authenticated" },
    ...{ session_id: uuid.replace("6", "7"), is_anonymous: false },
  }],
  [blockOf("docs/security.md", "keycloak.example.com"), {
    ...{ iss: "https://keycloak.example.com/realms/REALM", sub: uuid, aud: ["wsproxy", "account"], typ: "Bearer" },
    ...{ azp: "app", sid: uuid, scope: "openid" },
  }],
];

for (const [{ text }, claims] of providers) {
  Deno.test(`The settings printed for ${claims["iss"]} take such tokens, for the sessions of their users only`, async () => {
    const printed = Object.fromEntries(text.trim().split("\n").map((line) => line.split(/=(.*)/s).slice(0, 2)));
    assert.match(printed["JWKS_URL"]!, /^https:\/\//);
    const pair = await createKeyPair(printed["JWT_ALGORITHM"]!, "k1");
    const encrypting = await createKeyPair("RS256", "k2");
    const set = JSON.parse(jwks(pair, encrypting));
    Object.assign(set.keys[1], { use: "enc", alg: "RSA-OAEP" });
    await using redis = await RedisServer.start();
    await using server = new KeyServer(JSON.stringify(set));
    await using proxy = await TestProxy.start(redis, { JWT_SECRET: "", ...printed, JWKS_URL: server.url });
    await eventually("ready", async () => (await proxy.request("/ready")).status === 200);
    const tries = async (session: string, other: Claims = {}) => {
      // `undefined` takes the claim of the harness away, which providers do not have.
      const token = await pair.sign("", { session_id: undefined, ...claims, exp, ...other });
      const headers = { ...handshakeHeaders, Authorization: `Bearer ${token}` };
      return (await proxy.request(`/agent/ws/${encodeURIComponent(session)}`, { headers })).status;
    };
    assert.equal(await tries(claims.sub), 101);
    assert.equal(await tries(`${claims.sub}:chat`), 101);
    assert.equal(await tries(`${claims.sub}x`), 403);
    assert.equal(await tries("another:chat"), 403);
    assert.equal(await tries(claims.sub, { iss: `${claims["iss"]}x` }), 403);
    if (claims["aud"] !== undefined) assert.equal(await tries(claims.sub, { aud: "another" }), 403);
  });
}
