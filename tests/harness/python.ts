/**
 * Python for tests, in virtual environments below .tools/. Run as a program it makes those of test:python; with the word
 * `agents`, that of test:agents.
 */

import { relative } from "node:path";
import { renderLibrary } from "../../src/redis/log_library.ts";

const root = new URL("../../", import.meta.url).pathname;

/** What a command prints. @throws what it says when it fails. */
export async function run(command: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args }).output();
  const text = new TextDecoder().decode(stdout);
  if (!success) throw new Error(`${command} failed: ${text}${new TextDecoder().decode(stderr)}`);
  return text;
}

/** Whether a virtual environment works and has these packages, by the folders that pip leaves: pip itself takes long. */
async function isMade(folder: string, packages: readonly string[]): Promise<boolean> {
  try {
    await run(`${folder}/bin/python`, "-c", "");
    const [version] = await Array.fromAsync(Deno.readDir(`${folder}/lib`));
    const installed = await Array.fromAsync(Deno.readDir(`${folder}/lib/${version!.name}/site-packages`));
    const folders = new Set(installed.map(({ name }) => name.toLowerCase()));
    return packages.map((each) => each.toLowerCase().split("==")).every(([name, version]) =>
      folders.has(`${name!.replace(/[-.]+/g, "_")}-${version}.dist-info`)
    );
  } catch {
    return false;
  }
}

/** A virtual environment with these packages, made once; `name==version` each. Returns the folder of its programs. */
export async function venv(name: string, packages: readonly string[]): Promise<string> {
  const bin = `${root}.tools/${name}/bin`;
  if (!await isMade(`${root}.tools/${name}`, packages)) {
    await run("python3", "-m", "venv", "--clear", `${root}.tools/${name}`);
    await run(`${bin}/pip`, "install", "--quiet", "--disable-pip-version-check", ...packages);
  }
  return bin;
}

/** The virtual environment of what clients/python, its checks and examples/ need. */
export function clientsVenv(): Promise<string> {
  const requirements = Deno.readTextFileSync(`${root}examples/requirements.txt`).trim().split(/\s+/);
  return venv("clients", [...requirements, "websockets==16.0", "mypy==2.4.1", "pyright==1.1.414"]);
}

/** The virtual environment of the libraries that clients/python has adapters for. */
export function agentsVenv(): Promise<string> {
  const libraries = ["pydantic-ai-slim==2.68.0", "ag-ui-protocol==1.0.0", "openai-agents==0.24.0", "langgraph==1.2.24"];
  return venv("agents", [...libraries, "redis==8.1.0", "mypy==2.4.1", "pyright==1.1.414"]);
}

/** The modules of clients/python that need such a library. */
export const adapters = ["pydantic_ai.py", "pydantic_ai_ag_ui.py", "openai_agents.py", "langgraph.py"];

const folder = `${root}clients/python`;

/** The files of modules of clients/python, by their names. */
export const modulesOf = (names: readonly string[]) => names.map((name) => `${folder}/wsproxy_client/${name}`);

/** What `mypy --strict` and pyright find, as an error. Tests, by their names, are for mypy only. */
export async function checkTypes(
  bin: string,
  { version, files, tests = [] }: { version: string; files: readonly string[]; tests?: readonly string[] },
): Promise<void> {
  await run(
    "env",
    `MYPYPATH=${folder}:${root}tests/clients`,
    `${bin}/mypy`,
    `--cache-dir=${root}.tools/mypy`,
    `--config-file=${folder}/pyproject.toml`,
    `--python-executable=${bin}/python`,
    `--python-version=${version}`,
    ...tests.map((name) => `${root}tests/clients/${name}`),
    ...files,
  );
  const project = await Deno.makeTempDir();
  try {
    // It takes no absolute paths.
    const include = files.map((file) => relative(project, file));
    const config = {
      include,
      extraPaths: [relative(project, folder)],
      typeCheckingMode: "strict",
      pythonVersion: version,
      // redis-py does not say of what type the options of from_url are.
      reportUnknownMemberType: false,
    };
    await Deno.writeTextFile(`${project}/pyrightconfig.json`, JSON.stringify(config));
    await run(`${bin}/pyright`, `--project=${project}`, `--pythonpath=${bin}/python`);
  } finally {
    await Deno.remove(project, { recursive: true });
  }
}

/** What the functions are loaded with where no proxy loads them. */
export const librarySettings = {
  maxMessages: 4096,
  ttlMs: 3_600_000,
  maxMessageBytes: 1_048_576,
  sharded: false,
  startedMs: 0,
};

/** Runs a file of tests/clients that starts Redis itself. @throws what it says when it fails. */
export async function runOnRedis(bin: string, file: string): Promise<void> {
  const library = await Deno.makeTempFile();
  try {
    await Deno.writeTextFile(library, renderLibrary(librarySettings));
    const env = [`PYTHONPATH=${folder}`, `LIBRARY=${library}`];
    await run("env", ...env, `${bin}/python`, "-X", "dev", `${root}tests/clients/${file}`);
  } finally {
    await Deno.remove(library);
  }
}

/** The Pythons that clients/python promises to run on, each with a version of websockets: the oldest, the newest, others. */
export const pythons = [
  { version: "3.10", websockets: "14.0" },
  { version: "3.11", websockets: "15.0.1" },
  { version: "3.12", websockets: "16.0" },
  { version: "3.13", websockets: "17.4" },
] as const;

/** The file of a Python of this version: on PATH, or one of pyenv's; undefined where there is none. */
export async function findPython(version: string): Promise<string | undefined> {
  // On PATH there may be pyenv's shim for a version that is not in use. It fails.
  const file = await run(`python${version}`, "-c", "import sys; print(sys.executable)").catch(() => undefined);
  if (file !== undefined) return file.trim();
  const versions = await run("pyenv", "versions", "--bare").catch(() => "");
  const found = versions.split("\n").find((each) => each.trim().startsWith(`${version}.`));
  return found && `${(await run("pyenv", "prefix", found.trim())).trim()}/bin/python`;
}

/** A folder with what one of `pythons` needs for the client, made once. */
export async function websocketsFor({ version, websockets }: typeof pythons[number]): Promise<string> {
  const folder = `${root}.tools/websockets-${websockets}`;
  const isThere = await Deno.stat(`${folder}/websockets-${websockets}.dist-info`).then(() => true, () => false);
  if (isThere) return folder;
  const words = [
    "--quiet",
    "--disable-pip-version-check",
    "--no-deps",
    "--only-binary=:all:",
    "--python-version",
    version,
  ];
  await run(`${await clientsVenv()}/pip`, "install", ...words, "--target", folder, `websockets==${websockets}`);
  return folder;
}

if (import.meta.main) {
  // It loads the rest of itself when it is first run.
  const forAgents = Deno.args.includes("agents");
  await run(`${await (forAgents ? agentsVenv() : clientsVenv())}/pyright`, "--version");
  if (!forAgents) {
    for (const each of pythons) if (await findPython(each.version) !== undefined) await websocketsFor(each);
  }
}
