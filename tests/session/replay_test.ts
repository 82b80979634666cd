/** Catching up, against every interleaving of writing, reading, trimming and breaking that a generator thinks of. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import {
  beginning,
  type Entry,
  envelopeByte,
  formatPosition,
  parsePosition,
  type Position,
} from "../../src/redis/log_entry.ts";
import { dialects } from "../../src/session/frames.ts";
import { type LogSource, Replay, type ReplayListener } from "../../src/session/replay.ts";
import { eventually } from "../harness/wait.ts";

const dialect = dialects.socket.resuming;

/** A message of the log, as it is published. */
function publish(replay: Replay, position: Position, text: string): void {
  const head = `?${formatPosition(position)}\n`;
  const envelope = Buffer.from(head + text);
  envelope[0] = envelopeByte;
  replay.logged(position, envelope, head.length);
}

/** A log in memory, with the rules of log.lua; reads are answered when the test says so. */
class ModelLog implements LogSource {
  entries: Entry[] = [];
  ms = 1000;
  /** Reads that have been made, and wait for their answer. */
  readonly asked: (() => void)[] = [];

  append(payload: string): Position {
    const last = this.entries.at(-1)?.position;
    const position = { ms: last ? Math.max(last.ms, this.ms) : this.ms + 1, n: (last?.n ?? 0) + 1 };
    this.entries.push({ position, payload: Buffer.from(payload) });
    return position;
  }

  openLog(): Promise<Position> {
    if (this.entries.length === 0) this.entries.push({ position: { ms: this.ms + 1, n: 0 }, payload: undefined });
    return this.#answer(this.entries.at(-1)!.position);
  }

  readLog(from: Position, count: number): Promise<Entry[]> {
    const after = ({ position: { ms, n } }: Entry) => ms > from.ms || (ms === from.ms && n >= from.n);
    return this.#answer(this.entries.filter(after).slice(0, count));
  }

  /** The oldest read is answered, and all that comes of it is done. */
  async answer(): Promise<void> {
    this.asked.shift()?.();
    for (let turn = 0; turn < 200; turn++) await null;
  }

  /** What Redis has looked up is on its way. */
  #answer<T>(value: T): Promise<T> {
    return new Promise((resolve) => this.asked.push(() => resolve(value)));
  }
}

/** Sees frames as a client does, and knows what must not be. */
class Oracle implements ReplayListener {
  last = 0;
  toldOfGap = true;
  live = false;
  gaps = 0;
  /** What a gap has named; the next frame of the log comes right after it. */
  goesOn: string | undefined;
  plain = 0;
  slow = 0;
  send(frame: string | Buffer): "taken" {
    const text = frame.toString();
    const [head, body = ""] = [text.slice(0, text.indexOf("\n")), text.slice(text.indexOf("\n") + 1)];
    if (head === "!gap") {
      this.toldOfGap = true;
      this.gaps++;
    }
    if (head === "!gap") {
      this.goesOn = JSON.parse(body).position;
      return "taken";
    }
    if (this.goesOn !== undefined && head !== "") {
      const [gap, next] = [this.goesOn, head === "!live" ? body : head].map((at) => parsePosition(at)!);
      const follows = next!.n === gap!.n + 1 && (next!.ms === gap!.ms || gap!.n === 0);
      assert(head === "!live" ? body === this.goesOn : follows, `${head} ${body} after a gap up to ${this.goesOn}`);
      this.goesOn = undefined;
    }
    if (head === "!live") this.live = true;
    else if (head === "") {
      assert.equal(Number(body), this.plain + 1, "plain messages in order");
      this.plain++;
    } else {
      const number = Number(body);
      assert(this.toldOfGap || number === this.last + 1, `${number} after ${this.last}`);
      this.toldOfGap = false;
      this.last = number;
    }
    return "taken";
  }
  room(): Promise<void> {
    return Promise.resolve();
  }
  tooSlow(): void {
    this.slow++;
  }
  /** For how long the log could not be read, each time that it could not be. */
  readonly unreadMs: number[] = [];
  unread(_error: unknown, forMs: number): void {
    this.unreadMs.push(forMs);
  }
  caughtUp(): void {}
  end(): void {}
}

const actions = [
  "append",
  "append",
  "append",
  "plain",
  "answer",
  "answer",
  "answer",
  "tick",
  "trim",
  "flush",
  "break",
  "mend",
] as const;

Deno.test("Whatever is written, read, trimmed, flushed and broken in whatever order, nothing is lost untold", async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.constantFrom(...actions), { minLength: 5, maxLength: 120 }),
      fc.nat(60),
      async (steps, before) => {
        const log = new ModelLog();
        let sent = 0;
        let plain = 0;
        for (let n = 0; n < before; n++) log.append(String(++sent));
        const oracle = new Oracle();
        const replay = new Replay(log, oracle, dialect, beginning, 1_000_000);
        let broken = false;
        replay.catchUp();
        for (const step of steps) {
          if (step === "append") {
            const position = log.append(String(++sent));
            if (!broken) publish(replay, position, String(sent));
          } else if (step === "plain") {
            if (!broken) replay.plain(Buffer.from(String(++plain)));
          } else if (step === "tick") log.ms += 7;
          else if (step === "trim") log.entries = log.entries.slice(-3);
          else if (step === "flush") {
            // A log that is flushed in the very millisecond of its birth has the ids of the next one.
            log.entries = [];
            log.ms += 1;
          } else if (step === "break") broken = true;
          else if (step === "mend" && broken) {
            broken = false;
            replay.catchUp();
          } else if (step === "answer") {
            await log.answer();
          }
        }
        if (broken) replay.catchUp();
        const position = log.append(String(++sent));
        publish(replay, position, String(sent));
        const done = () => oracle.last === sent && oracle.plain === plain;
        for (let reads = 0; reads < 200 && !done(); reads++) await log.answer();
        assert(done(), `${oracle.last} of ${sent}, ${oracle.plain} of ${plain} plain`);
        replay.stop();
      },
    ),
    { numRuns: 3000 },
  );
});

const liveActions = ["append", "append", "plain", "answer", "tick", "trim", "flush", "empty", "open"] as const;

Deno.test("A client that is live all the time is told of no gap, whatever happens to its log, and reads it no more", async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.constantFrom(...liveActions), { maxLength: 60 }), fc.nat(5), async (steps, before) => {
      const log = new ModelLog();
      let sent = 0;
      let plain = 0;
      for (let n = 0; n < before; n++) log.append(String(++sent));
      const oracle = new Oracle();
      const replay = new Replay(log, oracle, dialect, beginning, 1_000_000);
      const append = () => {
        const position = log.append(String(++sent));
        publish(replay, position, String(sent));
      };
      replay.catchUp();
      await log.answer();
      // While it is read for the last time the log may vanish as well.
      log.asked.splice(0).forEach((answer) => answer());
      if (before === 5) {
        log.entries = [];
        log.ms += 1;
        append();
      }
      for (let turn = 0; turn < 200; turn++) await null;
      assert(oracle.live);
      for (const step of steps) {
        if (step === "append") append();
        else if (step === "plain") replay.plain(Buffer.from(String(++plain)));
        else if (step === "tick") log.ms += 7;
        else if (step === "trim") log.entries = log.entries.slice(-3);
        else if (step === "open") {
          // Another client of the session begins to catch up.
          void log.openLog();
          log.asked.pop();
        } else if (step === "flush" || step === "empty") {
          log.entries = [];
          log.ms += 1;
        }
        assert.equal(oracle.last, sent);
        assert.equal(oracle.plain, plain);
      }
      assert.equal(oracle.gaps, 0);
      assert.equal(log.asked.length, 0);
      replay.stop();
    }),
    { numRuns: 1000 },
  );
});

Deno.test("A live client takes the next number only with a time that fits, and an older pair not at all", async () => {
  const log = new ModelLog();
  log.append("1");
  const oracle = new Oracle();
  const replay = new Replay(log, oracle, dialect, beginning, 1_000_000);
  replay.catchUp();
  while (!oracle.live) await log.answer();
  const { ms } = replay.position;
  publish(replay, { ms, n: 1 }, "1");
  publish(replay, { ms: ms - 1, n: 1 }, "1");
  assert.equal(log.asked.length, 0);
  // As after a failover to a replica that is behind: it is no entry of this log.
  publish(replay, { ms: ms - 1, n: 2 }, "2");
  assert.equal(oracle.last, 1);
  assert.equal(log.asked.length, 1);
  replay.stop();
});

Deno.test("A number that has been, once others have followed it, is of another log, whatever its time", async () => {
  const log = new ModelLog();
  for (const text of ["1", "2"]) log.append(text);
  const oracle = new Oracle();
  const replay = new Replay(log, oracle, dialect, beginning, 1_000_000);
  replay.catchUp();
  while (!oracle.live) await log.answer();
  const { ms } = replay.position;
  // These were published before the log was read, and are only late.
  for (const n of [1, 2]) publish(replay, { ms, n }, String(n));
  publish(replay, log.append("3"), "3");
  assert.equal(oracle.last, 3);
  assert.equal(log.asked.length, 0);
  log.entries = [{ position: { ms, n: 1 }, payload: Buffer.from("1") }];
  oracle.live = false;
  assert.equal(oracle.gaps, 0);
  publish(replay, { ms, n: 1 }, "1");
  while (!oracle.live) await log.answer();
  assert.equal(oracle.gaps, 1);
  replay.stop();
});

Deno.test("A log that cannot be read now is asked for again, and each time it is told for how long that has been so", async () => {
  const log = new ModelLog();
  log.append("1");
  let refusals = 3;
  const source: LogSource = {
    openLog: () => --refusals > 0 ? Promise.reject(new Error("away")) : Promise.resolve(log.entries.at(-1)!.position),
    readLog: () => Promise.resolve(log.entries),
  };
  const oracle = new Oracle();
  const replay = new Replay(source, oracle, dialect, beginning, 1000);
  replay.catchUp();
  await eventually("it is live", () => oracle.live);
  assert.equal(oracle.last, 1);
  const [first, second, ...others] = oracle.unreadMs;
  assert.deepEqual([first, others], [0, []]);
  assert(second! > 0);
  // The time counts from then on, when it fails the next time.
  refusals = 2;
  oracle.live = false;
  replay.catchUp();
  await eventually("it is live again", () => oracle.live);
  assert.equal(oracle.unreadMs[2], 0);
  replay.stop();
});

Deno.test("A replay that is stopped because its log cannot be read asks no more", async () => {
  let asked = 0;
  const source: LogSource = {
    openLog: () => Promise.reject(new Error(`refused ${++asked}`)),
    readLog: () => assert.fail(),
  };
  const oracle = new Oracle();
  const replay = new Replay(source, oracle, dialect, beginning, 1000);
  oracle.unread = () => replay.stop();
  replay.catchUp();
  for (let turn = 0; turn < 20; turn++) await null;
  assert.equal(asked, 1);
});

Deno.test("A stopped replay leaves no timer, whenever its reads fail", async () => {
  const failures: (() => void)[] = [];
  const openLog = () => new Promise<Position>((_, reject) => failures.push(() => reject(new Error("not connected"))));
  const source: LogSource = { openLog, readLog: () => assert.fail() };
  const fail = async () => {
    failures.shift()!();
    for (let turn = 0; turn < 20; turn++) await null;
  };
  const replay = new Replay(source, new Oracle(), dialect, beginning, 1_000_000);
  replay.catchUp();
  replay.catchUp();
  // The first is overtaken already; the second one waits to ask again, and is overtaken in that.
  await fail();
  await fail();
  replay.catchUp();
  await fail();
  replay.catchUp();
  replay.stop();
  await fail();
  assert.equal(failures.length, 0);
});

Deno.test("What is held is bounded: of the log it is read again, and plain messages end a session that is too slow", async () => {
  const log = new ModelLog();
  log.append("1");
  const oracle = new Oracle();
  const replay = new Replay(log, oracle, dialect, beginning, 10_000);
  replay.catchUp();
  for (let n = 2; n <= 100; n++) {
    const position = log.append(String(n));
    publish(replay, position, String(n));
  }
  assert.equal(oracle.slow, 0);
  await eventually("all of it has come", () => {
    log.asked.shift()?.();
    return oracle.live && oracle.last === 100;
  });
  replay.catchUp();
  for (let n = 1; n <= 100; n++) replay.plain(Buffer.from(String(n)));
  assert(oracle.slow > 0);
  replay.stop();
});
