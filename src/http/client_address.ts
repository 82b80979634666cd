/**
 * Where a request comes from: the other end of its connection, or, where that is a proxy that is trusted, what the proxy
 * has written into a header. A proxy adds what it has seen on the right, so that is read from the right, as far as
 * trusted proxies wrote it; whatever stands left of that may be a client's invention.
 */

import { IpAddress, type Networks } from "../ip.ts";
import type { Request } from "./exchange.ts";

/** Which proxies are believed, and in what they tell. */
export interface ForwardingSettings {
  /** Undefined for none. */
  readonly trusted: Networks | undefined;
  readonly header: "x-forwarded-for" | "forwarded";
}

/** Proxies on the way of one request; what a chain longer than this says is not read. */
const maxHops = 32;
/** What one proxy writes: an address, and in `Forwarded` maybe a host beside it. A longer entry is no address. */
const maxEntryChars = 1024;

/** The address that a request comes from; undefined when its connection has ended. */
export function clientAddress(request: Request, { trusted, header }: ForwardingSettings): IpAddress | undefined {
  let address = IpAddress.parse(request.peer ?? "");
  if (trusted === undefined || address === undefined || !trusted.has(address)) return address;
  let rest = request.header(header);
  const addressIn = header === "forwarded" ? forwardedFor : nodeAddress;
  for (let hops = 0; rest !== undefined && hops < maxHops; hops++) {
    const comma = rest.lastIndexOf(",");
    const entry = rest.slice(comma + 1).trim();
    const further = entry.length > maxEntryChars ? undefined : addressIn(entry);
    // The proxy does not know or does not tell it: then the proxy stands for all that come by it.
    if (further === undefined) break;
    address = further;
    if (!trusted.has(address)) break;
    rest = comma < 0 ? undefined : rest.slice(0, comma);
  }
  return address;
}

/** An address as proxies write it: IPv6 in brackets or not, and maybe a port (RFC 7239, section 6). */
function nodeAddress(text: string): IpAddress | undefined {
  const [, bracketed, ipv4] = /^(?:\[([^\]]*)\]|([\d.]+))(?::[\w.-]+)?$/.exec(text) ?? [];
  // Brackets are for IPv6 alone.
  return bracketed?.includes(":") === false ? undefined : IpAddress.parse(bracketed ?? ipv4 ?? text);
}

/** A parameter of `Forwarded`: a token, or a text in quotes. One in which a comma stands is not understood. */
const parameter = /^([!#$%&'*+.^_`|~\w-]+)=(?:([!#$%&'*+.^_`|~\w-]+)|"([^"\\]*)")$/;

/** The address in an element of `Forwarded`; undefined when it is not there once, or any part is malformed. */
function forwardedFor(element: string): IpAddress | undefined {
  let found: string | undefined;
  for (const pair of element.split(";")) {
    const [matched, name = "", token, quoted] = parameter.exec(pair.trim()) ?? [];
    if (matched === undefined) return undefined;
    if (name.toLowerCase() !== "for") continue;
    if (found !== undefined) return undefined;
    found = token ?? quoted ?? "";
  }
  return found === undefined ? undefined : nodeAddress(found);
}
