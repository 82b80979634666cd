/** What is said of the source is true of it: CONTRIBUTING.md, and the log lines that the documentation quotes. */

import assert from "node:assert/strict";

const root = new URL("../", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, root));
const page = read("CONTRIBUTING.md");

function* filesIn(folder: string): Generator<string> {
  for (const { name, isDirectory } of Deno.readDirSync(new URL(folder, root))) {
    if (isDirectory) yield* filesIn(`${folder}${name}/`);
    else yield `${folder}${name}`;
  }
}

const files = [...filesIn("src/")];
const source = files.map(read).join("\n");

function exists(path: string): boolean {
  try {
    Deno.statSync(new URL(path, root));
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** The part of a page from one text on to another. */
function between(text: string, from: string, to: string): string {
  const start = text.indexOf(from);
  const end = text.indexOf(to, start);
  assert(start >= 0 && end >= 0, `${from} … ${to}`);
  return text.slice(start, end);
}

/** The rows of the first table in a text, as cells. */
const rowsOf = (text: string) =>
  [...text.matchAll(/^\|(.*)\|$/gm)].slice(2).map(([, row]) => row!.split("|").map((cell) => cell.trim()));

const quotesIn = (text: string) => [...text.matchAll(/`([^`]+)`/g)].map(([, quote]) => quote!.replace(/\s+/g, " "));

const map = between(page, "## The source", "Where something new goes");
const homes = between(page, "Where something new goes", "## Dependencies");
const dependencies = between(page, "## Dependencies", "## How we work");

Deno.test("CONTRIBUTING's map has every file of src/ once, and no path that is not there", () => {
  const mapped: string[] = [];
  for (const [cell] of rowsOf(map)) {
    let folder = "";
    for (const quote of quotesIn(cell!)) {
      const path = quote.slice(0, -1).includes("/") ? quote : `${folder}${quote}`;
      folder = path.slice(0, path.lastIndexOf("/") + 1);
      assert(exists(path), path);
      mapped.push(path);
    }
  }
  for (const file of files) {
    const places = mapped.filter((path) => path === file || (path.endsWith("/") && file.startsWith(path)));
    assert.equal(places.length, 1, `${file} is in the map ${places.length} times`);
  }
});

Deno.test("CONTRIBUTING's table of dependencies is what deno.json imports", () => {
  const { imports } = JSON.parse(read("deno.json")) as { imports: Record<string, string> };
  const named = rowsOf(dependencies).flatMap(([, here]) => [...here!.matchAll(/`([^`]+)`(?: (\d[\d.]*))?/g)]);
  const packages = named.filter(([, name]) => !/^(?:node:|src\/|--)/.test(name!));
  assert.deepEqual(packages.map(([, name]) => name!).sort(), Object.keys(imports).sort());
  for (const [, name, version] of packages) {
    if (version) assert(imports[name!]!.includes(`@${version}`), `${name} ${version}: ${imports[name!]}`);
  }
});

Deno.test("What CONTRIBUTING sends the reader to exists: files, names of the source, tasks", () => {
  const { tasks } = JSON.parse(read("deno.json")) as { tasks: Record<string, unknown> };
  for (const quote of quotesIn(homes)) {
    if (quote.startsWith("./dev ")) continue;
    if (quote.includes("/")) assert(exists(quote), quote);
    else assert.match(source, new RegExp(`(?:class|interface|type|const|function|^ +)\\s*${quote}\\b`, "m"), quote);
  }
  const commands = [...page.matchAll(/\.\/dev ([a-z][\w:]*)/g)].map(([, name]) => name!);
  assert(commands.length > 3);
  for (const name of commands) assert(name in tasks || exists("dev") && read("dev").includes(`./dev ${name}`), name);
  for (const [path] of page.matchAll(/\b(?:tests|scripts|docs)\/[\w/]+\.\w+/g)) assert(exists(path), path);
});

/** Log lines and reasons that are completed when they are said, as what stands before and after. */
const templates = [...source.matchAll(/`([^`\n]{9,})\$\{\w+\}([^`$\n]*)`/g)].map((
  [, before, after],
) => [before!, after!]);

const isSaid = (quote: string) =>
  source.includes(quote) ||
  templates.some(([before, after]) => quote.startsWith(before!) && quote.endsWith(after!));

/** First words of commands and of other programs' settings, which docs quote as they quote log lines. */
const foreign = new Set(["deno", "docker", "kubectl", "helm", "timeout", "sentinel", "git", "npm", "apt"]);

Deno.test("Every log line, and every reason of a close, that the documentation quotes is in src/", () => {
  const pages = ["README.md", ...[...filesIn("docs/")].filter((path) => path.endsWith(".md"))];
  const quoted = pages.flatMap((path) => {
    const prose = read(path).replace(/^```[\s\S]*?^```$/gm, "");
    // Words, and nothing that a path, a command's option or a setting has.
    const quotes = prose.split(/\n\n|\|/).flatMap(quotesIn).filter((quote) =>
      /^[A-Za-z']+(?:,? [A-Za-z][a-z',-]*)+$/.test(quote)
    );
    return quotes.filter((quote) => !foreign.has(quote.split(" ")[0]!)).map((quote) => ({ path, quote }));
  });
  assert(quoted.length > 10);
  assert.deepEqual(quoted.filter(({ quote }) => !isSaid(quote)), []);
});

Deno.test("What acts in a sentence of src/ has a name: client, proxy, request, backend", () => {
  const nameless = /\b(?:who(?:so)?ever|whom|(?:some|any|every|no)(?:body|one))\b/i;
  const found = files.flatMap((path) =>
    read(path).split("\n").flatMap((line, n) => nameless.test(line) ? [`${path}:${n + 1} ${line.trim()}`] : [])
  );
  assert.deepEqual(found, []);
});
