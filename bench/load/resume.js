// @ts-check
/**
 * A storm of clients that resume: each has missed some messages of its log, and all come back at once, while messages
 * are streamed to others. Takes an order as JSON on standard input, and prints what it measured as JSON.
 */

import { Buffer } from "node:buffer";
import { once } from "node:events";
import { connect } from "node:net";
import process from "node:process";
import { text } from "node:stream/consumers";
import { Client } from "./client.js";
import { requestFor } from "./crowd.js";
import { Histogram } from "./histogram.js";
import { blank, dueUsOf } from "./message.js";
import { cpuUs, residentBytes } from "./process.js";
import { Publisher, sessionName } from "./redis.js";

/** @type {{ port: number, redisPort: number, serverPid: number, secret: string, sessions: number, missed: number, connecting: number, witnesses: number, perSecond: number, bytes: number }} */
const order = JSON.parse(await text(process.stdin));
const { port, redisPort, serverPid, sessions, missed, connecting, witnesses, perSecond, bytes } = order;
/** @param {number} ms */
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Sends commands in one write, and waits for as many replies, of which each ends its last line with a number. @param {string[][]} commands */
async function pipeline(commands) {
  const socket = connect({ port: redisPort, host: "127.0.0.1" });
  await once(socket, "connect");
  let replies = 0;
  const done = new Promise((resolve, reject) => {
    socket.on("data", (chunk) => {
      const data = chunk.toString("latin1");
      if (/^-/m.test(data)) reject(new Error(data.slice(0, 200)));
      // The number of receivers is the last line of a reply.
      replies += data.split("\n:").length - 1 + (data.startsWith(":") ? 1 : 0);
      if (replies >= commands.length) resolve(undefined);
    });
  });
  for (let at = 0; at < commands.length; at += 500) {
    const batch = commands.slice(at, at + 500).map((words) =>
      `*${words.length}\r\n${words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("")}`
    );
    if (!socket.write(batch.join(""))) await once(socket, "drain");
  }
  await done;
  socket.destroy();
}

const payload = "x".repeat(bytes);
/** @type {string[][]} */
const logged = [];
for (let n = 0; n < missed; n++) {
  for (let session = witnesses; session < witnesses + sessions; session++) {
    const channel = `session:${sessionName(session)}:down`;
    logged.push(["FCALL", "wsproxy_send", "1", channel, payload, `${n}`]);
  }
}
await pipeline(logged);

let latency = new Histogram();
let late = 0;
const listener = {
  onOpen() {},
  /** @param {unknown} _client @param {number} status */
  onRefused(_client, status) {
    throw new Error(`refused with ${status}`);
  },
  /** @param {unknown} _client @param {Buffer} buffer @param {number} at */
  onMessage(_client, buffer, at) {
    latency.record(Math.round(performance.now() * 1000) - dueUsOf(buffer, at));
  },
  onForeign() {},
  /** @param {unknown} _client @param {number | string} code */
  onEnd(_client, code) {
    throw new Error(`ended with ${code}`);
  },
};
await Promise.all(Array.from({ length: witnesses }, (_, session) =>
  new Promise((resolve) =>
    new Client(session, {
      port,
      localAddress: "127.0.0.1",
      request: requestFor(order, session),
      listener: { ...listener, onOpen: () => resolve(undefined) },
    })
  )));

const publisher = await Publisher.connect(redisPort, blank(64));
const startMs = performance.now();
let sent = 0;
const stream = setInterval(() => {
  const nowMs = performance.now();
  const due = Math.floor((nowMs - startMs) * perSecond / 1000);
  for (; sent < due; sent++) {
    const dueUs = Math.round((startMs + (sent + 1) * 1000 / perSecond) * 1000);
    late = Math.max(late, nowMs * 1000 - dueUs);
    publisher.publish(sent % witnesses, Math.floor(sent / witnesses), dueUs, false);
  }
  publisher.flush();
}, 1);
await pause(1000);
latency = new Histogram();
await pause(3000);
const quiet = latency;
latency = new Histogram();
const baseBytes = residentBytes(serverPid);
const cpu = cpuUs(serverPid);
let peakBytes = baseBytes;
const sampler = setInterval(() => peakBytes = Math.max(peakBytes, residentBytes(serverPid)), 20);
const stormMs = performance.now();
let next = witnesses;
let got = 0;
let gaps = 0;

/** One client, until it is live. @param {number} session */
function resume(session) {
  let frames = 0;
  return new Promise((resolve) =>
    new Client(session, {
      port,
      localAddress: "127.0.0.1",
      request: requestFor(order, session, true),
      listener: {
        ...listener,
        onForeign(_client, frame) {
          if (frame.startsWith("!live")) {
            if (frames !== missed) throw new Error(`${frames} of ${missed}`);
            resolve(undefined);
          } else if (frame.startsWith("!gap")) gaps++;
          else {
            frames++;
            got++;
          }
        },
      },
    })
  );
}

await Promise.all(Array.from({ length: connecting }, async () => {
  while (next < witnesses + sessions) await resume(next++);
}));
const tookMs = performance.now() - stormMs;
const storm = latency;
clearInterval(sampler);
clearInterval(stream);
const serverUs = (cpuUs(serverPid) - cpu) / sessions;
process.stdout.write(
  JSON.stringify({
    tookMs,
    got,
    gaps,
    serverUs,
    baseBytes,
    peakBytes,
    openBytes: residentBytes(serverPid),
    quietP99Us: quiet.percentile(99),
    stormP99Us: storm.percentile(99),
    late,
  }),
  () => process.exit(0),
);
