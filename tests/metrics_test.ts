/** What /metrics says of a proxy that works, with one worker and with two. */

import assert from "node:assert/strict";
import { sparePort } from "../scripts/spare_port.ts";
import { metricRows } from "../src/metrics.ts";
import { Client } from "./harness/client.ts";
import { onEachEngine, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { Listener, RedisServer } from "./harness/redis.ts";
import { eventually } from "./harness/wait.ts";
import { openRaw, request } from "./harness/wire.ts";

onEachEngine("What is measured shows, and is plausible", async (engine) => {
  for (const WORKERS of ["1", "2"]) {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, { ...engine, WORKERS });
    const control = redis.client();
    const up = await Listener.to(redis, "session:s1:up");
    const client = await Client.connect(proxy.port, "s1");
    const resuming = await Client.connect(proxy.port, "s2", { resume: "0" });
    assert.match(await resuming.next(), /^!live/);
    await assert.rejects(Client.connect(proxy.port, "s3", { token: "none" }));
    const started = performance.now();
    for (let n = 0; n < 640; n++) client.send("1");
    await up.take(640);
    const pipeline = control.pipeline();
    for (let n = 0; n < 640; n++) pipeline.publish("session:s1:down", "1");
    await pipeline.exec();
    await client.take(640);
    const tookSecs = (performance.now() - started) / 1000;
    let text = "";
    const value = (name: string) => Number(new RegExp(`^${name.replace(/[{}]/g, "\\$&")} (.*)$`, "m").exec(text)?.[1]);
    await eventually("all is counted", async () => {
      text = (await request(proxy.port, "/metrics")).body;
      return value("wsproxy_up_latency_seconds_count") >= 10 && value("wsproxy_event_loop_lag_seconds_count") > 0 &&
        value("wsproxy_redis_round_trip_seconds_count") >= Number(WORKERS);
    });
    for (const name of ["wsproxy_up_latency_seconds", "wsproxy_down_latency_seconds"]) {
      const count = value(`${name}_count`);
      assert(count >= 10 && count <= 12, `${name}: ${count}`);
      const mean = value(`${name}_sum`) / count;
      assert(mean > 0 && mean <= tookSecs, `${name}: ${mean} of ${tookSecs}`);
    }
    assert.equal(value('wsproxy_handshake_seconds_count{outcome="admitted"}'), 2);
    assert.equal(value('wsproxy_handshake_seconds_count{outcome="refused"}'), 1);
    assert.equal(value("wsproxy_catch_up_seconds_count"), 1);
    assert.equal(value("wsproxy_redis_connects_total"), 2 * Number(WORKERS));
    assert(value("wsproxy_heap_bytes") > 1e6);
    assert.equal(value("wsproxy_buffered_bytes"), 0);
    assert.equal(value("wsproxy_pending_bytes"), 0);
    assert.match(
      text,
      new RegExp(`^wsproxy_build_info\\{version="[\\d.]+",deno="[\\d.]+",engine="${engine["WS_ENGINE"]}"\\} 1$`, "m"),
    );
    // Every metric of the table is there, before anything of it has happened.
    for (const { name } of Object.values(metricRows)) assert(text.includes(`# TYPE ${name} `), name);
    // No label has a session, an agent or a token in it.
    assert(!/s1|agent|eyJ/.test(text.replace(/^#.*$/gm, "")));
    await client.close();
    await resuming.close();
  }
});

onEachEngine("METRICS_AGENTS gives those agents metrics of their own, and no others", async (engine) => {
  for (const WORKERS of ["1", "2"]) {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, { ...engine, WORKERS, METRICS_AGENTS: 'a "b", quiet' });
    const clients = await Promise.all(
      ["s1", "s2", "s3"].map((id, n) => Client.connect(proxy.port, id, { agent: n < 2 ? 'a "b"' : "other" })),
    );
    const control = redis.client();
    for (const [n, client] of clients.entries()) {
      await control.publish(`session:s${n + 1}:down`, "1");
      assert.equal(await client.next(), "1");
      client.send("2");
    }
    await control.fcall("wsproxy_send", 1, "session:s1:down", "logged");
    assert.equal(await clients[0]!.next(), "logged");
    await proxy.counts("wsproxy_messages_up_total", 3);
    const { body } = await request(proxy.port, "/metrics");
    const lines = body.split("\n").filter((line) => line.startsWith("wsproxy_agent_"));
    assert.deepEqual(lines.sort(), [
      'wsproxy_agent_connections{agent="a \\"b\\""} 2',
      'wsproxy_agent_connections{agent="quiet"} 0',
      'wsproxy_agent_messages_down_total{agent="a \\"b\\""} 3',
      'wsproxy_agent_messages_down_total{agent="quiet"} 0',
      'wsproxy_agent_messages_up_total{agent="a \\"b\\""} 2',
      'wsproxy_agent_messages_up_total{agent="quiet"} 0',
    ]);
    assert.match(body, /^wsproxy_connections 3$/m);
    assert.match(body, /^wsproxy_messages_down_total 4$/m);
    assert.match(body, /^wsproxy_messages_logged_total 1$/m);
    for (const client of clients) await client.close();
    await eventually(
      "no client is left",
      async () => await proxy.metric('wsproxy_agent_connections{agent="a \\"b\\""}') === 0,
    );
    assert.equal(await proxy.metric("wsproxy_connections"), 0);
  }
});

onEachEngine(
  "Messages with a place in the log are counted once for each client, from the log or as they come",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, engine);
    const control = redis.client();
    const log = (text: string) => control.fcall("wsproxy_send", 1, "session:s1:down", text);
    const clients = [await Client.connect(proxy.port, "s1"), await Client.connect(proxy.port, "s1", { resume: "0" })];
    assert.match(await clients[1]!.next(), /^!live/);
    for (let n = 0; n < 40; n++) await log(`${n}`);
    await control.publish("session:s1:down", "plain");
    for (const client of clients) await client.take(41);
    await proxy.counts("wsproxy_messages_logged_total", 80);
    // One that comes later reads all of them, and what is sent meanwhile it may read and hear.
    const late = Client.connect(proxy.port, "s1", { resume: "0" });
    for (let n = 0; n < 10; n++) await log(`${n}`);
    clients.push(await late);
    const got: string[] = [];
    while (got.filter((frame) => /^\d/.test(frame)).length < 50) got.push(await clients[2]!.next());
    for (const client of clients.slice(0, 2)) await client.take(10);
    await proxy.counts("wsproxy_messages_logged_total", 80 + 20 + 50);
    for (const client of clients) await client.close();
  },
);

Deno.test("What clients do not take, and what Redis does not take, shows in bytes", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { MAX_BUFFER_SIZE_BYTES: "30000000" });
  const client = await Client.connect(proxy.port, "s1");
  redis.signal("SIGSTOP");
  for (let n = 0; n < 100; n++) client.send(JSON.stringify("x".repeat(1000)));
  await eventually("pending", async () => await proxy.metric("wsproxy_pending_bytes") > 90_000);
  redis.signal("SIGCONT");
  await proxy.counts("wsproxy_pending_bytes", 0);
  await client.close();
});

onEachEngine(
  "ADMIN_PORT takes the metrics away from clients, and serves operators, also while draining",
  async (engine) => {
    for (const WORKERS of ["1", "2"]) {
      await using redis = await RedisServer.start();
      const ADMIN_PORT = sparePort();
      const env = { ...engine, WORKERS, ADMIN_PORT: String(ADMIN_PORT), SHUTDOWN_GRACE_PERIOD_SECS: "2" };
      await using proxy = await ProxyProcess.start(redis, env);
      assert.equal((await request(proxy.port, "/metrics")).status, 404);
      assert.equal((await request(proxy.port, "/ready")).status, 200);
      const metrics = await request(ADMIN_PORT, "/metrics");
      assert.match(metrics.body, new RegExp(`^wsproxy_workers ${WORKERS}$`, "m"));
      assert.equal(metrics.headers.get("content-type"), "text/plain; version=0.0.4; charset=utf-8");
      assert.match((await request(ADMIN_PORT, "/health")).body, /"healthy"/);
      assert.equal((await request(ADMIN_PORT, "/ready", { method: "HEAD" })).status, 200);
      assert.equal((await request(ADMIN_PORT, "/metrics", { method: "POST" })).status, 405);
      assert.equal((await request(ADMIN_PORT, "/agent/ws/s1")).status, 404);
      assert.equal((await request(ADMIN_PORT, "/health", { headers: { Host: "x/metrics?" } })).status, 400);
      using _stuck = await openRaw(proxy.port, "s1");
      proxy.signal("SIGTERM");
      await eventually("draining", async () => (await request(ADMIN_PORT, "/ready")).status === 503);
      assert.match((await request(ADMIN_PORT, "/metrics")).body, /^wsproxy_connections [01]$/m);
      assert.equal((await proxy.exit()).code, 0);
      // A port that is taken stops the start.
      await using second = ProxyProcess.spawn(
        testEnv(redis, { ...env, ADMIN_PORT: String(redis.port), LOG_LEVEL: "info" }),
      );
      const line = JSON.parse(await second.log.until((line) => line.includes("could not start")));
      assert.match(line.err.message, /in use/);
      assert.equal((await second.exit()).code, 1);
    }
  },
);
