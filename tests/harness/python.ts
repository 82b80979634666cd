/** Python for tests, in virtual environments below .tools/. Run as a program it makes the one of test:python. */

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

/** The virtual environment of what clients/python and examples/ need. */
export function clientsVenv(): Promise<string> {
  const requirements = Deno.readTextFileSync(`${root}examples/requirements.txt`).trim().split(/\s+/);
  return venv("python", [...requirements, "websockets==16.0", "build==1.3.0"]);
}

if (import.meta.main) await clientsVenv();
