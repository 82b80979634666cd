/**
 * Tortures chats as they are at the screen: many real `Chat`s of @ai-sdk/react, whose users ask, stop, ask again, load the
 * page anew in the middle, open a second tab and lose their network, while proxies, workers and Redis are killed. An
 * oracle compares each message with what the model says.
 *
 *     deno task test:chat --seconds 60 --seed 1 [--page] [--fresh] [--python PROGRAM] [--against resumable-stream|stock]
 *
 * With --page the users sit at examples/chat in Chromium: its page, its API and its workers, with another model.
 *
 * With --fresh Redis comes back empty from each restart: a user may be told to ask again then, which is counted, and each
 * answer must be right after that. With --python one of the workers is chat_worker.py, run by that Python, which has
 * redis-py. With --against what is tortured is another way to do it, whose troubles are counted.
 */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { DefaultChatTransport, type UIMessage, WebSocketChatTransport } from "ai";
import { SessionChatTransport } from "../../clients/js/ai.js";
import { installPage } from "../browser/chat_page.ts";
import { chatOf } from "../harness/chat.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { kept, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { partsExpected } from "./chat_model.ts";
import { Pages } from "./chat_pages.ts";
import { type Kind, kinds, losable, type Store, type System, type Tab, User } from "./chat_user.ts";
import { count, createRandom, oneOf, pause, runOptions } from "./parts.ts";
import { type Process, Processes, startProgram } from "./processes.ts";

/** Users, the lease of their workers, which examples/chat has for itself, and the time from fault to fault, in ms. */
const inChats = { users: 8, leaseMs: 1000, everyMs: 600 };
const inPages = { users: 4, leaseMs: 5000, everyMs: 1500 };
const proxies = 2;
const agents = 3;

/** The other ways. */
export const others = ["resumable-stream", "stock"] as const;

/** What a torture is. */
export interface Options {
  readonly seconds: number;
  readonly seed: number;
  /** Another way than SessionChatTransport and ChatWorker. */
  readonly against?: typeof others[number];
  /** Redis comes back empty. */
  readonly fresh?: boolean;
  /** Runs one of the workers. */
  readonly python?: string;
  /** The pages of examples/chat in Chromium, and its API and workers. */
  readonly page?: boolean;
}

/** What has happened: `troubles` are questions by kind. */
export interface Report {
  questions: number;
  regenerated: number;
  /** Questions that were asked once more, as a page had found them without an answer. */
  impatient: number;
  stopped: number;
  reloads: number;
  /** Pages that were loaded in the middle of an answer, and showed it before it ended. */
  resumed: number;
  /** Answers for which the machine was too busy, or had too little time: they were there when nothing was harmed. */
  late: number;
  /** Questions with any trouble. */
  troubled: number;
  troubles: Partial<Record<Kind, number>>;
  faults: Record<string, number>;
}

/** The database of the agents: it is there at all times. */
class History implements Store, AsyncDisposable {
  readonly #chats = new Map<string, { messages: UIMessage[]; activeStreamId: string | null; stopped: string[] }>();
  readonly #begun = new Set<string>();
  /** Of each question, the answer that was begun last. */
  readonly #newest = new Map<string, string>();
  /** Messages behind a question that was asked anew. */
  readonly dropped = new Set<string>();
  readonly #server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    async (request) => Response.json(this.#do(await request.json()) ?? {}),
  );
  readonly url = `http://127.0.0.1:${this.#server.addr.port}/`;

  of(id: string) {
    let chat = this.#chats.get(id);
    if (!chat) this.#chats.set(id, chat = { messages: [], activeStreamId: null, stopped: [] });
    return chat;
  }

  // deno-lint-ignore no-explicit-any
  #do(call: any): unknown {
    const chat = this.of(call.chat ?? call.id);
    const at = (id: string) => chat.messages.findIndex((message) => message.id === id);
    switch (call.op) {
      case "question": {
        const place = at(call.message.id);
        // Another worker may have begun this answer already.
        const isNew = !this.#begun.has(call.answerId);
        this.#begun.add(call.answerId);
        if (isNew) this.#newest.set(call.message.id, call.answerId);
        if (place < 0) chat.messages.push(call.message);
        else if (isNew) {
          for (const { id } of chat.messages.splice(place + 1)) this.dropped.add(id);
        }
        return;
      }
      case "answer": {
        // A worker that was frozen after it had asked whether it may write: another one has begun since, for a user who
        // asked again.
        if (this.#newest.get(call.question) !== call.answer.id) return;
        const [place, question] = [at(call.answer.id), at(call.question)];
        if (place >= 0) chat.messages[place] = call.answer;
        else if (question >= 0) chat.messages.splice(question + 1, 0, call.answer);
        return;
      }
      case "read":
        return chat;
      case "save":
        chat.messages = call.messages ?? chat.messages;
        chat.activeStreamId = call.activeStreamId;
        return;
      case "stop":
        chat.stopped.push(call.activeStreamId);
        if (chat.activeStreamId === call.activeStreamId) chat.activeStreamId = null;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server.shutdown();
  }
}

const complaints: string[] = [];

async function startProxy(url: string): Promise<Process> {
  const proxy = await ProxyProcess.start(url, {
    ...{ INBOX: "true", LOG_MAX_MESSAGES: "100000", REDIS_OUTAGE_GRACE_SECS: "60", SHUTDOWN_GRACE_PERIOD_SECS: "2" },
  });
  // What it complains of is shown when the oracle finds something.
  void proxy.log.until((line) => (/"level":"(warn|error)"/.test(line) && complaints.push(line), false)).catch(() => {});
  return {
    port: proxy.port,
    signal: (signal) => proxy.signal(signal),
    async end(signal) {
      proxy.signal(signal);
      await proxy.exit();
      await proxy[Symbol.asyncDispose]();
    },
  };
}

/** Sends what was said last once more, as a writer would that has not heard of its success; unless it was no chunk. */
async function sayAgain(control: Redis, id: string): Promise<void> {
  const key = `session:${id}:down`;
  try {
    await control.watch(key);
    const [last] = await control.xrevrange(key, "+", "-", "COUNT", 1);
    const payload = last?.[1][1] ?? "";
    if (payload.startsWith('{"type":"chunk"')) {
      await control.multi().call("FCALL", "wsproxy_send", 1, key, payload, crypto.randomUUID()).exec();
    } else await control.unwatch();
  } catch {
    // Redis is away.
  }
}

/** A page of this process: a real `Chat`, as it was just loaded. */
interface Page {
  readonly chat: ReturnType<typeof chatOf>["chat"];
  stop?(): unknown;
  leave(): void;
}

/** The history, as a page loads it. */
async function load({ store, session }: User): Promise<UIMessage[]> {
  await pause(20 * Math.random());
  return structuredClone([...store.of(session).messages]);
}

/** Chats in this process, over any transport. */
function chatsOf(open: (user: User) => Page | Promise<Page>): System {
  const openTab = async (user: User): Promise<Tab> => {
    const { chat, leave, stop = () => void chat.stop() } = await open(user);
    chat.messages = await load(user);
    let hasAsked = false;
    let before = chat.status;
    void chat.resumeStream();
    chat["~registerStatusCallback"](() => {
      const { status } = chat;
      // It has asked nothing: what it shows it has found.
      if (status === "streaming" && before === "submitted" && !hasAsked) user.resumed++;
      before = status;
    });
    return {
      look: () => chat,
      ask({ id, text }) {
        hasAsked = true;
        void chat.sendMessage({ id, parts: [{ type: "text", text }] });
      },
      askAgain(messageId) {
        hasAsked = true;
        void chat.regenerate({ ...(messageId !== undefined && { messageId }) });
        return true;
      },
      stop,
      reload() {
        leave();
        return openTab(user);
      },
      leave,
    };
  };
  return { patienceMs: 30_000, lookMs: 20, open: openTab, expected: partsExpected };
}

const systems: Record<"wsproxy" | typeof others[number], System> = {
  wsproxy: chatsOf((user) => {
    const { id, relay } = user;
    const transport = new SessionChatTransport({
      ...{ url: `ws://127.0.0.1:${relay.port}/agent/ws/${id}`, token: () => mint(id), silenceMs: 3000 },
      timeoutMs: 3000,
      onError() {},
      async onAnswer() {
        const messages = await load(user);
        // The user has asked meanwhile.
        if (chat.status === "submitted" || chat.status === "streaming") return;
        chat.messages = messages;
        await chat.resumeStream();
      },
    });
    const { chat } = chatOf(transport, [], id);
    return { chat, leave: () => transport.close() };
  }),
  stock: chatsOf(async ({ id, relay }) => {
    const transport = new WebSocketChatTransport({
      url: `ws://127.0.0.1:${relay.port}/agent/ws/${id}`,
      protocols: ["bearer", await mint(id)],
      prepareSendMessagesRequest: ({ messages }) => ({ messages: messages.slice(-1) }),
    });
    return { chat: chatOf(transport, [], id).chat, leave: () => transport.close() };
  }),
  "resumable-stream": chatsOf(({ id, relay }) => {
    const left = new AbortController();
    const client = Deno.createHttpClient({ poolMaxIdlePerHost: 0 });
    const api = `http://127.0.0.1:${relay.port}/api/chat`;
    const call = (url: string | URL | Request, init: RequestInit = {}) => {
      const signal = AbortSignal.any([left.signal, ...init.signal ? [init.signal] : []]);
      return fetch(url, { ...init, signal, client });
    };
    const transport = new DefaultChatTransport<UIMessage>({
      ...{ api, fetch: call },
      prepareSendMessagesRequest: ({ id, messages, trigger, messageId }) => ({
        body: { id, message: messages.at(-1), trigger, messageId },
      }),
    });
    const { chat } = chatOf(transport, [], id);
    return {
      chat,
      stop() {
        call(`${api}/${id}/stop`, { method: "POST" }).then((response) => response.body?.cancel()).catch(() => {});
        void chat.stop();
      },
      leave() {
        left.abort();
        client.close();
      },
    };
  }),
};

/** Runs one. @throws what the oracle finds, unless it is to be counted. */
export async function torture(options: Options): Promise<Report> {
  const { seconds, seed, against, fresh = false, python, page = false } = options;
  const random = createRandom(seed);
  const counted = against ? kinds : fresh ? losable : [];
  const { users, leaseMs, everyMs } = page ? inPages : inChats;
  const report: Report = {
    ...{ questions: 0, regenerated: 0, impatient: 0, stopped: 0, reloads: 0, resumed: 0 },
    ...{ late: 0, troubled: 0, troubles: {}, faults: {} },
  };
  // Clients wait a twentieth of what they would.
  const { random: native } = Math;
  Math.random = () => native() / 20;
  await using redis = await RedisServer.start(...fresh ? [] : kept);
  const control = redis.client();
  using redisRelay = new Relay(redis.port);
  await using history = new History();
  await using fronts = new Processes(() => startProxy(redisRelay.url));
  await using pages = page ? await Pages.start(redisRelay.url, () => fronts.ports) : undefined;
  const env = { REDIS_URL: redisRelay.url, HISTORY_URL: history.url, LEASE_MS: String(leaseMs) };
  const isHttp = against === "resumable-stream";
  await using backs = new Processes((i) => {
    if (pages) return pages.startWorker();
    if (python && i === 0) return startProgram("chat_worker.py", env, { python });
    return startProgram(isHttp ? "chat_next.ts" : "chat_worker.ts", env, { listens: isHttp });
  });
  await using apis = new Processes(() => pages!.startApi());
  await Promise.all([isHttp ? undefined : fronts.fill(proxies), backs.fill(agents), pages && apis.fill(1)]);
  const network = () =>
    pages?.network() ?? new Relay(() => {
      const { ports } = isHttp ? backs : fronts;
      return ports.length > 0 ? oneOf(ports, Math.random) : 1;
    });
  const system = pages ?? systems[against ?? "wsproxy"];
  const weather = { waiting: 0 };
  const all = Array.from(
    { length: users },
    (_, i) => new User(`u${i}`, system, pages ?? history, createRandom(seed + i + 1), network(), counted, weather),
  );
  let done = false;
  try {
    const harming = (async () => {
      let isRestarting = false;
      const some = (count: number) => Math.floor(random() * count);
      const faults: Record<string, () => Promise<void> | void> = {
        killProxy: () => fronts.replace(some(proxies), "SIGKILL"),
        deployProxy: () => fronts.replace(some(proxies), "SIGTERM"),
        killAgent: () => backs.replace(some(agents), "SIGKILL"),
        deployAgent: () => backs.replace(some(agents), "SIGTERM"),
        freezeAgent: () => backs.freeze(some(agents), leaseMs * (0.5 + 2 * random())),
        restartRedis: async () => {
          if (isRestarting) return;
          isRestarting = true;
          await redis.kill();
          await pause(300 * random());
          await redis.start();
          isRestarting = false;
        },
        cutRedis: () => redisRelay.cut(),
        ...(!against && {
          sayAgain: async () => {
            for (const { session } of all) await sayAgain(control, session);
          },
        }),
        cutUser: () => oneOf(all, random).relay.cut(),
        cutUsers: () => all.forEach(({ relay }) => random() < 0.5 && relay.cut()),
        ...(page && { killApi: () => apis.replace(0, "SIGKILL") }),
      };
      const going: Promise<void>[] = [];
      const endMs = performance.now() + 1000 * seconds;
      while (performance.now() < endMs && !done) {
        await pause(everyMs * (0.5 + 1.5 * random()));
        if (weather.waiting > 0) continue;
        const fault = oneOf(Object.keys(faults), random);
        if (isHttp && fault.endsWith("Proxy")) continue;
        count(report.faults, fault);
        going.push(Promise.resolve(faults[fault]!()));
      }
      done = true;
      await Promise.all(going);
    })();
    const using = all.map((user) => user.run(() => done));
    await Promise.all([harming, ...using]).catch((error) => {
      done = true;
      console.error(complaints.slice(-20).join("\n"));
      throw error;
    });
    await Promise.all(all.map((user) => user.judge()));
    for (const { asked, reloads, resumed, regenerated, impatient, late } of all) {
      report.questions += asked.length;
      report.stopped += asked.filter(({ stopped }) => stopped).length;
      report.reloads += reloads;
      report.resumed += resumed;
      report.late += late;
      report.impatient += impatient;
      report.regenerated += regenerated;
      for (const { troubles } of asked) {
        if (troubles.size > 0) report.troubled++;
        for (const kind of troubles) count(report.troubles, kind);
      }
    }
  } finally {
    done = true;
    Math.random = native;
    for (const user of all) await user[Symbol.asyncDispose]();
  }
  // Else no page has found an answer that was under way, of all that were loaded.
  assert(against || report.resumed > 0 || report.reloads < 10, JSON.stringify(report));
  return report;
}

if (import.meta.main) {
  const { against, python, ...rest } = runOptions(60, {
    against: { type: "string" },
    python: { type: "string" },
    page: { type: "boolean", default: false },
    fresh: { type: "boolean", default: false },
  });
  const way = others.find((name) => name === against);
  if (against !== undefined && way === undefined) {
    throw new Error(`--against must be one of ${others}: current value is "${against}"`);
  }
  if (rest.page && (rest.fresh || against !== undefined || python !== undefined)) {
    throw new Error("--page goes with --seconds and --seed only");
  }
  if (rest.page) await installPage();
  console.log(JSON.stringify(await torture({ ...rest, ...(way && { against: way }), ...(python && { python }) })));
  Deno.exit(0);
}
