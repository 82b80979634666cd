/** A request's body, read up to a limit. */

import { Buffer, isUtf8 } from "node:buffer";
import { Refusal } from "../replies.ts";

/**
 * The text of a body.
 * @throws {Refusal} when it is larger than `maxBytes`, and the rest of it is not read; when it is no UTF-8, which no
 * backend could tell from what replaces it; and when the client does not send all of it.
 */
export async function readText(body: AsyncIterable<Uint8Array>, maxBytes: number): Promise<string> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  try {
    for await (const chunk of body) {
      size += chunk.length;
      if (size > maxBytes) break;
      chunks.push(chunk);
    }
  } catch {
    // Whatever the engine calls it: no error of ours can come from reading.
    throw new Refusal("clientGone");
  }
  if (size > maxBytes) throw new Refusal("bodyTooLarge");
  const bytes = Buffer.concat(chunks);
  if (!isUtf8(bytes)) throw new Refusal("notUtf8");
  return bytes.toString();
}
