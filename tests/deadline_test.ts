import assert from "node:assert/strict";
import process from "node:process";
import fc from "fast-check";
import { after, type Deadline, Deadlines, settled, within } from "../src/deadline.ts";

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

Deno.test("A time that is over, none, or too far off is no delay that a timer is warned of", async () => {
  const warnings: string[] = [];
  const onWarning = ({ name }: Error) => warnings.push(name);
  process.on("warning", onWarning);
  const come = (delayMs: number) => new Promise<void>((resolve) => after(delayMs, resolve));
  const never = new Promise<never>(() => {});
  for (const overMs of [-1, -Infinity, NaN]) {
    await come(overMs);
    assert.equal(await within(overMs, never, () => "late"), "late");
    await new Promise<void>((resolve) => new Deadlines().set(overMs, resolve));
  }
  for (const farMs of [2 ** 31, Infinity]) {
    clearTimeout(after(farMs, () => assert.fail()));
    assert.equal(await within(farMs, Promise.resolve("in time"), () => "late"), "in time");
  }
  const deadlines = new Deadlines();
  await new Promise<void>((resolve) => {
    // The next one is due by the time this one has ended, as under load.
    deadlines.set(1, () => {
      const sinceMs = performance.now();
      while (performance.now() < sinceMs + 60);
    });
    deadlines.set(40, resolve);
  });
  // Warnings come in a turn of their own.
  await come(0);
  process.off("warning", onWarning);
  assert.deepEqual(warnings, []);
});
