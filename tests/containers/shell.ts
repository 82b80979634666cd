/** Commands of the host, Docker first. */

import assert from "node:assert/strict";

/** Building and pulling take their time; everything else is far below this. */
const patienceMs = 300_000;

export interface Result {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  cwd?: string;
  env?: Record<string, string>;
}

export async function run(command: string, args: string[], { cwd, env }: RunOptions = {}): Promise<Result> {
  const { code, stdout, stderr } = await new Deno.Command(command, {
    args,
    cwd,
    env,
    stdin: "null",
    signal: AbortSignal.timeout(patienceMs),
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Standard output of a command that must succeed. */
export async function succeed(command: string, args: string[], options: RunOptions = {}): Promise<string> {
  const { code, stdout, stderr } = await run(command, args, options);
  assert.equal(code, 0, `${command} ${args.join(" ")}\n${stdout}\n${stderr}`);
  return stdout;
}

export const docker = (...args: string[]) => succeed("docker", args);

/** A command is there and works; if not, says so, for what is ignored must be seen. */
export async function present(command: string, args: string[], what: string): Promise<boolean> {
  try {
    if ((await run(command, args)).code === 0) return true;
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  console.error(`IGNORED: ${what}: "${command} ${args.join(" ")}" does not work here`);
  return false;
}

export async function eventually(what: string, check: () => Promise<boolean>): Promise<void> {
  const endMs = performance.now() + 60_000;
  while (!await check()) {
    if (performance.now() > endMs) throw new Error(`${what}: not within a minute`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}
