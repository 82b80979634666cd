/** The caller's mistake, in one line or with the usage. */
export class UsageError extends Error {
  /** Tells it from a bug. */
  override readonly name = "UsageError";
}

/** How `token` is called, for its own usage and for the list of all commands. */
export const tokenUsage = `wsproxy token <session_id> [--agent <agent_id>] [--ttl <seconds, or 15m, 1h, 7d>]
       wsproxy token --verify <token> [--session <session_id>] [--agent <agent_id>]`;
