/**
 * The runtimes that clients and workers are tried in: what is on this machine, and what npm has, below .tools/. Run as a
 * program it fetches those of tests/clients/worker_runtimes.ts.
 */

import { findPython, pythons, run, websocketsFor } from "./python.ts";

/** One of them. */
export interface Runtime {
  readonly name: string;
  readonly command: string;
  /** The words before the orders: they name the program of clients. */
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Its client can do without WebSockets. */
  readonly sse: boolean;
  /** The module of npm ws, for a runtime without a WebSocket of its own. */
  readonly ws?: string;
}

const root = new URL("../../", import.meta.url).pathname;
const program = `${root}tests/clients/tortured_program.js`;

/** Deno itself. */
export const deno: Runtime = {
  name: "deno",
  command: Deno.execPath(),
  args: ["run", "--quiet", "--no-prompt", "--allow-net=127.0.0.1", "--allow-sys", "--v8-flags=--expose-gc", program],
  sse: true,
};

/** Where Deno keeps a package of deno.json. */
async function packageFolder(name: string, version: string): Promise<string> {
  const { npmCache } = JSON.parse(await run(Deno.execPath(), "info", "--json"));
  for (const registry of Deno.readDirSync(npmCache)) {
    const folder = `${npmCache}/${registry.name}/${name}/${version}`;
    try {
      if (Deno.statSync(folder).isDirectory) return folder;
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound) && !(error instanceof Deno.errors.NotADirectory)) throw error;
    }
  }
  throw new Error(`${npmCache} has no ${name}@${version}`);
}

/** Node as a runtime, with npm ws where its own version has no WebSocket. */
async function node(command: string): Promise<Runtime | undefined> {
  const version = (await run(command, "--version").catch(() => "v0")).trim();
  const major = Number(/^v(\d+)/.exec(version)?.[1]);
  // An older one has no `crypto` for all.
  if (major < 20) return undefined;
  const args = ["--expose-gc", program];
  if (major >= 22) return { name: `node ${version}`, command, args, sse: true };
  const { imports } = JSON.parse(Deno.readTextFileSync(`${root}deno.json`));
  const folder = await packageFolder("ws", imports.ws.split("@").at(-1));
  return { name: `node ${version} with ws`, command, args, sse: true, ws: `${folder}/wrapper.mjs` };
}

/** What is there without being fetched. */
export async function runtimesHere(): Promise<Runtime[]> {
  return [deno, await node("node")].filter((each) => each !== undefined);
}

/** The Pythons of this machine, and the versions that it lacks. */
export async function pythonsHere(): Promise<{ found: Runtime[]; lacking: string[] }> {
  const found: Runtime[] = [];
  const lacking: string[] = [];
  for (const each of pythons) {
    const name = `python ${each.version}`;
    const command = await findPython(each.version);
    if (command === undefined) {
      lacking.push(name);
      continue;
    }
    const env = { PYTHONPATH: `${root}clients/python:${await websocketsFor(each)}` };
    found.push({ name, command, args: [`${root}tests/clients/tortured.py`], env, sse: false });
  }
  return { found, lacking };
}

/** Packages of npm in a folder of their own below .tools/, put there once. Returns the folder of its node_modules. */
async function npmFolder(name: string, packages: readonly string[]): Promise<string> {
  const folder = `${root}.tools/${name}`;
  const list = `${folder}/installed.txt`;
  const installed = await Deno.readTextFile(list).catch(() => "");
  if (installed !== packages.join("\n")) {
    await Deno.mkdir(folder, { recursive: true });
    const options = ["--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"];
    await run("npm", "install", "--prefix", folder, ...options, ...packages);
    await Deno.writeTextFile(list, packages.join("\n"));
  }
  return `${folder}/node_modules`;
}

/** The programs of Node 20, 22 and 24, which npm has as packages. */
async function nodes(): Promise<Record<string, string>> {
  const platform = `${Deno.build.os}-${Deno.build.arch === "x86_64" ? "x64" : "arm64"}`;
  const majors = ["20", "22", "24"];
  const folders = await Promise.all(majors.map((major) => npmFolder(`node-${major}`, [`node-${platform}@${major}`])));
  return Object.fromEntries(folders.map((folder, n) => [`Node ${majors[n]}`, `${folder}/node-${platform}/bin/node`]));
}

/** Deno, and Node 20, 22 and 24. */
export async function allOfJavaScript(): Promise<Runtime[]> {
  const found = await Promise.all(Object.values(await nodes()).map(node));
  return [deno, ...found.filter((each) => each !== undefined)];
}

/** Node and Bun, by name, and the folder of modules with the libraries that a worker can have. */
export async function workerRuntimes(): Promise<{ modules: string; runtimes: Record<string, string> }> {
  const { imports } = JSON.parse(Deno.readTextFileSync(`${root}deno.json`));
  const packages = [imports.ioredis.replace("npm:", ""), imports.redis.replace("npm:", ""), "bun@1"];
  // Bun's package fetches its program when it is installed.
  const modules = await npmFolder("worker_runtimes", packages);
  return { modules, runtimes: { ...await nodes(), Bun: `${modules}/bun/bin/bun.exe` } };
}

if (import.meta.main) await workerRuntimes();
