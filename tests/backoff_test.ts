import assert from "node:assert/strict";
import { backoffMs } from "../src/backoff.ts";

Deno.test("A delay doubles with each failure up to its most, less up to half of it, and never alike for all", () => {
  for (const [failures, mostMs] of [[0, 50], [1, 100], [4, 800], [5, 1000], [5000, 1000]] as const) {
    const delays = Array.from({ length: 100 }, () => backoffMs(failures, 50, 1000));
    assert(delays.every((delayMs) => delayMs >= mostMs / 2 && delayMs <= mostMs), `${failures}: ${delays}`);
    assert(new Set(delays).size > 50);
  }
});
