/** Workers as processes: answers_worker.ts and answers_worker.py. */

/** A library of TypeScript, or a Python that has redis-py. */
export type Library = "ioredis" | "node-redis" | { readonly python: string };

/** Starts one for the agent `agent`; what it complains of is shown. */
export function startWorker(url: string, library: Library, leaseMs: number): Deno.ChildProcess {
  const folder = new URL(".", import.meta.url).pathname;
  const env = { REDIS_URL: url, LEASE_MS: String(leaseMs) };
  const options = { stdin: "null", stdout: "null", stderr: "inherit" } as const;
  if (typeof library === "object") {
    const path = { PYTHONPATH: `${folder}../../clients/python` };
    const args = ["-u", `${folder}answers_worker.py`];
    return new Deno.Command(library.python, { ...options, args, env: { ...env, ...path } }).spawn();
  }
  const rights = ["--allow-net", "--allow-env", "--allow-read", "--allow-sys"];
  return new Deno.Command(Deno.execPath(), {
    ...options,
    args: ["run", "--quiet", "--no-check", ...rights, `${folder}answers_worker.ts`],
    env: { ...env, LIBRARY: library },
  }).spawn();
}
