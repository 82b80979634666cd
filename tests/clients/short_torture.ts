/** A few seconds of the torture of clients, as a test. */

import assert from "node:assert/strict";
import type { Program } from "../harness/balancer.ts";
import { engines } from "../harness/proxy.ts";
import { type Runtime, runtimesHere } from "../harness/runtimes.ts";
import { type ClientTortureOptions, tortureClients } from "./torture.ts";

/** Tests clients of some runtimes on either engine; whichever the seed chooses. */
export function testTorture(
  name: string,
  { ignore = false, ...options }: Partial<ClientTortureOptions> & { readonly ignore?: boolean },
  runtimes: () => Promise<readonly Runtime[]> = () => Promise.resolve([]),
): void {
  Deno.test(name, { ignore }, async () => {
    const seed = Date.now() % 1e9;
    const engine = engines[seed % engines.length]!;
    const { sessions = 4 } = options;
    const common = { seconds: 4, seed, engine, runtimes: await runtimes(), sessions };
    const reports = await tortureClients({ ...common, ...options });
    const told = `seed ${seed}: ${JSON.stringify(reports)}`;
    for (const { received, connects } of Object.values(reports)) assert(received > 100 && connects > 0, told);
    assert(Object.values(reports).some(({ acknowledged }) => acknowledged > 0), told);
  });
}

/** The clients of this machine's Deno and Node behind a balancer. */
export function testTortureBehind(balancer: Program): void {
  testTorture(
    `Clients behind deploy/${balancer.file} lose nothing untold, and are live again, while it and its servers are harmed`,
    { balancer, sessions: 2 },
    runtimesHere,
  );
}
