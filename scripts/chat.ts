/**
 * `deno task chat [FOLDER] [--install]`: the chat of examples/chat, or of a folder that was made of it, with all that it needs: it
 * installs what the folder names, starts Redis, the proxy, two workers, the API and the page, and prints one address.
 * Whatever ends is started again; a line with its name kills it, to see what the page shows then.
 */

import {
  Child,
  Failure,
  freePort,
  type Interrupt,
  readLines,
  runUntilInterrupted,
  startProxy,
  startRedis,
  waitUntilHealthy,
} from "./processes.ts";

const onlyInstall = "--install";
const pagePort = 8000;
/** One that ends sooner than this has something wrong with it, and is not started again at once. */
const livedMs = 2000;
const clientPackage = new URL("../clients/python", import.meta.url).pathname;

/** What the folder needs, unless it is there. */
const install = `
set -e
if ! cmp -s requirements.txt .venv/installed; then
  echo "installing what the backend needs" >&3
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 must be 3.10 or later")'
  python3 -m venv --clear .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/installed
fi
if ! npm ls >/dev/null 2>&1; then
  echo "installing what the page needs" >&3
  node -e '
    const [major, minor] = process.versions.node.split(".").map(Number);
    const fits = major > 22 || major === 22 && minor >= 12 || major === 20 && minor >= 19;
    if (!fits) console.log("node must be 20.19, or 22.12 or later: it is " + process.versions.node);
    process.exitCode = fits ? 0 : 1;
  '
  npm ci --no-audit --no-fund --loglevel=error
fi
`;

/** A child that is started again whenever it ends. */
class Immortal implements AsyncDisposable {
  #child: Child;
  #disposed = false;
  readonly #watched: Promise<void>;

  constructor(readonly start: () => Child) {
    this.#child = start();
    this.#watched = this.#watch();
  }

  kill(): void {
    this.#child.kill();
  }

  async #watch(): Promise<void> {
    while (true) {
      const since = performance.now();
      const end = await this.#child.ended;
      if (this.#disposed) return;
      if (performance.now() - since < livedMs) {
        console.error(`${end}, and is started again`);
        await new Promise((resolve) => setTimeout(resolve, livedMs));
      }
      if (this.#disposed) return;
      this.#child = this.start();
    }
  }

  /** At once: whatever it is doing, there will be no page to show it. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    this.kill();
    await this.#child.ended;
  }
}

async function installInto(cwd: string): Promise<void> {
  const { success, stdout } = await new Deno.Command("sh", {
    args: ["-c", `exec 3>&2 2>&1; ${install}`],
    cwd,
    stdin: "null",
    stdout: "piped",
    stderr: "inherit",
  }).output();
  if (!success) throw new Failure(`${new TextDecoder().decode(stdout).trim()}\nthis could not be installed`);
}

/** Waits until a server answers, whatever it says. */
async function waitUntilServed(url: string): Promise<void> {
  while (true) {
    const response = await fetch(url).catch(() => undefined);
    await response?.body?.cancel();
    if (response) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function run(interrupt: Interrupt): Promise<void> {
  const [folder = "examples/chat"] = Deno.args.filter((word) => word !== onlyInstall);
  const cwd = Deno.realPathSync(folder);
  await installInto(cwd);
  if (Deno.args.includes(onlyInstall)) return;
  const [redisPort, proxyPort, apiPort] = [0, 0, 0].map((port) => freePort("127.0.0.1", port));
  const REDIS_URL = Deno.env.get("REDIS_URL") || `redis://127.0.0.1:${redisPort}`;
  const JWT_SECRET = crypto.randomUUID() + crypto.randomUUID();
  const API_URL = `http://127.0.0.1:${apiPort}`;
  const port = choosePagePort();
  const python = (name: string, ...args: string[]) => () =>
    new Child(name, `${cwd}/.venv/bin/python`, {
      args,
      cwd,
      env: { REDIS_URL, JWT_SECRET, PROXY_URL: `ws://127.0.0.1:${proxyPort}`, PYTHONPATH: clientPackage },
    });
  await using redis = Deno.env.get("REDIS_URL") ? undefined : await startRedis(redisPort!);
  await using proxy = new Immortal(() =>
    startProxy({
      HOST: "127.0.0.1",
      PORT: String(proxyPort),
      REDIS_URL,
      JWT_SECRET,
      INBOX: "true",
      LOG_FORMAT: "text",
      LOG_LEVEL: "warn",
    })
  );
  await waitUntilHealthy(`http://127.0.0.1:${proxyPort}`);
  const api = ["-m", "uvicorn", "--app-dir", "backend", "--port", String(apiPort), "--log-level", "warning", "app:app"];
  await using backend = new Immortal(python("backend", ...api));
  await using worker = new Immortal(python("worker", "backend/worker.py"));
  await using other = new Immortal(python("worker 2", "backend/worker.py"));
  const vite = ["node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--strictPort", "--logLevel", "warn"];
  await using page = new Immortal(() =>
    new Child("page", "node", { args: [...vite, "--port", String(port)], cwd, env: { API_URL } })
  );
  const victims: Record<string, Immortal> = { proxy, backend, worker, "worker 2": other, page };
  interrupt.onSecond = () => redis?.kill();
  const started = Promise.all([waitUntilServed(`http://127.0.0.1:${port}/`), waitUntilServed(`${API_URL}/api/chats`)]);
  const first = await Promise.race([started, interrupt.received.then(() => "interrupted")]);
  if (first === "interrupted") return;
  console.log(`
Open http://127.0.0.1:${port}/ and ask something.
To see what happens when one of them dies, type ${Object.keys(victims).join(", ")} and Enter. Ctrl-C ends all of it.
`);
  readLines(Deno.stdin.readable, (line) => victims[line.trim()]?.kill());
  const end = await Promise.race([interrupt.received, ...redis ? [redis.ended] : []]);
  if (end !== undefined) throw new Failure(end);
}

/** The port that `PORT` names, or the usual one, or a free one where that is taken. */
function choosePagePort(): number {
  const given = Deno.env.get("PORT");
  try {
    return freePort("127.0.0.1", Number(given || pagePort));
  } catch (error) {
    if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    if (given) throw new Failure(`PORT must be free: something listens on ${given}`);
    return freePort("127.0.0.1", 0);
  }
}

await runUntilInterrupted(run);
