/** IP addresses and networks: what `TRUSTED_PROXIES` lists, by what a client's address is counted, and the loopback. */

import { isIPv4, isIPv6 } from "node:net";

/** The bits of one of eight groups, of an IPv6 address and of its IPv4 part. */
const groupBits = 16;
const addressBits = 128;
const ipv4Bits = 32;
/** What stands before an IPv4 address that is written as an IPv6 one (RFC 4291, section 2.5.5.2). */
const mappedPrefix = [0, 0, 0, 0, 0, 0xffff];
/** Groups of a /64: the least that a site has of IPv6, and a client of it may take any address in it. */
const siteGroups = 4;

/** An address of IPv6, or one of IPv4 as it is mapped into IPv6: what is the same host is equal. */
export class IpAddress {
  /** Eight groups of 16 bits. */
  readonly #groups: readonly number[];

  private constructor(groups: readonly number[]) {
    this.#groups = groups;
  }

  /**
   * An address as text: IPv4 in four decimal parts without leading zeros, or IPv6 (RFC 4291, section 2.2), of which a
   * zone is dropped. Undefined for anything else.
   */
  static parse(text: string): IpAddress | undefined {
    if (isIPv4(text)) return new IpAddress([...mappedPrefix, ...groupsOfIpv4(text)]);
    if (!isIPv6(text)) return undefined;
    const [head = "", tail] = text.replace(/%.*$/, "").split("::");
    const before = groupsOf(head);
    if (tail === undefined) return new IpAddress(before);
    const after = groupsOf(tail);
    const zeros = Array.from({ length: addressBits / groupBits - before.length - after.length }, () => 0);
    return new IpAddress([...before, ...zeros, ...after]);
  }

  /** It is one of IPv4, also when it was written as one of IPv6. */
  get isIpv4(): boolean {
    return mappedPrefix.every((group, i) => group === this.#groups[i]);
  }

  /** What counts as one client's: an address of IPv4, or the /64 of one of IPv6. */
  get site(): string {
    return this.isIpv4
      ? this.toString()
      : this.#groups.slice(0, siteGroups).map((group) => group.toString(16)).join(":");
  }

  /** The first so many bits are those of another one. */
  startsLike(other: IpAddress, bits: number): boolean {
    for (let i = 0; bits > 0; i++, bits -= groupBits) {
      const ignored = Math.max(0, groupBits - bits);
      if (this.#groups[i]! >> ignored !== other.#groups[i]! >> ignored) return false;
    }
    return true;
  }

  /** As people write it: IPv4 in decimal, IPv6 as RFC 5952 says. */
  toString(): string {
    if (this.isIpv4) return this.#groups.slice(6).map((group) => `${group >> 8}.${group & 255}`).join(".");
    const text = this.#groups.map((group) => group.toString(16)).join(":");
    return new URL(`http://[${text}]`).hostname.slice(1, -1);
  }
}

function groupsOfIpv4(text: string): number[] {
  const [a = 0, b = 0, c = 0, d = 0] = text.split(".").map(Number);
  return [a << 8 | b, c << 8 | d];
}

/** The groups on one side of "::", or of an address without it; the last two may be written as IPv4. */
const groupsOf = (text: string): number[] =>
  text === "" ? [] : text.split(":").flatMap((part) => part.includes(".") ? groupsOfIpv4(part) : parseInt(part, 16));

/** Whether a host is this machine: `localhost`, or an address of the loopback (RFC 6761, section 6.3; no brackets). */
export const isLoopback = (host: string): boolean => /^(localhost|127\.[\d.]+|::1)$/.test(host);

/** The networks that `TRUSTED_PROXIES` lists. */
export class Networks {
  readonly #networks: { readonly address: IpAddress; readonly bits: number; readonly isIpv4: boolean }[] = [];

  /**
   * A comma-separated list of addresses, and of networks as `address/bits` (RFC 4632, section 3.1).
   * @throws {Error} whose message is a rule that begins with "must", when an item is none, or is everything.
   */
  constructor(list: string) {
    for (const item of list.split(",").map((item) => item.trim())) this.#add(item);
  }

  /** Whether an address is in one of them. */
  has(address: IpAddress): boolean {
    const { isIpv4 } = address;
    return this.#networks.some((network) =>
      network.isIpv4 === isIpv4 && address.startsLike(network.address, network.bits)
    );
  }

  #add(item: string): void {
    const [, text = "", size] = /^([^/]+?)(?:\/(\d{1,3}))?$/.exec(item) ?? [];
    const address = text.includes("%") ? undefined : IpAddress.parse(text);
    const written = text.includes(":") ? addressBits : ipv4Bits;
    const bits = size === undefined ? written : Number(size);
    if (address === undefined || bits > written) {
      throw new Error(
        `must be a comma-separated list of addresses and networks like 10.0.0.0/8,192.0.2.7,fd00::/8; ${
          JSON.stringify(item)
        } is none`,
      );
    }
    const network = { address, bits: bits + addressBits - written, isIpv4: false };
    // One of IPv6 may begin like those into which IPv4 is mapped, and is none of IPv4.
    network.isIpv4 = address.isIpv4 && network.bits >= addressBits - ipv4Bits;
    const isAll = network.bits === (network.isIpv4 ? addressBits - ipv4Bits : 0);
    if (isAll) throw new Error("must not list every address: any client could say then where it comes from");
    this.#networks.push(network);
  }
}
