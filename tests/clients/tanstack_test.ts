/** Threads of TanStack AI over a session, under the real ChatClient and useChat; a writer says what each test wants. */

import assert from "node:assert/strict";
import { ChatClient, type UIMessage } from "@tanstack/ai-client";
// The client looks for a document when it is loaded, and these tests have none to hide.
import { type ConnectionOptions, SessionConnection } from "../../clients/js/tanstack.js";
import { ChatSite } from "../harness/chat.ts";
import { blockOf } from "../harness/pages.ts";
import { ReadmePage } from "../harness/readme_page.ts";
import { close, open, RunWriter, words } from "../harness/runs.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";

const down = "session:s1:down";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

const page = blockOf("clients/js/README.md", "@tanstack/ai-react").text;

const message = (id: string, role: "user" | "assistant", content: string): UIMessage => ({
  ...{ id, role },
  parts: [{ type: "text", content }],
});
const earlier = [message("m1", "user", "hello"), message("m2", "assistant", "welcome")];

const shown = (client: ChatClient) =>
  client.getMessages().map(({ role, parts }) =>
    `${role}|${parts.map((part) => part.type === "text" ? part.content.trim() : part.type).join("|")}`
  ).join(" ");
const before = "user|hello assistant|welcome";
const says = (client: ChatClient, expected: string) =>
  eventually(expected, () => shown(client) === expected)
    .catch((error) => assert.equal(shown(client), expected, error));

interface Frame {
  type: string;
  requestId: string;
  input: { runId: string; threadId: string; messages: { role: string; content: string }[]; forwardedProps: unknown };
}

/** Pages of a session whose backend keeps `history`. */
async function start() {
  const site = await ChatSite.start();
  const pages: { client: ChatClient; connection: SessionConnection }[] = [];
  const history = [...earlier];
  const connect = (options: Partial<ConnectionOptions> = {}) =>
    new SessionConnection({
      ...{ url: site.url, token: () => mint("s1"), onError() {} },
      ...{ history: () => ({ messages: [...history] }), ...options },
    });
  const load = (connection = connect()) => {
    const client = new ChatClient({ connection, threadId: "t", persistence: true });
    client.attach();
    pages.push({ client, connection });
    return client;
  };
  return {
    ...{ site, connect, load, history, control: site.control },
    async asked(count: number) {
      return (await site.asked(count) as unknown as Frame[]).at(-1)!;
    },
    async [Symbol.asyncDispose]() {
      for (const { client, connection } of pages) {
        client.dispose();
        connection.close();
      }
      await site[Symbol.asyncDispose]();
    },
  };
}

Deno.test("A run of TanStack AI shows over killed proxies, in a page that is loaded again, and begun anew", async () => {
  await using pages = await start();
  const { site, load, control, history } = pages;
  const kill = await site.moveToAnother();
  const client = load();
  await says(client, before);
  const done = client.sendMessage("how are you?");
  const { type, requestId, input } = await pages.asked(1);
  assert.deepEqual([type, requestId, input.threadId], ["run", input.runId, "t"]);
  assert.deepEqual(input.messages.map(({ content }) => content), ["hello", "welcome", "how are you?"]);
  history.push(client.getMessages().at(-1)!);
  const former = await RunWriter.begin(control, requestId);
  await former.say(open("a"), ...words("a", "one two"));
  const asked = `${before} user|how are you?`;
  await says(client, `${asked} assistant|one two`);
  await kill();
  await former.say(...words("a", "three"));
  await says(client, `${asked} assistant|one two three`);
  const reloaded = load();
  history.push(message("a", "assistant", "one"));
  const partial = load();
  history.pop();
  for (const each of [reloaded, partial]) await says(each, `${asked} assistant|one two three`);
  const writer = await RunWriter.begin(control, requestId);
  await writer.say(open("b"), ...words("b", "uno"));
  for (const each of [client, reloaded, partial]) await says(each, `${asked} assistant|uno`);
  site.relay.cut();
  await writer.say(...words("b", "dos"), close("b"));
  await writer.end();
  await soon(done, "the end of a run");
  for (const each of [client, reloaded, partial]) {
    await eventually("it is done", () => each.getStatus() === "ready");
    await says(each, `${asked} assistant|uno dos`);
  }
  assert.equal((await site.asked(1)).length, 1);
});

Deno.test("A run of TanStack AI is stopped wherever it is watched, also by a view that goes, and what is lost is an error", async () => {
  await using pages = await start();
  const { site, load, control, history } = pages;
  const client = load();
  await says(client, before);
  const stopped = client.sendMessage("one?");
  const first = await RunWriter.begin(control, (await pages.asked(1)).requestId);
  history.push(client.getMessages().at(-1)!);
  await first.say(open("a"), ...words("a", "one"));
  const second = load();
  await says(second, `${before} user|one? assistant|one`);
  second.stop();
  assert.deepEqual(await pages.asked(2), { type: "abort", requestId: first.runId } as unknown);
  await first.say(close("a"));
  await first.end();
  await soon(stopped, "the end of a run");
  await eventually("both are ready", () => [client, second].every((each) => each.getStatus() === "ready"));
  const own = client.sendMessage("two?");
  const { requestId } = await pages.asked(3);
  client.stop();
  await soon(own, "the end of a run");
  assert.deepEqual(await pages.asked(4), { type: "abort", requestId } as unknown);
  const left = client.sendMessage("left?");
  const { requestId: unseen } = await pages.asked(5);
  client.detach();
  await soon(left, "the end of a run");
  assert.deepEqual(await pages.asked(6), { type: "abort", requestId: unseen } as unknown);
  const refused = client.sendMessage("three?");
  await RunWriter.begin(control, (await pages.asked(7)).requestId)
    .then((writer) => writer.say({ type: "RUN_ERROR", message: "no luck" }));
  await soon(refused, "the end of a run");
  assert.deepEqual([client.getStatus(), client.getError()?.message], ["error", "no luck"]);
  const lost = client.sendMessage("four?");
  const fourth = await RunWriter.begin(control, (await pages.asked(8)).requestId);
  await fourth.say(open("d"), ...words("d", "four"));
  await eventually("it shows", () => shown(client).endsWith("assistant|four"));
  site.relay.hangsUp = true;
  site.relay.cut();
  await fourth.say(...words("d", "more"));
  await control.xtrim(down, "MAXLEN", 1);
  site.relay.hangsUp = false;
  await soon(lost, "the end of a run");
  assert.deepEqual([client.getStatus(), client.getError()?.message], [
    "error",
    "part of the run is missing: ask again",
  ]);
});

Deno.test("A history from before the question of the run that is under way is loaded again", async () => {
  await using pages = await start();
  const { connect, load, control, history } = pages;
  let isFirst = true;
  const connection = connect({
    async history(threadId) {
      const messages = [...history];
      if (!isFirst) return { messages };
      isFirst = false;
      history.push(message("m3", "user", "of another tab"));
      const writer = await RunWriter.begin(control, "r1");
      await writer.say(open("a"), ...words("a", "one"));
      await eventually("it is heard of", async () => (await connection.hydrate(threadId)).activeRun !== null);
      return { messages };
    },
  });
  await says(load(connection), `${before} user|of another tab assistant|one`);
});

Deno.test("The page of the README for TanStack AI asks, is loaded again in the middle, also by StrictMode, and stops", async () => {
  await using pages = await start();
  const { site, control, history } = pages;
  await using readme = new ReadmePage({
    ...{ code: page, module: "tanstack.js", closes: "connection" },
    ...{ url: site.url, history: () => history },
  });
  const first = await readme.load();
  await first.has(">welcome<");
  first.write("how are you?");
  first.press();
  const { requestId, input: { messages } } = await pages.asked(1);
  assert.equal(messages.at(-1)!.content, "how are you?");
  history.push(message("m3", "user", "how are you?"));
  const writer = await RunWriter.begin(control, requestId);
  await writer.say(open("a"), ...words("a", "one two"));
  await first.has(">one two <");
  const second = await readme.load();
  await second.has(">one two <");
  await writer.say(...words("a", "three"));
  for (const each of [first, second]) await each.has(">one two three <");
  second.press();
  assert.deepEqual(await pages.asked(2), { type: "abort", requestId } as unknown);
  await second.has(">Ask<");
  await writer.say(close("a"));
  await writer.end();
  await first.has(">Ask<");
});
