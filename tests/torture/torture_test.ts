import assert from "node:assert/strict";
import { engines } from "../harness/proxy.ts";
import { torture } from "./torture.ts";

for (const engine of engines) {
  for (const persistent of [true, false]) {
    const what = persistent ? "keeps its log" : "forgets";
    Deno.test(`[${engine}] Nothing is lost, doubled or out of order untold, while Redis dies and ${what}`, async () => {
      const seed = Date.now() % 1e9;
      const report = await torture({ seconds: 6, seed, engine, sessions: 12, persistent, workers: 1 });
      assert(report.received > 100 && report.connects >= 12, JSON.stringify(report));
    });
  }
}
