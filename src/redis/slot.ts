/** Hash slots of a Cluster: where a name lives. A name with braces lives where the text between the first two does. */

import calculateSlot from "cluster-key-slot";

/** How many slots there are. */
export const slotCount = 16_384;

/** The slot of a key or a sharded channel. */
export const slotOf: (name: string) => number = calculateSlot;

/** The prefix of keys that belong to another key: with it they lie in the slot of that key. */
export function prefixOf(key: string): string {
  if (!key.includes("}")) return `wsproxy:{${key}}`;
  // The key has a tag of its own, or braces that no tag can hold: a number in the same slot takes its place.
  const slot = slotOf(key);
  let tag = 0;
  while (slotOf(String(tag)) !== slot) tag++;
  return `wsproxy:{${tag}}:${key}`;
}
