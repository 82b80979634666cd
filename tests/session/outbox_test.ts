import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import { Outbox } from "../../src/session/outbox.ts";
import { SendBudget } from "../../src/session/send_budget.ts";
import { eventually } from "../harness/wait.ts";

/** A transport that hands to the kernel what the test lets it. */
class Pipe {
  readonly sent: string[] = [];
  bufferedAmount = 0;
  send(message: string | Buffer): void {
    this.sent.push(message.toString());
    this.bufferedAmount += Buffer.byteLength(message);
  }
  close(): void {}
  terminate(): void {}
  /** The kernel takes so many bytes. */
  take(bytes: number): void {
    this.bufferedAmount = Math.max(0, this.bufferedAmount - bytes);
  }
}

Deno.test("A budget never takes less for unsent than there is, and is whole again when nothing is", () => {
  fc.assert(fc.property(
    fc.array(fc.tuple(fc.string({ unit: "grapheme", maxLength: 2000 }), fc.nat(3000)), { maxLength: 50 }),
    (steps) => {
      const pipe = new Pipe();
      const budget = new SendBudget(20_000);
      for (const [text, taken] of steps) {
        budget.spend(text);
        pipe.send(text);
        pipe.take(taken);
        assert(budget.unsent(pipe) >= pipe.bufferedAmount);
        if (pipe.bufferedAmount >= 20_000) assert(!budget.hasRoom(pipe));
      }
      pipe.take(Infinity);
      assert.equal(budget.unsent(pipe), 0);
      assert(budget.hasRoom(pipe));
    },
  ));
});

Deno.test("Whatever is held, sent and taken, messages come out once and in order", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.oneof(fc.constant("send"), fc.constant("turn")), { maxLength: 200 }),
      async (steps) => {
        const pipe = new Pipe();
        const outbox = new Outbox(3000, () => assert.fail("it is not stuck"));
        const sent: string[] = [];
        let sinceTurn = 0;
        for (const [n, step] of steps.entries()) {
          if (n === 20) outbox.open(pipe);
          if (step === "turn" || sinceTurn === 15) {
            sinceTurn = 0;
            pipe.take(Infinity);
            await new Promise((resolve) => setTimeout(resolve, 0));
          }
          if (step === "send") {
            sinceTurn++;
            sent.push(`message ${n}`);
            outbox.send(n % 2 ? `message ${n}` : Buffer.from(`message ${n}`));
          }
        }
        outbox.open(pipe);
        await eventually("all is out", () => {
          pipe.take(Infinity);
          return pipe.sent.length === sent.length;
        });
        assert.deepEqual(pipe.sent, sent);
        outbox.close();
      },
    ),
    { numRuns: 50 },
  );
});

Deno.test("A client that takes nothing is stuck, and one that takes a little is not", async () => {
  let stuck = 0;
  const outbox = new Outbox(10_000, () => {
    stuck++;
    outbox.close();
  });
  const pipe = new Pipe();
  outbox.open(pipe);
  for (let n = 0; n < 20; n++) outbox.send("x".repeat(100));
  let taken = 0;
  while (pipe.sent.length < 20) {
    pipe.take(1);
    taken++;
    await new Promise((resolve) => setTimeout(resolve, 0));
    if (taken % 50 === 0) pipe.take(2000);
  }
  assert.equal(stuck, 0);
  for (let n = 0; n < 20; n++) outbox.send("x".repeat(100));
  await eventually("it is stuck", () => stuck > 0);
  assert.equal(stuck, 1);
  outbox.send("nothing comes of this");
  assert(!pipe.sent.includes("nothing comes of this"));
});

Deno.test("No more is held than one client may cost, with or without a transport", () => {
  for (const open of [false, true]) {
    const pipe = new Pipe();
    let stuck = 0;
    const outbox = new Outbox(10_000, () => {
      stuck++;
      outbox.close();
    });
    if (open) outbox.open(pipe);
    for (let n = 0; n < 1000; n++) outbox.send("x".repeat(500));
    assert.equal(stuck, 1);
    assert(pipe.sent.length < 20);
  }
});

Deno.test("What is held is flushed before a close, and dropped by it", () => {
  const pipe = new Pipe();
  const outbox = new Outbox(10_000, () => {});
  outbox.open(pipe);
  for (let n = 0; n < 15; n++) outbox.send("x".repeat(500));
  assert(pipe.sent.length < 15);
  outbox.flush();
  assert.equal(pipe.sent.length, 15);
  outbox.close();
});
