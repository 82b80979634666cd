/** The caller's mistake, in one line or with the usage. */
export class UsageError extends Error {
  /** Tells it from a bug. */
  override readonly name = "UsageError";
}
