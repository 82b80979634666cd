/** Programs of a torture, which are killed and come back. */

import { lines } from "../harness/process.ts";
import { soon } from "../harness/wait.ts";
import { pause } from "./parts.ts";

/** Processes that are killed and come back; those that are dead have no port. */
export class Processes implements AsyncDisposable {
  readonly #running: (Process | undefined)[] = [];
  readonly #frozen = new Set<Process>();
  constructor(readonly start: (i: number) => Promise<Process>) {}

  async fill(count: number): Promise<void> {
    await Promise.all(Array.from({ length: count }, async (_, i) => void (this.#running[i] = await this.start(i))));
  }

  get ports(): number[] {
    return this.#running.flatMap((process) => process ? [process.port] : []);
  }

  /** Ends one, and starts another one; not while that goes on already. */
  async replace(i: number, signal: Deno.Signal): Promise<void> {
    const process = this.#running[i];
    if (process === undefined || this.#frozen.has(process)) return;
    this.#running[i] = undefined;
    await process.end(signal);
    this.#running[i] = await this.start(i);
  }

  async freeze(i: number, ms: number): Promise<void> {
    const process = this.#running[i];
    if (process === undefined || this.#frozen.has(process)) return;
    this.#frozen.add(process);
    process.signal("SIGSTOP");
    await pause(ms);
    process.signal("SIGCONT");
    this.#frozen.delete(process);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#running.map((process) => process?.end("SIGKILL")));
  }
}

/** One of them. */
export interface Process {
  readonly port: number;
  signal(signal: Deno.Signal): void;
  end(signal: Deno.Signal): Promise<void>;
}

/** The words after `deno` that run a program of this folder. */
const run = ["run", "--quiet", "--no-check", "--allow-net", "--allow-env", "--allow-read", "--allow-sys"];

/** The path of a file of this folder. */
export const fileOf = (name: string): string => new URL(name, import.meta.url).pathname;

/** Starts a program of this folder, by Deno or by a Python, which prints a port if it listens. */
export async function startProgram(
  file: string,
  env: Record<string, string>,
  { listens = false, python }: { readonly listens?: boolean; readonly python?: string | undefined } = {},
): Promise<Process> {
  const args = [...(python ? [] : run), fileOf(file)];
  const child = spawn(python ?? Deno.execPath(), args, env, listens ? "null" : "inherit");
  const output = lines(child.stdout);
  const listening = listens ? soon(output.until((line) => /^\d+$/.test(line)), file) : Promise.resolve("0");
  const port = Number(
    await listening.catch((error) => {
      child.kill("SIGKILL");
      throw error;
    }),
  );
  output.drain();
  return processOf(child, port);
}

/** Spawns a command that may import clients/python. */
export function spawn(
  command: string,
  args: readonly string[],
  env: Record<string, string>,
  stderr: "null" | "inherit",
): Deno.ChildProcess {
  return new Deno.Command(command, {
    args: [...args],
    env: { ...env, PYTHONPATH: fileOf("../../clients/python") },
    ...{ stdin: "null", stdout: "piped", stderr },
  }).spawn();
}

/** A child, as {@linkcode Processes} take it; one may have ended by itself, such as a worker that found no database. */
export function processOf(child: Deno.ChildProcess, port: number): Process {
  let hasEnded = false;
  const ended = child.status.then(() => hasEnded = true);
  const signal = (name: Deno.Signal) => void (hasEnded || child.kill(name));
  return {
    port,
    signal,
    async end(name) {
      signal(name);
      await ended;
    },
  };
}
