import assert from "node:assert/strict";
import { readConfig } from "../src/config.ts";
import { files, firstDifference, renderTable } from "../scripts/docs.ts";

for (const [path, render] of Object.entries(files)) {
  Deno.test(`${path} is what "deno task docs" writes`, () => {
    const text = Deno.readTextFileSync(new URL(`../${path}`, import.meta.url));
    const wanted = render(text);
    assert(text === wanted, `${path}: ${firstDifference(text, wanted)}`);
  });
}

Deno.test("Every default in .env.example is accepted, and only JWT_SECRET is missing", () => {
  const text = files[".env.example"]!("");
  const lines = text.split("\n").map((line) => /^#?([A-Z_]+)=(.*)$/.exec(line)).filter((match) => match !== null);
  const env = Object.fromEntries(lines.map(([, name, value]) => [name, value]));
  assert.equal(env["JWT_SECRET"], "");
  assert.match(text, /^JWT_SECRET=$/m);
  assert.doesNotThrow(() => readConfig({ ...env, JWT_SECRET: "x".repeat(32) }));
});

Deno.test("A table escapes what would end a cell", () => {
  assert.equal(renderTable(["a", "b"], [["x|y", "1"]]), "| a    | b   |\n| ---- | --- |\n| x\\|y | 1   |");
});

Deno.test("A README without its markers is refused, and not written over", () => {
  assert.throws(() => files["README.md"]!("# wsproxy\n"), /must have a line <!-- settings -->/);
});
