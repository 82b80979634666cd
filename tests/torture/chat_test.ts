import assert from "node:assert/strict";
import type { UIMessage } from "ai";
import { partsExpected } from "./chat_model.ts";
import { torture } from "./chat.ts";
import { troubleOf } from "./chat_user.ts";

Deno.test("Each message at the screen is what the model said, and each question is answered once, whatever is killed", async () => {
  const seed = Date.now() % 1e9;
  const report = await torture({ seconds: 8, seed }).catch((cause) => {
    throw new Error(`seed ${seed}`, { cause });
  });
  assert(report.questions > 0, JSON.stringify(report));
});

Deno.test("The oracle at the screen finds each thing that must not be", () => {
  const text = ["a", "b", "c", "d", "e"].find((each) => partsExpected(each).length === 2)!;
  const user: UIMessage = { id: "a", role: "user", parts: [{ type: "text", text }] };
  const said = partsExpected(text)[1]!.slice("text ".length);
  const answer = (text: string): UIMessage => ({
    id: `of ${text}`,
    role: "assistant",
    parts: [{ type: "step-start" }, { type: "text", text }],
  });
  const asked = { id: "a", text, stopped: false };
  const half = said.split(" ").slice(0, 2).join(" ");
  assert.equal(troubleOf([user, answer(said)], asked), undefined);
  assert.equal(troubleOf([user, answer(half)], { ...asked, stopped: true }), undefined);
  assert.equal(troubleOf([user], { ...asked, stopped: true }), undefined);
  for (
    const [trouble, messages] of [
      ["unanswered", [user]],
      ["unanswered", []],
      ["unanswered", [user, { ...user, id: "b" }, answer(said)]],
      ["wrong text", [user, answer(half)]],
      ["wrong text", [user, answer("another text")]],
      ["doubled", [user, answer(`${said}${said}`)]],
      ["doubled", [user, answer(half), answer(said)]],
    ] as const
  ) assert.equal(troubleOf(messages, asked), trouble);
  assert.equal(troubleOf([user, answer("another")], { ...asked, stopped: true }), "wrong text");
});
