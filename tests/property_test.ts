import assert from "node:assert/strict";
import fc from "fast-check";
import { missedNotice } from "../src/session/frames.ts";
import { type Client } from "./harness/client.ts";
import { onEachEngine, TestProxy } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { mint } from "./harness/token.ts";
import { eventually } from "./harness/wait.ts";
import { handshakeHeaders } from "./harness/wire.ts";

/** Header values that a TCP client can send: visible ASCII and spaces within. */
const headerValue = fc.string({ unit: fc.constantFrom(..."abcABC019 ,;=/+-_.\"'"), maxLength: 40 })
  .map((text) => text.trim());
const oneOrNone = <T>(arbitrary: fc.Arbitrary<T>) => fc.option(arbitrary, { nil: undefined });

onEachEngine(
  "Any request is answered with a status of the table, and only a perfect one gets a socket",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, ALLOWED_ORIGINS: "https://app.example" });
    const good = await mint("s1");
    const wrong = await mint("s3");
    const request = fc.record({
      method: fc.constantFrom("GET", "GET", "GET", "POST", "PUT", "OPTIONS"),
      path: fc.oneof(
        fc.constant("/agent/ws/s1"),
        fc.constant("/agent/ws/s1"),
        fc.constantFrom("/", "/health", "/agent/ws/", "/agent/ws/%", "//ws/s1", "/agent/ws/s1/", "/agent/ws/s2"),
        fc.webPath().filter((path) => path.startsWith("/")),
      ),
      upgrade: oneOrNone(fc.oneof(fc.constant("websocket"), fc.constant("WebSocket"), headerValue)),
      connection: oneOrNone(fc.oneof(fc.constant("Upgrade"), fc.constant("keep-alive, upgrade"), headerValue)),
      key: oneOrNone(fc.oneof(fc.constant(handshakeHeaders["Sec-WebSocket-Key"]!), headerValue)),
      version: oneOrNone(fc.constantFrom("13", "13", "13", "8", "x")),
      authorization: oneOrNone(fc.oneof(fc.constantFrom(`Bearer ${good}`, `Bearer ${wrong}`), headerValue)),
      origin: oneOrNone(fc.constantFrom("https://app.example", "https://evil.example", "null")),
    });
    await fc.assert(
      fc.asyncProperty(request, async ({ method, path, upgrade, connection, key, version, authorization, origin }) => {
        const headers: Record<string, string> = {
          Upgrade: upgrade ?? "",
          Connection: connection ?? "",
          "Sec-WebSocket-Key": key ?? "",
          "Sec-WebSocket-Version": version ?? "",
          Authorization: authorization ?? "",
          Origin: origin ?? "",
        };
        const reply = await proxy.request(path, { method, headers });
        const perfect = method === "GET" && path === "/agent/ws/s1" && upgrade?.toLowerCase() === "websocket" &&
          /(^|, )upgrade$/i.test(connection ?? "") && key === handshakeHeaders["Sec-WebSocket-Key"] &&
          version === "13" &&
          authorization === `Bearer ${good}` && (origin === undefined || origin === "https://app.example");
        assert.equal(reply.status === 101, perfect, `status ${reply.status}`);
        assert([101, 200, 400, 401, 403, 404, 405, 426].includes(reply.status), String(reply.status));
        assert(!reply.body.includes(good) && !reply.body.includes(wrong), "no token in an answer");
      }),
      { numRuns: 300 },
    );
    await proxy.empty();
  },
);

/** What can happen, in any order. `session` and `client` are picked among those there are. */
type Step =
  | { do: "connect"; session: number }
  | { do: "send" | "close"; client: number }
  | { do: "publish"; session: number; count: number }
  | { do: "cut" }
  | { do: "settle" };

const sessions = 3;
const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 4, arbitrary: fc.record({ do: fc.constant("connect" as const), session: fc.nat(sessions - 1) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("send" as const), client: fc.nat(9) }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("close" as const), client: fc.nat(9) }) },
  {
    weight: 6,
    arbitrary: fc.record({
      do: fc.constant("publish" as const),
      session: fc.nat(sessions - 1),
      count: fc.integer({ min: 1, max: 5 }),
    }),
  },
  { weight: 1, arbitrary: fc.constant({ do: "cut" as const }) },
  { weight: 1, arbitrary: fc.constant({ do: "settle" as const }) },
);

interface Tab {
  client: Client;
  session: number;
  /** Messages published to its session before it was open, and how many it has sent. */
  from: number;
  sent: number;
  name: number;
}

onEachEngine(
  "Any interleaving keeps the promises: subscribed when open, right session, in order, ends final",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    const control = redis.client();
    const backend = redis.client();
    const heard: string[] = [];
    backend.on("pmessage", (_pattern, channel, text) => heard.push(`${channel} ${text}`));
    await backend.psubscribe("session:*:up");
    let run = 0;

    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 5, maxLength: 40 }), async (steps) => {
        const prefix = `run${++run}`;
        const published = Array.from({ length: sessions }, () => 0);
        const tabs: Tab[] = [];
        const all: Tab[] = [];
        let cuts = 0;
        heard.length = 0;
        for (const step of steps) {
          if (step.do === "connect") {
            const client = await proxy.connect(`${prefix}-${step.session}`).catch(() => undefined);
            // Between a cut and its repair new clients are refused.
            if (client === undefined) continue;
            const tab = { client, session: step.session, from: published[step.session]!, sent: 0, name: all.length };
            tabs.push(tab);
            all.push(tab);
          } else if (step.do === "publish") {
            for (let i = 0; i < step.count; i++) {
              control.publish(
                `session:${prefix}-${step.session}:down`,
                `${step.session} ${published[step.session]!++}`,
              );
            }
          } else if (step.do === "cut") {
            cuts++;
            const list = await control.client("LIST") as string;
            const id = /id=(\d+) .*name=wsproxy-subscriber /.exec(list)?.[1];
            if (id) await control.client("KILL", "ID", id);
          } else if (step.do === "settle") {
            await eventually("messages flow", () => proxy.isHealthy());
          } else {
            const tab = tabs[step.client % tabs.length];
            if (tab === undefined) continue;
            if (step.do === "send") tab.client.send(JSON.stringify(`${tab.name} ${tab.sent++}`));
            else tabs.splice(tabs.indexOf(tab), 1)[0]!.client.socket.close();
          }
        }
        await eventually("messages flow", () => proxy.isHealthy());

        // Each open client is subscribed: a last message reaches all of them.
        for (let session = 0; session < sessions; session++) {
          const open = tabs.filter((tab) => tab.session === session);
          const channel = `session:${prefix}-${session}:down`;
          if (open.length > 0) {
            await eventually("subscribed", async () => (await control.pubsub("NUMSUB", channel))[1] === 1);
          }
          await control.publish(channel, `${session} ${published[session]!++}`);
        }
        for (const tab of tabs) {
          const last = `${tab.session} ${published[tab.session]! - 1}`;
          const got: string[] = [];
          while (got.at(-1) !== last) got.push(await tab.client.next());
          const numbers = got.filter((text) => text !== missedNotice.bare).map((text) => {
            const [session, number] = text.split(" ").map(Number);
            assert.equal(session, tab.session, "a message of another session");
            return number!;
          });
          assert(numbers.every((number, i) => i === 0 || number > numbers[i - 1]!), `out of order: ${numbers}`);
          if (!got.includes(missedNotice.bare)) {
            // No client was told of a gap, so there is none.
            const first = numbers[0]!;
            assert(first <= tab.from, `starts with ${first}, was open at ${tab.from}`);
            assert.equal(numbers.length, published[tab.session]! - first);
          }
          if (cuts === 0) assert(!got.includes(missedNotice.bare), "a gap without a cut");
        }
        const sent = all.reduce((sum, tab) => sum + tab.sent, 0);
        await eventually("all is heard", () => heard.length === sent);
        for (const tab of all) {
          const line = `session:${prefix}-${tab.session}:up "${tab.name} `;
          const own = heard.filter((text) => text.startsWith(line));
          assert.deepEqual(own, Array.from({ length: tab.sent }, (_, i) => `${line}${i}"`));
        }
        await Promise.all(tabs.map((tab) => tab.client.close()));
        await proxy.empty();
      }),
      // The proxy lives through all runs: after a failure it is no fit ground for shrinking.
      { numRuns: 40, endOnFailure: true },
    );
  },
);
