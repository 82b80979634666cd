/** The one way to wait with a deadline. */

/**
 * The promise's outcome, or after `ms` milliseconds what `late` returns or throws. The promise itself goes on; when it
 * is late its rejection is handled.
 */
export async function within<T, L = void>(ms: number, promise: Promise<T>, late?: () => L): Promise<T | L> {
  const { promise: expired, resolve } = Promise.withResolvers<typeof tooLate>();
  const timer = setTimeout(() => resolve(tooLate), ms);
  try {
    const outcome = await Promise.race([promise, expired]);
    if (outcome !== tooLate) return outcome as T;
    promise.catch(() => {});
    return late?.() as L;
  } finally {
    clearTimeout(timer);
  }
}

const tooLate = Symbol("too late");
