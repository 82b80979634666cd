/** `wsproxy healthcheck`: a health check without curl, for images that have none. */

import http from "node:http";
import https from "node:https";
import { settings } from "../settings.ts";
import { UsageError } from "./usage.ts";

const timeoutMs = 2000;

/** Asks the proxy that `HOST` and `PORT` name, or a URL; prints the answer; 0 for a 2xx status, else 1. */
export async function healthcheck([url, ...more]: string[]): Promise<number> {
  if (more.length > 0) throw new UsageError("usage: wsproxy healthcheck [<url>]");
  try {
    const { status, body } = await get(url ?? ownUrl(), AbortSignal.timeout(timeoutMs));
    console.log(status, body);
    return status >= 200 && status < 300 ? 0 : 1;
  } catch (error) {
    console.log(error instanceof Error ? error.message : error);
    return 1;
  }
}

/**
 * What a URL answers when its own host is asked. `fetch` would ask the proxy that HTTP_PROXY or ALL_PROXY names, which
 * cannot reach this machine by 127.0.0.1.
 */
export function get(url: string, signal: AbortSignal): Promise<{ status: number; body: string }> {
  const { promise, resolve, reject } = Promise.withResolvers<{ status: number; body: string }>();
  // Whatever the other side answers: a 101 settles nothing.
  signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  const ask = url.startsWith("https:") ? https.get : http.get;
  ask(url, { agent: false, signal }, (answer) => {
    let body = "";
    answer.setEncoding("utf8").on("data", (text) => body += text);
    answer.on("end", () => resolve({ status: answer.statusCode!, body }));
    answer.on("error", reject);
  }).on("error", reject);
  return promise;
}

/** Where a proxy with these settings answers, from the same machine. */
function ownUrl(): string {
  const host = (Deno.env.get("HOST") || settings.HOST.default).replace(/^\[(.*)\]$/, "$1");
  return `http://${reachableHost(host)}:${Deno.env.get("PORT") || settings.PORT.default}/health`;
}

/** The host of a URL that leads to what listens on an address of this machine, which may be all of them. */
export function reachableHost(address: string): string {
  return hostInUrl(address === "0.0.0.0" ? "127.0.0.1" : address === "::" ? "::1" : address);
}

/** In a URL an IPv6 address stands in brackets. */
export function hostInUrl(address: string): string {
  return address.includes(":") ? `[${address}]` : address;
}
