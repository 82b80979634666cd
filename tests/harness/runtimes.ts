/** The runtimes that clients are tried in: what is on this machine, and what npm has. */

import { run } from "./python.ts";

/** One of them. */
export interface Runtime {
  readonly name: string;
  readonly command: string;
  readonly args: readonly string[];
  /** The module of npm ws, for a runtime without a WebSocket of its own. */
  readonly ws?: string;
}

const root = new URL("../../", import.meta.url).pathname;

/** Deno itself. */
export const deno: Runtime = {
  name: "deno",
  command: Deno.execPath(),
  args: ["run", "--quiet", "--no-prompt", "--allow-net=127.0.0.1", "--allow-sys", "--v8-flags=--expose-gc"],
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
  const args = ["--expose-gc"];
  if (major >= 22) return { name: `node ${version}`, command, args };
  const { imports } = JSON.parse(Deno.readTextFileSync(`${root}deno.json`));
  const folder = await packageFolder("ws", imports.ws.split("@").at(-1));
  return { name: `node ${version} with ws`, command, args, ws: `${folder}/wrapper.mjs` };
}

/** What is there without being fetched. */
export async function runtimesHere(): Promise<Runtime[]> {
  return [deno, await node("node")].filter((each) => each !== undefined);
}

/** Also Node 20, 22 and 24, which npm has as packages. */
export async function allRuntimes(): Promise<Runtime[]> {
  const platform = `${Deno.build.os}-${Deno.build.arch === "x86_64" ? "x64" : "arm64"}`;
  const nodes = await Promise.all(["20", "22", "24"].map(async (major) => {
    const folder = `${root}.tools/node-${major}`;
    const command = `${folder}/node_modules/node-${platform}/bin/node`;
    const found = await node(command);
    if (found) return found;
    Deno.mkdirSync(folder, { recursive: true });
    const options = ["--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"];
    await run("npm", "install", "--prefix", folder, ...options, `node-${platform}@${major}`);
    return await node(command);
  }));
  return [deno, ...nodes.filter((each) => each !== undefined)];
}
