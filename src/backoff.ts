/**
 * How long to wait before another attempt, in milliseconds: twice as long after each failure, from `firstMs` up to
 * `maxMs`, less up to half of it, so that clients that failed together do not come back together.
 */
export function backoffMs(failures: number, firstMs: number, maxMs: number): number {
  // 2^16 of the shortest delay is beyond the longest, and 2^1024 would be infinite.
  return Math.min(maxMs, firstMs * 2 ** Math.min(failures, 16)) * (0.5 + Math.random() / 2);
}
