/**
 * What clients/python has for agents' libraries, against the real proxy: `deno task test:agents`, a step of the gate where
 * there is Python. It makes a virtual environment in .tools/.
 */

import assert from "node:assert/strict";
import { CustomStreamOrchestrator } from "@langchain/langgraph-sdk/ui";
import { SessionStreamTransport } from "../../clients/js/langgraph.js";
import { Client } from "../harness/client.ts";
import { ChatSite, says } from "../harness/chat.ts";
import { blockOf } from "../harness/pages.ts";
import { TestProxy } from "../harness/proxy.ts";
import { adapters, agentsVenv, checkTypes, modulesOf, runOnRedis } from "../harness/python.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { WorkerProcess } from "../harness/workers.ts";

const root = new URL("../../", import.meta.url).pathname;
const bin = await agentsVenv();
const env = { PYTHONPATH: `${root}clients/python` };

interface Frame {
  readonly type: string;
  readonly requestId: string;
  readonly sequence: number;
  readonly chunk: { readonly type: string; readonly delta: string; readonly messageId?: string };
}

/** A page that asks by `!send`, and reads frames. */
class Page implements AsyncDisposable {
  readonly #client: Client;

  private constructor(client: Client) {
    this.#client = client;
  }

  static async open(proxy: TestProxy): Promise<Page> {
    return new Page(await proxy.connect("s1", { resume: "0" }));
  }

  ask(requestId: string, text: string): void {
    const messages = [{ id: `id of ${text}`, role: "user", parts: [{ type: "text", text }] }];
    const frame = { type: "send", requestId, id: "chat", trigger: "submit-message", messages, headers: {}, body: {} };
    this.#client.send(`!send\n${requestId}\n${JSON.stringify(frame)}`);
  }

  abort(requestId: string): void {
    this.#client.send(`!send\n${requestId}-abort\n${JSON.stringify({ type: "abort", requestId })}`);
  }

  async next(): Promise<Frame> {
    while (true) {
      const frame = await this.#client.next();
      if (!frame.startsWith("!")) return JSON.parse(frame.slice(frame.indexOf("\n") + 1));
    }
  }

  /** All up to the one that fits. */
  async until(fits: (frame: Frame) => boolean): Promise<Frame[]> {
    const frames = [await this.next()];
    while (!fits(frames.at(-1)!)) frames.push(await this.next());
    return frames;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#client.close();
  }
}

const isEnd = ({ type }: Frame) => type === "end" || type === "error";
const textOf = (frames: readonly Frame[]) =>
  frames.map(({ chunk }) => chunk?.type === "text-delta" ? chunk.delta : "").join("");

/** What a page shows in the end: that of the writer who has begun last. Its chunks are numbered without holes. */
function shown(frames: readonly Frame[]): string {
  const last = frames.slice(frames.findLastIndex(({ type }) => type === "start"));
  const numbers = last.filter(({ type }) => type === "chunk").map(({ sequence }) => sequence);
  assert.deepEqual(numbers, numbers.map((_, n) => n));
  assert.deepEqual(last[1]?.chunk, { type: "start", messageId: last[0]!.requestId });
  return textOf(last);
}

const program = (redis: RedisServer, name: string) =>
  new WorkerProcess(`${bin}/python`, ["-u", `${root}tests/clients/chat_program.py`, redis.url, name], env);

/** Its libraries are large: a machine with other work may take a minute to load them. One that fails ends, and its output too. */
const isReady = (worker: WorkerProcess) => worker.output.until((line) => line === "ready");

const words = (name: string) => Array.from({ length: 40 }, (_, n) => `${name}-${n} `).join("");

Deno.test("The worker of a chat is killed in the middle of an answer, and another one begins it anew", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { INBOX: "true" });
  await proxy.resumable();
  await using page = await Page.open(proxy);
  const workers = { one: program(redis, "one"), two: program(redis, "two") };
  await using one = workers.one;
  await using two = workers.two;
  for (const worker of [one, two]) await isReady(worker);
  page.ask("r1", "who are you?");
  page.ask("r2", "and you?");
  const before = await page.until((frame) => textOf([frame]).includes("-9 "));
  const killed = textOf(before).startsWith("one") ? one : two;
  const name = killed === one ? "two" : "one";
  await killed[Symbol.asyncDispose]();
  const frames = [...before, ...await page.until(isEnd)];
  assert.equal(shown(frames), words(name));
  assert.equal(frames.filter(({ type }) => type === "start").length, 2);
  assert(frames.every(({ requestId }) => requestId === "r1"));
  assert.equal(shown(await page.until(isEnd)), words(name));
});

Deno.test("A page stops the answer of a chat, whichever worker writes it, and the question after it is answered", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { INBOX: "true" });
  await proxy.resumable();
  await using page = await Page.open(proxy);
  await using one = program(redis, "one");
  await using two = program(redis, "two");
  for (const worker of [one, two]) await isReady(worker);
  for (const request of ["r1", "r2", "r3"]) {
    page.ask(request, `question of ${request}`);
    const begun = await page.until((frame) => textOf([frame]).includes("-1 "));
    page.abort(request);
    const frames = [...begun, ...await page.until(isEnd)];
    assert(frames.some(({ chunk }) => chunk?.type === "abort"), "it says so");
    assert(!shown(frames).includes("-39 "), "it was stopped");
    await (shown(frames).startsWith("one") ? one : two).prints(`leaves ${request}`);
  }
  page.ask("r4", "the last one");
  assert.match(shown(await page.until(isEnd)), /-39 $/);
});

Deno.test("The AI SDK's Chat shows one answer whole when its worker in Python is killed, in a new tab too", async () => {
  await using site = await ChatSite.start();
  await using one = program(site.redis, "one");
  await using two = program(site.redis, "two");
  for (const worker of [one, two]) await isReady(worker);
  const { chat, statuses } = site.load();
  const text = () => chat.messages.at(-1)?.parts.map((part) => part.type === "text" ? part.text : "").join("") ?? "";
  const asking = chat.sendMessage({ text: "who are you?" });
  await eventually("it has begun", () => text().includes("-5 "));
  const killed = text().startsWith("one") ? one : two;
  await killed[Symbol.asyncDispose]();
  const name = killed === one ? "two" : "one";
  await eventually("another one answers", () => text().includes(`${name}-3 `));
  site.relay.cut();
  const tab = site.load({}, [chat.messages[0]!]);
  const resuming = tab.chat.resumeStream();
  await Promise.all([asking, resuming]);
  for (const each of [chat, tab.chat]) {
    await says(each, "user|who are you?", `assistant|step-start|${words(name).trim()}`);
    assert.equal(each.status, "ready");
  }
  assert(!statuses.includes("error"), String(statuses));
});

/** A worker of a graph which tells word for word which it is. */
const graphOf = (redis: RedisServer, name: string) =>
  new WorkerProcess(`${bin}/python`, [
    ...["-u", "-c"],
    `
import asyncio
from collections.abc import AsyncIterator
import redis.asyncio as redis
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from wsproxy_client.chat import Chunk, Send
model = FakeListChatModel(responses=["".join(f"${name}-{n} " for n in range(40))], sleep=0.005)
async def call(state):
    return {"messages": [await model.ainvoke(state["messages"])]}
graph = StateGraph(MessagesState).add_node("call", call).add_edge(START, "call").compile(checkpointer=InMemorySaver())
${blockOf("clients/python/README.md", "import before, events").text}
print("ready")
asyncio.run(AgUiWorker(redis.Redis.from_url("${redis.url}"), "agent", answer, lease_ms=1000).run())`,
  ], env);

Deno.test("useStream of LangGraph shows one answer whole when its worker is killed, in a page that is loaded again too", async () => {
  await using site = await ChatSite.start();
  await using one = graphOf(site.redis, "one");
  await using two = graphOf(site.redis, "two");
  for (const worker of [one, two]) await isReady(worker);
  const pages: SessionStreamTransport[] = [];
  const load = () => {
    const transport = new SessionStreamTransport({ url: site.url, token: () => mint("s1") });
    pages.push(transport);
    return new CustomStreamOrchestrator<Record<string, unknown>>({ transport, threadId: "t" });
  };
  const graph = load();
  const shown = (each = graph) => each.messages.map((message) => `${message.getType()}|${message.content}`);
  const last = () => shown().at(-1) ?? "";
  const asking = graph.submit({ messages: [{ type: "human", content: "who are you?" }] });
  await eventually("it has begun", () => last().includes("-5 "));
  const killed = last().startsWith("ai|one") ? one : two;
  await killed[Symbol.asyncDispose]();
  const name = killed === one ? "two" : "one";
  await eventually("another one answers", () => last().includes(`${name}-3 `));
  site.relay.cut();
  const reloaded = load();
  await Promise.all([asking, reloaded.submit(undefined)]);
  for (const each of [graph, reloaded]) assert.deepEqual(shown(each), ["human|who are you?", `ai|${words(name)}`]);
  for (const page of pages) page.close();
});

const readme = {
  pydanticAi: blockOf("clients/python/README.md", "import pydantic_ai").text,
  openAiAgents: blockOf("clients/python/README.md", "import openai_agents").text,
  langGraph: blockOf("clients/python/README.md", "import langgraph").text,
};

/** The README's workers, with what it leaves to the reader: a model, that is. */
const workers = [
  { library: "Pydantic AI", answer: "", says: () => "success (no tool calls)" },
  {
    library: "the OpenAI Agents SDK",
    answer: `
from agents import set_tracing_disabled
from agents.testing import ScriptedModel, assistant_message
set_tracing_disabled(True)
model = ScriptedModel([[assistant_message(f"answer {n}")] for n in (1, 2)])
${readme.openAiAgents.replace('Agent("Assistant")', 'Agent("Assistant", model=model)')}`,
    says: (n: number) => `answer ${n}`,
  },
  {
    library: "LangGraph",
    answer: `
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
model = FakeListChatModel(responses=["answer 1", "answer 2"])
async def call(state):
    return {"messages": [await model.ainvoke(state["messages"])]}
graph = StateGraph(MessagesState).add_node("call", call).add_edge(START, "call").compile(checkpointer=InMemorySaver())
${readme.langGraph}`,
    says: (n: number) => `answer ${n}`,
  },
];

for (const { library, answer, says } of workers) {
  Deno.test(`The worker in the README of the Python package answers as printed, with ${library}`, async () => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { INBOX: "true" });
    await proxy.resumable();
    const source = readme.pydanticAi.replace("redis://127.0.0.1:6379", redis.url).replace('"support"', '"agent"')
      .replace("async def main()", `${answer}\nprint("ready")\nasync def main()`);
    await using worker = new WorkerProcess(`${bin}/python`, ["-u", "-c", source], env);
    await isReady(worker);
    await using page = await Page.open(proxy);
    for (const n of [1, 2]) {
      page.ask(`r${n}`, "the same question");
      assert.equal(shown(await page.until(isEnd)), says(n));
    }
  });
}

Deno.test("The agents keep what agents_test.py says", () => runOnRedis(bin, "agents_test.py"));

Deno.test("mypy --strict and pyright find nothing in the adapters", () =>
  checkTypes(bin, { version: "3.11", files: modulesOf(adapters), tests: ["agents_test.py", "chat_program.py"] }));
