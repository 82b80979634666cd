/** The gate itself: what counts as a failure, and that its first steps see a bare machine. */

import assert from "node:assert/strict";
import { countsOf, type GateOptions, runGate, type Step } from "../scripts/gate.ts";
import { patienceMs } from "./harness/wait.ts";

/** What the gate prints about steps. */
async function gate(steps: Step[], options?: GateOptions): Promise<{ good: boolean; lines: string[] }> {
  const lines: string[] = [];
  const good = await runGate(steps, (line) => lines.push(line.replace(/ \(\d+ s\)$/, "")), options);
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
  const core = await gate([{ name: "core", args: finds("promtool") }], { path });
  assert.equal(core.good, false);
  assert.match(core.lines[0]!, /NotFound.*promtool/);
  assert.deepEqual(core.lines.slice(-2), ["core: 0 passed, 1 failed", "0 passed, 1 failed"]);
  const own = await gate([{ name: "own", needs: "promtool", args: finds("promtool") }], { path });
  assert.deepEqual(own, { good: true, lines: ["own: 1 passed, 0 failed", "1 passed, 0 failed"] });
  await Deno.remove(folder, { recursive: true });
  assert.deepEqual(await gate([{ name: "redis", args: finds("redis-server") }]), {
    good: true,
    lines: ["redis: 1 passed, 0 failed", "1 passed, 0 failed"],
  });
});

Deno.test("The steps that need no program run beside each other", async () => {
  const folder = await Deno.makeTempDir();
  /** Ends when the other has begun, and fails where that does not come. */
  const waits = (own: string, other: string): readonly string[] => [
    "eval",
    `Deno.writeTextFileSync("${folder}/${own}", "");
    const endMs = Date.now() + ${patienceMs};
    while (!Array.from(Deno.readDirSync("${folder}")).some(({ name }) => name === "${other}")) {
      if (Date.now() > endMs) Deno.exit(1);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }`,
  ];
  const steps = [{ name: "check", args: waits("a", "b") }, { name: "test", args: waits("b", "a") }];
  const { good, lines } = await gate(steps);
  assert(good, lines.join("\n"));
  await Deno.remove(folder, { recursive: true });
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

Deno.test("What takes long is left out where time is short", async () => {
  const steps: Step[] = [{ name: "slow", needs: "sh", slow: true, args: ["eval", ""] }];
  assert.deepEqual((await gate(steps)).lines, ["slow: 1 passed, 0 failed", "1 passed, 0 failed"]);
  const { lines } = await gate(steps, { maxSecs: 0 });
  assert.deepEqual(lines, [
    "left out: slow, because those that need no program took more than 0 s",
    "0 passed, 0 failed",
  ]);
});

Deno.test("Of the steps that need a program three run beside each other, in their order", async () => {
  const folder = await Deno.makeTempDir();
  /** Notes its begin; the first three wait until all three have begun, and each notes its end. */
  const notes = (n: number): readonly string[] => [
    "eval",
    `Deno.writeTextFileSync("${folder}/log", "begin ${n}\\n", { append: true });
    const begun = () => Deno.readTextFileSync("${folder}/log").match(/begin/g).length;
    const endMs = Date.now() + ${patienceMs};
    while (begun() < 3) {
      if (Date.now() > endMs) Deno.exit(1);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    Deno.writeTextFileSync("${folder}/log", "end ${n}\\n", { append: true });`,
  ];
  const steps = Array.from({ length: 5 }, (_, n) => ({ name: `step ${n}`, needs: "sh", args: notes(n) }));
  const { good, lines } = await gate(steps);
  assert(good, lines.join("\n"));
  const log = (await Deno.readTextFile(`${folder}/log`)).trim().split("\n");
  let running = 0;
  for (const line of log) {
    running += line.startsWith("begin") ? 1 : -1;
    assert(running <= 3, log.join("\n"));
  }
  assert.deepEqual(log.slice(0, 3).sort(), ["begin 0", "begin 1", "begin 2"]);
  await Deno.remove(folder, { recursive: true });
});

Deno.test("What only the whole gate has is named where it is left out", async () => {
  const steps: Step[] = [
    { name: "core", args: ["eval", ""] },
    { name: "python", needs: "sh", whole: true, args: ["eval", ""] },
    { name: "page", needs: "sh", whole: true, slow: true, args: ["eval", ""] },
  ];
  assert.deepEqual((await gate(steps)).lines, [
    "core: 1 passed, 0 failed",
    "left out: python, page, which ./dev ok --all has",
    "1 passed, 0 failed",
  ]);
  const { lines } = await gate(steps, { all: true });
  assert.deepEqual(lines.sort(), [
    "3 passed, 0 failed",
    "core: 1 passed, 0 failed",
    "page: 1 passed, 0 failed",
    "python: 1 passed, 0 failed",
  ]);
});

Deno.test("A run that fails without a failed test is a failure", () => {
  assert.deepEqual(countsOf("ok | 7 passed | 0 failed | 2 ignored (1s)", true), { passed: 7, failed: 0 });
  assert.deepEqual(countsOf("ok | 7 passed | 0 failed (1s)", false), { passed: 7, failed: 1 });
  assert.deepEqual(countsOf("FAILED | 7 passed | 3 failed (2 steps) (1s)", false), { passed: 7, failed: 3 });
  assert.deepEqual(countsOf("killed", false), { passed: 0, failed: 1 });
});
