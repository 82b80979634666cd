/** Positions, and what a published message is besides its payload. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import fc from "fast-check";
import {
  beginning,
  envelopeByte,
  follows,
  formatPosition,
  isPast,
  parseEnvelope,
  parsePosition,
  type Position,
} from "../../src/redis/log_entry.ts";

const number = fc.oneof(fc.nat(), fc.integer({ min: 0, max: 999_999_999_999_999 }));
const position = fc.record({ ms: number, n: number }, { noNullPrototype: true });
const at = (text: string): Position => parsePosition(text)!;

Deno.test("A position is 0, or two numbers with a dash, and is read back as it was written", () => {
  assert.deepEqual(parsePosition("0"), beginning);
  assert.equal(formatPosition({ ms: 1764000000000, n: 12 }), "1764000000000-12");
  fc.assert(fc.property(position, (position) => assert.deepEqual(parsePosition(formatPosition(position)), position)));
  const texts = [
    "",
    "-",
    "1",
    "1-",
    "-1",
    "1--1",
    "1-1 ",
    " 1-1",
    "+1-1",
    "1e3-1",
    "1.0-1",
    "١-١",
    "1-1-1",
    "1-1\n",
    "-0",
  ];
  for (const text of [...texts, `1-${"9".repeat(16)}`, "9".repeat(400) + "-1"]) {
    assert.equal(parsePosition(text), undefined, JSON.stringify(text));
  }
});

Deno.test("The next number follows when its time is not older, and what is older in both is past", () => {
  const cases = [
    ["5-3", "5-4", true, false],
    ["5-3", "9-4", true, false],
    ["5-0", "5-1", true, false],
    ["0", "5-1", true, false],
    ["5-3", "5-3", false, true],
    ["5-3", "5-2", false, true],
    ["5-3", "4-1", false, true],
    ["5-3", "4-4", false, false],
    ["5-3", "5-5", false, false],
    ["5-3", "6-3", false, false],
    ["5-3", "6-1", false, false],
    ["0", "5-2", false, false],
  ] as const;
  for (const [last, next, isNext, isOld] of cases) {
    assert.equal(follows(at(next), at(last)), isNext, `${next} follows ${last}`);
    assert.equal(isPast(at(next), at(last)), isOld, `${last} is past ${next}`);
  }
});

const message = (head: string, rest: string | Uint8Array = "") =>
  Buffer.concat([Buffer.from([envelopeByte]), Buffer.from(head), Buffer.from(rest as string)]);

Deno.test("An envelope has a position, and a payload of any bytes", () => {
  fc.assert(fc.property(position, fc.uint8Array(), (position, payload) => {
    const envelope = parseEnvelope(message(`${position.ms}-${position.n}\n`, payload));
    assert(envelope?.kind === "logged");
    assert.deepEqual(envelope.position, position);
    const whole = message(`${position.ms}-${position.n}\n`, payload);
    assert.deepEqual(new Uint8Array(whole.subarray(envelope.payloadAt)), payload);
  }));
});

Deno.test("A command has a name, and the rest is its JSON", () => {
  assert.deepEqual(parseEnvelope(message('!close\n{"reason":"日\\n"}')), {
    kind: "command",
    name: "close",
    json: '{"reason":"日\\n"}',
  });
  assert.deepEqual(parseEnvelope(message("!\n")), { kind: "command", name: "", json: "" });
});

Deno.test("What only begins like an envelope is none", () => {
  const heads = ["", "1", "1-", "1-1", "-1\n", "1-\n", "-\n", "\n", "0\n", "1 1\n", "1-1 \n", "a-1\n", "!", "!close"];
  for (const head of [...heads, `${2 ** 53}-1\n`, `1-${2 ** 53}\n`, "9".repeat(400) + "-1\n", "1".repeat(400)]) {
    assert.equal(parseEnvelope(message(head)), undefined, JSON.stringify(head));
  }
  fc.assert(fc.property(fc.uint8Array(), (bytes) => {
    // Whatever it is, it is read without an error, and the payload is within it.
    const envelope = parseEnvelope(message("", bytes));
    if (envelope?.kind === "logged") assert(envelope.payloadAt <= bytes.length + 1);
  }));
});
