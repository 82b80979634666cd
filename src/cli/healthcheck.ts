/** `wsproxy healthcheck`: a health check without curl, for images that have none. */

import { UsageError } from "./usage.ts";

const timeoutMs = 2000;

/** Asks the proxy that `HOST` and `PORT` name, or a URL; prints the answer; 0 for a 2xx status, else 1. */
export async function healthcheck([url, ...more]: string[]): Promise<number> {
  if (more.length > 0) throw new UsageError("usage: wsproxy healthcheck [<url>]");
  try {
    const answer = await fetch(url ?? ownUrl(), { signal: AbortSignal.timeout(timeoutMs) });
    console.log(answer.status, await answer.text());
    return answer.ok ? 0 : 1;
  } catch (error) {
    const { cause = error } = error as Error;
    console.log(cause instanceof Error ? cause.message : cause);
    return 1;
  }
}

/** Where a proxy with these settings answers, from the same machine. */
function ownUrl(): string {
  const host = (Deno.env.get("HOST") || "0.0.0.0").replace(/^\[(.*)\]$/, "$1");
  const reachable = host === "0.0.0.0" ? "127.0.0.1" : host === "::" ? "::1" : host;
  return `http://${reachable.includes(":") ? `[${reachable}]` : reachable}:${Deno.env.get("PORT") || "8080"}/health`;
}
