// @ts-check
/**
 * The load generator: one process that is all clients and the backend, so that one clock times every message. It runs
 * one order (see ../outcome.ts) and exits. It is JavaScript for Node because that is the cheapest client of those
 * measured (docs/performance.md) and because Deno reads /proc only with every permission.
 */

import { Buffer } from "node:buffer";
import { createHmac } from "node:crypto";
import process from "node:process";
import { text } from "node:stream/consumers";
import { Client, FrameWriter } from "./client.js";
import { Histogram } from "./histogram.js";
import { Ledger } from "./ledger.js";
import { blank, dueUsOf, headBytes, numberOf, sessionOf } from "./message.js";
import { cpuUs, maxOpenFiles, residentBytes } from "./process.js";
import { hear, Publisher, sessionName } from "./redis.js";

/** @import { Account, Cpu, Event, Flow, FlowOutcome, Order, Sample } from "../outcome.ts" */

/** Connections from one address, which has some 28,000 ports for them. */
const clientsPerAddress = 20_000;
/** After the last message is sent: how long nothing may come before what is missing counts as lost. */
const drainQuietMs = 2000;
/** How long clients that did not read are given to find out that they were dropped. */
const slowEndMs = 2000;
/** How often a share of streaming sessions moves on. */
const rotateMs = 500;

/** @param {Event} event */
const tell = (event) => process.stdout.write(JSON.stringify(event) + "\n");
/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const nowUs = () => Math.round(performance.now() * 1000);

/** @type {Order} */
const order = JSON.parse(await text(process.stdin));
const { load, port, redisPort, serverPid, redisPid, secret } = order;
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

/** One direction's state. */
class Direction {
  latency = new Histogram();
  /** @type {Ledger} */
  ledger;
  /** @param {Flow} flow */
  constructor(flow) {
    this.flow = flow;
    this.ledger = new Ledger(load.sessions, firstSlow);
    this.streaming = Math.max(1, Math.round(load.sessions * (flow.active ?? 1)));
    this.messagesAt = 0;
    this.messages = 0;
  }

  /** Messages sent since the flow began. */
  sent = 0;
  startMs = 0;
  /** Messages still to be lost on purpose. */
  drop = 0;

  /** The session whose turn it is. @param {number} nowMs */
  turn(nowMs) {
    const { streaming } = this;
    if (streaming === load.sessions) return this.sent % streaming;
    const moved = Math.floor((nowMs - this.startMs) / rotateMs) * streaming / 2;
    return (this.sent % streaming + Math.floor(moved)) % load.sessions;
  }

  /** How many are due. @param {number} nowMs */
  due(nowMs) {
    const { perSecond, window = 0 } = this.flow;
    if (perSecond === undefined) return Math.max(0, window - this.ledger.outstanding);
    return Math.floor((nowMs - this.startMs) * perSecond / 1000) - this.sent;
  }

  /** When the next one is due, in microseconds. @param {number} nowMs */
  dueUs(nowMs) {
    const { perSecond } = this.flow;
    return Math.round((perSecond === undefined ? nowMs : this.startMs + (this.sent + 1) * 1000 / perSecond) * 1000);
  }
}

const down = load.down && new Direction(load.down);
const up = load.up && new Direction(load.up);
if (down) down.drop = load.drop ?? 0;
const interval = new Histogram();
const lag = new Histogram();
/** @type {Record<string, number>} */
const closes = {};
const foreign = { count: 0, first: /** @type {string | undefined} */ (undefined) };

/** @param {Direction} direction @param {number} session @param {Buffer} buffer @param {number} at @param {number} length */
function arrived(direction, session, buffer, at, length) {
  if (length !== direction.flow.bytes) return alien(buffer.toString("latin1", at, at + Math.min(length, headBytes)));
  const us = nowUs() - dueUsOf(buffer, at);
  direction.ledger.receive(session, sessionOf(buffer, at), numberOf(buffer, at));
  if (session >= firstSlow) return;
  direction.latency.record(us);
  interval.record(us);
}

/** @param {string} text */
function alien(text) {
  foreign.count++;
  foreign.first ??= text;
}

const publisher = down && await Publisher.connect(redisPort, blank(down.flow.bytes));
const hearing = up &&
  await hear(redisPort, (session, buffer, at, length) => {
    arrived(up, session, buffer, at, length);
    refill(up);
  });
const frames = up && new FrameWriter(blank(up.flow.bytes));

// --- connecting

/** @type {(Client | undefined)[]} */
const clients = new Array(load.sessions);
const requests = Array.from({ length: load.sessions }, (_, session) => requestFor(session));
const connectLatency = new Histogram();
const reconnectLatency = new Histogram();
const reconnect = { opened: 0, failed: 0 };
let open = 0;

/** @param {number} session */
function requestFor(session) {
  /** @param {object} part */
  const encode = (part) => Buffer.from(JSON.stringify(part)).toString("base64url");
  const iat = Math.floor(Date.now() / 1000);
  const claims = { session_id: sessionName(session), iat, exp: iat + 86_400 };
  const signed = `${encode({ alg: "HS256", typ: "JWT" })}.${encode(claims)}`;
  const token = `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
  return [
    `GET /bench/ws/${sessionName(session)} HTTP/1.1`,
    `Host: 127.0.0.1:${port}`,
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    `Authorization: Bearer ${token}`,
    "User-Agent: wsproxy-bench",
    "\r\n",
  ].join("\r\n");
}

/** What waits for a client's open or failure, by session. @type {(((client: Client | undefined, why?: number | string) => void) | undefined)[]} */
const opening = new Array(load.sessions);

/** @type {import("./client.js").Listener} */
const listener = {
  onOpen(client) {
    clients[client.session] = client;
    open++;
    if (load.storm) down?.ledger.reopen(client.session);
    if (client.session >= firstSlow) client.stopReading();
    opening[client.session]?.(client);
  },
  onRefused(client, status) {
    opening[client.session]?.(undefined, status);
  },
  onMessage(client, buffer, at, length) {
    if (!down) return alien("a message of ours that was not sent");
    arrived(down, client.session, buffer, at, length);
    refill(down);
  },
  onForeign(_client, text) {
    alien(text);
  },
  onEnd(client, code) {
    if (clients[client.session] !== client) return opening[client.session]?.(undefined, code);
    clients[client.session] = undefined;
    open--;
    closes[code] = (closes[code] ?? 0) + 1;
  },
};

/** Resolves with nothing when it was opened, else with the HTTP status or the error's code. @param {number} session @param {Histogram} latency @returns {Promise<number | string | undefined>} */
function connectOne(session, latency) {
  return new Promise((resolve) => {
    const client = new Client(session, {
      port,
      localAddress: `127.0.0.${1 + Math.floor(session / clientsPerAddress)}`,
      request: requests[session] ?? "",
      listener,
    });
    opening[session] = (opened, why) => {
      opening[session] = undefined;
      if (opened) latency.record((performance.now() - client.startedMs) * 1000);
      resolve(opened ? undefined : why);
    };
  });
}

/** @type {{ opened: number, refused: Record<string, number>, failed: Record<string, number> }} */
const connected = { opened: 0, refused: {}, failed: {} };

/** @param {number} from @param {number} to */
async function connectAll(from, to) {
  let next = from;
  async function connectNext() {
    while (next < to) {
      const why = await connectOne(next++, connectLatency);
      if (why === undefined) connected.opened++;
      else {
        const by = typeof why === "number" ? connected.refused : connected.failed;
        by[why] = (by[why] ?? 0) + 1;
      }
    }
  }
  await Promise.all(Array.from({ length: load.connecting }, connectNext));
}

// --- the series

/** @type {Sample[]} */
const series = [];
let peakBytes = 0;
let sampledMs = performance.now();
let sampled = { down: 0, up: 0 };
const beginMs = performance.now();

function sample() {
  const nowMs = performance.now();
  const secs = (nowMs - sampledMs) / 1000;
  const counts = { down: down?.ledger.received ?? 0, up: up?.ledger.received ?? 0 };
  const serverBytes = residentBytes(serverPid);
  peakBytes = Math.max(peakBytes, serverBytes);
  const downPerSecond = Math.round((counts.down - sampled.down) / secs);
  const upPerSecond = Math.round((counts.up - sampled.up) / secs);
  series.push({
    atMs: Math.round(nowMs - beginMs),
    connections: open,
    downPerSecond,
    upPerSecond,
    serverBytes,
    ...(interval.count > 0 ? { p50Us: interval.percentile(50), p99Us: interval.percentile(99) } : {}),
  });
  const rates = [down && `, ${downPerSecond} down/s`, up && `, ${upPerSecond} up/s`].filter(Boolean).join("");
  tell({ progress: `${open} open${rates}, ${Math.round(serverBytes / 2 ** 20)} MB` });
  interval.reset();
  sampled = counts;
  sampledMs = nowMs;
}

// --- sending

let sending = false;
/** @type {NodeJS.Immediate | undefined} */
let refilling;

/** Closed loop: sends more as soon as half of the window has come back. @param {Direction} direction */
function refill(direction) {
  if (direction.flow.perSecond !== undefined || refilling || !sending) return;
  if (direction.ledger.outstanding > (direction.flow.window ?? 0) / 2) return;
  refilling = setImmediate(() => {
    refilling = undefined;
    sendDue();
  });
}

function sendDue() {
  if (!sending) return;
  const nowMs = performance.now();
  if (down && publisher) {
    for (let due = down.due(nowMs); due > 0; due--) {
      const session = down.turn(nowMs);
      const dueUs = down.dueUs(nowMs);
      const astray = down.drop > 0 && session < firstSlow;
      if (astray) down.drop--;
      publisher.publish(session, down.ledger.send(session), dueUs, astray);
      if (down.flow.perSecond !== undefined) lag.record(nowMs * 1000 - dueUs);
      down.sent++;
    }
    publisher.flush();
  }
  if (up && frames) {
    for (let due = up.due(nowMs); due > 0; due--) {
      const session = up.turn(nowMs);
      const dueUs = up.dueUs(nowMs);
      up.sent++;
      const client = clients[session];
      if (!client) continue;
      client.send(frames.write(session, up.ledger.send(session), dueUs));
      if (up.flow.perSecond !== undefined) lag.record(nowMs * 1000 - dueUs);
    }
  }
}

function pump() {
  if (!sending) return;
  sendDue();
  setTimeout(pump, 1);
}

/** Breaks and reopens the storm's sessions, again and again while messages are sent. @param {number} sessions @param {number} everyMs */
async function storm(sessions, everyMs) {
  const first = load.sessions - sessions;
  while (sending) {
    const startMs = performance.now();
    const reopened = [];
    for (let session = first; session < load.sessions; session++) {
      const client = clients[session];
      if (client) {
        clients[session] = undefined;
        open--;
        down?.ledger.cut(session);
        client.cut();
      }
      reopened.push(reopenOne(session));
      // At once, but not so that our own messages are late for it.
      if (session % 8 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    await Promise.all(reopened);
    await pause(Math.max(0, everyMs - (performance.now() - startMs)));
  }
}

/** @param {number} session */
async function reopenOne(session) {
  const why = await connectOne(session, reconnectLatency);
  if (why === undefined) reconnect.opened++;
  else {
    reconnect.failed++;
    connected.failed[why] = (connected.failed[why] ?? 0) + 1;
  }
}

const directions = [down, up].filter((direction) => direction !== undefined);
const received = () => directions.reduce((sum, direction) => sum + direction.ledger.received, 0);

async function drain() {
  let last = received();
  let lastMs = performance.now();
  while (directions.some((direction) => direction.ledger.outstanding > 0)) {
    await pause(5);
    const now = received();
    if (now !== last) {
      last = now;
      lastMs = performance.now();
    } else if (performance.now() - lastMs > drainQuietMs) return;
  }
  // Whatever comes twice would come now.
  await pause(50);
}

// --- the run

const sampler = setInterval(sample, load.sampleMs);
await connectAll(0, load.warmSessions ?? 0);
await pause(load.settleMs);
const baseBytes = residentBytes(serverPid);
const warmed = connected.opened;
connectLatency.reset();
const connectCpu = readCpu();
const connectStartMs = performance.now();
await connectAll(load.warmSessions ?? 0, load.sessions);
const connectTookMs = performance.now() - connectStartMs;
const connectCost = since(connectCpu);
await pause(load.settleMs);
const openBytes = residentBytes(serverPid);

let measureStartMs = performance.now();
let measureCpu = readCpu();
let storming;
if (directions.length > 0) {
  sending = true;
  for (const direction of directions) direction.startMs = performance.now();
  pump();
  storming = load.storm && storm(load.storm.sessions, load.storm.everyMs);
  await pause(load.warmupMs);
  for (const direction of directions) {
    direction.latency.reset();
    direction.messagesAt = direction.ledger.received;
  }
  lag.reset();
  measureStartMs = performance.now();
  measureCpu = readCpu();
}
await pause(load.measureMs);
for (const direction of directions) direction.messages = direction.ledger.received - direction.messagesAt;
const measureCost = since(measureCpu);
const measuredMs = performance.now() - measureStartMs;
sending = false;
await storming;
await drain();
if (load.slow) {
  // Whoever was dropped finds out only by reading.
  const slow = clients.slice(firstSlow);
  for (const client of slow) client?.readAgain();
  const endMs = performance.now() + slowEndMs;
  while (performance.now() < endMs && slow.some((client) => client && clients[client.session])) await pause(20);
}
clearInterval(sampler);
sample();

/** @param {Direction | undefined} direction @returns {FlowOutcome | undefined} */
function outcomeOf(direction) {
  if (!direction) return undefined;
  return {
    account: direction.ledger.close(),
    messages: direction.messages,
    perSecond: direction.messages / measuredMs * 1000,
    latency: direction.latency.toBuckets(),
  };
}

tell({
  outcome: {
    connect: {
      ...connected,
      opened: connected.opened - warmed,
      tookMs: connectTookMs,
      latency: connectLatency.toBuckets(),
      cpu: connectCost,
    },
    memory: {
      baseBytes,
      openBytes,
      perConnectionBytes: (openBytes - baseBytes) / Math.max(1, connected.opened - warmed),
      peakBytes,
    },
    measuredMs,
    cpu: measureCost,
    down: outcomeOf(down),
    up: outcomeOf(up),
    lag: lag.toBuckets(),
    closes,
    reconnect: load.storm && { ...reconnect, latency: reconnectLatency.toBuckets() },
    foreign,
    series,
  },
});
publisher?.close();
hearing?.close();
await new Promise((resolve) => process.stdout.write("", resolve));
process.exit(0);
