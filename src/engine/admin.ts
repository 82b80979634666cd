/** `ADMIN_PORT`: where operators are served, by one proxy or for all workers. */

import type { Config } from "../config.ts";
import { listenPlain } from "./deno.ts";
import { Admin, type AdminContext } from "../http/admin.ts";
import type { Operator } from "../http/operator.ts";
import { RefusalLog } from "../http/refusal_log.ts";
import { createAdminRouter } from "../http/router.ts";
import type { RefusalName } from "../replies.ts";

/** Attempts to get in. A browser's first request has no password, and is none. */
const attempts: ReadonlySet<RefusalName> = new Set(["wrongPassword", "tooManyTries", "foreignHost"]);

/** Listens; returns what ends it. @throws what the operating system says. */
export function listenAdmin(
  settings: NonNullable<Config["admin"]>,
  { operator, ...context }: Pick<AdminContext, "ask" | "log" | "forwarding"> & { readonly operator: Operator },
): () => Promise<void> {
  const admin = new Admin({ ...settings, ...context });
  const refusals = new RefusalLog(context.log, { level: "warn", lines: 1, windowMs: 10_000 });
  const router = createAdminRouter(operator, admin, context.log, (refusal) => {
    if (attempts.has(refusal.refusal)) refusals.add(refusal);
  });
  const close = listenPlain(router, settings);
  return () => {
    refusals.close();
    return close();
  };
}
