/** HTTP and WebSocket down to the bytes. */

import { Buffer } from "node:buffer";
import { sparePort } from "../../scripts/spare_port.ts";
import { type Claims, mint } from "./token.ts";
import { soon } from "./wait.ts";

/** Starts something on a spare port, which another process may have taken by then: that is tried again. */
export async function onSparePort<T>(start: (port: number) => Promise<T>): Promise<T> {
  for (let left = 3;; left--) {
    try {
      return await start(sparePort());
    } catch (error) {
      if (left === 0) throw error;
    }
  }
}

/** What `request` sends besides the path. */
export interface RequestOptions {
  method?: string;
  headers?: Record<string, string>;
}

/** An HTTP answer, as it came. */
export interface Reply {
  status: number;
  headers: Headers;
  body: string;
}

/** The headers of a correct opening handshake; "" takes one away. */
export const handshakeHeaders: Record<string, string> = {
  Upgrade: "websocket",
  Connection: "Upgrade",
  "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
  "Sec-WebSocket-Version": "13",
};

/** The text of a request's head. */
export function requestHead(path: string, { method = "GET", headers = {} }: RequestOptions = {}): string {
  const lines = Object.entries({ Host: "127.0.0.1", ...headers }).filter(([, value]) => value !== "");
  return `${method} ${path} HTTP/1.1\r\n${lines.map(([name, value]) => `${name}: ${value}\r\n`).join("")}\r\n`;
}

/** One request over a TCP connection of its own, so that any header can be sent. A 101 is returned and hung up on. */
export async function request(port: number, path: string, options: RequestOptions = {}): Promise<Reply> {
  using connection = await Deno.connect({ hostname: "127.0.0.1", port });
  await writeAll(connection, new TextEncoder().encode(requestHead(path, options)));
  return await soon(
    readReply(connection, options.method !== "HEAD"),
    `answer to ${options.method ?? "GET"} ${path.slice(0, 100)}`,
  );
}

/** The headers of a correct opening handshake with a token for the session. */
export async function handshake(sessionId: string, claims: Claims = {}): Promise<Record<string, string>> {
  return { ...handshakeHeaders, Authorization: `Bearer ${await mint(sessionId, claims)}` };
}

/** A WebSocket down to the bytes: opened by hand, and from then on it does nothing by itself, not even answer a ping. */
export async function openRaw(port: number, sessionId: string, claims: Claims = {}): Promise<Deno.TcpConn> {
  const connection = await Deno.connect({ hostname: "127.0.0.1", port });
  const head = requestHead(`/agent/ws/${sessionId}`, { headers: await handshake(sessionId, claims) });
  try {
    await writeAll(connection, new TextEncoder().encode(head));
    const { status } = await soon(readReply(connection), "101");
    if (status !== 101) throw new Error(`handshake was answered with ${status}`);
    return connection;
  } catch (error) {
    connection.close();
    throw error;
  }
}

/** One frame of a client, masked with zeros unless told otherwise (RFC 6455, section 5.2). */
export function frame(
  opcode: number,
  payload: string | Uint8Array,
  { fin = true, reserved = 0, masked = true, claimedBytes = -1 } = {},
): Uint8Array {
  const body = typeof payload === "string" ? new TextEncoder().encode(payload) : payload;
  const size = claimedBytes < 0 ? body.length : claimedBytes;
  const head = [(fin ? 0x80 : 0) | reserved << 4 | opcode];
  const mask = masked ? 0x80 : 0;
  if (size < 126) head.push(mask | size);
  else if (size < 65_536) head.push(mask | 126, size >> 8, size & 255);
  else head.push(mask | 127, 0, 0, 0, 0, size >>> 24, size >> 16 & 255, size >> 8 & 255, size & 255);
  return new Uint8Array([...head, ...masked ? [0, 0, 0, 0] : [], ...body]);
}

/** Writes all of it. */
export async function writeAll(connection: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let at = 0; at < bytes.length;) at += await connection.write(bytes.subarray(at));
}

/** Reads until a text has come, and returns all up to then. */
export async function readUntil(connection: Deno.Conn, pattern: RegExp): Promise<string> {
  const chunk = new Uint8Array(65_536);
  let text = "";
  while (!pattern.test(text)) {
    const count = await connection.read(chunk);
    if (count === null) throw new Error(`connection ended after ${JSON.stringify(text)}`);
    text += new TextDecoder().decode(chunk.subarray(0, count));
  }
  return text;
}

/** Reads until the connection ends, or is reset. */
export async function readToEnd(connection: Deno.Conn): Promise<void> {
  const chunk = new Uint8Array(65_536);
  while (await connection.read(chunk).catch(() => null) !== null);
}

/** Reads one answer with a Content-Length, or without a body; an answer to HEAD has the one and not the other. */
export async function readReply(connection: Deno.Conn, hasBody = true): Promise<Reply> {
  // One character a byte, as lengths are in bytes.
  const chunk = new Uint8Array(65_536);
  let text = "";
  const read = async () => {
    const count = await connection.read(chunk);
    if (count === null) throw new Error(`connection ended after ${JSON.stringify(text)}`);
    text += Buffer.from(chunk.subarray(0, count)).toString("latin1");
  };
  while (!text.includes("\r\n\r\n")) await read();
  const [head = "", ...rest] = text.split("\r\n\r\n");
  const [statusLine = "", ...fields] = head.split("\r\n");
  const headers = new Headers(fields.map((field): [string, string] => {
    const colon = field.indexOf(":");
    return [field.slice(0, colon), field.slice(colon + 1).trim()];
  }));
  const status = Number(statusLine.split(" ")[1]);
  text = rest.join("\r\n\r\n");
  while (hasBody && status !== 101 && text.length < Number(headers.get("content-length") ?? 0)) await read();
  return { status, headers, body: Buffer.from(text, "latin1").toString() };
}
