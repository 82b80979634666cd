/** Addresses and networks, against ipaddr.js: another implementation. */

import assert from "node:assert/strict";
import fc from "fast-check";
import ipaddr from "ipaddr.js";
import { IpAddress, Networks } from "../src/ip.ts";

const octet = fc.integer({ min: 0, max: 255 });
const ipv4 = fc.tuple(octet, octet, octet, octet).map((parts) => parts.join("."));
/** Zeros are frequent, so that some can be left out; and so is what IPv4 is mapped to. */
const group = fc.oneof(fc.constantFrom(0, 0, 0, 0xffff), fc.integer({ min: 0, max: 0xffff }));
const written = (value: number) =>
  fc.constantFrom(value.toString(16), value.toString(16).toUpperCase(), value.toString(16).padStart(4, "0"));

/** An address of IPv6 in any of the ways in which it may be written. */
const ipv6 = fc.array(group, { minLength: 8, maxLength: 8 }).chain((groups) =>
  fc.tuple(fc.tuple(...groups.map(written)), fc.nat(7), fc.nat(8), fc.boolean()).map(([words, at, count, hasIpv4]) => {
    const parts = [...words];
    if (hasIpv4) {
      const bytes = groups.slice(6).flatMap((value) => [value >> 8, value & 255]);
      parts.splice(6, 2, bytes.join("."));
    }
    const zeros = groups.slice(at).findIndex((value) => value !== 0);
    const end = Math.min(at + count, zeros < 0 ? 8 : at + zeros, hasIpv4 ? 6 : 8);
    if (end <= at) return parts.join(":");
    return `${parts.slice(0, at).join(":")}::${parts.slice(end).join(":")}`;
  })
  // ipaddr.js takes the deprecated form for an IPv4 one; to RFC 4291, section 2.5.5.1, it is of IPv6.
).filter((text) => !/^::\d+\./.test(text));
const address = fc.oneof(ipv4, ipv6, ipv4.map((text) => `::ffff:${text}`));

const bytesOf = (text: string) => ipaddr.process(text).toByteArray();
const isSame = (a: readonly number[], b: readonly number[], bits: number) =>
  a.every((byte, i) =>
    byte >> Math.max(0, Math.min(8, 8 * (i + 1) - bits)) === b[i]! >> Math.max(0, Math.min(8, 8 * (i + 1) - bits))
  );

Deno.test("Every address is read and written as ipaddr.js does", () => {
  fc.assert(
    fc.property(address, (text) => {
      const judge = ipaddr.process(text);
      const parsed = IpAddress.parse(text);
      assert(parsed, text);
      assert.equal(parsed.isIpv4, judge.kind() === "ipv4", text);
      // WHATWG's URL shortens a single zero no more than RFC 5952 does.
      const expected = judge.kind() === "ipv4" ? judge.toString() : (judge as ipaddr.IPv6).toRFC5952String();
      assert.equal(String(parsed), expected);
      assert.equal(String(IpAddress.parse(String(parsed))), String(parsed));
    }),
    { numRuns: 3000 },
  );
});

Deno.test("The deprecated IPv6 form of an IPv4 address is none of IPv4", () => {
  assert.equal(String(IpAddress.parse("::1.2.3.4")), "::102:304");
});

Deno.test("Two addresses are of one site exactly when they are the same of IPv4, or share a /64 of IPv6", () => {
  const near = fc.tuple(address, address, fc.nat(128)).map(([one, other, keep]): [string, string] => {
    const [a, b] = [one, other].map(bytesOf) as [number[], number[]];
    if (a.length !== b.length) return [one, other];
    // So many of the first bits are the same.
    const mixed = a.map((byte, i) => {
      const mask = 0xff00 >> Math.max(0, Math.min(8, keep - 8 * i)) & 0xff;
      return byte & mask | b[i]! & ~mask & 0xff;
    });
    return [one, ipaddr.fromByteArray(mixed).toString()];
  });
  fc.assert(
    fc.property(near, ([one, other]) => {
      const [a, b] = [one, other].map(bytesOf) as [number[], number[]];
      const isOneSite = a.length === b.length && isSame(a, b, a.length === 4 ? 32 : 64);
      assert.equal(IpAddress.parse(one)!.site === IpAddress.parse(other)!.site, isOneSite, `${one} ${other}`);
    }),
    { numRuns: 3000 },
  );
});

Deno.test("A network has the addresses that ipaddr.js finds in it", () => {
  const network = fc.tuple(address, fc.integer({ min: 1, max: 128 })).map(([text, bits]) =>
    text.includes(":") ? `${text}/${bits}` : `${text}/${1 + bits % 32}`
  );
  const isIn = (text: string, cidr: string) => {
    const [base, bits] = ipaddr.parseCIDR(cidr);
    const mapped = base.kind() === "ipv6" && (base as ipaddr.IPv6).isIPv4MappedAddress() && bits >= 96;
    const range: [ipaddr.IPv4 | ipaddr.IPv6, number] = mapped
      ? [(base as ipaddr.IPv6).toIPv4Address(), bits - 96]
      : [base, bits];
    const judged = ipaddr.process(text);
    return judged.kind() === range[0].kind() && judged.match(range);
  };
  let found = 0;
  fc.assert(
    fc.property(network, address, fc.nat(128), (cidr, other, keep) => {
      const [base] = ipaddr.parseCIDR(cidr);
      const bytes = base.toByteArray();
      const others = bytesOf(other);
      const mixed = bytes.map((byte, i) => keep >= 8 * (i + 1) ? byte : others[i % others.length]!);
      let networks;
      try {
        networks = new Networks(cidr);
      } catch (error) {
        assert.match((error as Error).message, /every address/);
        return;
      }
      for (const text of [other, ipaddr.fromByteArray(mixed).toString(), base.toString()]) {
        const expected = isIn(text, cidr);
        if (expected) found++;
        assert.equal(networks.has(IpAddress.parse(text)!), expected, `${text} in ${cidr}`);
      }
    }),
    { numRuns: 3000 },
  );
  assert(found > 1000);
});

Deno.test("What is no address is none, whatever ipaddr.js makes of it", () => {
  const texts = [
    "",
    "1",
    "1.2.3",
    "010.1.1.1",
    "0x1.2.3.4",
    "1.2.3.04",
    "1.2.3.256",
    "1::2::3",
    "1:2:3:4:5:6:7",
    "::g",
  ];
  for (const text of [...texts, "12345::", " ::1", "::1 ", "1.2.3.4:80", "[::1]", "unknown", "_hidden", "::00001"]) {
    assert.equal(IpAddress.parse(text), undefined, text);
  }
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.stringMatching(/^[0-9a-f:.%/]{0,45}$/)), (text) => {
      const parsed = IpAddress.parse(text);
      if (parsed) assert.equal(String(parsed), String(ipaddr.process(text.replace(/%.*$/s, ""))));
    }),
    { numRuns: 3000 },
  );
});

Deno.test("A list of networks that holds something else, or everything, says so", () => {
  for (
    const list of [
      "",
      "10.0.0.0/33",
      "::/129",
      "10.0.0/8",
      "localhost",
      "10.0.0.0/8,",
      "fe80::1%eth0",
      "1.2.3.4/",
      "/8",
    ]
  ) {
    assert.throws(() => new Networks(list), /^Error: must be a comma-separated list/, list);
  }
  for (const list of ["0.0.0.0/0", "::/0", "10.0.0.0/8, ::/0", "::ffff:0:0/96"]) {
    assert.throws(() => new Networks(list), /^Error: must not list every address/, list);
  }
});
