/**
 * `deno task bench:resume`: 10,000 clients that resume come back at once, each has missed 20 messages, while a stream
 * goes to others.
 */

import { giveOrder, startLoad, startRedis, startTarget } from "./processes.ts";
import { align, count, ms, us } from "./table.ts";
import { targets } from "./targets.ts";

const load = { sessions: 10_000, missed: 20, connecting: 200, witnesses: 100, perSecond: 2000, bytes: 64 };
const mib = (bytes: number) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

const rows = [["", "time", "resumes/s", "CPU us each", "memory before", "peak", "p99 ms of others", "before", "gaps"]];
for (const target of targets.filter(({ name }) => name.startsWith("wsproxy"))) {
  await using redis = await startRedis();
  const secret = crypto.randomUUID();
  await using server = await startTarget(target, redis, secret);
  await functionsLoaded(redis.port);
  const order = {
    ...load,
    port: server.port,
    redisPort: redis.port,
    serverPid: server.pid,
    secret,
  };
  const node = startLoad("resume.js");
  await giveOrder(node, order);
  const { success, stdout } = await node.output();
  if (!success) Deno.exit(1);
  const found = JSON.parse(new TextDecoder().decode(stdout));
  rows.push([
    target.name,
    `${(found.tookMs / 1000).toFixed(1)} s`,
    count(load.sessions / found.tookMs * 1000),
    us(found.serverUs),
    mib(found.baseBytes),
    mib(found.peakBytes),
    ms(found.stormP99Us / 1000),
    ms(found.quietP99Us / 1000),
    String(found.gaps),
  ]);
}
console.log(
  `${count(load.sessions)} clients resume at once, ${load.missed} messages of ${load.bytes} bytes missed each,`,
);
console.log(`while ${count(load.perSecond)} messages a second go to ${load.witnesses} others\n`);
console.log(align(rows));

/** The proxy loads the functions when it connects. */
async function functionsLoaded(port: number): Promise<void> {
  for (let tries = 0; tries < 500; tries++) {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port });
    await connection.write(new TextEncoder().encode("FUNCTION LIST LIBRARYNAME wsproxy\r\n"));
    const reply = new Uint8Array(64);
    const size = await connection.read(reply);
    if (!new TextDecoder().decode(reply.subarray(0, size ?? 0)).startsWith("*0")) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error("the proxy has not loaded the functions");
}
