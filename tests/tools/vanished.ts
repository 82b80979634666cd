/**
 * Clients that vanish without a word, in network namespaces of their own. Needs ip, unshare and nsenter, and a kernel that
 * lets this user make namespaces. With pings of a second it says how long that takes with another
 * setting: `TCP_RETRIES2=6 ./dev test:file tests/tools/vanished.ts`.
 */

import assert from "node:assert/strict";
import { ProxyProcess } from "../harness/proxy.ts";
import { lines, shell } from "../harness/process.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { patienceMs } from "../harness/wait.ts";

const retries = Number(Deno.env.get("TCP_RETRIES2") ?? 3);
const isInside = Deno.env.get("VANISHED_INSIDE") === "true";

Deno.test("A stream whose client has vanished ends when the kernel gives up, which tcp_retries2 says", async () => {
  if (isInside) return await vanish();
  // Root of a network of its own, without being root: what is set there is set nowhere else.
  const { success, stdout } = await new Deno.Command("unshare", {
    args: ["-rn", Deno.execPath(), "test", "-A", "--no-check", import.meta.filename!],
    env: { VANISHED_INSIDE: "true", NO_COLOR: "1" },
    stderr: "inherit",
  }).output();
  const output = new TextDecoder().decode(stdout);
  assert(success, output);
  console.log(output.match(/^.* ended after .*$/mg)?.join("\n"));
});

async function vanish(): Promise<void> {
  const elsewhere = new Deno.Command("unshare", { args: ["-n", "sleep", "1000"] }).spawn();
  const there = `nsenter -t ${elsewhere.pid} -n`;
  await using redis = await RedisServer.start();
  shell(
    `ip link set lo up && echo ${retries} >/proc/sys/net/ipv4/tcp_retries2 &&
     ip link add va type veth peer name vb && ip addr add 10.0.0.1/24 dev va && ip link set va up &&
     ip link set vb netns ${elsewhere.pid} &&
     ${there} sh -c 'ip addr add 10.0.0.2/24 dev vb && ip link set vb up'`,
  );
  const env = { HOST: "0.0.0.0", WS_PING_INTERVAL_SECS: "1", WS_PING_TIMEOUT_SECS: "1" };
  await using native = await ProxyProcess.start(redis, { ...env, WS_ENGINE: "deno" });
  await using ws = await ProxyProcess.start(redis, { ...env, WS_ENGINE: "ws" });
  const [command = "", ...args] = `${there} ${Deno.execPath()} eval`.split(" ");
  const source = await program([native.port, ws.port]);
  const client = new Deno.Command(command, { args: [...args, source], stdout: "piped" }).spawn();
  const output = lines(client.stdout);
  await output.until((line) => line === "all are open");
  for (const proxy of [native, ws]) await proxy.counts("wsproxy_connections", 2);
  // The other end drops what comes, and as its hardware address stays known, nothing tells us.
  shell(
    `ip neigh replace 10.0.0.2 dev va nud permanent \
       lladdr $(${there} ip -o link show vb | sed 's/.*ether \\([^ ]*\\).*/\\1/') &&
     ${there} ip addr flush dev vb`,
  );
  const startMs = performance.now();
  const limitMs = patienceMs + 400 * 2 ** retries;
  for (const proxy of [native, ws]) {
    while (await proxy.metric("wsproxy_connections") > 0) {
      assert(performance.now() - startMs < limitMs, "the stream has not ended");
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    console.log(`${proxy === ws ? "ws" : "deno"} ended after ${((performance.now() - startMs) / 1000).toFixed(1)} s`);
  }
  client.kill("SIGKILL");
  elsewhere.kill("SIGKILL");
  await Promise.all([client.status, elsewhere.status, output.rest()]);
}

/** A WebSocket and a stream on each port, which say nothing. */
async function program(ports: readonly number[]): Promise<string> {
  return `
    const headers = { Authorization: "Bearer ${await mint("s1")}" };
    const all = [];
    for (const port of ${JSON.stringify(ports)}) {
      all.push(await fetch("http://10.0.0.1:" + port + "/agent/sse/s1", { headers }));
      const socket = new WebSocket("ws://10.0.0.1:" + port + "/agent/ws/s1", { headers });
      await new Promise((resolve) => socket.onopen = resolve);
      all.push(socket);
    }
    console.log("all are open");
    setInterval(() => all, 1000);`;
}
