import assert from "node:assert/strict";
import { setImmediate } from "node:timers/promises";
import { Turns } from "../../src/http/turns.ts";

Deno.test("Steps beyond those of one turn wait for later turns, in order, and other work has its turn between them", async () => {
  const turns = new Turns();
  const log: string[] = [];
  const steps: Promise<unknown>[] = [];
  for (let n = 0; n < 10; n++) {
    const turn = turns.take();
    if (turn === undefined) log.push(String(n));
    else steps.push(turn.then(() => log.push(String(n))));
  }
  assert.equal(log.join(""), "01");
  for (let n = 0; n < 4; n++) {
    await setImmediate();
    log.push("-");
  }
  await Promise.all(steps);
  assert.match(log.join(""), /^01-?23-45-67-89-?$/);
  // Turns that no handshake needed are not saved up.
  for (let n = 0; n < 5; n++) await setImmediate();
  const later = Array.from({ length: 6 }, () => turns.take());
  assert.deepEqual(later.map((turn) => turn === undefined), [true, true, false, false, false, false]);
  await Promise.all(later);
});
