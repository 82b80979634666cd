/** The proxy's end of SOCKS 5, as far as Chromium speaks it: no authentication, CONNECT, and names that the proxy resolves. */

import { writeAll } from "./wire.ts";

const version = 5;
/** What an address is. */
const name = 3;

/** Reads what a browser wants to be connected to, and says yes: what follows is for that host. */
export async function socksHost(client: Deno.Conn): Promise<string> {
  const [, methods = 0] = await take(client, 2);
  await take(client, methods);
  await writeAll(client, Uint8Array.of(version, 0));
  const [, , , kind, length = 0] = await take(client, 5);
  if (kind !== name) throw new Error(`an address must be a name: its kind is ${kind}`);
  const address = await take(client, length + 2);
  await writeAll(client, Uint8Array.of(version, 0, 0, 1, 0, 0, 0, 0, 0, 0));
  return new TextDecoder().decode(address.subarray(0, length));
}

/** So many bytes. */
async function take(client: Deno.Conn, count: number): Promise<Uint8Array> {
  const bytes = new Uint8Array(count);
  for (let have = 0; have < count;) {
    const more = await client.read(bytes.subarray(have));
    if (more === null) throw new Error("hung up");
    have += more;
  }
  return bytes;
}
