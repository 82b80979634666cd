/** A few seconds of the torture of examples/chat in a headless Chromium: `deno task test:page`. */

import assert from "node:assert/strict";
import { torture } from "../torture/chat.ts";

Deno.test({
  name: "Each page shows what the model said, and each question answered once, whatever is killed, in every tab",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    const seed = Date.now() % 1e9;
    const report = await torture({ seconds: 15, seed, page: true }).catch((cause) => {
      throw new Error(`seed ${seed}`, { cause });
    });
    assert(report.questions > 0, JSON.stringify(report));
  },
});
