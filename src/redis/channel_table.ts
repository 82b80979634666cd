/**
 * Channels by name: each is found by the bytes in which Redis writes its name. In a `Map` of strings each message would
 * have a string made of its channel's name, hashed, and looked for among all strings that V8 has.
 */

import { Buffer } from "node:buffer";

/** What a {@linkcode ChannelTable} holds. */
export interface Named<C> {
  /** The name: see {@linkcode keyOf}. An array of bytes would take five times as much memory. */
  readonly key: string;
  /** The next one of those whose names have the same hash; set by {@linkcode ChannelTable}. */
  nextOfHash: C | undefined;
}

/** A name as a string with a character for each byte of its UTF-8. */
export const keyOf = (name: string): string => Buffer.from(name).toString("latin1");

/** A set of channels, each with a name of its own. */
export class ChannelTable<C extends Named<C>> implements Iterable<C> {
  readonly #byHash = new Map<number, C>();
  /** Clients have a say in names: without it they could choose many of one hash. */
  readonly #seed = crypto.getRandomValues(new Int32Array(1))[0]!;
  #size = 0;

  /** How many there are. */
  get size(): number {
    return this.#size;
  }

  /** The one of that name, if it is here. */
  find(nameBytes: Uint8Array): C | undefined {
    let channel = this.#byHash.get(this.#hash(nameBytes));
    while (channel !== undefined && !same(channel.key, nameBytes)) channel = channel.nextOfHash;
    return channel;
  }

  /** The one of that key, if it is here. */
  get(key: string): C | undefined {
    let channel = this.#byHash.get(this.#hashKey(key));
    while (channel !== undefined && channel.key !== key) channel = channel.nextOfHash;
    return channel;
  }

  /** Adds one whose name is not here yet. */
  add(channel: C): void {
    const hash = this.#hashKey(channel.key);
    channel.nextOfHash = this.#byHash.get(hash);
    this.#byHash.set(hash, channel);
    this.#size++;
  }

  /** Removes one. False when it is not here, though another one of its name may be. */
  delete(channel: C): boolean {
    const hash = this.#hashKey(channel.key);
    let before = this.#byHash.get(hash);
    if (before === channel) {
      if (channel.nextOfHash === undefined) this.#byHash.delete(hash);
      else this.#byHash.set(hash, channel.nextOfHash);
    } else {
      while (before !== undefined && before.nextOfHash !== channel) before = before.nextOfHash;
      if (before === undefined) return false;
      before.nextOfHash = channel.nextOfHash;
    }
    this.#size--;
    return true;
  }

  /** All of them, in no order. One may be deleted when it has come. */
  *[Symbol.iterator](): Iterator<C> {
    for (const first of this.#byHash.values()) {
      for (let channel: C | undefined = first; channel !== undefined; channel = channel.nextOfHash) yield channel;
    }
  }

  /** FNV-1a, from a basis of our own. */
  #hash(bytes: Uint8Array): number {
    let hash = this.#seed;
    for (let i = 0; i < bytes.length; i++) hash = Math.imul(hash ^ bytes[i]!, 0x01000193);
    return hash;
  }

  /** The same for a key; apart, as one function for both would be slow for both. */
  #hashKey(key: string): number {
    let hash = this.#seed;
    for (let i = 0; i < key.length; i++) hash = Math.imul(hash ^ key.charCodeAt(i), 0x01000193);
    return hash;
  }
}

function same(key: string, nameBytes: Uint8Array): boolean {
  const { length } = nameBytes;
  if (key.length !== length) return false;
  for (let i = 0; i < length; i++) {
    if (key.charCodeAt(i) !== nameBytes[i]) return false;
  }
  return true;
}
