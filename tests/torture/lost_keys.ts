/**
 * What backends are told when Redis loses any of the keys of an inbox at any moment:
 * `SEED=1 deno task test:file tests/torture/lost_keys.ts`.
 */

import assert from "node:assert/strict";
import type { Client } from "../harness/client.ts";
import { entriesOf, type Entry, entryOf, inboxEnv, names } from "../harness/entries.ts";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";
import { createRandom, oneOf, pause } from "./parts.ts";

/** What happens to each agent. */
const lossRounds = 25;

Deno.test("Whatever single keys Redis loses, no session with a socket is vacated, and each one that has left is", async () => {
  await using redis = await RedisServer.start();
  const env = { ...inboxEnv, VACATED_GRACE_SECS: "1" };
  await using first = await TestProxy.start(redis, env);
  await using second = await TestProxy.start(redis, env);
  const control = redis.client();
  const seed = Number(Deno.env.get("SEED") ?? Date.now());
  const random = createRandom(seed);
  interface Socket {
    readonly client: Client;
    readonly session: string;
    readonly openMs: number;
    closesMs: number;
  }
  interface Told {
    readonly sockets: Socket[];
    /** What stood in the stream when it was lost. */
    readonly lost: Entry[];
  }
  const sessions = names("s", 3);
  const agents = new Map<string, Told>(names("agent", 12).map((agent) => [agent, { sockets: [], lost: [] }]));
  const connect = async (agent: string, proxy: TestProxy, session: string) => {
    const client = await proxy.connect(session, { agent });
    agents.get(agent)!.sockets.push({ client, session, openMs: Date.now(), closesMs: Infinity });
  };
  const close = async (socket: Socket) => {
    socket.closesMs = Date.now();
    await socket.client.close();
  };
  const lose = async (agent: string) => {
    const keys = (await control.keys(`wsproxy:{agent:${agent}:inbox}:*`)).filter(() => random() < 0.4);
    // Of every third agent the stream goes as well.
    if (Number(agent.slice(-1)) % 3 === 0 && random() < 0.3) {
      const key = `agent:${agent}:inbox`;
      const [[, entries] = []] = await control.multi().xrange(key, "-", "+").del(key, ...keys).exec() ?? [];
      agents.get(agent)!.lost.push(...(entries as [string, string[]][]).map(([, words]) => entryOf(words)));
    } else if (keys.length > 0) await control.del(...keys);
  };
  await Promise.all([...agents].map(async ([agent, { sockets }]) => {
    await connect(agent, first, "first");
    await connect(agent, second, "second");
    for (let round = 0; round < lossRounds; round++) {
      const action = random();
      const open = sockets.slice(2).filter(({ closesMs }) => closesMs === Infinity);
      if (action < 0.4 || open.length === 0) {
        await connect(agent, oneOf([first, second], random), oneOf(sessions, random));
      } else if (action < 0.7) await close(oneOf(open, random));
      else await lose(agent);
      await pause(random() * 100);
    }
    await lose(agent);
  }));
  await control.del("wsproxy:{proxies}");
  const left = new Map([...agents].map(([agent, { sockets }]) => {
    const open = new Set(sockets.filter(({ closesMs }) => closesMs === Infinity).map(({ session }) => session));
    return [agent, new Set(sockets.map(({ session }) => session).filter((session) => !open.has(session)))];
  }));
  const allOf = async (agent: string) => [...agents.get(agent)!.lost, ...await entriesOf(control, agent)];
  /** The last that is told of each session which has left is that it is vacant. */
  const isVacated = async (agent: string, session: string) =>
    (await allOf(agent)).findLast((entry) => entry["session"] === session)?.["type"] === "vacated";
  const allVacated = async () => {
    for (const [agent, sessions] of left) for (const session of sessions) await vacates(agent, session);
  };
  const vacates = (agent: string, session: string) =>
    eventually(`${session} of ${agent} is vacated (seed ${seed})`, () => isVacated(agent, session), 60_000);
  await allVacated();
  for (const [agent, { sockets }] of agents) {
    await Promise.all(sockets.filter(({ closesMs }) => closesMs === Infinity).map(close));
    left.set(agent, new Set(sockets.map(({ session }) => session)));
  }
  await allVacated();
  for (const [agent, { sockets, lost }] of agents) {
    const entries = await allOf(agent);
    for (const { type, session, at } of entries) {
      if (type !== "vacated") continue;
      const isOpen = (socket: Socket) =>
        socket.session === session && socket.openMs < Number(at) - 1000 && socket.closesMs > Number(at);
      assert(!sockets.some(isOpen), `${session} of ${agent} is vacated and has a socket (seed ${seed})`);
    }
    for (const type of ["connected", "disconnected"]) {
      const told = entries.filter((entry) => entry["type"] === type).map(({ connection }) => connection);
      assert.equal(new Set(told).size, sockets.length, `${type} of ${agent} (seed ${seed})`);
      // With the stream goes what it told of: that is told again.
      if (lost.length === 0) assert.equal(told.length, sockets.length, `${type} of ${agent} (seed ${seed})`);
    }
  }
  for (const agent of agents.keys()) {
    await eventually("nothing is kept", async () => (await control.keys(`wsproxy:{agent:${agent}:*`)).length === 0);
  }
});
