import assert from "node:assert/strict";
import { readConfig } from "../src/config.ts";
import { files, firstDifference, renderTable } from "../scripts/docs.ts";
import { pages } from "./harness/pages.ts";

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

Deno.test("A page without its markers is refused, and not written over", () => {
  assert.throws(() => files["docs/reference.md"]!("# Reference\n"), /must have a line <!-- settings -->/);
});

const root = new URL("../", import.meta.url);

/** A page's text without what stands in code, where brackets are no links. */
const prose = (page: string) =>
  Deno.readTextFileSync(new URL(page, root)).replace(/^```.*?^```/gms, "").replace(
    /`[^`\n]*`/g,
    (code) => code.replace(/[[\]()]/g, ""),
  );

/** The anchors of a page's headings, as GitHub makes them. */
function anchorsOf(page: string): Set<string> {
  const headings = [...prose(page).matchAll(/^#+ (.*)$/gm)].map((match) => match[1]!);
  return new Set(
    headings.map((heading) => heading.toLowerCase().replace(/[^\p{L}\p{N}\s_-]/gu, "").replaceAll(" ", "-")),
  );
}

Deno.test("Every link of a page leads to a file, and to a heading of it", () => {
  let links = 0;
  for (const page of pages) {
    for (const [, target] of prose(page).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target!)) continue;
      links++;
      const [path, anchor] = target!.split("#");
      const url = path === "" ? new URL(page, root) : new URL(path!, new URL(page, root));
      assert.doesNotThrow(() => Deno.statSync(url), `${page}: ${target}`);
      if (anchor === undefined) continue;
      const file = url.pathname.slice(root.pathname.length);
      assert(anchorsOf(file).has(anchor), `${page}: ${target}`);
    }
  }
  assert(pages.length >= 8 && links > 30, `${links} links of ${pages.length} pages`);
});

Deno.test("In every page actors have a name: client, proxy, backend, operator", () => {
  for (const page of pages) {
    assert.doesNotMatch(prose(page), /\b(who(m|so)?ever|whom|(some|any|every|no)body)\b/i, page);
  }
});
