/** A request's body, read up to a limit. */

import { Buffer } from "node:buffer";

/** The text of a body; undefined when it is larger than `maxBytes`, and the rest of it is not read. */
export async function readText(body: AsyncIterable<Uint8Array>, maxBytes: number): Promise<string | undefined> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of body) {
    size += chunk.length;
    if (size > maxBytes) return undefined;
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}
