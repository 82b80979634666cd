// @ts-check
/**
 * The load generator: one process that is all clients and the backend, so that one clock times every message. It runs
 * one order (see ../outcome.ts) and exits. It is JavaScript for Node because that is the cheapest client of those
 * measured (docs/performance.md) and because Deno reads /proc only with every permission.
 */

import process from "node:process";
import { text } from "node:stream/consumers";
import { Crowd } from "./crowd.js";
import { Direction } from "./direction.js";
import { blank, headBytes } from "./message.js";
import { cpuUs, maxOpenFiles, residentBytes } from "./process.js";
import { hear, Publisher } from "./redis.js";
import { Sender } from "./sender.js";
import { Series } from "./series.js";
import { storm } from "./storm.js";

/** @import { Cpu, Event, Order } from "../outcome.ts" */

/** After the last message is sent: how long nothing may come before what is missing counts as lost. */
const drainQuietMs = 2000;
const lookMs = 5;
/** How long clients that did not read are given to find out that they were dropped. */
const slowEndMs = 2000;

/** @param {Event} event */
const tell = (event) => process.stdout.write(JSON.stringify(event) + "\n");
/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** @type {Order} */
const order = JSON.parse(await text(process.stdin));
const { load, redisPort, serverPid, redisPid } = order;
if (load.sessions + 50 > maxOpenFiles()) {
  throw new Error(
    `${load.sessions} sessions need more open files than the limit of ${maxOpenFiles()}: raise "ulimit -n"`,
  );
}
const firstSlow = load.sessions - (load.slow ?? 0);

/** @returns {Cpu} */
function readCpu() {
  const own = process.cpuUsage();
  return { server: cpuUs(serverPid), load: own.user + own.system, redis: cpuUs(redisPid) };
}
/** @param {Cpu} from @param {Cpu} [to] @returns {Cpu} */
function since(from, to = readCpu()) {
  return { server: to.server - from.server, load: to.load - from.load, redis: to.redis - from.redis };
}

const down = load.down && new Direction(load.down, load, firstSlow);
const up = load.up && new Direction(load.up, load, firstSlow);
const directions = [down, up].filter((direction) => direction !== undefined);
if (down) down.drop = load.drop ?? 0;

const foreign = { count: 0, first: /** @type {string | undefined} */ (undefined) };
/** @param {string} text */
function alien(text) {
  foreign.count++;
  foreign.first ??= text;
}

/** @param {Direction | undefined} direction @param {number} session @param {Buffer} buffer @param {number} at @param {number} length */
function arrived(direction, session, buffer, at, length) {
  if (!direction) return alien("a message of ours that was not sent");
  if (length !== direction.flow.bytes) return alien(buffer.toString("latin1", at, at + Math.min(length, headBytes)));
  const us = direction.receive(session, buffer, at);
  if (us !== undefined) series.interval.record(us);
  sender.refill(direction);
}

const crowd = new Crowd(order, {
  onOpen(client) {
    if (load.storm) down?.ledger.reopen(client.session);
    if (client.session >= firstSlow) client.stopReading();
  },
  onMessage: (client, buffer, at, length) => arrived(down, client.session, buffer, at, length),
  onForeign: (_client, text) => alien(text),
});
const publisher = down && await Publisher.connect(redisPort, blank(down.flow.bytes));
const sender = new Sender(crowd, { down, up, publisher });
const series = new Series(crowd, { down, up }, serverPid, tell);
const hearing = up &&
  await hear(redisPort, (session, buffer, at, length) => arrived(up, session, buffer, at, length));

async function drain() {
  const received = () => directions.reduce((sum, direction) => sum + direction.ledger.received, 0);
  let last = received();
  // Counted in looks: while this process stood still, nothing could come.
  let quietMs = 0;
  while (directions.some((direction) => direction.ledger.outstanding > 0)) {
    await pause(lookMs);
    const now = received();
    quietMs = now === last ? quietMs + lookMs : 0;
    last = now;
    if (quietMs > drainQuietMs) return;
  }
  // Whatever comes twice would come now.
  await pause(50);
}

const sampler = setInterval(() => series.sample(), load.sampleMs);
await crowd.connect(0, load.warmSessions ?? 0);
await pause(load.settleMs);
const baseBytes = residentBytes(serverPid);
const warmed = crowd.connected.opened;
crowd.connectLatency.reset();
const connectCpu = readCpu();
const connectStartMs = performance.now();
await crowd.connect(load.warmSessions ?? 0, load.sessions);
const connectTookMs = performance.now() - connectStartMs;
const connectCost = since(connectCpu);
await pause(load.settleMs);
const openBytes = residentBytes(serverPid);

let measureStartMs = performance.now();
let measureCpu = readCpu();
let storming;
if (directions.length > 0) {
  sender.start();
  storming = load.storm && storm(crowd, sender, down, load.storm);
  await pause(load.warmupMs);
  for (const direction of directions) direction.begin();
  sender.lag.reset();
  measureStartMs = performance.now();
  measureCpu = readCpu();
}
await pause(load.measureMs);
for (const direction of directions) direction.end();
const measureCost = since(measureCpu);
const measuredMs = performance.now() - measureStartMs;
sender.sending = false;
await storming;
await drain();
if (load.slow) {
  // A client that was dropped finds out only by reading.
  const slow = crowd.clients.slice(firstSlow);
  for (const client of slow) client?.readAgain();
  const endMs = performance.now() + slowEndMs;
  while (performance.now() < endMs && slow.some((client) => client && crowd.clients[client.session])) await pause(20);
}
clearInterval(sampler);
series.sample();

tell({
  outcome: {
    connect: {
      ...crowd.connected,
      opened: crowd.connected.opened - warmed,
      tookMs: connectTookMs,
      latency: crowd.connectLatency.toBuckets(),
      cpu: connectCost,
    },
    memory: {
      baseBytes,
      openBytes,
      perConnectionBytes: (openBytes - baseBytes) / Math.max(1, crowd.connected.opened - warmed),
      peakBytes: series.peakBytes,
    },
    measuredMs,
    cpu: measureCost,
    down: down?.outcome(measuredMs),
    up: up?.outcome(measuredMs),
    lag: sender.lag.toBuckets(),
    closes: crowd.closes,
    reconnect: load.storm && { ...crowd.reconnect, latency: crowd.reconnectLatency.toBuckets() },
    foreign,
    series: series.samples,
  },
});
publisher?.close();
hearing?.close();
await new Promise((resolve) => process.stdout.write("", resolve));
process.exit(0);
