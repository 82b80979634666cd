/** Commands of the pages as a reader types them, in a copy of the project. */

import assert from "node:assert/strict";
import { dirname } from "node:path";
import process from "node:process";
import { sparePort } from "../../scripts/spare_port.ts";
import { blockOf } from "./pages.ts";
import { lines } from "./process.ts";
import { soon } from "./wait.ts";

const root = new URL("../../", import.meta.url).pathname;
const left = new Set([".git", ".tools", ".env", "node_modules", "bench", "coverage", "tests"]);

/** A command line, with whatever it started, until the end of its scope. */
export class Terminal implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #output: ReturnType<typeof lines>;
  /** Nothing of its process group is left, whose number is another process's before long. */
  #isGone = false;

  constructor(readonly script: string, cwd: string, env: Record<string, string>) {
    // A process group of its own, so that all of it can be ended.
    const options = { cwd, env, stdin: "piped", stdout: "piped", stderr: "null", detached: true } as const;
    this.#child = new Deno.Command("bash", { args: ["-c", `exec 2>&1\n${script}`], ...options }).spawn();
    this.#child.status.then(() => this.#isGone = !isGroup(this.#child.pid));
    this.#stdin = this.#child.stdin.getWriter();
    this.#output = lines(this.#child.stdout);
  }

  /** Up to the line that contains a text. */
  shows(text: string, forMs?: number): Promise<string> {
    return soon(this.#output.until((line) => line.includes(text)), `${text} from ${this.script}`, forMs);
  }

  async type(line: string): Promise<void> {
    await this.#stdin.write(new TextEncoder().encode(`${line}\n`));
  }

  /** All that it prints, once it has ended well. */
  async ends(): Promise<string> {
    const text = await soon(this.#output.rest(), `the end of ${this.script}`);
    const { code } = await this.#child.status;
    assert.equal(code, 0, `${this.script}\n${text}`);
    return text.trim();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      if (!this.#isGone) Deno.kill(-this.#child.pid, "SIGTERM");
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error; // it has ended already
    }
    await this.#child.status;
    await this.#stdin.close().catch(() => {});
    await this.#output.rest();
  }
}

/** Whether a process group has members. */
function isGroup(id: number): boolean {
  try {
    return process.kill(-id, 0);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
    return false;
  }
}

/** A copy of the project with neither .env nor tests, and ports of its own in place of the pages'. */
export class Copy implements AsyncDisposable {
  readonly folder = Deno.makeTempDirSync();
  /** The proxy's port, 8080 in the pages, its Redis's, 6390 there, and that of ADMIN_PORT, 9090. */
  readonly port = sparePort();
  readonly redisPort = sparePort();
  readonly adminPort = sparePort();

  constructor() {
    const names = [...Deno.readDirSync(root)].map(({ name }) => name).filter((name) => !left.has(name));
    // What is installed below is as large as all the rest many times over.
    const pack =
      'from=$1 to=$2; shift 2; tar -C "$from" --exclude node_modules --exclude .venv --exclude dist -cf - "$@" | tar -C "$to" -xf -';
    assert(new Deno.Command("sh", { args: ["-c", pack, "sh", root, this.folder, ...names] }).outputSync().success);
  }

  /** A page's text with the ports of this copy. */
  adapt(text: string): string {
    const ports: Readonly<Record<string, number>> = { 8080: this.port, 6390: this.redisPort, 9090: this.adminPort };
    // In one pass: one's own may have another's digits.
    return text.replace(/8080|6390|9090/g, (port) => String(ports[port]));
  }

  /** A command line in this copy, as it stands in a page. */
  run(script: string, env: Record<string, string> = {}): Terminal {
    const path = `${dirname(Deno.execPath())}:${Deno.env.get("PATH")}`;
    return new Terminal(this.adapt(script), this.folder, {
      PATH: path,
      PORT: String(this.port),
      NO_COLOR: "1",
      ...env,
    });
  }

  /** The lines of a page's block; `from` and `to` choose some of them. */
  block(page: string, part: string, from = 0, to?: number): string {
    return blockOf(page, part).text.trimEnd().split("\n").slice(from, to).join("\n");
  }

  /** Also of the Redis that the pages start. */
  async [Symbol.asyncDispose](): Promise<void> {
    await new Deno.Command("redis-cli", {
      args: ["-p", String(this.redisPort), "shutdown", "nosave"],
      stdout: "null",
      stderr: "null",
    }).output();
    await Deno.remove(this.folder, { recursive: true });
  }
}
