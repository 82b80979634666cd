/** The project's pages, and the blocks of code that stand in them. */

import assert from "node:assert/strict";

const root = new URL("../../", import.meta.url);

/** Every page of the project, by its path. A checkout may be a copy without git. */
function pagesBelow(folder: string): string[] {
  return [...Deno.readDirSync(new URL(folder, root))].flatMap(({ name, isDirectory, isFile }) => {
    if (name.startsWith(".") || name === "node_modules" || name === "out") return [];
    if (isDirectory) return pagesBelow(`${folder}${name}/`);
    return isFile && name.endsWith(".md") ? [`${folder}${name}`.slice("./".length)] : [];
  });
}

export const pages = pagesBelow("./");

/** A fenced block of a page. */
export interface Block {
  readonly page: string;
  readonly text: string;
}

/** Every block but the drawings. */
export const blocks: readonly Block[] = pages.flatMap((page) =>
  [...Deno.readTextFileSync(new URL(page, root)).matchAll(/^( *)```(\w*)\n([^]*?)^ *```$/gm)]
    .filter(([, , language]) => language !== "mermaid")
    .map(([, indent, , text]) => ({ page, text: text!.replaceAll(new RegExp(`^${indent}`, "gm"), "") }))
);

/** The one block of a page that contains a text. */
export function blockOf(page: string, part: string): Block {
  const found = blocks.filter((block) => block.page === page && block.text.includes(part));
  assert.equal(found.length, 1, `${page} must have one block with ${part}`);
  return found[0]!;
}
