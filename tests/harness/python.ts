/** Python for tests, in virtual environments below .tools/. Run as a program it makes those of test:python. */

const root = new URL("../../", import.meta.url).pathname;

/** What a command prints. @throws what it says when it fails. */
export async function run(command: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(command, { args }).output();
  const text = new TextDecoder().decode(stdout);
  if (!success) throw new Error(`${command} failed: ${text}${new TextDecoder().decode(stderr)}`);
  return text;
}

/** A virtual environment with these packages, made once; `name==version` each. Returns the folder of its programs. */
export async function venv(name: string, packages: readonly string[]): Promise<string> {
  const bin = `${root}.tools/${name}/bin`;
  const installed = await run(`${bin}/pip`, "freeze").catch(() => "");
  if (!packages.every((each) => installed.includes(each))) {
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
  await run(`${await clientsVenv()}/pyright`, "--version");
  for (const each of pythons) if (await findPython(each.version) !== undefined) await websocketsFor(each);
}
