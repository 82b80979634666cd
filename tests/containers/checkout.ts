/** A copy of the project under a Compose project of its own, and all that its containers are called. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { type Result, run, succeed } from "./shell.ts";

export const repo = new URL("../..", import.meta.url).pathname;
export const project = `wsproxy-check-${Deno.pid}`;
export const proxyPort = sparePort();
export const balancerPort = sparePort();
export const workersPort = sparePort();
export const secret = crypto.randomUUID() + crypto.randomUUID();
export const version = "9.8.7-check";
export const image = `wsproxy:${version}`;
/** An engine without the right to raise limits (rootless) cannot give more than it has itself. */
export const maxDescriptors = Math.min(65536, Number((await run("sh", ["-c", "ulimit -Hn"])).stdout) || 65536);

/** The project as it would be cloned, plus what must never get into an image; and a user's `.env`. */
export class Checkout implements AsyncDisposable {
  private constructor(readonly path: string) {}

  static async create(): Promise<Checkout> {
    const checkout = new Checkout(await Deno.makeTempDir({ prefix: "wsproxy-check-" }));
    const files = await succeed("git", ["ls-files", "--cached", "--others", "--exclude-standard"], { cwd: repo });
    for (const file of files.split("\n")) {
      await Deno.mkdir(`${checkout.path}/${file}/..`.replace(/[^/]+\/\.\.$/, ""), { recursive: true });
      await Deno.copyFile(`${repo}/${file}`, `${checkout.path}/${file}`).catch((error) => {
        if (!(error instanceof Deno.errors.NotFound)) throw error; // deleted, and not committed yet
      });
    }
    for (const decoy of ["src/.env.local", "src/tls.key", "tests/client.pem", ".git/config", "notes.txt"]) {
      await Deno.mkdir(`${checkout.path}/${decoy.replace(/[^/]+$/, "")}`, { recursive: true });
      await Deno.writeTextFile(`${checkout.path}/${decoy}`, "a decoy");
    }
    return checkout;
  }

  settings(env: Record<string, string>): Promise<void> {
    const lines = Object.entries(env).map(([name, value]) => `${name}=${value}\n`);
    return Deno.writeTextFile(`${this.path}/.env`, lines.join(""));
  }

  readonly #env = {
    COMPOSE_PROJECT_NAME: project,
    PORT: String(proxyPort),
    SCALE_PORT: String(balancerPort),
    WORKERS_PORT: String(workersPort),
    NOFILE: String(maxDescriptors),
    VERSION: version,
    REVISION: "0123456789abcdef",
    SOURCE: "https://source.example/wsproxy",
  };

  compose(...args: string[]): Promise<Result> {
    return run("docker", ["compose", ...args], { cwd: this.path, env: this.#env });
  }

  async composed(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.compose(...args);
    assert.equal(code, 0, `docker compose ${args.join(" ")}\n${stdout}\n${stderr}`);
    return stdout;
  }

  /** The end-to-end tests in their container, against another proxy than the default one; they must pass. */
  async endToEnd(env: Record<string, string>): Promise<void> {
    const where = Object.entries(env).flatMap(([name, value]) => ["-e", `${name}=${value}`]);
    await this.composed("--profile", "tests", "run", "--rm", "-T", "--no-deps", ...where, "tests");
  }

  /** The container's id. */
  container(service: string): Promise<string> {
    return this.composed("--profile", "*", "ps", "--all", "--quiet", service);
  }

  /** Runs the load of failover_load.ts, ends a proxy when it is loaded, and returns what it counted. */
  async failover(end: () => Promise<unknown>): Promise<Failover> {
    const child = new Deno.Command("docker", {
      args: [
        ...["compose", "--profile", "*", "run", "--rm", "--no-deps", "-T", "-e", "WSPROXY_URL=http://haproxy:8080"],
        ...["tests", "deno", "run", "--no-prompt", "--frozen", "--cached-only"],
        ...["--allow-env", "--allow-net=haproxy,redis,proxy,proxy-2,proxy-3", "scripts/failover_load.ts", "90"],
        ...["http://proxy:8080", "http://proxy-2:8080", "http://proxy-3:8080"],
      ],
      cwd: this.path,
      env: this.#env,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const stderr = new Response(child.stderr).text();
    let output = "";
    for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
      const before = output;
      output += text;
      if (!before.includes("loaded") && output.includes("loaded")) await end();
    }
    assert.equal((await child.status).code, 0, `${output}\n${await stderr}`);
    await stderr;
    const json = output.slice(output.indexOf("{"));
    console.log(json.trim());
    return JSON.parse(json);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "1");
    await run("docker", ["image", "rm", "--force", image, `wsproxy-tests:${version}`]);
    await Deno.remove(this.path, { recursive: true });
  }
}

/** What failover_load.ts prints. */
export interface Failover {
  clients: number;
  before: Record<string, number | null>;
  after: Record<string, number | null>;
  cut: number;
  codes: Record<string, number>;
  down: { published: number; received: number; lost: number; untold: number };
  up: { sent: number; heard: number; lost: number; untold: number };
}
