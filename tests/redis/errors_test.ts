/** What logs say of errors. A new ioredis whose texts differ fails here. */

import assert from "node:assert/strict";
import { Redis } from "ioredis";
import { disconnect, redisOptions } from "../../src/redis/client.ts";
import { reasonOf } from "../../src/redis/errors.ts";
import { RedisServer } from "../harness/redis.ts";
import { soon } from "../harness/wait.ts";

function connect({ port }: RedisServer): Redis {
  return new Redis(redisOptions({ host: "127.0.0.1", port, tls: false }));
}

const failureOf = (redis: Redis) => soon(new Promise<Error>((resolve) => redis.once("error", resolve)), "an error");

Deno.test("Why Redis hangs up unasked is told in its own words", async () => {
  await using server = await RedisServer.start("--maxclients", "1");
  await server.client().ping();
  const redis = connect(server);
  assert.equal(reasonOf(await failureOf(redis)), "ERR max number of clients reached");
  await disconnect(redis);
});

Deno.test("A reply that no command had asked for is told of without what it holds", async () => {
  await using server = await RedisServer.start();
  await server.client().set("key", "a secret");
  const redis = connect(server);
  await soon(new Promise<void>((resolve) => redis.once("ready", resolve)), "a connection");
  redis.stream.write("GET key\r\n");
  const error = await failureOf(redis);
  assert.match(error.message, /a secret/);
  assert.equal(reasonOf(error), "Redis sent a reply that no command had asked for");
  await disconnect(redis);
});
