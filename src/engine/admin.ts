/** `ADMIN_PORT`: where operators are served, by one proxy or for all workers. */

import type { Config } from "../config.ts";
import { listenPlain } from "./deno.ts";
import { Admin, type AdminContext } from "../http/admin.ts";
import type { Operator } from "../http/operator.ts";
import { createAdminRouter } from "../http/router.ts";

/** Listens; returns what ends it. @throws what the operating system says. */
export function listenAdmin(
  settings: NonNullable<Config["admin"]>,
  { operator, ...context }: Pick<AdminContext, "reports" | "log"> & { readonly operator: Operator },
): () => Promise<void> {
  const admin = new Admin({ ...settings, ...context });
  return listenPlain(createAdminRouter(operator, admin, context.log), settings);
}
