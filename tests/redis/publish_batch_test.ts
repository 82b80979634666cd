/** What a batch relies on in ioredis: one write, one reply a message, in order. A new ioredis that differs fails here. */

import assert from "node:assert/strict";
import { Redis, ReplyError } from "ioredis";
import { PublishBatch } from "../../src/redis/publish_batch.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually, soon } from "../harness/wait.ts";

const connect = (url: string) =>
  new Redis(url, { enableReadyCheck: false, enableOfflineQueue: false, disableClientInfo: true, lazyConnect: true });

async function disconnect(redis: Redis): Promise<void> {
  const ended = new Promise((resolve) => redis.once("end", resolve));
  redis.disconnect();
  await ended;
}

Deno.test("A batch is one write, and each message has its own outcome in order", async () => {
  await using server = await RedisServer.start();
  await server.client().call("ACL", "SETUSER", "proxy", "on", "nopass", "+@all", "resetchannels", "&a");
  const redis = connect(server.url.replace("redis://", "redis://proxy:any@"));
  await redis.connect();
  const backend = await Listener.to(server, "a");
  const writes: unknown[] = [];
  const { stream } = redis;
  const write = stream.write.bind(stream);
  stream.write = ((...args: Parameters<typeof write>) => {
    writes.push(args[0]);
    return write(...args);
  }) as typeof stream.write;
  const publications = Array.from({ length: 1000 }, (_, n) => ({
    channel: n % 100 === 50 ? "forbidden" : "a",
    text: `grüße 💡 ${n}\r\n$5\r\n`,
  }));
  const outcomes = await soon(new PublishBatch(publications).send(redis), "replies");
  assert.equal(writes.length, 1);
  assert.equal(outcomes.length, 1000);
  for (const [n, outcome] of outcomes.entries()) {
    if (n % 100 === 50) assert(outcome instanceof ReplyError, String(outcome));
    else assert.equal(outcome, 1);
  }
  const allowed = publications.filter(({ channel }) => channel === "a").map(({ text }) => text);
  assert.deepEqual(await backend.take(allowed.length), allowed);
  assert.deepEqual(await new PublishBatch([{ channel: "a", text: "x" }]).send(redis), [1]);
  await server.client().call("ACL", "SETUSER", "proxy", "&*");
  assert.deepEqual(await new PublishBatch([{ channel: "nobody", text: "x" }]).send(redis), [0]);
  // Ordinary commands go on behind it.
  assert.equal(await redis.ping(), "PONG");
  await disconnect(redis);
});

Deno.test("A batch that is aborted has an error for each message that was not answered, once", async () => {
  await using server = await RedisServer.start();
  using relay = new Relay(server.port);
  const redis = connect(relay.url);
  await redis.connect();
  relay.freezeAll();
  const batch = new PublishBatch([{ channel: "a", text: "1" }, { channel: "a", text: "2" }]);
  const sent = batch.send(redis);
  batch.abort(new Error("the connection broke"));
  assert.deepEqual((await sent).map((outcome) => (outcome as Error).message), [
    "the connection broke",
    "the connection broke",
  ]);
  // ioredis rejects the commands as well, when the connection ends: nothing comes of that.
  await disconnect(redis);
  await eventually("it has ended", () => redis.status === "end");
  assert.deepEqual((await sent).length, 2);
});
