import assert from "node:assert/strict";
import { engines } from "../harness/proxy.ts";
import { runtimesHere } from "../harness/runtimes.ts";
import { tortureClients } from "./torture.ts";

Deno.test("Clients lose nothing untold, and are live again, while relays and a proxy are harmed", async () => {
  const seed = Date.now() % 1e9;
  const engine = engines[seed % engines.length]!;
  const reports = await tortureClients({ seconds: 4, seed, engine, runtimes: await runtimesHere(), sessions: 4 });
  for (const [runtime, { received, connects, acknowledged }] of Object.entries(reports)) {
    const report = `seed ${seed}, ${runtime}: ${JSON.stringify(reports)}`;
    assert(received > 100 && connects >= 4 && acknowledged > 0, report);
  }
});
