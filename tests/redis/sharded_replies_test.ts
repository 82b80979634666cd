/** What sharded subscriptions rely on in ioredis: whose reply is whose. A new ioredis that differs fails here. */

import assert from "node:assert/strict";
import { Redis, ReplyError } from "ioredis";
import { redisOptions } from "../../src/redis/client.ts";
import { askEach, expectSharded } from "../../src/redis/sharded_replies.ts";
import { slotOf } from "../../src/redis/slot.ts";
import { type ClusterNode, TestCluster } from "../harness/cluster.ts";
import { disconnect } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";

/** Names of slots that only one of the servers has. */
function namesIn(slots: ReadonlySet<number>, count: number): string[] {
  const names: string[] = [];
  for (let n = 0; names.length < count; n++) if (slots.has(slotOf(`n${n}`))) names.push(`n${n}`);
  return names;
}

Deno.test("Each subscription has its own outcome, and a slot that leaves takes no other reply", async () => {
  await using cluster = await TestCluster.start(2);
  const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
  const own = namesIn(await cluster.slotsOf(from), 5);
  const foreign = namesIn(await cluster.slotsOf(to), 3);
  const redis = new Redis(redisOptions({ host: "127.0.0.1", port: from.server.port, tls: false }));
  const errors: Error[] = [];
  redis.on("error", (error) => errors.push(error));
  await new Promise<void>((resolve) => redis.once("ready", resolve));
  const left: string[] = [];
  const messages: string[] = [];
  expectSharded(redis, (channel) => left.push(channel));
  redis.on("smessageBuffer", (channel, message) => messages.push(`${channel} ${message}`));
  assert.equal(await redis.ping(), "PONG");

  const mixed = [own[0]!, foreign[0]!, own[1]!, foreign[1]!, own[2]!];
  const outcomes = await askEach(redis, "subscribe", mixed);
  for (const [i, outcome] of outcomes.entries()) {
    if (i % 2 === 0) assert.equal(typeof outcome, "number");
    else assert.match(String(outcome), /^ReplyError: MOVED /);
  }
  assert.equal(await cluster.publish(own[1]!, "x"), 1);
  await eventually("it has come", () => messages.length === 1);
  // The mode in which messages are told from replies outlives the last channel.
  const ended = askEach(redis, "unsubscribe", [own[0]!, foreign[2]!, own[1]!, own[2]!]);
  const again = askEach(redis, "subscribe", own);
  assert.deepEqual((await ended).map((outcome) => outcome instanceof ReplyError), [false, true, false, false]);
  assert.deepEqual((await again).map((outcome) => typeof outcome), own.map(() => "number"));
  assert.equal(left.length, 0);

  // SUNSUBSCRIBE comes unasked, among the replies of what is asked all the time.
  let answered = 0;
  let asking = true;
  const asked = (async () => {
    while (asking) {
      const pings = Array.from({ length: 20 }, () => redis.ping());
      const subscribed = askEach(redis, "subscribe", [own[4]!, own[4]!]);
      for (const pong of await Promise.all(pings)) assert.deepEqual(pong.toString(), "pong,");
      assert.deepEqual((await subscribed).map((outcome) => typeof outcome), ["number", "number"]);
      answered++;
    }
  })();
  for (const name of own.slice(0, 4)) {
    const before = answered;
    await cluster.finishMove(slotOf(name), from, to);
    await cluster.agreed();
    await eventually("it goes on", () => left.includes(name) && answered > before + 5);
  }
  asking = false;
  await asked;
  assert.deepEqual(left, own.slice(0, 4));
  assert.equal(await cluster.publish(own[4]!, "y"), 1);
  await eventually("it has come", () => messages.at(-1) === `${own[4]} y`);
  assert.deepEqual(errors, []);
  await disconnect(redis);
});
