/** The gate itself: what counts as a failure, and that its first steps see a bare machine. */

import assert from "node:assert/strict";
import { countsOf, runGate, type Step } from "../scripts/gate.ts";

/** What the gate prints about steps. */
async function gate(steps: Step[], path?: string): Promise<{ good: boolean; lines: string[] }> {
  const lines: string[] = [];
  const good = await runGate(steps, (line) => lines.push(line.replace(/ \(\d+ s\)$/, "")), path);
  return { good, lines };
}

/** A step that finds a program on its PATH, or fails. */
const finds = (program: string): readonly string[] => [
  "eval",
  `new Deno.Command(${JSON.stringify(program)}, { args: ["--version"], stdout: "null", stderr: "null" }).outputSync()`,
];

Deno.test("The gate's core sees no program that a bare machine lacks", async () => {
  const folder = await Deno.makeTempDir();
  await Deno.writeTextFile(`${folder}/promtool`, "#!/bin/sh\n", { mode: 0o755 });
  const path = `${folder}:${Deno.env.get("PATH")}`;
  const core = await gate([{ name: "core", args: finds("promtool") }], path);
  assert.equal(core.good, false);
  assert.match(core.lines[0]!, /NotFound.*promtool/);
  assert.deepEqual(core.lines.slice(-2), ["core: 0 passed, 1 failed", "0 passed, 1 failed"]);
  const own = await gate([{ name: "own", needs: "promtool", args: finds("promtool") }], path);
  assert.deepEqual(own, { good: true, lines: ["own: 1 passed, 0 failed", "1 passed, 0 failed"] });
  await Deno.remove(folder, { recursive: true });
  assert.deepEqual(await gate([{ name: "redis", args: finds("redis-server") }]), {
    good: true,
    lines: ["redis: 1 passed, 0 failed", "1 passed, 0 failed"],
  });
});

Deno.test("The gate's last lines say what was left out, and how many passed and failed", async () => {
  const { good, lines } = await gate([
    {
      name: "first",
      args: ["eval", "console.log('./a => A fact ... ignored (0ms)\\nok | 7 passed (3 steps) | 0 failed (1s)')"],
    },
    { name: "second", needs: "no-such-program", args: ["eval", ""] },
    { name: "third", needs: "sh", prepare: ["eval", "throw new Error('no net')"], args: ["eval", ""] },
  ]);
  assert(good);
  assert.deepEqual(lines, [
    "first: 7 passed, 0 failed",
    "left out: first: A fact",
    "left out: second, because there is no no-such-program on this machine",
    "left out: third, because what it needs cannot be installed: Error: no net",
    "7 passed, 0 failed",
  ]);
});

Deno.test("A run that fails without a failed test is a failure", () => {
  assert.deepEqual(countsOf("ok | 7 passed | 0 failed | 2 ignored (1s)", true), { passed: 7, failed: 0 });
  assert.deepEqual(countsOf("ok | 7 passed | 0 failed (1s)", false), { passed: 7, failed: 1 });
  assert.deepEqual(countsOf("FAILED | 7 passed | 3 failed (2 steps) (1s)", false), { passed: 7, failed: 3 });
  assert.deepEqual(countsOf("killed", false), { passed: 0, failed: 1 });
});
