/** Hash slots of a Cluster: where a name lives. A name with braces lives where the text between the first two does. */

import calculateSlot from "cluster-key-slot";

/** How many slots there are. */
export const slotCount = 16_384;

/** The slot of a key or a sharded channel. */
export const slotOf: (name: string) => number = calculateSlot;

/** What keys begin with that belong to another key, so that they live in its slot. */
export function prefixOf(key: string): string {
  if (!key.includes("}")) return `wsproxy:{${key}}`;
  // It has a tag of its own, or braces that cannot stand within any: a number does that lives in the same slot.
  const slot = slotOf(key);
  let tag = 0;
  while (slotOf(String(tag)) !== slot) tag++;
  return `wsproxy:{${tag}}:${key}`;
}
