/**
 * `deno task ok`: what the gate checks, step by step, one line for each. A step that fails shows its output. The last
 * lines name the steps that were left out and why, and the very last one is "N passed, N failed". What takes long beside
 * the tests themselves is only in `deno task ok --all`, which is what .ci/run runs.
 *
 * The first steps see only the programs of a bare Debian with Node and npm, and what ./dev installs. A test that needs
 * another program is a step of its own, and belongs to tests/tools/ or a task of its own.
 */

import { delimiter } from "node:path";

/** One step of the gate. */
export interface Step {
  readonly name: string;
  /** The words after `deno`. */
  readonly args: readonly string[];
  /** Without this program the step is left out; a step that needs none sees only the programs of `bare`. */
  readonly needs?: string;
  /** The words after `deno` that make ready what the step needs; where they fail, the step is left out. */
  readonly prepare?: readonly string[];
  /** It takes long, and most changes cannot break it: only the whole gate has it. */
  readonly whole?: true;
  /** It installs much, too: it is left out where the steps that need no program have taken too long. */
  readonly slow?: true;
}

/** In seconds, for those steps: the whole gate is to take less than ten minutes. */
const maxBareSecs = 240;

/** Of the steps that need a program so many run beside each other: each has a server, proxies and clients of its own. */
const maxAtOnce = 3;

/**
 * The programs that the steps without `needs` may use: of Debian's essential packages coreutils, others and util-linux; of
 * Node; and of ./dev.
 */
const bare = [
  "[ basename cat chgrp chmod chown cksum comm cp cut date dd df dirname du echo env expr false fold head id install join",
  "ln ls mkdir mkfifo mktemp mv nice nl nohup nproc od paste printenv printf pwd readlink realpath rm rmdir seq sha256sum",
  "shuf sleep sort split stat stdbuf stty sync tac tail tee test timeout touch tr true truncate tty uname uniq wc yes",
  "awk bash cmp diff egrep fgrep find getconf grep gunzip gzip hostname sed sh tar which xargs zcat",
  "dmesg flock ionice nsenter prlimit setarch setpriv setsid taskset unshare",
  "node npm npx",
  "redis-server redis-cli redis-sentinel",
].flatMap((line) => line.split(" "));

const task = (name: string) => ["task", "--quiet", name];
/** A file of tests/harness that installs what a step needs. */
const harness = ["run", "--no-prompt", "--allow-run", "--allow-env", "--allow-read", "--allow-write=.tools"];
const testFile = (path: string) => [...task("test:file"), path];

const steps: readonly Step[] = [
  { name: "check", args: task("check") },
  // The step above, which runs beside it, checks the types of all files.
  { name: "test", args: [...task("test"), "--no-check"] },
  // Those that take longest come first, so that short ones fill what is left of the time.
  {
    name: "python",
    needs: "python3",
    prepare: [...harness, "tests/harness/python.ts"],
    args: task("test:python"),
    whole: true,
  },
  { name: "browser", needs: "chromium", args: task("test:browser"), whole: true },
  {
    name: "page",
    needs: "chromium",
    prepare: [...task("chat"), "--install"],
    args: task("test:page"),
    whole: true,
    slow: true,
  },
  {
    name: "agents",
    needs: "python3",
    prepare: [...harness, "tests/harness/python.ts", "agents"],
    args: task("test:agents"),
    whole: true,
    slow: true,
  },
  {
    name: "runtimes",
    needs: "npm",
    prepare: [...harness, "tests/harness/runtimes.ts"],
    args: testFile("tests/clients/worker_runtimes.ts"),
    whole: true,
    slow: true,
  },
  {
    name: "vanished clients",
    needs: "ip",
    // Not every machine lets its users make namespaces.
    prepare: ["eval", "Deno.exit(new Deno.Command('unshare', { args: ['-rn', 'true'] }).outputSync().code)"],
    args: testFile("tests/tools/vanished.ts"),
  },
  { name: "haproxy", needs: "haproxy", args: testFile("tests/tools/haproxy.ts") },
  { name: "nginx", needs: "nginx", args: testFile("tests/tools/nginx.ts") },
  { name: "curl", needs: "curl", args: testFile("tests/tools/curl.ts") },
  { name: "helm", needs: "helm", args: testFile("tests/tools/helm.ts") },
  { name: "promtool", needs: "promtool", args: testFile("tests/tools/promtool.ts") },
  { name: "systemd", needs: "systemd-analyze", args: testFile("tests/tools/systemd.ts") },
];

/** A program's file, in the first of these directories that has it. */
function findProgram(name: string, path: string): string | undefined {
  return path.split(delimiter).map((directory) => `${directory}/${name}`).find((file) => {
    try {
      return Deno.statSync(file).isFile;
    } catch {
      return false; // not there, or a directory that this user may not read
    }
  });
}

/** What a test run counted, in the last line of its own; a step that counts nothing is one check, passed or failed. */
export function countsOf(output: string, success: boolean): { passed: number; failed: number } {
  const [, passed, failed] = output.match(/^(?:ok|FAILED) \| (\d+) passed.* \| (\d+) failed.*$/m) ?? [];
  if (passed === undefined) return { passed: Number(success), failed: Number(!success) };
  // A run may fail without a failed test, such as when it was killed.
  return { passed: Number(passed), failed: success ? Number(failed) : Math.max(1, Number(failed)) };
}

/** The output without the lines of tests that passed, and of files whose types were checked. */
const withoutPassed = (output: string) =>
  output.replace(/^(?:Check \S+|.* \.\.\. (?:.* \.\.\. )?(?:ok|ignored) \(.*\))\n/gm, "");

/** Why a program failed: the message of its error, or its first line. */
const reasonOf = (output: string) =>
  (/^error: (?:Uncaught )?(?:\(in promise\) )?(.*)$/m.exec(output) ?? /(.*)/.exec(output))![1];

async function run(args: readonly string[], path: string): Promise<{ success: boolean; output: string }> {
  // Both streams into one pipe, so that lines stay in their order.
  const { success, stdout } = await new Deno.Command("sh", {
    args: ["-c", 'exec "$@" 2>&1', "sh", Deno.execPath(), ...args],
    env: { PATH: path, NO_COLOR: "1" },
    stdin: "null",
    stdout: "piped",
  }).output();
  return { success, output: new TextDecoder().decode(stdout) };
}

/** Where programs are looked for: on PATH, and where Debian keeps what it takes for administrators' programs. */
const wholePath = [Deno.env.get("PATH"), "/usr/sbin", "/usr/local/sbin"].join(delimiter);

/** What runs them, besides the steps. */
export interface GateOptions {
  /** With the steps that only the whole gate has. */
  readonly all?: boolean;
  /** Where programs are looked for. */
  readonly path?: string;
  readonly maxSecs?: number;
}

/** Lets so many run at a time, in the order in which they ask. */
class Turns {
  #free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.#free = count;
  }

  async take<T>(run: () => Promise<T>): Promise<T> {
    if (this.#free > 0) this.#free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    try {
      return await run();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.#free++;
    }
  }
}

/** Runs the steps, and prints what came of them. Resolves with whether all is well. */
export async function runGate(
  steps: readonly Step[],
  print: (line: string) => void,
  { all = false, path = wholePath, maxSecs = maxBareSecs }: GateOptions = {},
) {
  const startedMs = performance.now();
  const barePath = await Deno.makeTempDir({ dir: "/tmp", prefix: "gate" });
  const leftOut: string[] = [];
  const sum = { passed: 0, failed: 0 };
  const turns = new Turns(maxAtOnce);
  let isLate = false;
  async function take(step: Step, path: string): Promise<void> {
    const { name, needs, prepare, slow } = step;
    if (needs !== undefined && findProgram(needs, path) === undefined) {
      leftOut.push(`left out: ${name}, because there is no ${needs} on this machine`);
      return;
    }
    if (slow && isLate) {
      leftOut.push(`left out: ${name}, because those that need no program took more than ${maxSecs} s`);
      return;
    }
    if (prepare !== undefined) {
      // Out of turn, as it waits for the net.
      const { success, output } = await run(prepare, path);
      if (!success) {
        leftOut.push(
          `left out: ${name}, because what it needs cannot be installed: ${reasonOf(output)}`,
        );
        return;
      }
    }
    if (needs === undefined) await check(step, path);
    else await turns.take(() => check(step, path));
  }
  async function check({ name, args }: Step, path: string): Promise<void> {
    const since = performance.now();
    const { success, output } = await run(args, path);
    const { passed, failed } = countsOf(output, success);
    sum.passed += passed;
    sum.failed += failed;
    for (const [, test] of output.matchAll(/^(?:\S+ => )?(.*) \.\.\. ignored \(/gm)) {
      leftOut.push(`left out: ${name}: ${test}`);
    }
    if (!success) print(withoutPassed(output).trimEnd());
    print(`${name}: ${passed} passed, ${failed} failed (${Math.round((performance.now() - since) / 1000)} s)`);
  }
  try {
    await Deno.symlink(Deno.execPath(), `${barePath}/deno`);
    for (const name of bare) {
      const file = findProgram(name, path);
      if (file !== undefined) await Deno.symlink(file, `${barePath}/${name}`);
    }
    const taken = steps.filter(({ whole }) => all || !whole);
    await Promise.all(taken.filter(({ needs }) => needs === undefined).map((step) => take(step, barePath)));
    isLate = performance.now() - startedMs > maxSecs * 1000;
    await Promise.all(taken.filter(({ needs }) => needs !== undefined).map((step) => take(step, path)));
  } finally {
    await Deno.remove(barePath, { recursive: true });
  }
  const others = steps.filter(({ whole }) => whole && !all).map(({ name }) => name);
  if (others.length > 0) leftOut.push(`left out: ${others.join(", ")}, which ./dev ok --all has`);
  for (const line of leftOut) print(line);
  print(`${sum.passed} passed, ${sum.failed} failed`);
  return sum.failed === 0;
}

if (import.meta.main) {
  const isAll = Deno.args[0] === "--all";
  if (Deno.args.length > (isAll ? 1 : 0)) {
    console.error("usage: ./dev ok [--all]");
    Deno.exit(1);
  }
  Deno.exit(await runGate(steps, console.log, { all: isAll }) ? 0 : 1);
}
