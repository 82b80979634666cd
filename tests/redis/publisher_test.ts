/** The queue to one server, and what of it goes to another one. */

import assert from "node:assert/strict";
import { pino } from "pino";
import { parseRedisUrl, type ServerAddress } from "../../src/redis_url.ts";
import { RedisConnection } from "../../src/redis/connection.ts";
import { type Loss, Publisher, type Source } from "../../src/redis/publisher.ts";
import { type Listener as SubscriptionListener, Subscriptions } from "../../src/redis/subscriptions.ts";
import { Listener, Published, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";

const log = pino({ level: "silent" });

async function connect(server: RedisServer): Promise<{ publisher: Publisher; connection: RedisConnection }> {
  const connection = new RedisConnection({
    purpose: "publisher",
    address: parseRedisUrl(server.url) as ServerAddress,
    log,
    prove: (redis) => redis.ping(),
    onUp: () => {},
    onDown: () => {},
    onFailure: () => {},
  });
  await eventually("connected", () => connection.writable !== undefined);
  const publisher = new Publisher({ connection, log, command: "publish", onRedirected() {}, onTimed() {} });
  return { publisher, connection };
}

Deno.test("20,001 messages that wait are published in order, in as many batches as they take", async () => {
  await using server = await RedisServer.start();
  const { publisher, connection } = await connect(server);
  const ear = await Listener.to(server, "channel");
  const source: Source = { pendingCost: 0, discarded: false, entered: false, lost: () => assert.fail(), unheard() {} };
  server.signal("SIGSTOP");
  const texts = Array.from({ length: 20_001 }, (_, n) => String(n));
  for (const text of texts) publisher.publish("channel", text, source);
  server.signal("SIGCONT");
  assert.deepEqual(await ear.take(texts.length), texts);
  await publisher.close(1000);
  assert.equal(source.pendingCost, 0);
  await connection.close();
});

Deno.test("20,001 channels are subscribed to again after a cut, each listener is told of the gap, and all are left", async () => {
  await using server = await RedisServer.start();
  using relay = new Relay(server.port);
  const control = server.client();
  let confirmed = 0;
  let gaps = 0;
  const connection = new RedisConnection({
    ...{ purpose: "subscriber", address: parseRedisUrl(relay.url) as ServerAddress, log },
    prove: (redis) => redis.ping(),
    onUp: () => subscriptions.resume(),
    onDown: () => subscriptions.forget(),
    onFailure: () => {},
  });
  const subscriptions = new Subscriptions({
    ...{ connection, log, outageGraceMs: 60_000, onRedirected: undefined, onTimed() {} },
  });
  const listener: SubscriptionListener = {
    backlog: "none",
    deliver: () => "taken",
    gap: () => gaps++,
    rejected: assert.fail,
    fail: assert.fail,
  };
  const channels = Array.from({ length: 20_001 }, (_, n) => subscriptions.add(`channel-${n}`, listener));
  for (const channel of channels) channel.waiting = [() => confirmed++];
  await eventually("all are confirmed", () => confirmed === channels.length);
  relay.cut();
  await eventually("each is told of the gap", () => gaps === channels.length);
  const inRedis = async () => (await control.pubsub("CHANNELS") as string[]).length;
  assert.equal(await inRedis(), channels.length);
  for (const channel of channels) subscriptions.remove(channel, listener);
  await eventually("all are left", async () => await inRedis() === 0);
  assert.equal(subscriptions.size, 0);
  subscriptions.close();
  await connection.close();
});

Deno.test("What is handed over to another server goes there behind what is under way to the former one", async () => {
  await using former = await RedisServer.start();
  await using next = await RedisServer.start();
  await using published = await Published.on([former, next]);
  const [from, to] = [await connect(former), await connect(next)];
  let owner = from.publisher;
  const lost: Loss[] = [];
  const source: Source = {
    pendingCost: 0,
    discarded: false,
    entered: false,
    lost: (_messages, why) => lost.push(why),
    unheard() {},
  };
  const publish = (text: string) => owner.publish("moving", text, source);
  former.signal("SIGSTOP");
  for (const text of ["1", "2", "3"]) publish(text);
  // The batch is under way by now, and what comes after waits for its answers.
  await new Promise((resolve) => setTimeout(resolve, 0));
  for (const text of ["4", "5"]) publish(text);
  from.publisher.publish("staying", "stays", source);
  from.publisher.betweenBatches(() => {
    owner = to.publisher;
    to.publisher.adopt(from.publisher.take((name) => name === "moving"));
  });
  publish("6");
  former.signal("SIGCONT");
  await eventually("it has moved", () => owner === to.publisher);
  publish("7");
  await eventually("all are published", () => published.to("moving").length === 7);
  assert.deepEqual(published.to("moving"), ["1", "2", "3", "4", "5", "6", "7"]);
  await eventually("all are answered", () => source.pendingCost === 0);
  assert.deepEqual(lost, []);
  for (const { publisher, connection } of [from, to]) {
    await publisher.close(1000);
    await connection.close();
  }
});
