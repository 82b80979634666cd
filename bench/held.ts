/**
 * What a held message costs besides its payload, for src/overhead.ts:
 * `deno run --allow-net=127.0.0.1 --allow-env --allow-sys --v8-flags=--expose-gc bench/held.ts`
 */

import { Buffer } from "node:buffer";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { WebSocketServer } from "ws";
import { Publisher, type PublisherOptions } from "../src/redis/publisher.ts";
import { Outbox } from "../src/session/outbox.ts";

const messages = 50_000;
const chars = 10;

/** What is in use when all that can be collected has been. */
async function settled(): Promise<Deno.MemoryUsage> {
  for (let i = 0; i < 4; i++) {
    (globalThis as unknown as { gc(): void }).gc();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return Deno.memoryUsage();
}

async function measure(place: string, hold: (text: string) => void): Promise<void> {
  const before = await settled();
  for (let n = 0; n < messages; n++) hold(String(n).padStart(chars, "0"));
  const after = await settled();
  const each = (bytes: number) => Math.round(bytes / messages - chars);
  const heap = each(after.heapUsed + after.external - before.heapUsed - before.external);
  console.log(`${place}: ${heap} bytes of heap, ${each(after.rss - before.rss)} resident`);
}

/** A client that never reads. */
async function connect(port: number): Promise<Deno.TcpConn> {
  const connection = await Deno.connect({ hostname: "127.0.0.1", port });
  const key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13";
  const head = `GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n${key}\r\n\r\n`;
  await connection.write(new TextEncoder().encode(head));
  return connection;
}

interface Sends {
  readonly bufferedAmount: number;
  send(text: string): void;
}

/** Sends until the kernel takes no more. */
async function fill(socket: Sends): Promise<void> {
  while (socket.bufferedAmount === 0) {
    socket.send("x".repeat(60_000));
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

// First, as what the others leave in memory would be used again and not show.
const opened = Promise.withResolvers<WebSocket>();
const { addr } = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, (request) => {
  const { socket, response } = Deno.upgradeWebSocket(request);
  socket.onopen = () => opened.resolve(socket);
  return response;
});
const _other = await connect(addr.port);
const denoSocket = await opened.promise;
await fill(denoSocket);
await measure("transport of Deno", (text) => denoSocket.send(text));

const outbox = new Outbox(Infinity, { tooSlow() {} });
await measure("outbox", (text) => void outbox.send(Buffer.from(text)));

// It has no connection, so that all stays pending.
const publisher = new Publisher({ connection: {}, command: "publish" } as unknown as PublisherOptions);
const source = { pendingCost: 0 } as unknown as Parameters<Publisher["publish"]>[2];
await measure("publisher", (text) => publisher.publish("session:s1:up", Buffer.from(text).toString(), source));

const server = createServer();
await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", () => resolve()));
const accepted = Promise.withResolvers<Sends & { send(message: Buffer, options: { binary: boolean }): void }>();
new WebSocketServer({ server }).on("connection", accepted.resolve);
const _one = await connect((server.address() as AddressInfo).port);
const wsSocket = await accepted.promise;
await fill(wsSocket);
await measure("transport of ws", (text) => wsSocket.send(Buffer.from(text), { binary: false }));
Deno.exit(0);
