/** What a proxy says of itself to operators: alone, or as one worker of several, whose reports are put together. */

import type { MetricsReport } from "./metrics.ts";

/** What is asked. */
export type ReportKind = Report["kind"];

/** What one proxy knows. */
export type Report =
  | {
    readonly kind: "health";
    /** Open sockets. */
    readonly connections: number;
    /** What keeps messages from flowing through a server of Redis, by its name; null when nothing does. */
    readonly servers: Readonly<Record<string, string | null>>;
  }
  | { readonly kind: "metrics"; readonly metrics: MetricsReport };
