/**
 * A health check without curl, for images that have none: asks the URL given as the only argument, prints the answer,
 * and exits with 0 for a 2xx status, else with 1. Needs `--allow-net` for that host and port.
 */

const timeoutMs = 2000;

try {
  const answer = await fetch(Deno.args[0]!, { signal: AbortSignal.timeout(timeoutMs) });
  console.log(answer.status, await answer.text());
  Deno.exitCode = answer.ok ? 0 : 1;
} catch (error) {
  console.log(error instanceof Error ? error.message : error);
  Deno.exitCode = 1;
}
