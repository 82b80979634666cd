/** Graphs of LangGraph over a session, under the real useStream and its orchestrator; a writer says what each test wants. */

import assert from "node:assert/strict";
import { CustomStreamOrchestrator } from "@langchain/langgraph-sdk/ui";
// The client looks for a document when it is loaded, and these tests have none to hide.
import { SessionStreamTransport } from "../../clients/js/langgraph.js";
import { ChatSite } from "../harness/chat.ts";
import { blockOf } from "../harness/pages.ts";
import { ReadmePage } from "../harness/readme_page.ts";
import { RunWriter } from "../harness/runs.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";

const down = "session:s1:down";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

const page = blockOf("clients/js/README.md", "@langchain/langgraph-sdk/react").text;

const raw = (event: string, data: unknown) => ({ type: "RAW", event: { event, data } });
const values = (...messages: Message[]) => raw("values", { messages });
const words = (id: string, text: string) =>
  text.split(" ").map((word) => raw("messages", [{ type: "AIMessageChunk", id, content: `${word} ` }, {}]));

type Message = { type: string; id: string; content: string };
const human = (content: string): Message => ({ type: "human", id: `id of ${content}`, content });
const ai = (content: string, id = `id of ${content}`): Message => ({ type: "ai", id, content });
const earlier = [human("hello"), ai("welcome")];

type Graph = CustomStreamOrchestrator<Record<string, unknown>>;

const shown = (graph: Graph) =>
  graph.messages.map((message) => `${message.getType()}|${String(message.content).trim()}`).join(" ");
const before = "human|hello ai|welcome";
const says = (graph: Graph, expected: string) =>
  eventually(expected, () => shown(graph) === expected)
    .catch((error) => assert.equal(shown(graph), expected, error));

interface Frame {
  type: string;
  requestId: string;
  input: { threadId: string; forwardedProps: { input?: { messages: Message[] }; command?: unknown } };
}

/** Pages of a session whose backend keeps `history`. */
async function start() {
  const site = await ChatSite.start();
  const transports: SessionStreamTransport[] = [];
  const errors: unknown[] = [];
  const load = (threadId = "t"): Graph => {
    const transport = new SessionStreamTransport({ url: site.url, token: () => mint("s1"), onError() {} });
    transports.push(transport);
    const onError = (error: unknown) => errors.push((error as Error).message);
    const options = { transport, threadId, initialValues: { messages: earlier }, onError };
    return new CustomStreamOrchestrator<Record<string, unknown>>(options);
  };
  const ask = (graph: Graph, content: string) => {
    const messages = [human(content)];
    return graph.submit({ messages }, { optimisticValues: { messages: [...earlier, ...messages] } });
  };
  const { error } = console;
  console.error = () => {};
  return {
    ...{ site, load, ask, errors, control: site.control },
    async asked(count: number) {
      return (await site.asked(count) as unknown as Frame[]).at(-1)!;
    },
    async [Symbol.asyncDispose]() {
      console.error = error;
      for (const transport of transports) transport.close();
      await site[Symbol.asyncDispose]();
    },
  };
}

Deno.test("A run of LangGraph shows over killed proxies, in a page that is loaded again, and begun anew", async () => {
  await using pages = await start();
  const { site, load, ask, control } = pages;
  const kill = await site.moveToAnother();
  const graph = load();
  await graph.submit(undefined);
  assert.equal(shown(graph), before);
  const done = ask(graph, "how are you?");
  const { type, requestId, input } = await pages.asked(1);
  assert.deepEqual([type, input.threadId, input.forwardedProps.input], ["run", "t", {
    messages: [human("how are you?")],
  }]);
  const former = await RunWriter.begin(control, requestId);
  await former.say(values(...earlier, human("how are you?")), ...words("a", "one two"));
  const asked = `${before} human|how are you?`;
  await says(graph, `${asked} ai|one two`);
  await kill();
  await former.say(...words("a", "three"));
  const reloaded = load();
  const resumed = reloaded.submit(undefined);
  const other = load("another thread");
  await other.submit(undefined);
  assert.equal(shown(other), before);
  for (const each of [graph, reloaded]) await says(each, `${asked} ai|one two three`);
  const writer = await RunWriter.begin(control, requestId);
  // A graph may give its messages the same ids again, and need not say its values first.
  await writer.say(...words("a", "uno"));
  for (const each of [graph, reloaded]) await says(each, `${asked} ai|uno`);
  site.relay.cut();
  await writer.say(...words("a", "dos"), values(...earlier, human("how are you?"), ai("uno dos", "a")));
  await writer.end();
  await soon(Promise.all([done, resumed]), "the end of a run");
  for (const each of [graph, reloaded]) {
    assert.equal(shown(each), `${asked} ai|uno dos`);
    assert.equal(each.isLoading, false);
  }
  assert.deepEqual(pages.errors, []);
  assert.equal((await site.asked(1)).length, 1);
});

Deno.test("A run of LangGraph is stopped wherever it is watched, and what is lost is an error", async () => {
  await using pages = await start();
  const { site, load, ask, control, errors } = pages;
  const graph = load();
  const stopped = ask(graph, "one?");
  const first = await RunWriter.begin(control, (await pages.asked(1)).requestId);
  await first.say(...words("a", "one"));
  const second = load();
  const resumed = second.submit(undefined);
  await says(second, `${before} ai|one`);
  second.stop();
  await soon(resumed, "the end of a run");
  assert.deepEqual(await pages.asked(2), { type: "abort", requestId: first.runId } as unknown);
  await first.end();
  await soon(stopped, "the end of a run");
  const continued = graph.submit(undefined, { command: { resume: "yes" } });
  const asked = await pages.asked(3);
  assert.deepEqual(asked.input.forwardedProps.command, { resume: "yes" });
  graph.stop();
  await soon(continued, "the end of a run");
  assert.deepEqual(await pages.asked(4), { type: "abort", requestId: asked.requestId } as unknown);
  const going = graph.submit(null);
  assert.equal((await pages.asked(5)).input.forwardedProps.input, null);
  graph.stop();
  await soon(going, "the end of a run");
  await pages.asked(6);
  const refused = ask(graph, "two?");
  await RunWriter.begin(control, (await pages.asked(7)).requestId)
    .then((writer) => writer.say({ type: "RUN_ERROR", message: "no luck" }));
  await soon(refused, "the end of a run");
  const lost = ask(graph, "three?");
  const third = await RunWriter.begin(control, (await pages.asked(8)).requestId);
  await third.say(...words("c", "three"));
  await says(graph, `${before} human|three? ai|three`);
  site.relay.hangsUp = true;
  site.relay.cut();
  await third.say(...words("c", "more"));
  await control.xtrim(down, "MAXLEN", 1);
  site.relay.hangsUp = false;
  await soon(lost, "the end of a run");
  assert.deepEqual(errors, ["no luck", "part of the run is missing: ask again"]);
});

Deno.test("The page of the README for LangGraph asks, is loaded again in the middle, also by StrictMode, and stops", async () => {
  await using pages = await start();
  const { site, control } = pages;
  await using readme = new ReadmePage({
    ...{ code: page, module: "langgraph.js", closes: "transport" },
    ...{ url: site.url, history: () => ({ messages: earlier }) },
  });
  const first = await readme.load();
  await first.has(">welcome<");
  await first.has(">Ask<");
  const ask = async (text: string, count: number) => {
    first.write(text);
    first.press();
    await first.has(`>${text}<`);
    return await RunWriter.begin(control, (await pages.asked(count)).requestId);
  };
  const writer = await ask("how are you?", 1);
  await writer.say(values(...earlier, human("how are you?")), ...words("a", "one two"));
  await first.has(">one two <");
  const second = await readme.load();
  await second.has(">one two <");
  await writer.say(...words("a", "three"));
  for (const each of [first, second]) await each.has(">one two three <");
  second.press();
  assert.deepEqual(await pages.asked(2), { type: "abort", requestId: writer.runId } as unknown);
  await writer.end();
  for (const each of [first, second]) await each.has(">Ask<");
  const next = await ask("really?", 3);
  assert(first.html.includes(">one two three <"), "what was said before stays");
  await next.end();
  await first.has(">Ask<");
});
