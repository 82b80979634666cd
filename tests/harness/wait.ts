/** Waiting for events, with a generous limit only so that a failure is reported instead of hanging. */

import { within } from "../../src/deadline.ts";

/** How long an event may take before a test gives up on it. These machines stall, so it is long. */
export const patienceMs = 20_000;

/** The promise, or an error that names what did not happen. */
export function soon<T>(promise: Promise<T>, what: string, forMs = patienceMs): Promise<T> {
  return within(forMs, promise, (): never => {
    throw new Error(`${what}: not within ${forMs} ms`);
  });
}

/** Asks until the answer is yes, for what has no event: state inside Redis or the proxy. */
export async function eventually(
  what: string,
  check: () => boolean | Promise<boolean>,
  forMs = patienceMs,
): Promise<void> {
  const begin = performance.now();
  while (!await check()) {
    const waitedMs = performance.now() - begin;
    if (waitedMs > forMs) throw new Error(`${what}: not within ${forMs} ms`);
    // What takes long may be seen somewhat later: asking costs time that other tests need.
    const pauseMs = Math.min(100, Math.max(5, waitedMs / 20));
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
}
