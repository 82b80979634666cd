/** What a worker of every library must do when its Redis is elsewhere, and its connections do not break. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { TestCluster } from "../harness/cluster.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";
import { type Library, startWorker } from "./crew.ts";

const settings = { maxMessages: 4096, ttlMs: 3_600_000, maxMessageBytes: 1_048_576, startedMs: 0 };
const inbox = "agent:agent:inbox";

/** A worker until the end of a scope. */
function work(url: string, library: Library): AsyncDisposable {
  const child = startWorker(url, library, 1000);
  return {
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.status;
    },
  };
}

/** Asks at one place, and waits for the end of the answer at another one. */
async function asks(entering: Redis, logging: Redis, session: string): Promise<void> {
  const data = JSON.stringify({ q: session, words: 2 });
  await entering.xadd(inbox, "*", "type", "message", "session", session, "data", data);
  await eventually(`${session} is answered`, async () => {
    const [last] = await logging.xrevrange(`session:${session}:down`, "+", "-", "COUNT", 1);
    return last !== undefined && JSON.parse(last[1][1]!).kind === "end";
  }, 40_000);
}

/** A worker leaves a server that has become a replica, or is frozen, for the one that its address leads to now. */
export async function testMovedServer(library: Library): Promise<void> {
  await using one = await RedisServer.start();
  await using two = await RedisServer.start("--replicaof", `127.0.0.1 ${one.port}`);
  const [first, second] = [one.client(), two.client()];
  await first.call("FUNCTION", "LOAD", renderLibrary({ ...settings, sharded: false }));
  using name = new Relay(one.port);
  await using _worker = work(name.url, library);
  await asks(first, first, "s1");
  await eventually("the replica has it", async () => await second.exists("session:s1:down") === 1);
  await second.replicaof("NO", "ONE");
  name.target = two.port;
  await first.replicaof("127.0.0.1", two.port);
  await asks(second, second, "s2");
  await eventually("the replica has it", async () => await first.exists("session:s2:down") === 1);
  await first.replicaof("NO", "ONE");
  name.target = one.port;
  two.signal("SIGSTOP");
  await asks(first, first, "s3");
}

/** A worker of a Cluster finds the master that has taken the place of a frozen one. */
export async function testFrozenMaster(library: Library): Promise<void> {
  await using cluster = await TestCluster.start(3, 1);
  for (const { server } of cluster.nodes.slice(0, 3)) {
    await server.client().call("FUNCTION", "LOAD", renderLibrary({ ...settings, sharded: true }));
  }
  await using _worker = work(cluster.url, library);
  const owner = async (key: string) => (await cluster.ownerOf(key)).control;
  const logOf = (session: string) => `session:${session}:down`;
  await asks(await owner(inbox), await owner(logOf("s1")), "s1");
  const master = await cluster.ownerOf(inbox);
  // Its replica has the functions, too: no proxy is here to load them again.
  assert.equal(await master.control.wait(1, 20_000), 1);
  master.server.signal("SIGSTOP");
  const others = cluster.nodes.filter((node) => node !== master);
  let next = master;
  await eventually("a replica has its place", async () => {
    for (const node of others) {
      if (!/role:master/.test(await node.control.info("replication"))) continue;
      if (await node.control.xlen(inbox).then(() => true, () => false)) next = node;
    }
    return next !== master;
  });
  const sessions = Array.from({ length: 9 }, (_, i) => `t${i}`);
  for (const session of sessions) {
    const logs = await Promise.all(others.map(async ({ control }) => {
      const here = /role:master/.test(await control.info("replication"));
      return here && await control.exists(logOf(session)).then(() => control, () => undefined);
    }));
    const log = logs.find((each) => each !== undefined && each !== false);
    assert(log);
    await asks(next.control, log, session);
  }
}
