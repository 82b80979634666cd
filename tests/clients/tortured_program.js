// @ts-check
/**
 * A process of tortured clients, in Deno or Node: `tortured_program.js ORDERS [MODULE]`, with the orders as JSON and the
 * module of npm ws where the runtime is to use that. It prints reports, and obeys "calm" and "summarize".
 */

import process from "node:process";
import { createInterface } from "node:readline";
import { begin } from "./tortured.js";

const [orders = "", ws] = process.argv.slice(2);
const Socket = ws === undefined ? WebSocket : (await import(ws)).default;
const print = (/** @type {object} */ report) => process.stdout.write(`${JSON.stringify(report)}\n`);
const clients = begin(JSON.parse(orders), Socket, print);
for await (const line of createInterface({ input: process.stdin })) {
  if (line === "calm") clients.calm();
  else {
    // @ts-ignore: Node has it where it runs with --expose-gc
    globalThis.gc?.();
    const heapMb = Math.round(process.memoryUsage().heapUsed / 2 ** 20);
    print({ event: "summary", ...clients.summarize(), heapMb });
  }
}
process.exit();
