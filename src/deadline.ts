/** The ways to wait with a deadline: one promise, or thousands of sessions. */

/** The longest delay a timer can hold; a longer one would fire at once. */
const maxTimerMs = 2 ** 31 - 1;

/**
 * `setTimeout` for a delay that was computed: a time that is over already, or is no number, has come, and 24 days are
 * the longest. Node and Deno print a warning for each such delay.
 */
export function after(delayMs: number, action: () => void): ReturnType<typeof setTimeout> {
  return setTimeout(action, delayMs > 0 ? Math.min(delayMs, maxTimerMs) : 0);
}

/**
 * The promise's outcome, or after `ms` milliseconds what `late` returns or throws. The promise itself goes on; when it
 * is late its rejection is handled.
 */
export async function within<T, L = void>(ms: number, promise: Promise<T>, late?: () => L): Promise<T | L> {
  const { promise: expired, resolve } = Promise.withResolvers<typeof tooLate>();
  const timer = after(ms, () => resolve(tooLate));
  try {
    const outcome = await Promise.race([promise, expired]);
    if (outcome !== tooLate) return outcome as T;
    promise.catch(() => {});
    return late?.() as L;
  } finally {
    clearTimeout(timer);
  }
}

/**
 * What the promises have come to, in their order, as soon as that is `enough` or all are settled. The others go on;
 * their rejections are handled.
 */
export async function settled<T>(
  promises: readonly Promise<T>[],
  enough: (values: readonly T[]) => boolean,
): Promise<{ readonly values: readonly T[]; readonly errors: readonly unknown[] }> {
  // Numbers as keys stay in order, whichever comes first.
  const values: Record<number, T> = {};
  const errors: unknown[] = [];
  let left = promises.length;
  const { promise: done, resolve } = Promise.withResolvers<void>();
  if (left === 0) resolve();
  for (const [i, promise] of promises.entries()) {
    promise.then((value) => void (values[i] = value), (error) => void errors.push(error)).then(() => {
      if (--left === 0 || enough(Object.values(values))) resolve();
    });
  }
  await done;
  return { values: Object.values(values), errors: [...errors] };
}

const tooLate = Symbol("too late");

/** What is to happen at a time, unless it is called off. */
export interface Deadline {
  /** Idempotent; does nothing when the time has come. */
  cancel(): void;
}

/** How late an action may be, in milliseconds: those that are due in the same step share a turn. */
const stepMs = 16;
/** A bucket is this share of the time that is left until it, so that a few hundred hold any number of deadlines. */
const bucketsPerDoubling = 32;

/**
 * Deadlines of many sessions, on one timer. A timer of its own costs a session half a kilobyte and some 5 us, whether or
 * not it ever fires, and nearly none of them does: the client opens, the peer answers, the token is renewed.
 *
 * A deadline waits in a bucket with others that are due at about the same time, and the further off they are, the more
 * that is; when a bucket's time begins, those that are not due yet go to finer ones.
 */
export class Deadlines {
  /** By the time at which they are looked at, in milliseconds of `performance.now()`. */
  readonly #buckets = new Map<number, Set<Pending>>();
  #pending = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #wakesAtMs = Infinity;

  /**
   * Calls `action` in `delayMs` milliseconds, or up to 16 later; never for `Infinity`, and soon for what is no number.
   * What it throws ends the process, as in a timer.
   */
  set(delayMs: number, action: () => void): Deadline {
    const leftMs = delayMs > 0 ? delayMs : 0;
    const pending = new Pending(performance.now() + leftMs, action, this.#onCancel);
    this.#pending++;
    this.#place(pending, leftMs);
    return pending;
  }

  #place(pending: Pending, leftMs: number): void {
    const atMs = lookAtMs(pending.dueMs, leftMs);
    let bucket = this.#buckets.get(atMs);
    if (bucket === undefined) this.#buckets.set(atMs, bucket = new Set());
    bucket.add(pending);
    pending.bucket = bucket;
    if (atMs < this.#wakesAtMs) this.#wakeAt(atMs);
  }

  #wakeAt(atMs: number): void {
    clearTimeout(this.#timer);
    this.#wakesAtMs = atMs;
    this.#timer = atMs === Infinity ? undefined : after(Math.ceil(atMs - performance.now()), this.#look);
  }

  readonly #look = (): void => {
    this.#wakesAtMs = -Infinity; // a deadline that is set meanwhile is waited for below
    const nowMs = performance.now();
    for (const [atMs, bucket] of this.#buckets) {
      if (atMs > nowMs) continue;
      this.#buckets.delete(atMs);
      for (const pending of bucket) {
        const leftMs = pending.dueMs - nowMs;
        if (leftMs > 0) this.#place(pending, leftMs);
        else this.#act(pending);
      }
    }
    this.#wakeAt(this.#pending === 0 ? this.#forget() : Math.min(...this.#buckets.keys()));
  };

  #act(pending: Pending): void {
    pending.bucket = undefined;
    this.#pending--;
    try {
      pending.action();
    } catch (error) {
      // The others still have their turn.
      queueMicrotask(() => {
        throw error;
      });
    }
  }

  /** With no deadline left, nothing keeps the process alive. */
  readonly #onCancel = (): void => {
    if (--this.#pending === 0 && this.#wakesAtMs !== -Infinity) this.#wakeAt(this.#forget());
  };

  /** Returns when to wake. */
  #forget(): number {
    this.#buckets.clear();
    return Infinity;
  }
}

class Pending implements Deadline {
  readonly dueMs: number;
  readonly action: () => void;
  readonly #onCancel: () => void;
  /** Where it waits; undefined when its time has come. */
  bucket: Set<Pending> | undefined;

  constructor(dueMs: number, action: () => void, onCancel: () => void) {
    this.dueMs = dueMs;
    this.action = action;
    this.#onCancel = onCancel;
  }

  cancel(): void {
    if (!this.bucket?.delete(this)) return;
    this.bucket = undefined;
    this.#onCancel();
  }
}

/** When to look at a deadline: not later than it is due when that is far off, and in the step after it otherwise. */
function lookAtMs(dueMs: number, leftMs: number): number {
  const shareMs = leftMs / bucketsPerDoubling;
  if (shareMs < stepMs) return Math.ceil(dueMs / stepMs) * stepMs;
  const sizeMs = 2 ** Math.floor(Math.log2(Math.min(shareMs, maxTimerMs)));
  return Math.floor(dueMs / sizeMs) * sizeMs;
}
