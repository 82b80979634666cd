import assert from "node:assert/strict";
import { judge, torture } from "./answers.ts";

for (
  const [redis, what] of [
    ["server", "whatever is killed"],
    ["sentinel", "whichever server is the master"],
    ["cluster", "whichever servers are the masters of a Cluster"],
  ] as const
) {
  Deno.test(`Each question has one answer, by one writer at a time, and every stop is obeyed, ${what}`, async () => {
    const seed = Date.now() % 1e9;
    const report = await torture({ seconds: 4, seed, redis }).catch((cause) => {
      throw new Error(`seed ${seed}`, { cause });
    });
    assert(report.questions > 0 && report.answers > 0, JSON.stringify(report));
  });
}

Deno.test("The oracle finds each thing that must not be", () => {
  const asked = [{ q: "a", words: 2 }, { q: "b", words: 1 }, { q: "s", stop: true as const }, { q: "c", words: 1 }];
  const start = (q: string, by = q) => ({ kind: "start" as const, q, by });
  const word = (q: string, at: number, by = q) => ({ kind: "word" as const, q, at, by });
  const end = (q: string, by = q) => ({ kind: "end" as const, q, by });
  const stopped = { kind: "stopped" as const, q: "s" };
  const last = [start("c"), word("c", 0), end("c")];
  const whole = [start("a"), word("a", 0), start("a", "a2"), word("a", 1, "a2"), end("a", "a2")];
  assert.equal(judge(asked, [...whole, stopped, ...last]), 1);
  assert.equal(judge(asked, [start("a"), stopped, ...last]), 0);
  for (
    const [what, said] of [
      [/by a writer after another has begun/, [start("a"), start("a", "a2"), word("a", 0)]],
      [/the words of a/, [start("a"), word("a", 0), start("a", "a2"), word("a", 0, "a2")]],
      [/goes on after its end/, [...whole, start("a")]],
      [/goes on after a stop/, [start("a"), stopped, word("a", 0)]],
      [/goes on after a stop/, [stopped, start("b")]],
      [/stops twice/, [start("a"), stopped, ...last, stopped]],
      [/begins after a question that came later/, [start("b"), word("b", 0), end("b"), start("a")]],
      [/b has no answer/, [...whole, ...last]],
      [/a is whole/, [start("a"), word("a", 0), end("a"), stopped, ...last]],
    ] as const
  ) assert.throws(() => judge(asked, said), what);
});
