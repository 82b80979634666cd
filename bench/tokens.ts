/**
 * What verifying a token costs, for each algorithm: `deno task bench:tokens`. The proxy's own verifier, and jose, which
 * has signatures checked in another thread. CPU of the whole process, so that the other thread's share counts; rounds
 * of all alternate, and each figure is the median, as other programs may use the machine.
 */

import process from "node:process";
import { exportSPKI, generateKeyPair, jwtVerify, SignJWT } from "jose";
import { KeySet } from "../src/http/keys.ts";
import { createVerifier, type Verify } from "../src/http/token.ts";
import { parsePublicKeys, publicAlgorithms } from "../src/public_keys.ts";
import { renderTable } from "../scripts/docs.ts";

const rounds = 15;
const tokensPerRound = 200;
const target = { agentId: "agent", sessionId: "s-1" };
const claims = {
  session_id: "s-1",
  iat: 1,
  exp: 4_000_000_000,
  sub: "auth0|0123456789",
  iss: "https://issuer.example/",
};

/** What is measured of an algorithm. */
interface Subject {
  readonly alg: string;
  readonly verify: () => unknown;
  readonly jose: () => Promise<unknown>;
  /** CPU for one token, in us, by round. */
  readonly us: { readonly verify: number[]; readonly jose: number[] };
}

function subject(alg: string, token: string, verify: Verify, key: Parameters<typeof jwtVerify>[1]): Subject {
  return {
    alg,
    verify: () => verify(token, target),
    jose: () => jwtVerify(token, key as CryptoKey, { algorithms: [alg] }),
    us: { verify: [], jose: [] },
  };
}

async function subjects(): Promise<Subject[]> {
  const secret = new TextEncoder().encode("s".repeat(32));
  const signed = (alg: string) => new SignJWT(claims).setProtectedHeader({ alg, kid: alg });
  const found = [
    subject(
      "HS256",
      await signed("HS256").sign(secret),
      createVerifier({ secrets: ["s".repeat(32)] }),
      secret as never,
    ),
  ];
  for (const alg of publicAlgorithms) {
    const { publicKey, privateKey } = await generateKeyPair(alg, { extractable: true });
    const { keys } = parsePublicKeys(`${await exportSPKI(publicKey)}\n`, [alg]);
    const verify = createVerifier({ secrets: [], publicAlgorithms: [alg], keys: new KeySet(keys) });
    found.push(subject(alg, await signed(alg).sign(privateKey), verify, publicKey as never));
  }
  return found;
}

async function cpuUs(run: () => unknown): Promise<number> {
  const before = process.cpuUsage();
  for (let n = 0; n < tokensPerRound; n++) await run();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / tokensPerRound;
}

const all = await subjects();
for (let round = -1; round < rounds; round++) {
  for (const { verify, jose, us } of all) {
    const measured = [await cpuUs(verify), await cpuUs(jose)] as const;
    // The first one warms up.
    if (round < 0) continue;
    us.verify.push(measured[0]);
    us.jose.push(measured[1]);
  }
}
const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1]!;
const reference = median(all[0]!.us.verify);
console.log(renderTable(
  ["algorithm", "CPU for a token", "to HS256", "with jose"],
  all.map(({ alg, us }) => [
    alg,
    `${median(us.verify).toFixed(0)} us`,
    (median(us.verify) / reference).toFixed(1),
    `${median(us.jose).toFixed(0)} us`,
  ]),
));
