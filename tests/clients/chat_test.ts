/** A chat at both ends: the real `Chat` of the AI SDK, a proxy, workers of clients/js/chat.js, and models of `ai/test`. */

import assert from "node:assert/strict";
import { convertToModelMessages, streamText, toUIMessageStream, type UIMessage, WebSocketChatTransport } from "ai";
import { MockLanguageModelV4 } from "ai/test";
import { Redis } from "ioredis";
import { Window } from "happy-dom";
import { ChatError, ChatWorker, type ChatWorkerOptions, type Send } from "../../clients/js/chat.js";
import { chatOf, ChatSite, isNow, says, shown } from "../harness/chat.ts";
import { blockOf } from "../harness/pages.ts";
import { disconnect } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { WorkerProcess } from "../harness/workers.ts";

const page = blockOf("docs/chat.md", "useChat({").text;
const agent = blockOf("docs/chat.md", "new ChatWorker").text;

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

const usage = {
  inputTokens: { total: 1, noCache: 1, cacheRead: 0, cacheWrite: 0 },
  outputTokens: { total: 1, text: 1, reasoning: 0 },
};

/** A model that says these words, each when it is asked for the next one. */
function modelOf(words: (signal: AbortSignal | undefined) => AsyncIterable<string> | Iterable<string>) {
  return new MockLanguageModelV4({
    // deno-lint-ignore require-await
    doStream: async ({ abortSignal }) => ({
      stream: ReadableStream.from((async function* () {
        yield { type: "stream-start" as const, warnings: [] };
        yield { type: "text-start" as const, id: "t" };
        for await (const word of words(abortSignal)) {
          abortSignal?.throwIfAborted();
          yield { type: "text-delta" as const, id: "t", delta: `${word} ` };
        }
        yield { type: "text-end" as const, id: "t" };
        yield { type: "finish" as const, usage, finishReason: { unified: "stop" as const, raw: undefined } };
      })()),
    }),
  });
}

/** What an agent of the AI SDK does with a question. */
const answering = (model: MockLanguageModelV4) => async (send: Send) => {
  const { stream } = streamText({
    model,
    messages: await convertToModelMessages(send.messages),
    abortSignal: send.abortSignal,
    maxRetries: 0,
    onError() {},
  });
  return toUIMessageStream({ stream });
};

/** A worker that runs until the end of its scope, and what it has complained of. */
function work(site: ChatSite, options: Partial<ChatWorkerOptions> & Pick<ChatWorkerOptions, "answer">) {
  const redis = new Redis(site.redis.url);
  const errors: string[] = [];
  const worker = new ChatWorker({
    ...{ redis, agent: "agent", leaseMs: 1000, graceMs: 0 },
    onError: (error, what) => errors.push(`${what}: ${error instanceof Error ? error.message : error}`),
    ...options,
  });
  const done = worker.run();
  return {
    errors,
    async [Symbol.asyncDispose]() {
      worker.stop();
      await soon(done, "the worker's end");
      await disconnect(redis);
    },
  };
}

/** What the log has, in order, as frames. */
async function logged(site: ChatSite) {
  const entries = await site.control.xrange("session:s1:down", "-", "+");
  return entries.map(([, fields]) => fields[1]!).filter((text) => text.startsWith("{")).map((text) => JSON.parse(text));
}

Deno.test("An answer of the AI SDK shows as it was said, in as many messages as were worth their while", async () => {
  await using site = await ChatSite.start();
  const words = Array.from({ length: 300 }, (_, i) => `w${i}`);
  const prompts: unknown[] = [];
  const model = modelOf(() => words);
  await using _worker = work(site, {
    answer(send) {
      prompts.push([send.chatId, send.trigger, shown(send.messages), send.body, send.answerId === send.requestId]);
      return answering(model)(send);
    },
  });
  const { chat } = site.load();
  await chat.sendMessage({ text: "hello" }, { body: { model: "small" } });
  assert.deepEqual(shown(chat.messages), ["user|hello", `assistant|step-start|${words.join(" ")}`]);
  assert.deepEqual(prompts, [["chat", "submit-message", ["user|hello"], { model: "small" }, true]]);
  const frames = await logged(site);
  const { requestId } = frames[0];
  assert.equal(chat.messages[1]!.id, requestId);
  assert.deepEqual(frames[0], { type: "start", requestId, id: "chat" });
  assert.deepEqual(frames.at(-1), { type: "end", requestId });
  const chunks = frames.slice(1, -1);
  assert.deepEqual(chunks.map(({ sequence }) => sequence), chunks.map((_, i) => i));
  assert.deepEqual(chunks[0].chunk, { type: "start", messageId: requestId });
  assert(chunks.length < words.length / 2, `${chunks.length} chunks`);
  // A stock transport's resume has its turn when nothing is under way.
  await using other = await site.proxyClient();
  other.send(JSON.stringify({ type: "resume", requestId: "r", id: "chat", headers: {}, body: {} }));
  await eventually("it is answered", async () => (await logged(site)).length > frames.length);
  assert.deepEqual((await logged(site)).at(-1), { type: "no-active", requestId: "r" });
});

Deno.test("Of an answer whose worker is killed another one shows all, and nothing of the first", async () => {
  await using site = await ChatSite.start();
  const folder = await Deno.makeTempDir();
  const program = `
    import { Redis } from "ioredis";
import { Window } from "happy-dom";
    import { ChatWorker } from "${new URL("../../clients/js/chat.js", import.meta.url)}";
    async function* answer() {
      yield { type: "start" };
      yield { type: "start-step" };
      yield { type: "text-start", id: "1" };
      yield { type: "text-delta", id: "1", delta: "never to be seen again" };
      console.log("in the middle");
      await new Promise(() => {});
    }
    setInterval(() => {}, 1000);
    await new ChatWorker({ redis: new Redis(Deno.env.get("REDIS_URL")), agent: "agent", leaseMs: 1000, answer }).run();
  `;
  await Deno.writeTextFile(`${folder}/worker.js`, program);
  const config = new URL("../../deno.json", import.meta.url).pathname;
  const args = ["run", "--quiet", "--no-prompt", "--frozen", "--config", config, "--allow-all", `${folder}/worker.js`];
  const { chat, statuses } = site.load();
  let done: Promise<void>;
  {
    await using doomed = new WorkerProcess(Deno.execPath(), args, { REDIS_URL: site.redis.url });
    done = chat.sendMessage({ text: "hello" });
    await doomed.prints("in the middle");
    await says(chat, "user|hello", "assistant|step-start|never to be seen again");
  }
  await using _worker = work(site, { answer: answering(modelOf(() => ["all", "is", "well"])) });
  await soon(done, "the end of an answer");
  assert.deepEqual(shown(chat.messages), ["user|hello", "assistant|step-start|all is well"]);
  assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
  await Deno.remove(folder, { recursive: true });
});

Deno.test("A stop ends the model wherever it runs, and no other question", async () => {
  await using site = await ChatSite.start();
  const stops: string[] = [];
  const endless = (name: string) =>
    modelOf(async function* (signal) {
      yield "one";
      await new Promise((resolve) => signal!.addEventListener("abort", resolve));
      stops.push(name);
    });
  const answer = (send: Send) =>
    shown(send.messages)[0] === "user|endless"
      ? answering(endless(send.chatId))(send)
      : answering(modelOf(() => ["short"]))(send);
  const questions: string[] = [];
  const onQuestion = async ({ requestId }: Send) => {
    const isFirst = !(await logged(site)).some((frame) => frame.requestId === requestId);
    if (isFirst) questions.push(requestId);
  };
  await using _one = work(site, { answer, onQuestion });
  await using _two = work(site, { answer, onQuestion });
  const first = site.load();
  const second = site.load();
  const asking = first.chat.sendMessage({ text: "endless" });
  await says(first.chat, "user|endless", "assistant|step-start|one");
  const waiting = second.chat.sendMessage({ text: "patient" });
  await site.asked(2);
  const third = site.load();
  const given = third.chat.sendMessage({ text: "endless" });
  await site.asked(3);
  // One that waits, first.
  await third.chat.stop();
  await soon(given, "the end of an answer");
  // It has arrived before the question has its turn.
  await site.asked(4);
  await first.chat.stop();
  await soon(asking, "the end of an answer");
  await soon(waiting, "the end of an answer");
  assert.deepEqual(shown(second.chat.messages), ["user|patient", "assistant|step-start|short"]);
  await eventually("all has ended", async () => (await logged(site)).filter(({ type }) => type === "end").length === 3);
  assert.deepEqual(stops, ["chat"]);
  const frames = await logged(site);
  const [, , frame] = await site.asked(3);
  assert.deepEqual(
    frames.filter(({ requestId }) => requestId === frame!.requestId).map(({ type, chunk }) => chunk?.type ?? type),
    ["start", "start", "abort", "end"],
  );
  const aborted = frames.filter(({ chunk }) => chunk?.type === "abort");
  assert.equal(aborted.length, 2);
  // Each question can be stored before other pages hear of it, also one that no model was asked.
  assert.deepEqual(questions, frames.filter(({ type }) => type === "start").map(({ requestId }) => requestId));
});

Deno.test("An answer that fails says so, without what went wrong; a try that has shown nothing is made again", async () => {
  await using site = await ChatSite.start();
  let tries = 0;
  await using worker = work(site, {
    onQuestion(send) {
      if (shown(send.messages)[0] === "user|refused") throw new ChatError("Not that.");
    },
    answer: (send) => {
      const [text] = shown(send.messages);
      if (text === "user|model") {
        const doStream = () => Promise.reject(new Error("the key sk-123 is wrong"));
        return answering(new MockLanguageModelV4({ doStream }))(send);
      }
      if (text === "user|told") throw new ChatError("Too long.");
      if (text === "user|again" && tries++ === 0) throw new Error("at first");
      return (async function* () {
        yield { type: "text-start", id: "1" };
        yield { type: "text-delta", id: "1", delta: "said" };
        if (text === "user|late") throw new Error("sk-123");
        yield { type: "text-end", id: "1" };
      })();
    },
  });
  const { chat } = site.load();
  const ask = async (text: string) => {
    chat.messages = [];
    await chat.sendMessage({ text });
    return [chat.status, chat.error?.message, ...shown(chat.messages.slice(1))];
  };
  assert.deepEqual(await ask("model"), ["error", "An error occurred.", "assistant"]);
  assert.deepEqual(await ask("told"), ["error", "Too long."]);
  assert.deepEqual(await ask("refused"), ["error", "Not that."]);
  assert.deepEqual(await ask("late"), ["error", "The answer failed.", "assistant|said"]);
  assert.deepEqual(await ask("again"), ["ready", undefined, "assistant|said"]);
  assert.equal((await logged(site)).some((frame) => JSON.stringify(frame).includes("sk-123")), false);
  assert.equal(worker.errors.length, 2);
});

Deno.test("What is no question of a chat is answered by nobody, or with an error", async () => {
  await using site = await ChatSite.start();
  await using worker = work(site, { answer: answering(modelOf(() => ["yes"])) });
  await using client = await site.proxyClient();
  for (
    const data of ["[]", '{"type":"abort","requestId":"gone"}', '{"type":"send","requestId":"bad","messages":[{}]}']
  ) {
    client.send(data);
  }
  await eventually("the last is answered", async () => (await logged(site)).length > 0);
  assert.deepEqual(await logged(site), [
    { type: "error", requestId: "bad", errorText: "The question was not understood." },
  ]);
  assert.deepEqual(worker.errors, []);
});

Deno.test("The page and the agent of docs/chat.md talk, and a page that is loaded in the middle shows all", async () => {
  await using site = await ChatSite.start();
  const folder = await Deno.makeTempDir();
  const config = new URL("../../deno.json", import.meta.url).pathname;
  const module = (name: string) => new URL(`../../clients/js/${name}.js`, import.meta.url).href;
  // A model that goes on when the test says so, and a history in Redis.
  const prelude = `
    import { MockLanguageModelV4 } from "ai/test";
    const control = new Redis(process.env.REDIS_URL);
    async function save(chat, message) {
      await control.hset("history:" + chat, message.id, JSON.stringify(message));
      await control.zadd("order:" + chat, "NX", Date.now(), message.id);
    }
    async function load(chat) {
      const ids = await control.zrange("order:" + chat, 0, -1);
      return (await control.hmget("history:" + chat, ...ids)).map((text) => JSON.parse(text));
    }
    const model = new MockLanguageModelV4({
      doStream: async () => ({
        stream: ReadableStream.from((async function* () {
          yield { type: "text-start", id: "t" };
          yield { type: "text-delta", id: "t", delta: "the beginning, " };
          while (!await control.exists("go")) await new Promise((resolve) => setTimeout(resolve, 5));
          yield { type: "text-delta", id: "t", delta: "the end" };
          yield { type: "text-end", id: "t" };
          yield { type: "finish", usage: ${JSON.stringify(usage)}, finishReason: { unified: "stop", raw: undefined } };
        })()),
      }),
    });
  `;
  const text = agent.replace('"./chat.js"', `"${module("chat")}"`).replace('agent: "support"', 'agent: "agent"')
    .replace("redis.disconnect();", "control.disconnect(); redis.disconnect();");
  const [imports, rest] = [text.slice(0, text.indexOf("\nconst redis")), text.slice(text.indexOf("\nconst redis"))];
  await Deno.writeTextFile(`${folder}/agent.js`, imports + prelude + rest);
  const args = ["run", "--quiet", "--no-prompt", "--frozen", "--config", config, "--allow-all", `${folder}/agent.js`];
  await using running = new WorkerProcess(Deno.execPath(), args, { REDIS_URL: site.redis.url });
  const history = async () => {
    const ids = await site.control.zrange("order:demo", 0, -1);
    return ids.length ? (await site.control.hmget("history:demo", ...ids)).map((text) => JSON.parse(text!)) : [];
  };
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const { pathname } = new URL(request.url);
    return pathname === "/token" ? new Response(await mint("s1")) : Response.json(await history());
  });
  const window = new Window();
  Object.assign(globalThis, { window, document: window.document });
  const { createElement } = await import("react");
  const { createRoot } = await import("react-dom/client");
  const unload: (() => void)[] = [];
  /** Loads the page, as often as there are tabs. */
  const load = async (name: string) => {
    const code = page.replace('"./ai.js"', `"${module("ai")}"`).replace("wss://example.com/agent/ws/demo", site.url)
      .replaceAll('fetch("', `fetch("http://127.0.0.1:${server.addr.port}`);
    const file = `${folder}/${name}.jsx`;
    await Deno.writeTextFile(file, `/** @jsxImportSource react */\n${code}\nexport { chat, transport };`);
    const { Page, chat, transport } = await import(`file://${file}`);
    const element = window.document.createElement("div");
    window.document.body.appendChild(element);
    const root = createRoot(element as never);
    root.render(createElement(Page));
    unload.push(() => {
      root.unmount();
      transport.close();
    });
    return { element, chat: chat as ReturnType<typeof chatOf>["chat"] };
  };
  const first = await load("first");
  await eventually("it can be asked", () => first.element.querySelector("button")?.textContent === "Ask");
  void first.chat.sendMessage({ text: "hello" });
  const begun = "hello</p>.*the beginning, </p>";
  await eventually("it has begun", () => new RegExp(begun).test(first.element.innerHTML));
  const second = await load("second");
  await eventually("the second has it", () => new RegExp(begun).test(second.element.innerHTML));
  await site.control.set("go", 1);
  for (const { element, chat } of [first, second]) {
    await eventually("all is there", () => element.innerHTML.includes("the beginning, the end</p>"));
    await isNow(chat, "ready");
    assert.deepEqual(shown(chat.messages), ["user|hello", "assistant|step-start|the beginning, the end"]);
  }
  // A tab that is open hears of what another one asks.
  void second.chat.sendMessage({ text: "again" });
  const told = () => first.chat.messages.length === 4 && first.chat.status === "ready";
  await eventually("the first has it, too", told);
  assert.deepEqual(first.chat.messages.slice(2).map(({ role }) => role), ["user", "assistant"]);
  await isNow(second.chat, "ready");
  const stored = (await history()) as UIMessage[];
  assert.deepEqual(stored.map(({ id }) => id), second.chat.messages.map(({ id }) => id));
  for (const each of unload) each();
  assert.equal(await running.stop(), 0);
  await window.happyDOM.close();
  await Deno.remove(folder, { recursive: true });
});

Deno.test("The stock transport talks to the same agent, bare", async () => {
  await using site = await ChatSite.start();
  await using _worker = work(site, { answer: answering(modelOf(() => ["all", "is", "well"])) });
  const protocols = ["bearer", await mint("s1")];
  const transport = new WebSocketChatTransport({ url: site.url, protocols });
  const { chat, statuses } = chatOf(transport);
  for (let i = 1; i <= 2; i++) await chat.sendMessage({ text: "hello" });
  assert.deepEqual(shown(chat.messages).slice(2), ["user|hello", "assistant|step-start|all is well"]);
  assert.deepEqual(statuses.slice(3), ["submitted", "streaming", "ready"]);
  const [, frame] = await site.asked(2);
  assert.equal(frame!.messages!.length, 3);
  // Its resume has its turn when nothing is under way.
  await chat.resumeStream();
  assert.equal(chat.status, "ready");
  transport.close();
});
