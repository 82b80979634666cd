import assert from "node:assert/strict";
import fc from "fast-check";
import { type Deadline, Deadlines, settled } from "../src/deadline.ts";

Deno.test("Each of many deadlines comes once and not before it is due, and those that are called off never", async () => {
  const plan = fc.array(
    fc.record({
      delayMs: fc.oneof(fc.nat(50), fc.nat(2000)),
      /** Called off at once, when another one comes, or not at all. */
      fate: fc.constantFrom("stays", "stays", "cancelled", "cancelledLater"),
      /** Sets another one when it comes. */
      sets: fc.option(fc.nat(300), { nil: undefined }),
    }),
    { minLength: 1000, maxLength: 1000 },
  );
  await fc.assert(
    fc.asyncProperty(plan, async (rows) => {
      const deadlines = new Deadlines();
      const late: Deadline[] = [];
      const came: string[] = [];
      const all = Promise.withResolvers<void>();
      let left = 0;
      const set = (name: string, delayMs: number, then: () => void): Deadline => {
        const dueMs = performance.now() + delayMs;
        left++;
        return deadlines.set(delayMs, () => {
          assert(performance.now() >= dueMs, `${name} came ${dueMs - performance.now()} ms too early`);
          came.push(name);
          late.pop()?.cancel();
          then();
          if (--left === 0) all.resolve();
        });
      };
      const stay: string[] = [];
      for (const [i, { delayMs, fate, sets }] of rows.entries()) {
        if (fate === "stays") {
          stay.push(`${i}`);
          if (sets !== undefined) stay.push(`${i}'s`);
          set(`${i}`, delayMs, () => sets !== undefined && set(`${i}'s`, sets, () => {}));
        } else {
          const deadline = deadlines.set(fate === "cancelled" ? delayMs : 60_000, () => came.push(`${i}, ${fate}`));
          if (fate === "cancelled") deadline.cancel();
          else late.push(deadline);
        }
      }
      await all.promise;
      for (const deadline of late) deadline.cancel();
      assert.deepEqual(came.toSorted(), stay.toSorted());
    }),
    { numRuns: 2 },
  );
});

Deno.test("A deadline that throws takes none of its neighbours with it, and the error is seen", async () => {
  const deadlines = new Deadlines();
  const seen = Promise.withResolvers<unknown>();
  const onError = (event: ErrorEvent) => {
    event.preventDefault();
    seen.resolve(event.error);
  };
  addEventListener("error", onError, { once: true });
  const bug = new Error("a bug");
  deadlines.set(10, () => {
    throw bug;
  });
  await new Promise<void>((resolve) => deadlines.set(10, resolve));
  assert.equal(await seen.promise, bug);
});

Deno.test("A deadline that is infinitely far away never comes, and others do", async () => {
  const deadlines = new Deadlines();
  const never = deadlines.set(Infinity, () => assert.fail());
  const far = deadlines.set(Number.MAX_SAFE_INTEGER, () => assert.fail());
  await new Promise<void>((resolve) => deadlines.set(20, resolve));
  never.cancel();
  far.cancel();
});

Deno.test("Of many promises the first that are enough count, in their order, and the rest is left", async () => {
  const never = new Promise<number>(() => {});
  const three = [Promise.resolve(1), never, Promise.resolve(3), Promise.reject<number>(new Error("a reason"))];
  const some = await settled(three, (values) => values.length === 2);
  assert.deepEqual(some.values, [1, 3]);
  const all = await settled(
    [...three.slice(2), new Promise<number>((resolve) => queueMicrotask(() => resolve(5)))],
    () => {
      return false;
    },
  );
  assert.deepEqual([all.values, all.errors.map(String)], [[3, 5], ["Error: a reason"]]);
  assert.deepEqual(await settled([], () => false), { values: [], errors: [] });
});
