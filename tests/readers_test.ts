/** Clients that read slowly or not at all, and fast ones that must not be taken for such. */

import assert from "node:assert/strict";
import { Client } from "./harness/client.ts";
import { onEachEngine, ProxyProcess, TestProxy } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { eventually } from "./harness/wait.ts";
import { openRaw } from "./harness/wire.ts";

onEachEngine("A client that does not read is closed with 1008, before it costs more than its share", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "262144" });
  await using witness = await Client.connect(proxy.port, "witness");
  const control = redis.client();
  const slowClients = 60;
  const slow = await Promise.all(Array.from({ length: slowClients }, () => openRaw(proxy.port, "slow")));
  // 20 MB to each of them, in pieces as small as a model's tokens and as large as a document: together three times the
  // limit of below.
  let sent = 0;
  for (let n = 0; sent < 20_000_000; n++) {
    const text = "x".repeat(n % 2 ? 60_000 : 60);
    sent += text.length;
    await control.publish("session:slow:down", text);
    if (n % 100 === 0) {
      await control.publish("session:witness:down", String(n));
      assert.equal(await witness.next(), String(n));
    }
  }
  await proxy.counts('wsproxy_closed_total{code="1008"}', slowClients);
  await proxy.counts("wsproxy_slow_clients_total", slowClients);
  await proxy.counts("wsproxy_connections", 1);
  await proxy.counts("wsproxy_subscriptions", 3);
  const limit = 400 * 1024 * 1024;
  assert(proxy.peakBytes < limit, `${proxy.peakBytes} bytes`);
  for (const connection of slow) connection.close();
});

onEachEngine(
  "A client that does not read small messages is closed for what they cost besides their payload",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "1048576" });
    const control = redis.client();
    using _slow = await openRaw(proxy.port, "s1");
    // The kernel takes megabytes first: what it takes of small messages takes long on a busy machine.
    await eventually("the kernel takes no more", async () => {
      await control.publish("session:s1:down", "x".repeat(60_000));
      // A single message may be on its way to the kernel just now.
      return await proxy.metric("wsproxy_buffered_bytes") > 200_000;
    });
    // Of payload these are a fifth of the limit.
    const isClosed = async () => await proxy.metric('wsproxy_closed_total{code="1008"}') === 1;
    for (let round = 0; round < 20 && !await isClosed(); round++) {
      const pipeline = control.pipeline();
      for (let i = 0; i < 1000; i++) pipeline.publish("session:s1:down", "0123456789");
      await pipeline.exec();
    }
    await proxy.counts('wsproxy_closed_total{code="1008"}', 1);
    await eventually("Redis has forgotten", () => proxy.proxy.subscriptions === 2);
  },
);

/** Publishes without a pause. */
async function burst(redis: RedisServer, texts: readonly string[]): Promise<void> {
  const control = redis.client();
  for (let at = 0; at < texts.length; at += 1000) {
    const pipeline = control.pipeline();
    for (const text of texts.slice(at, at + 1000)) pipeline.publish("session:s1:down", text);
    await pipeline.exec();
  }
}

/** Numbered texts of about so many bytes. */
const texts = (count: number, size: number) => Array.from({ length: count }, (_, n) => String(n).padEnd(size, "x"));
/** Redis cuts off no subscriber. */
const patient = ["--client-output-buffer-limit", "pubsub", "0", "0", "0"];

onEachEngine("A client that reads gets all of a burst, however many messages come in one read", async (engine) => {
  await using redis = await RedisServer.start(...patient);
  await using proxy = await ProxyProcess.start(redis, engine);
  await using client = await Client.connect(proxy.port, "s1");
  for (const [count, size] of [[1500, 7], [100_000, 8], [20_000, 1000], [40, 900_000]] as const) {
    const sent = texts(count, size);
    await burst(redis, sent);
    assert.deepEqual(await client.take(count), sent);
  }
  assert.equal(await proxy.metric('wsproxy_closed_total{code="1008"}'), 0);
});

onEachEngine("A client that reads gets all of a burst, however small its buffer is", async (engine) => {
  await using redis = await RedisServer.start(...patient);
  await using proxy = await ProxyProcess.start(redis, { ...engine, MAX_BUFFER_SIZE_BYTES: "65536" });
  await using client = await Client.connect(proxy.port, "s1");
  for (const [count, size] of [[10_000, 8], [5000, 1000], [20, 900_000]] as const) {
    const sent = texts(count, size);
    await burst(redis, sent);
    assert.deepEqual(await client.take(count), sent);
  }
});

onEachEngine("A client that reads gets all that came while the proxy was stopped", async (engine) => {
  await using redis = await RedisServer.start(...patient);
  await using proxy = await ProxyProcess.start(redis, engine);
  await using client = await Client.connect(proxy.port, "s1");
  for (const [count, size] of [[50_000, 8], [20_000, 500]] as const) {
    const sent = texts(count, size);
    proxy.signal("SIGSTOP");
    await burst(redis, sent);
    proxy.signal("SIGCONT");
    assert.deepEqual(await client.take(count), sent);
  }
  assert.equal(await proxy.metric("wsproxy_gaps_total"), 0);
});

onEachEngine("A fast reader of a long stream is never taken for a slow one", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await using client = await proxy.connect("s1");
  const control = redis.client();
  for (let round = 0; round < 100; round++) {
    const pipeline = control.pipeline();
    for (let i = 0; i < 300; i++) pipeline.publish("session:s1:down", String(i));
    await pipeline.exec();
    assert.equal((await client.take(300)).at(-1), "299");
  }
});

Deno.test("[ws] A stuck reader is really cut off", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis, { WS_ENGINE: "ws", MAX_BUFFER_SIZE_BYTES: "100000" });
  const before = proxy.descriptors;
  using _stuck = await openRaw(proxy.port, "s1");
  const control = redis.client();
  while (await control.publish("session:s1:down", "x".repeat(100_000)) > 0);
  await eventually("its descriptor is free though it holds on", () => proxy.descriptors <= before);
});

Deno.test("[deno] What a stuck reader holds is counted for as long as it holds on", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "deno", MAX_BUFFER_SIZE_BYTES: "1000000" });
  const stuck = await openRaw(proxy.port, "s1");
  const control = redis.client();
  while (await control.publish("session:s1:down", "x".repeat(100_000)) > 0);
  await proxy.empty();
  assert(await proxy.metric("wsproxy_buffered_bytes") > 500_000);
  stuck.close();
  await proxy.counts("wsproxy_buffered_bytes", 0);
});
