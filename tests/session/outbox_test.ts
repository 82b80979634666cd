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
        const outbox = new Outbox(3000, { tooSlow: () => assert.fail("it is not stuck") });
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

/** An outbox with an open transport, and how often its client was found to be stuck. */
function opened(maxBytes: number, pipe: Pipe): { outbox: Outbox; stuck: () => number } {
  let stuck = 0;
  const outbox = new Outbox(maxBytes, {
    tooSlow() {
      stuck++;
      outbox.close();
    },
  });
  outbox.open(pipe);
  return { outbox, stuck: () => stuck };
}

Deno.test("A client that takes nothing is stuck, and one that takes a little is not", async () => {
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  for (let n = 0; n < 20; n++) outbox.send("x".repeat(50));
  let taken = 0;
  while (pipe.sent.length < 20 && stuck() === 0) {
    pipe.take(1);
    taken++;
    await new Promise((resolve) => setTimeout(resolve, 0));
    if (taken % 50 === 0) pipe.take(2000);
  }
  assert.equal(stuck(), 0);
  for (let n = 0; n < 10; n++) outbox.send(String(n));
  assert.equal(outbox.backlog, "none");
  await eventually("it is stuck", () => stuck() > 0);
  assert.equal(stuck(), 1);
  outbox.send("nothing comes of this");
  assert(!pipe.sent.includes("nothing comes of this"));
});

Deno.test("A line that carries nothing for a second is no stuck client, while no more is held than it may cost", async () => {
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  for (let n = 0; n < 20; n++) outbox.send(String(n));
  assert(pipe.sent.length < 20);
  // The length of the pause is what is tested.
  await new Promise((resolve) => setTimeout(resolve, 1000));
  pipe.take(Infinity);
  await eventually("all is out", () => {
    pipe.take(Infinity);
    return pipe.sent.length === 20;
  });
  assert.equal(stuck(), 0);
});

Deno.test("Reading waits for a client that takes nothing no longer than for one that takes too little", async () => {
  /** Counts the looks at a client, which are ten milliseconds of its own apart, however slow the machine is. */
  let looks = 0;
  class StuckPipe extends Pipe {
    constructor() {
      super();
      Object.defineProperty(this, "bufferedAmount", { get: () => (looks++, 1_000_000) });
    }
    override send(): void {}
  }
  const { outbox, stuck } = opened(100_000, new StuckPipe());
  while (outbox.send("x".repeat(1000)) === "taken");
  looks = 0;
  await eventually("it is not waited for", () => outbox.send("x") === "taken");
  assert.equal(outbox.backlog, "none");
  assert.equal(stuck(), 0);
  // Three for each time: what is unsent, whether there is room, and what is unsent after that.
  assert(looks <= 3 * 10, `only after ${looks} looks`);
  outbox.close();
});

Deno.test("A client that takes all it gets may be behind for as long as it takes", async () => {
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  const sent = Array.from({ length: 1000 }, (_, n) => `message ${n}`);
  // Far more than may be held.
  for (const text of sent) outbox.send(text);
  assert.equal(outbox.backlog, "moving");
  while (pipe.sent.length < sent.length && stuck() === 0) {
    pipe.take(Infinity);
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
  assert.equal(stuck(), 0);
  assert.deepEqual(pipe.sent, sent);
  assert.equal(outbox.backlog, "none");
});

Deno.test("A client that takes a little, while more is held than it may cost, is too slow", async () => {
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  for (let n = 0; n < 1000; n++) outbox.send("x".repeat(10));
  await eventually("it is too slow", () => {
    pipe.take(1);
    return stuck() > 0;
  });
  assert(pipe.sent.length < 100, `${pipe.sent.length} sent`);
});

Deno.test("No more is held than one client may cost, with or without a transport", async () => {
  for (const [text, most] of [["x".repeat(500), 500], ["\u{5b57}".repeat(500), 300]] as const) {
    for (const open of [false, true]) {
      const pipe = new Pipe();
      let stuck = 0;
      const outbox = new Outbox(10_000, {
        tooSlow() {
          stuck++;
          outbox.close();
        },
      });
      if (open) outbox.open(pipe);
      let sent = 0;
      // All in one turn: nothing can be judged, and there is an end to that.
      for (; stuck === 0 && sent < most; sent++) outbox.send(Buffer.from(text));
      assert(sent < most, `${sent} held`);
      assert(pipe.sent.length < 20);
      outbox.send(Buffer.from(text));
      assert.equal(stuck, 1);
    }
  }
  // And what is a little too much is judged once there was a chance to take it.
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  for (let n = 0; n < 30; n++) outbox.send("x".repeat(500));
  assert.equal(stuck(), 0);
  await eventually("it is stuck", () => stuck() > 0);
});

Deno.test("A message is held whatever its size, when it is the only one", () => {
  const pipe = new Pipe();
  const { outbox, stuck } = opened(10_000, pipe);
  outbox.send("x".repeat(900_000));
  outbox.send("y".repeat(900_000));
  assert.equal(stuck(), 0);
  outbox.send("z".repeat(900_000));
  assert.equal(stuck(), 1);
});

Deno.test("What is held is flushed before a close, and dropped by it", () => {
  const pipe = new Pipe();
  const outbox = new Outbox(10_000, { tooSlow() {} });
  outbox.open(pipe);
  for (let n = 0; n < 15; n++) outbox.send("x".repeat(500));
  assert(pipe.sent.length < 15);
  outbox.flush();
  assert.equal(pipe.sent.length, 15);
  outbox.close();
});
