/** Imports run downward, so that a part can be read, tested and replaced without what is above it. */

import assert from "node:assert/strict";
import { dirname, join, relative } from "node:path";

const src = new URL("../src", import.meta.url).pathname;

/** The rooms of src/, from the top down. What stands beside them in src/ itself are leaves, or the composition. */
const floors = ["cli", "engine", "http", "session", "redis"];
const compositions = ["proxy.ts", "worker.ts", "workers.ts"];

function* modules(dir = src): Generator<string> {
  for (const entry of Deno.readDirSync(dir)) {
    if (entry.isDirectory) yield* modules(join(dir, entry.name));
    else if (entry.name.endsWith(".ts")) yield join(dir, entry.name);
  }
}

/** What a module imports: paths from src/, and names of packages. */
function importsOf(path: string): string[] {
  const text = Deno.readTextFileSync(path);
  const found = [...text.matchAll(/\b(?:from|import)\s*\(?\s*"([^"]+)"/g)].map((match) => match[1]!);
  return found.map((name) => name.startsWith(".") ? relative(src, join(dirname(path), name)) : name);
}

const floorOf = (path: string) => floors.indexOf(path.split("/")[0]!);

Deno.test("No module of src/ imports from above it", () => {
  let seen = 0;
  for (const path of modules()) {
    const name = relative(src, path);
    if (compositions.includes(name)) continue;
    for (const imported of importsOf(path).filter((other) => other.endsWith(".ts"))) {
      seen++;
      const [from, to] = [floorOf(name), floorOf(imported)];
      assert(!compositions.includes(imported), `${name} imports ${imported}`);
      assert(from < 0 ? to < 0 : to < 0 || to >= from, `${name} imports ${imported}`);
    }
  }
  assert(seen > 20);
});

Deno.test("Only redis/ imports ioredis, only an engine imports ws, and only it and the health check node:http", () => {
  for (const path of modules()) {
    const name = relative(src, path);
    for (const imported of importsOf(path)) {
      if (imported === "ioredis") assert(name.startsWith("redis/"), `${name} imports ${imported}`);
      if (imported === "ws" || imported === "node:http") {
        const asks = imported === "node:http" && name === "cli/healthcheck.ts";
        assert(name.startsWith("engine/") || asks, `${name} imports ${imported}`);
      }
      if (floorOf(name) === floors.indexOf("engine")) {
        assert(!imported.startsWith("redis/"), `${name} imports ${imported}`);
      }
    }
  }
});
