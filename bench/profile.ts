/**
 * Sums up a profile: reads what `perf script` prints and tells for each JavaScript function what it takes itself, with
 * the native code and the kernel that it calls directly. docs/performance.md has the commands.
 */

import { linesOf } from "./processes.ts";

/** Rows of the table. */
const shown = 16;

interface Share {
  kernel: number;
  native: number;
  javascript: number;
}

const newShare = (): Share => ({ kernel: 0, native: 0, javascript: 0 });
const totalOf = ({ kernel, native, javascript }: Share) => kernel + native + javascript;

/** A frame of a stack, innermost first: an address, a symbol, and where that is from. */
const jsFrame = /^\s*[0-9a-f]+ (JS:\S?.*?)\+0x[0-9a-f]+ \(.*perf-\d+\.map\)$/;

/** As "deliver session.ts:86": without V8's mark of its tier, and without directories. */
function shortName(symbol: string): string {
  return symbol.replace(/^JS:[*+^~]?'?/, "").replace(/(?:file|ext):\S*\//, "").replace(/:\d+$/, "").trim();
}

function kindOf(frame: string): keyof Share {
  if (jsFrame.test(frame)) return "javascript";
  return frame.includes("[kernel.kallsyms]") ? "kernel" : "native";
}

const functions = new Map<string, Share>();
const all = newShare();

function count(stack: readonly string[]): void {
  if (stack.length === 0) return;
  const symbol = stack.map((frame) => jsFrame.exec(frame)?.[1]).find((found) => found !== undefined);
  const name = symbol === undefined ? "(outside JavaScript)" : shortName(symbol);
  const share = functions.getOrInsertComputed(name, newShare);
  const kind = kindOf(stack[0]!);
  share[kind]++;
  all[kind]++;
}

let stack: string[] = [];
for await (const line of linesOf(Deno.stdin.readable)) {
  if (/^\s+\S/.test(line)) stack.push(line);
  else {
    count(stack);
    stack = [];
  }
}
count(stack);

const percent = (samples: number) => (100 * samples / totalOf(all)).toFixed(1).padStart(10);
const row = (share: Share, name: string) =>
  `${percent(totalOf(share))}${percent(share.kernel)}${percent(share.native)}${percent(share.javascript)}  ${name}`;
console.log(["%", "kernel", "native", "JS"].map((title) => title.padStart(10)).join(""));
console.log(row(all, "all"));
const rows = [...functions].sort(([, a], [, b]) => totalOf(b) - totalOf(a));
for (const [name, share] of rows.slice(0, shown)) console.log(row(share, name));
