/** The workers of clients/js on a real Redis, over each client library. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { setTimeout as sleep } from "node:timers/promises";
import { Cluster, Redis } from "ioredis";
import { createClient, createCluster, RESP_TYPES } from "redis";
import { type Answer, Cancelled, type Options, type Question, Worker } from "../../clients/js/backend.js";
import { Commands, Queue } from "../../clients/js/queue.js";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { TestCluster } from "../harness/cluster.ts";
import { blockOf } from "../harness/pages.ts";
import { disconnect, kept, RedisServer } from "../harness/redis.ts";
import { eventually, soon } from "../harness/wait.ts";
import { testFrozenMaster, testMovedServer } from "../torture/moved_master.ts";

const settings = { maxMessages: 4096, ttlMs: 3_600_000, maxMessageBytes: 1_048_576, sharded: false, startedMs: 0 };
const inbox = "agent:agent:inbox";
const log = (session: string) => `session:${session}:down`;

/** A server with the functions, as a proxy leaves it. */
async function start(...args: string[]) {
  const redis = await RedisServer.start(...args);
  const control = redis.client();
  await control.call("FUNCTION", "LOAD", "REPLACE", renderLibrary(settings));
  return { redis, control, [Symbol.asyncDispose]: () => redis[Symbol.asyncDispose]() };
}

const libraries = ["ioredis", "node-redis"] as const;
type Library = typeof libraries[number];

function clientOf(library: Library, redis: RedisServer) {
  if (library === "ioredis") {
    // What a program wants for its own keys is not the worker's.
    const client = new Redis(redis.url, { retryStrategy: () => 50, disconnectTimeout: 0, keyPrefix: "mine:" });
    client.on("error", () => {});
    return { client, close: () => disconnect(client) };
  }
  const client = createClient({ url: redis.url, socket: { reconnectStrategy: 50 }, keyPrefix: "mine:" })
    .withTypeMapping({ [RESP_TYPES.BLOB_STRING]: Buffer });
  return { client, close: () => {} };
}

/** A worker that runs until the end of its scope, and what it has complained of. */
function work(redis: RedisServer, options: Partial<Options> = {}, library: Library = "ioredis") {
  const { client, close } = clientOf(library, redis);
  const errors: string[] = [];
  const worker = new Worker({
    redis: client,
    agent: "agent",
    leaseMs: 60_000,
    graceMs: 0,
    handle: () => {},
    onError: (error, what) => errors.push(`${what}: ${error instanceof Error ? error.message : error}`),
    ...options,
  });
  const done = worker.run();
  const stop = async () => {
    worker.stop();
    await soon(done, "the worker's end");
  };
  return {
    worker,
    errors,
    stop,
    [Symbol.asyncDispose]: async () => {
      await stop();
      await close();
    },
  };
}

const onEachLibrary = (name: string, test: (library: Library) => Promise<void>) => {
  for (const library of libraries) Deno.test(`${name} (${library})`, () => test(library));
};

/** What a proxy writes into the inbox. */
const enter = (control: Redis, type: string, session: string, fields: Record<string, string> = {}) => {
  const words = { type, session, connection: "c-1", at: "1", ...fields };
  return control.xadd(inbox, "*", ...Object.entries(words).flat()) as Promise<string>;
};
const ask = (control: Redis, session: string, data: string, fields: Record<string, string> = {}) =>
  enter(control, "message", session, { data, ...fields });

/** What the log has, in order. */
async function said(control: Redis, session: string): Promise<string[]> {
  return (await control.xrange(log(session), "-", "+")).map(([, fields]) => fields[1]!);
}
const says = (control: Redis, session: string, expected: string[]) =>
  eventually(`${session}: ${expected}`, async () => {
    const now = await said(control, session);
    assert(now.length <= expected.length, `${now}`);
    return now.length === expected.length && now.every((text, i) => text === expected[i]);
  });
/** Nothing is left that a worker would do. */
const idle = async (control: Redis) => {
  await eventually("nothing is pending", async () => (await control.xpending(inbox, "answers") as [number])[0] === 0);
  for (const name of ["lanes", "questions", "events", "tries"]) {
    await eventually(`no ${name}`, async () => await control.exists(`worker:{${inbox}}:answers:${name}`) === 0);
  }
};

/** Answers with three words; a step is awaited before each, if there is one. */
const threeWords =
  (step?: (question: Question, word: number, answer: Answer) => unknown) => async (question: Question) => {
    const answer = await question.begin(`start ${question.data}`);
    for (let i = 0; i < 3; i++) {
      await step?.(question, i, answer);
      await answer.send(`${question.data} ${i}`);
    }
    await answer.end(`end ${question.data}`);
  };
const whole = (data: string) => [`start ${data}`, ...[0, 1, 2].map((i) => `${data} ${i}`), `end ${data}`];

onEachLibrary(
  "Workers answer each question once, those of a session one after the other and in order",
  async (library) => {
    await using server = await start();
    const { redis, control } = server;
    await using _one = await work(redis, { handle: threeWords() }, library);
    await using _two = await work(redis, { handle: threeWords() }, library);
    await using _three = await work(redis, { handle: threeWords(), concurrency: 1 }, library);
    const sessions = Array.from({ length: 10 }, (_, i) => `s${i}`);
    await Promise.all(Array.from({ length: 50 }, (_, i) => ask(control, `s${i % 10}`, `q${i}`)));
    for (const [i, session] of sessions.entries()) {
      await says(control, session, [0, 1, 2, 3, 4].flatMap((n) => whole(`q${i + 10 * n}`)));
    }
    await idle(control);
  },
);

onEachLibrary(
  "A question has its id, session and claims; events come in order, and claims go with the connection",
  async (library) => {
    await using server = await start();
    const { redis, control } = server;
    const seen: unknown[] = [];
    const handle = ({ id, entry, session, connection, data, claims, deliveries }: Question) => {
      seen.push({ id, entry, session, connection, data, claims, deliveries });
    };
    const onEvent = ({ type, session, sockets = "" }: Record<string, string>) => seen.push({ type, session, sockets });
    await using worker = await work(redis, { handle, onEvent }, library);
    await enter(control, "connected", "s 1", { sockets: "1", claims: '{"sub":"me"}' });
    await eventually("connected", () => seen.length === 1);
    const first = await ask(control, "s 1", "no JSON {", { id: "client-1" });
    await eventually("asked", () => seen.length === 2);
    await enter(control, "disconnected", "s 1", { code: "1006", sockets: "0" });
    await enter(control, "vacated", "s 1", { connection: "" });
    await eventually("left", () => seen.length === 4);
    const second = await ask(control, "s 1", "");
    await eventually("asked again", () => seen.length === 5);
    const posted = await ask(control, "s 1", "1", { connection: "", claims: '{"sub":"you"}' });
    await eventually("posted", () => seen.length === 6);
    const question = { session: "s 1", connection: "c-1", deliveries: 1 };
    assert.deepEqual(seen, [
      { type: "connected", session: "s 1", sockets: "1" },
      { ...question, id: "client-1", entry: first, data: "no JSON {", claims: { sub: "me" } },
      { type: "disconnected", session: "s 1", sockets: "0" },
      { type: "vacated", session: "s 1", sockets: "" },
      { ...question, id: second, entry: second, data: "", claims: {} },
      { ...question, connection: "", id: posted, entry: posted, data: "1", claims: { sub: "you" } },
    ]);
    await idle(control);
    assert.equal(await control.exists(`worker:{${inbox}}:answers:claims`), 0);
    assert.deepEqual(worker.errors, []);
  },
);

Deno.test("A message that comes twice with one id is answered once; another session may use the same id", async () => {
  await using server = await start();
  const { redis, control } = server;
  await using _one = await work(redis, { handle: threeWords() });
  await using _two = await work(redis, { handle: threeWords() });
  for (const session of ["s1", "s2", "s1", "s1"]) await ask(control, session, "q", { id: "same" });
  await ask(control, "s1", "q", { id: "other" });
  await says(control, "s2", whole("q"));
  await says(control, "s1", [...whole("q"), ...whole("q")]);
  await ask(control, "s1", "q", { id: "same" });
  await idle(control);
  assert.equal((await said(control, "s1")).length, 10);
});

Deno.test("A worker that is cut off is replaced, and the next one reads what it had written; it writes no word more", async () => {
  await using server = await start();
  const { redis, control } = server;
  const stuck = Promise.withResolvers<void>();
  const ended: unknown[] = [];
  const frozen = Promise.withResolvers<Answer>();
  const handle = async (question: Question) => {
    if (question.deliveries === 2) {
      const answer = await question.begin("again");
      assert.deepEqual(await answer.soFar(), ["one", "two"]);
      await answer.send("three");
      return await answer.end("end");
    }
    const answer = await question.begin("start");
    await answer.send("one");
    await answer.send("two");
    frozen.resolve(answer);
    await stuck.promise;
    await answer.send("three").catch((error) => ended.push(error));
  };
  await using _first = await work(redis, { handle });
  const entry = await ask(control, "s1", "q");
  const former = await frozen.promise;
  // Another one may take it now, as if this one had been frozen for longer than its lease; it may be itself.
  await control.hset(`worker:{${inbox}}:answers:lanes`, "m s1", `- ${entry}`);
  await control.zadd(`worker:{${inbox}}:answers:questions`, 0, "m s1");
  await using _second = await work(redis, { handle });
  await says(control, "s1", ["start", "one", "two", "again", "three", "end"]);
  await eventually("the first one knows", () => former.cancelled.aborted);
  stuck.resolve();
  await eventually("refused", () => ended.length === 1);
  assert(ended[0] instanceof Cancelled);
  await idle(control);
  assert.equal((await said(control, "s1")).length, 6);
});

Deno.test("A writer that nobody told is refused by the log itself", async () => {
  await using server = await start();
  const { redis, control } = server;
  const go = Promise.withResolvers<void>();
  const errors: unknown[] = [];
  await using _worker = await work(redis, {
    handle: async (question) => {
      const answer = await question.begin("start");
      await go.promise;
      await answer.send("late").catch((error) => errors.push(error, answer.cancelled.aborted));
    },
  });
  await ask(control, "s1", "q");
  await says(control, "s1", ["start"]);
  await control.call("FCALL", "wsproxy_begin", 1, log("s1"), "cancelled by hand", "n");
  go.resolve();
  await eventually("refused", () => errors.length === 2);
  assert(errors[0] instanceof Cancelled && errors[1]);
  await idle(control);
  assert.deepEqual(await said(control, "s1"), ["start", "cancelled by hand"]);
});

const stops = ({ type = "", data = "" }) =>
  type === "vacated" ? "vacated" : data.startsWith("stop") ? "stopped" : undefined;

Deno.test("A stop ends the answer wherever it is written, and what waited before it; what comes after is answered", async () => {
  await using server = await start();
  const { redis, control } = server;
  const reasons: string[] = [];
  const options = {
    interrupts: stops,
    concurrency: 1,
    handle: async (question: Question) => {
      if (question.data.startsWith("stop ")) return await threeWords()(question);
      if (question.data !== "long") return question.data === "stop" ? undefined : await threeWords()(question);
      const answer = await question.begin("start long");
      await new Promise((resolve) => answer.cancelled.addEventListener("abort", resolve));
      reasons.push(answer.cancelled.reason.name);
      await answer.send("a word too many");
    },
  };
  await using one = await work(redis, options);
  await using two = await work(redis, options);
  for (const session of ["s1", "s2"]) {
    await ask(control, session, "long");
    await says(control, session, ["start long"]);
    await ask(control, session, "waits");
  }
  // Both workers are busy, and hear it all the same.
  await ask(control, "s1", "stop");
  await ask(control, "s1", "next");
  await says(control, "s1", ["start long", "stopped", ...whole("next")]);
  await ask(control, "s2", "stop and again");
  await says(control, "s2", ["start long", "stopped", ...whole("stop and again")]);
  await ask(control, "s2", "long");
  await says(control, "s2", ["start long", "stopped", ...whole("stop and again"), "start long"]);
  await enter(control, "vacated", "s2");
  await says(control, "s2", ["start long", "stopped", ...whole("stop and again"), "start long", "vacated"]);
  // A stop for which there is nothing to stop.
  await ask(control, "s1", "stop");
  await idle(control);
  assert.deepEqual(await said(control, "s1"), ["start long", "stopped", ...whole("next")]);
  assert.deepEqual([...one.errors, ...two.errors], []);
  await eventually("each writer knows", () => reasons.length === 3);
  assert.deepEqual(reasons, ["Cancelled", "Cancelled", "Cancelled"]);
});

onEachLibrary(
  "When another worker reads a stop or a newer question, at most one word more is said",
  async (library) => {
    await using server = await start();
    const { redis, control } = server;
    const interrupts = ({ data }: Record<string, string>) => data === "stop" || data === "next" ? "stopped" : undefined;
    for (const interrupt of ["stop", "next"]) {
      const session = `is ${interrupt}`;
      let wordMs = 100;
      const handle = async (question: Question) => {
        if (question.data !== "long") return question.data === "stop" ? undefined : await threeWords()(question);
        const answer = await question.begin("start");
        for (let i = 0;; i++) {
          await answer.send(`word ${i}`);
          await sleep(wordMs, undefined, { signal: answer.cancelled });
        }
      };
      // It does not know a stop itself.
      await using writer = await work(redis, { handle, graceMs: 60_000 }, library);
      await ask(control, session, "long");
      await eventually("it writes", async () => (await said(control, session)).includes("word 2"));
      // It takes nothing more, and writes on.
      writer.worker.stop();
      await using _reader = await work(redis, { handle, interrupts }, library);
      const before = (await said(control, session)).length;
      await eventually("it writes on", async () => (await said(control, session)).length > before);
      // So that a word is as much as a machine which stalls may be late by.
      wordMs = 2000;
      const entry = ["type", "message", "session", session, "data", interrupt];
      const [[, told]] = await control.multi().xlen(log(session)).xadd(inbox, "*", ...entry).exec() as [[null, number]];
      await idle(control);
      const after = (await said(control, session)).slice(told);
      const words = after.filter((text) => text.startsWith("word"));
      assert(words.length <= 1, `${words}`);
      assert.deepEqual(after.slice(words.length), ["stopped", ...interrupt === "next" ? whole("next") : []]);
      await writer.stop();
    }
  },
);

Deno.test("A worker keeps its question while it lives, and looks once at what waits behind it", async () => {
  await using server = await start();
  const { redis, control } = server;
  const looked: string[] = [];
  const go = Promise.withResolvers<void>();
  await using _worker = await work(redis, {
    interrupts: ({ data = "" }) => void looked.push(data),
    handle: threeWords(() => go.promise),
  });
  await ask(control, "s1", "long");
  await says(control, "s1", ["start long"]);
  await ask(control, "s1", "waits");
  await eventually("it was looked at", () => looked.length > 0);
  const keptUntilMs = async () => Number(await control.zscore(`worker:{${inbox}}:answers:questions`, "m s1"));
  const beforeMs = await keptUntilMs();
  await eventually("it is kept twice", async () => await keptUntilMs() > beforeMs + 900);
  go.resolve();
  await says(control, "s1", [...whole("long"), ...whole("waits")]);
  assert.deepEqual(looked, ["waits"]);
});

Deno.test("Of two workers that interrupt for one message the first one does", async () => {
  await using server = await start();
  const { redis, control } = server;
  const { client, close } = clientOf("ioredis", redis);
  const commands = new Commands(client);
  const queue = new Queue(commands, "agent", "answers");
  await ask(control, "s1", "q");
  await queue.run("take", "writer", 60_000, 100, 1, 1, 60_000);
  const stop = await ask(control, "s1", "stop");
  const [behind] = await queue.run("take", "reader", 60_000, 100, 1, 1, 60_000);
  assert.deepEqual(behind.map(([lane, id, words]: [string, string, string[]]) => [lane, id, words.at(-1)]), [
    ["m s1", stop, "stop"],
  ]);
  const interrupt = (holder: string) => queue.run("interrupt", "m s1", holder, 60_000, stop);
  assert.equal(await interrupt("one"), 1);
  assert.equal(await interrupt("two"), 0);
  // Whoever has not heard the answer asks again.
  assert.equal(await interrupt("one"), 1);
  commands.end();
  await close();
});

/** A client whose calls, and those of its duplicates, are seen before they are made; what `before` throws comes instead. */
function watched<T extends { duplicate(): T }>(
  client: T,
  before: (target: T, name: string | symbol, args: unknown[]) => void,
): T {
  return new Proxy(client, {
    get: (target, name) => {
      const value = Reflect.get(target, name, target);
      if (typeof value !== "function") return value;
      return (...args: unknown[]) => {
        if (name === "duplicate") return watched(value.apply(target, args), before);
        before(target, name, args);
        return value.apply(target, args);
      };
    },
  });
}

Deno.test("A worker that Redis refuses for a moment does not wait for long", async () => {
  await using server = await start();
  const { redis, control } = server;
  const { client, close } = clientOf("ioredis", redis);
  const order: string[] = [];
  let timer;
  const refused = watched(client as Redis, (_target, name, args) => {
    if (name !== "call" || !args.includes("take")) return;
    order.push("take");
    if (order.length > 1) return;
    timer = setTimeout(() => order.push("half a second"), 500);
    throw new Error("READONLY You can't write against a read only replica.");
  });
  await using _worker = await work(redis, { redis: refused, handle: threeWords() });
  await ask(control, "s1", "q");
  await says(control, "s1", whole("q"));
  clearTimeout(timer);
  assert.deepEqual(order.slice(0, 2), ["take", "take"]);
  await close();
});

Deno.test("A stop that came while the writer was dead is obeyed by who takes the question over", async () => {
  await using server = await start();
  const { redis, control } = server;
  {
    await using dead = await work(redis, { handle: threeWords(() => new Promise(() => {})) });
    await ask(control, "s1", "q");
    await says(control, "s1", ["start q"]);
    // It dies without a word: nobody releases what it holds.
    await control.hset(
      `worker:{${inbox}}:answers:lanes`,
      "m s1",
      `dead ${(await control.xrange(inbox, "-", "+"))[0]![0]}`,
    );
    await dead.stop();
  }
  await ask(control, "s1", "stop");
  await control.zadd(`worker:{${inbox}}:answers:questions`, 0, "m s1");
  const asked: string[] = [];
  await using _next = await work(redis, { interrupts: stops, handle: ({ data }) => void asked.push(data) });
  await idle(control);
  assert.deepEqual(asked, ["stop"]);
  assert.deepEqual(await said(control, "s1"), ["start q", "stopped"]);
});

Deno.test("A question whose handler throws is given three times, then set aside and told in the log; others are not touched", async () => {
  await using server = await start();
  const { redis, control } = server;
  const deliveries: number[] = [];
  await using worker = await work(redis, {
    handle: async (question) => {
      if (question.data !== "{") return await threeWords()(question);
      deliveries.push(question.deliveries);
      JSON.parse(question.data);
    },
  });
  const entry = await ask(control, "s1", "{", { id: "bad" });
  await ask(control, "s1", "good");
  await ask(control, "s2", "good");
  await says(control, "s2", whole("good"));
  await says(control, "s1", ['{"type":"failed","id":"bad"}', ...whole("good")]);
  await idle(control);
  assert.deepEqual(deliveries, [1, 2, 3]);
  assert.equal(worker.errors.length, 3);
  const [[, fields]] = await control.xrange(`${inbox}:failed`, "-", "+") as [[string, string[]]];
  const kept = Object.fromEntries(fields.flatMap((word, i) => i % 2 === 0 ? [[word, fields[i + 1]]] : []));
  assert.deepEqual({ ...kept, reason: "" }, {
    type: "message",
    session: "s1",
    connection: "c-1",
    at: "1",
    data: "{",
    id: "bad",
    entry,
    reason: "",
  });
  assert.match(kept["reason"]!, /^SyntaxError/);
});

Deno.test("A worker that dies when it has sent the end leaves nothing to be answered", async () => {
  await using server = await start();
  const { redis, control } = server;
  const ended = Promise.withResolvers<void>();
  {
    await using worker = await work(redis, {
      handle: async (question) => {
        await threeWords()(question);
        ended.resolve();
        await new Promise(() => {});
      },
    });
    await ask(control, "s1", "q");
    await ended.promise;
    await worker.stop();
  }
  await using next = await work(redis, { handle: threeWords() });
  await idle(control);
  assert.deepEqual(await said(control, "s1"), whole("q"));
  assert.deepEqual(next.errors, []);
});

Deno.test("A worker that is stopped finishes within its grace, and hands over what it cannot finish", async () => {
  await using server = await start();
  const { redis, control } = server;
  const begun = Promise.withResolvers<void>();
  const go = Promise.withResolvers<void>();
  {
    await using patient = await work(redis, {
      graceMs: 60_000,
      handle: threeWords((_q, i) => i === 1 && (begun.resolve(), go.promise)),
    });
    await ask(control, "s1", "q");
    await begun.promise;
    patient.worker.stop();
    await ask(control, "s1", "later");
    go.resolve();
    await patient.stop();
  }
  assert.deepEqual(await said(control, "s1"), whole("q"));
  {
    const again = Promise.withResolvers<void>();
    await using hasty = await work(redis, {
      handle: threeWords((_q, i) => i === 1 && (again.resolve(), new Promise(() => {}))),
    });
    await again.promise;
    await hasty.stop();
  }
  const deliveries: number[] = [];
  await using _next = await work(redis, {
    handle: async (question) => {
      deliveries.push(question.deliveries);
      await threeWords()(question);
    },
  });
  await says(control, "s1", [...whole("q"), "start later", "later 0", ...whole("later")]);
  assert.deepEqual(deliveries, [1], "handing over is no failure");
  await idle(control);
});

onEachLibrary("Pieces that come soon go as one message, in order, and the end waits for them", async (library) => {
  await using server = await start();
  const { redis, control } = server;
  const texts = Array.from({ length: 2000 }, (_, i) => `${i} `);
  await using _worker = await work(redis, {
    join: (pieces: string[]) => pieces.join(""),
    handle: async (question) => {
      const answer = await question.begin("");
      for (const text of texts) await answer.send(text);
      await answer.end("end");
    },
  }, library);
  await ask(control, "s1", "q");
  await eventually("ended", async () => (await said(control, "s1")).at(-1) === "end");
  const log = await said(control, "s1");
  assert.equal(log.slice(0, -1).join(""), texts.join(""));
  assert(log.length < 500, `${log.length} messages`);
});

onEachLibrary(
  "Workers go on through a Redis that is not there at the start, is killed, and has lost everything",
  async (library) => {
    await using server = await start(...kept);
    const { redis, control } = server;
    await redis.kill();
    // What was taken when Redis was killed comes again after the lease.
    await using worker = await work(redis, { handle: threeWords(), leaseMs: 2000 }, library);
    await redis.start();
    for (let round = 0; round < 2; round++) {
      await ask(control, "s1", `q${round}`);
      await eventually("answered", async () => (await said(control, "s1")).at(-1) === `end q${round}`);
      await redis.kill();
      await redis.start();
    }
    assert.deepEqual(await said(control, "s1"), [...whole("q0"), ...whole("q1")]);
    await control.flushall();
    await ask(control, "s1", "anew");
    await says(control, "s1", whole("anew"));
    await control.call("FUNCTION", "FLUSH");
    await ask(control, "s1", "no functions");
    await new Promise((resolve) => setTimeout(resolve, 100));
    await control.call("FUNCTION", "LOAD", "REPLACE", renderLibrary(settings));
    await says(control, "s1", [...whole("anew"), ...whole("no functions")]);
    await idle(control);
    assert.deepEqual(worker.errors.filter((error) => !error.startsWith("Redis does not let")), []);
  },
);

Deno.test("The worker in the README of clients/js answers, stops, and ends with SIGTERM", async () => {
  await using server = await start();
  const { redis, control } = server;
  const { client, close } = clientOf("ioredis", redis);
  async function* model(question: string, { signal }: { signal: AbortSignal }) {
    yield "one";
    if (question === "long") await new Promise((resolve) => signal.addEventListener("abort", resolve));
    yield "two";
  }
  let terminate = () => {};
  const process = { env: {}, on: (_name: string, stop: () => void) => terminate = stop };
  const code = blockOf("clients/js/README.md", "import { Worker }").text.replaceAll(/^import .*$/gm, "");
  const { constructor: AsyncFunction } = Object.getPrototypeOf(async () => {});
  const running = new AsyncFunction("Worker", "Redis", "model", "process", code)(
    class extends Worker {
      constructor(options: Options) {
        super({ ...options, redis: client });
      }
    },
    class {
      disconnect() {}
    },
    model,
    process,
  );
  const enterFor = (data: string) =>
    control.xadd("agent:support:inbox", "*", "type", "message", "session", "s1", "data", data);
  const begun = '{"type":"start"}';
  await enterFor("short");
  await says(control, "s1", [begun, "one", "two", '{"type":"end"}']);
  await control.del(log("s1"));
  await enterFor("long");
  await says(control, "s1", [begun, "one"]);
  await enterFor('{"type":"stop"}');
  await says(control, "s1", [begun, "one", '{"type":"stopped"}']);
  terminate();
  await soon(running, "its end");
  await close();
});

onEachLibrary("A library that stumbles over a server that has gone fails no question", async (library) => {
  await using server = await start();
  const { redis, control } = server;
  const { client, close } = clientOf(library, redis);
  // As node-redis does when sentinels name another master while it sends: a TypeError, once for each of two commands.
  const stumbles = ["wsproxy_begin", "wsproxy_send"];
  const stumbled: unknown[] = [];
  const stumbling = watched(client as Redis, (target, name, args) => {
    assert(!stumbled.includes(target) || !["call", "sendCommand"].includes(String(name)), "it is used again");
    if (!args.flat().includes(stumbles[0])) return;
    stumbles.shift();
    stumbled.push(target);
    throw new TypeError("Cannot read properties of undefined (reading 'isReady')");
  });
  const deliveries: number[] = [];
  const handle = (question: Question) => {
    deliveries.push(question.deliveries);
    return threeWords()(question);
  };
  await using worker = await work(redis, { redis: stumbling, handle });
  await ask(control, "s1", "q");
  await says(control, "s1", whole("q"));
  await idle(control);
  assert.deepEqual(deliveries, [1]);
  assert.deepEqual(worker.errors, []);
  assert.equal(stumbled.length, 2);
  await close();
});

onEachLibrary("In a Cluster inbox and logs lie on different servers, and workers find each", async (library) => {
  await using cluster = await TestCluster.start(3);
  for (const { server } of cluster.nodes) {
    await server.client().call("FUNCTION", "LOAD", "REPLACE", renderLibrary({ ...settings, sharded: true }));
  }
  const { port } = cluster.nodes[0]!.server;
  const url = `redis://127.0.0.1:${port}`;
  const control = new Cluster([url]);
  const client = library === "ioredis" ? new Cluster([url]) : createCluster({ rootNodes: [{ url }] });
  // The script's keys must lie in the inbox's slot, whatever braces the agent has.
  const workers = ["agent", "a}b", "a{b}c{d}", "a{}b"].map((agent) => {
    const worker = new Worker({ redis: client, agent, handle: threeWords(), onError: (error) => console.error(error) });
    return { agent, worker, done: worker.run() };
  });
  try {
    for (const [n, { agent }] of workers.entries()) {
      for (let i = 0; i < 12; i++) {
        const fields = ["type", "message", "session", `s${n}${i % 6}`, "data", `q${i}`];
        await control.xadd(`agent:${agent}:inbox`, "*", ...fields);
      }
    }
    for (const n of workers.keys()) {
      for (let i = 0; i < 6; i++) {
        await says(control as unknown as Redis, `s${n}${i}`, [...whole(`q${i}`), ...whole(`q${i + 6}`)]);
      }
    }
  } finally {
    for (const { worker } of workers) worker.stop();
    await soon(Promise.all(workers.map(({ done }) => done)), "the workers' end");
    if (client instanceof Cluster) client.disconnect();
    control.disconnect();
  }
});

for (const library of libraries) {
  Deno.test(`A worker leaves a server that is a replica now, or frozen (${library})`, () => testMovedServer(library));

  Deno.test(`In a Cluster a worker finds the master that has taken a frozen one's place (${library})`, () =>
    testFrozenMaster(library));
}
