/**
 * ChannelTable by name, found by the bytes in which Redis writes a name. In a `Map` of strings each message would have a
 * string made of its channel's name, hashed, and looked for among all strings that V8 has.
 */

/** What a {@linkcode ChannelTable} holds. */
export interface Named<C> {
  /** The name in UTF-8. */
  readonly nameBytes: Uint8Array;
  /** The next one of those whose names have the same hash; set by {@linkcode ChannelTable}. */
  nextOfHash: C | undefined;
}

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
    while (channel !== undefined && !same(channel.nameBytes, nameBytes)) channel = channel.nextOfHash;
    return channel;
  }

  /** Adds one whose name is not here yet. */
  add(channel: C): void {
    const hash = this.#hash(channel.nameBytes);
    channel.nextOfHash = this.#byHash.get(hash);
    this.#byHash.set(hash, channel);
    this.#size++;
  }

  /** Removes one. False when it is not here, though another one of its name may be. */
  delete(channel: C): boolean {
    const hash = this.#hash(channel.nameBytes);
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
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) {
    if (a[i] !== b[i]) return false;
  }
  return true;
}
