/** The page's end of a chat, under the real `Chat` of @ai-sdk/react; a writer says what each test wants of the agent. */

import assert from "node:assert/strict";
import { type UIMessage, type UIMessageChunk, WebSocketChatTransport } from "ai";
import type { Redis } from "ioredis";
import { chatOf, ChatSite, forgetful, isNow, type Page, says, shown } from "../harness/chat.ts";
import { SessionChatTransport } from "../../clients/js/ai.js";
import { blockOf } from "../harness/pages.ts";
import { inboxEnv } from "../harness/entries.ts";
import { onEachEngine, ProxyProcess } from "../harness/proxy.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";

const down = "session:s1:down";
const stock = blockOf("docs/chat.md", "new WebSocketChatTransport").text;

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

/** The one writer of an answer. */
class Writer {
  #sequence = 0;
  private constructor(readonly control: Redis, readonly requestId: string, readonly epoch: number) {}
  static async begin(control: Redis, requestId: string, id = "chat"): Promise<Writer> {
    const payload = JSON.stringify({ type: "start", requestId, id });
    const [, , epoch] = await control.call("FCALL", "wsproxy_begin", 1, down, payload, crypto.randomUUID()) as number[];
    return new Writer(control, requestId, epoch!);
  }
  async send(frame: Record<string, unknown>): Promise<void> {
    const payload = JSON.stringify({ requestId: this.requestId, ...frame });
    await this.control.call("FCALL", "wsproxy_send", 1, down, payload, crypto.randomUUID(), this.epoch);
  }
  async say(...chunks: UIMessageChunk[]): Promise<void> {
    for (const chunk of chunks) await this.send({ type: "chunk", sequence: this.#sequence++, chunk });
  }
  async end(): Promise<void> {
    await this.send({ type: "end" });
  }
}

const open: UIMessageChunk[] = [{ type: "start" }, { type: "start-step" }, { type: "text-start", id: "t" }];
const words = (text: string): UIMessageChunk[] =>
  text.split(" ").map((word) => ({ type: "text-delta", id: "t", delta: `${word} ` }));
const close: UIMessageChunk[] = [{ type: "text-end", id: "t" }, { type: "finish-step" }, { type: "finish" }];
const tool: UIMessageChunk[] = [
  { type: "start" },
  { type: "start-step" },
  { type: "tool-input-available", toolCallId: "c", toolName: "look", input: {}, providerExecuted: true },
  { type: "tool-output-available", toolCallId: "c", output: "seen", providerExecuted: true },
  { type: "finish-step" },
];

onEachEngine("A question goes up once, and its answer shows word by word, over sockets that are cut", async (env) => {
  await using site = await ChatSite.start(env);
  const { chat, statuses } = site.load();
  chat.messages = [
    { id: "m1", role: "user", parts: [{ type: "text", text: "before" }] },
    { id: "m2", role: "assistant", parts: [{ type: "text", text: "yes" }] },
  ];
  site.relay.hangsUp = true;
  const done = chat.sendMessage({ text: "hello" }, { body: { model: "small" } });
  await eventually("a connection is refused", () => site.relay.accepted > 0);
  assert.equal(chat.status, "submitted");
  site.relay.hangsUp = false;
  const [frame] = await site.asked(1);
  const { requestId, ...rest } = frame!;
  assert.deepEqual({ ...rest, messages: shown(rest.messages!) }, {
    ...{ type: "send", id: "chat", trigger: "submit-message", headers: {}, body: { model: "small" } },
    messages: ["user|hello"],
  });
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one two"));
  await says(chat, "user|before", "assistant|yes", "user|hello", "assistant|step-start|one two");
  for (const word of ["three", "four", "five", "six", "seven"]) {
    site.relay.cut();
    await writer.say(...words(word));
  }
  await writer.say(...close);
  await writer.end();
  await soon(done, "the end of an answer");
  await says(
    chat,
    "user|before",
    "assistant|yes",
    "user|hello",
    "assistant|step-start|one two three four five six seven",
  );
  assert.equal(chat.messages.at(-1)!.id, requestId);
  assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
  assert.equal((await site.asked(1)).length, 1);
});

onEachEngine("A page that is loaded again, and a second tab, show an answer from its start on", async (env) => {
  await using site = await ChatSite.start(env);
  const first = site.load();
  await first.chat.resumeStream();
  assert.equal(first.chat.status, "ready");
  const asking = first.chat.sendMessage({ text: "hello" });
  const [frame] = await site.asked(1);
  const writer = await Writer.begin(site.control, frame!.requestId);
  await writer.say(...open, ...words("one two"));
  const partial: UIMessage = { id: frame!.requestId, role: "assistant", parts: [{ type: "text", text: "one" }] };
  const reloaded = site.load();
  const second = site.load({}, [...first.chat.messages.slice(0, 1), partial]);
  const other = site.load({}, [], "another chat");
  const resuming = [reloaded, second].map(({ chat }) => chat.resumeStream());
  await other.chat.resumeStream();
  assert.deepEqual(other.chat.messages, []);
  await says(reloaded.chat, "assistant|step-start|one two");
  await says(second.chat, "user|hello", "assistant|step-start|one two");
  site.relay.cut();
  await writer.say(...words("three"), ...close);
  await writer.end();
  await soon(Promise.all([asking, ...resuming]), "the end of all");
  for (const { chat } of [first, second]) await says(chat, "user|hello", "assistant|step-start|one two three");
  await says(reloaded.chat, "assistant|step-start|one two three");
  for (const { chat, statuses } of [reloaded, second]) {
    assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
    await chat.resumeStream();
    assert.equal(chat.status, "ready");
  }
  assert.equal((await site.asked(1)).length, 1);
});

Deno.test("What another worker begins anew takes the place of what the former one wrote, in every page", async () => {
  await using site = await ChatSite.start();
  const asking = site.load();
  const done = asking.chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const former = await Writer.begin(site.control, requestId);
  await former.say(...open, ...words("one two"));
  await says(asking.chat, "user|hello", "assistant|step-start|one two");
  const reading = site.load();
  const resumed = reading.chat.resumeStream();
  await says(reading.chat, "assistant|step-start|one two");
  const writer = await Writer.begin(site.control, requestId);
  await assert.rejects(former.say(...words("three")), /FENCED/);
  await writer.say({ type: "start", messageId: "another id" }, { type: "start-step" });
  // What was written stays until another text comes.
  const late = site.load();
  const resumedLate = late.chat.resumeStream();
  await eventually("begun", () => late.chat.messages.length === 1);
  assert.deepEqual(shown(asking.chat.messages), ["user|hello", "assistant|step-start|one two"]);
  await writer.say({ type: "text-start", id: "t" }, ...words("uno"));
  for (const { chat } of [reading, late]) await says(chat, "assistant|step-start|uno");
  await says(asking.chat, "user|hello", "assistant|step-start|uno");
  const third = await Writer.begin(site.control, requestId);
  await third.say(...open, ...words("eins zwei"), ...close);
  await third.end();
  await soon(Promise.all([done, resumed, resumedLate]), "the end of all");
  for (const { chat } of [reading, late]) await says(chat, "assistant|step-start|eins zwei");
  await says(asking.chat, "user|hello", "assistant|step-start|eins zwei");
  for (const { statuses } of [asking, reading, late]) assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
});

Deno.test("What cannot be taken back within its stream is read again from its new start", async () => {
  await using site = await ChatSite.start();
  const told: (string | undefined)[] = [];
  const asking: Page = site.load({
    onAnswer(id) {
      told.push(id);
      return asking.chat.resumeStream();
    },
  });
  const plain = site.load();
  const errors: unknown[] = [];
  const done = asking.chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const former = await Writer.begin(site.control, requestId);
  await former.say(...tool, { type: "start-step" }, { type: "text-start", id: "t" }, ...words("one two"));
  await says(asking.chat, "user|hello", "assistant|step-start|tool look|step-start|one two");
  const resumed = plain.chat.resumeStream().then(() => errors.push(plain.chat.error));
  await says(plain.chat, "assistant|step-start|tool look|step-start|one two");
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...tool, { type: "start-step" }, { type: "text-start", id: "t" }, ...words("uno"));
  await soon(Promise.all([done, resumed]), "the end of all");
  // A page without onAnswer sees what a broken network would be, and resumes as after that.
  assert.match(String(errors), /TypeError: network: the answer has begun anew/);
  assert.equal(plain.chat.status, "error");
  const again = plain.chat.resumeStream();
  await says(plain.chat, "assistant|step-start|tool look|step-start|uno");
  await says(asking.chat, "user|hello", "assistant|step-start|tool look|step-start|uno");
  await writer.say(...words("dos"), ...close);
  await writer.end();
  await soon(again, "the end of an answer");
  await isNow(asking.chat, "ready");
  assert.deepEqual(told, ["chat"]);
  await says(plain.chat, "assistant|step-start|tool look|step-start|uno dos");
  await says(asking.chat, "user|hello", "assistant|step-start|tool look|step-start|uno dos");
  assert.deepEqual(asking.statuses, ["submitted", "streaming", "ready", "submitted", "streaming", "ready"]);
});

Deno.test("A stop reaches the writer, from the page that asked and from one that was loaded later", async () => {
  await using site = await ChatSite.start();
  const first = site.load();
  void first.chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one two"));
  const second = site.load();
  void second.chat.resumeStream();
  await says(second.chat, "assistant|step-start|one two");
  // Resuming once more is no stop.
  void second.chat.resumeStream();
  await writer.say(...words("three"));
  await says(second.chat, "assistant|step-start|one two three");
  await second.chat.stop();
  assert.equal(second.chat.status, "ready");
  assert.deepEqual((await site.asked(2)).slice(1), [{ type: "abort", requestId }]);
  // It was stopped here, so nothing is under way for this page.
  await second.chat.resumeStream();
  assert.deepEqual(shown(second.chat.messages), ["assistant|step-start|one two three"]);
  await writer.say({ type: "abort" });
  await writer.end();
  await isNow(first.chat, "ready");
  void first.chat.sendMessage({ text: "and now?" });
  await site.asked(3);
  await first.chat.stop();
  const frames = await site.asked(4);
  assert.equal(frames.length, 4);
  assert.deepEqual(frames[3], { type: "abort", requestId: frames[2]!.requestId });
});

Deno.test("Regenerating asks with the question, and the new answer takes the place of the old one", async () => {
  await using site = await ChatSite.start();
  const { chat } = site.load();
  const done = chat.sendMessage({ text: "hello" });
  const [frame] = await site.asked(1);
  const writer = await Writer.begin(site.control, frame!.requestId);
  await writer.say(...open, ...words("one"), ...close);
  await writer.end();
  await soon(done, "the end of an answer");
  const again = chat.regenerate({ messageId: frame!.requestId });
  const [, other] = await site.asked(2);
  assert.deepEqual([other!.trigger, other!.messageId], ["regenerate-message", frame!.requestId]);
  assert.deepEqual(shown(other!.messages!), ["user|hello"]);
  const next = await Writer.begin(site.control, other!.requestId);
  await next.say(...open, ...words("two"), ...close);
  await next.end();
  await soon(again, "the end of an answer");
  await says(chat, "user|hello", "assistant|step-start|two");
});

Deno.test("What is lost for good is an error, after which the page can ask again", async () => {
  await using site = await ChatSite.start();
  const gaps: string[] = [];
  const { chat } = site.load({ onGap: (reason) => gaps.push(reason) });
  const done = chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one two"));
  await says(chat, "user|hello", "assistant|step-start|one two");
  site.relay.hangsUp = true;
  site.relay.cut();
  await writer.say(...words("three"));
  await site.control.xtrim(down, "MAXLEN", 1);
  await writer.say(...words("four"));
  site.relay.hangsUp = false;
  await soon(done, "the end of an answer");
  assert.deepEqual([chat.status, chat.error?.message, gaps], [
    "error",
    "part of the answer is missing: ask again",
    ["trimmed"],
  ]);
  // A page that is loaded now finds an answer without its start.
  const late = site.load();
  await late.chat.resumeStream();
  assert.deepEqual([late.chat.status, late.chat.error?.message], ["error", "part of the answer is missing: ask again"]);
  const again = chat.regenerate();
  // What is written of the former answer is of no use.
  const [, abort, other] = await site.asked(3);
  assert.deepEqual([abort, other!.trigger], [{ type: "abort", requestId }, "regenerate-message"]);
  await writer.end();
  const next = await Writer.begin(site.control, other!.requestId);
  await next.say(...open, ...words("two"), ...close);
  await next.end();
  await soon(again, "the end of an answer");
  await says(chat, "user|hello", "assistant|step-start|two");
  await late.chat.resumeStream();
  assert.equal(late.chat.status, "ready");
});

Deno.test("Of an answer that begins after a gap nothing is missing, and one that does not may have begun before", async () => {
  for (const [begins, confirmed] of [[true, "before"], [false, "before"], [true, "after"]] as const) {
    await using server = forgetful((requestId) => {
      const chunks = [...open, ...words("one"), ...close];
      const frames = chunks.map((chunk, sequence) => ({ type: "chunk", sequence, chunk }));
      const all = [{ type: "start", id: "chat" }, ...frames, { type: "end" }];
      return begins ? all.map((frame) => ({ requestId, ...frame })) : [];
    }, confirmed);
    const transport = new SessionChatTransport({
      url: `ws://127.0.0.1:${server.port}/agent/ws/s1`,
      token: () => mint("s1"),
    });
    const { chat } = chatOf(transport);
    await soon(chat.sendMessage({ text: "hello" }), "an end");
    assert.deepEqual(
      [shown(chat.messages).slice(1), chat.error?.message],
      begins ? [["assistant|step-start|one"], undefined] : [[], "part of the answer is missing: ask again"],
    );
    transport.close();
  }
});

Deno.test("Yesterday's chat goes on, though its log has expired", async () => {
  await using site = await ChatSite.start();
  let lives = 0;
  const { chat } = site.load({ onLive: () => void lives++ });
  for (const text of ["one", "two"]) {
    const count = text === "one" ? 1 : 2;
    const done = chat.sendMessage({ text: "hello" });
    const frame = (await site.asked(count))[count - 1]!;
    const writer = await Writer.begin(site.control, frame.requestId);
    await writer.say(...open, ...words(text), ...close);
    await writer.end();
    await soon(done, "the end of an answer");
    if (count === 2) break;
    site.relay.hangsUp = true;
    site.relay.cut();
    await site.control.del(down);
    const before = lives;
    site.relay.hangsUp = false;
    // What is asked before the page knows that its log is gone may have been answered in what is gone.
    await eventually("it is live again", () => lives > before);
  }
  await says(chat, "user|hello", "assistant|step-start|one", "user|hello", "assistant|step-start|two");
  const later = site.load({ position: "1767225600000-7", historyLoaded: true });
  await site.control.del(down);
  await later.chat.resumeStream();
  assert.deepEqual([later.chat.status, later.chat.error], ["ready", undefined]);
});

Deno.test("A chunk that comes twice counts once, and a hole is an error", async () => {
  await using site = await ChatSite.start();
  const { chat } = site.load();
  const done = chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one two"));
  await writer.send({ type: "chunk", sequence: 4, chunk: words("two")[0] });
  await writer.send({ type: "chunk", sequence: 5, chunk: words("three")[0] });
  await says(chat, "user|hello", "assistant|step-start|one two three");
  await writer.send({ type: "chunk", sequence: 7, chunk: words("five")[0] });
  await soon(done, "the end of an answer");
  assert.match(String(chat.error), /part of the answer is missing/);
  await says(chat, "user|hello", "assistant|step-start|one two three");
});

Deno.test("No stream stays open: an error, a worker that gave up, a close for good, a question that nobody takes", async () => {
  await using site = await ChatSite.start();
  const { chat, transport } = site.load();
  for (const [i, frame] of [{ type: "error", errorText: "no luck" }, { type: "error" }].entries()) {
    const done = chat.sendMessage({ text: "hello" });
    const { requestId } = (await site.asked(i + 1))[i]!;
    const writer = await Writer.begin(site.control, requestId);
    await writer.say(...open, ...words("one"));
    await writer.send(frame);
    await soon(done, "the end of an answer");
    assert.deepEqual([chat.status, chat.error?.message], ["error", frame.errorText ?? "the answer has failed"]);
  }
  const gone = chat.sendMessage({ text: "hello" });
  const { requestId } = (await site.asked(3))[2]!;
  const failed = JSON.stringify({ type: "failed", id: requestId });
  await site.control.call("FCALL", "wsproxy_begin", 1, down, failed, "n");
  await soon(gone, "the end of an answer");
  assert.deepEqual([chat.status, chat.error?.message], ["error", "the answer has failed"]);
  const closed = chat.sendMessage({ text: "hello" });
  await site.asked(4);
  await site.control.call("FCALL", "wsproxy_close", 1, down, 4403, "no more");
  await soon(closed, "the end of an answer");
  assert.deepEqual([chat.status, chat.error?.message], ["error", "the connection has ended: 4403 no more"]);
  // The next question connects again.
  const again = chat.regenerate();
  await site.asked(5);
  const reading = site.load();
  transport.close();
  await soon(again, "the end of an answer");
  assert.match(String(chat.error), /the connection has ended: 1000/);
  const refused = site.load({ token: () => mint("another session") });
  await soon(Promise.all([refused.chat.resumeStream(), refused.chat.sendMessage({ text: "hello" })]), "the end of all");
  assert.match(String(refused.chat.error), /the connection has ended: 4403/);
  await reading.chat.resumeStream();
  assert.equal(reading.chat.status, "ready");
});

Deno.test("A question that no backend has is an error", async () => {
  await using site = await ChatSite.start({ INBOX: "false" });
  const { chat } = site.load();
  await chat.sendMessage({ text: "hello" });
  assert.deepEqual([chat.status, chat.error?.message], ["error", "message not sent: unheard"]);
});

Deno.test("A page is told of each answer that it does not show, also of one that has ended, and not while it is busy", async () => {
  await using site = await ChatSite.start();
  const told: (string | undefined)[] = [];
  const second: Page = site.load({
    onAnswer(id) {
      told.push(id);
      return second.chat.resumeStream();
    },
  });
  await second.chat.resumeStream();
  const first = site.load();
  const ask = async (page: Page, count: number) => {
    const done = page.chat.sendMessage({ text: "hello" });
    const { requestId } = (await site.asked(count))[count - 1]!;
    return { done, requestId };
  };
  const answer = async (requestId: string, text: string) => {
    const writer = await Writer.begin(site.control, requestId);
    await writer.say(...open, ...words(text), ...close);
    await writer.end();
  };
  const one = await ask(first, 1);
  const writer = await Writer.begin(site.control, one.requestId);
  await writer.say(...open, ...words("one"));
  await says(second.chat, "assistant|step-start|one");
  site.relay.cut();
  await writer.say(...words("two"), ...close);
  await writer.end();
  await soon(one.done, "the end of an answer");
  await isNow(second.chat, "ready");
  await says(second.chat, "assistant|step-start|one two");
  assert.deepEqual(told, ["chat"]);
  // While its own question waits, another tab's is answered at once, and so is one while it is away.
  const own = await ask(second, 2);
  const other = await ask(first, 3);
  await answer(other.requestId, "three");
  await soon(other.done, "the end of an answer");
  assert.deepEqual(told, ["chat"]);
  await answer(own.requestId, "four");
  await soon(own.done, "the end of an answer");
  await eventually("it is told", () => told.length === 2);
  site.relay.hangsUp = true;
  site.relay.cut();
  await answer("of a tab that has gone", "five");
  site.relay.hangsUp = false;
  await eventually("it is told", () => told.length === 3);
  assert.deepEqual(told, ["chat", "chat", "chat"]);
  // The history that a page has loaded may be older than what has ended.
  const late = site.load({ onAnswer: () => told.push("late") });
  await late.chat.resumeStream();
  await eventually("it is told", () => told.length === 4);
  assert.equal(told[3], "late");
});

Deno.test("A page that resumes twice stops nothing, also where it begins behind the start of the answer", async () => {
  await using site = await ChatSite.start();
  const writer = await Writer.begin(site.control, "request");
  const [[position]] = await site.control.xrevrange(down, "+", "-") as [[string, string[]]];
  await writer.say(...open, ...words("one"));
  const { chat } = site.load({ position });
  const first = chat.resumeStream();
  await says(chat, "assistant|step-start|one");
  const second = chat.resumeStream();
  await first;
  await writer.say(...words("two"), ...close);
  await writer.end();
  await second;
  await says(chat, "assistant|step-start|one two");
  assert.deepEqual(await site.asked(0), []);
});

Deno.test("A page is told of an answer that came and ended while it was away, or faster than it could show it", async () => {
  await using site = await ChatSite.start();
  const told: (string | undefined)[] = [];
  const { chat } = site.load({ onAnswer: (id) => told.push(id) });
  await chat.resumeStream();
  const answer = async () => {
    const writer = await Writer.begin(site.control, crypto.randomUUID());
    await writer.say(...open, ...words("one"), ...close);
    await writer.end();
  };
  site.relay.hangsUp = true;
  site.relay.cut();
  await answer();
  site.relay.hangsUp = false;
  await eventually("it is told of the first", () => told.length === 1);
  site.relay.freezeAll();
  await answer();
  site.relay.thawAll();
  await eventually("it is told of the second", () => told.length >= 2);
  assert.deepEqual(new Set(told), new Set(["chat"]));
});

Deno.test("The stock transport of the page shows an answer over sockets that are cut, and mixes one that begins anew", async () => {
  await using site = await ChatSite.start();
  const folder = await Deno.makeTempDir();
  await using server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen() {} },
    async () => new Response(await mint("s1")),
  );
  const code = stock.replace("wss://example.com/agent/ws/demo", site.url)
    .replace('fetch("', `fetch("http://127.0.0.1:${server.addr.port}`)
    .replace('"./websocket.js"', `"${new URL("../../clients/js/websocket.js", import.meta.url)}"`);
  await Deno.writeTextFile(`${folder}/page.js`, `${code}\nexport { transport };`);
  const { transport } = await import(`file://${folder}/page.js`);
  try {
    const { chat, statuses } = chatOf(transport, [
      { id: "m1", role: "user", parts: [{ type: "text", text: "before" }] },
      { id: "m2", role: "assistant", parts: [{ type: "text", text: "yes" }] },
    ]);
    const done = chat.sendMessage({ text: "hello" });
    const [{ requestId, messages } = { requestId: "", messages: [] }] = await site.asked(1);
    assert.deepEqual(shown(messages!), ["user|hello"]);
    const writer = await Writer.begin(site.control, requestId);
    await writer.say(...open, ...words("one"));
    for (const word of ["two", "three", "four", "five", "six"]) {
      site.relay.cut();
      await writer.say(...words(word));
    }
    await writer.say(...close);
    await writer.end();
    await soon(done, "the end of an answer");
    assert.equal(shown(chat.messages).at(-1), "assistant|step-start|one two three four five six");
    assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
    const again = chat.sendMessage({ text: "hello" });
    const [, other] = await site.asked(2);
    const former = await Writer.begin(site.control, other!.requestId);
    await former.say(...open, ...words("one two"));
    const next = await Writer.begin(site.control, other!.requestId);
    await next.say(...open, ...words("uno dos tres cuatro"), ...close);
    await next.end();
    await soon(again, "the end of an answer");
    assert.equal(shown(chat.messages).at(-1), "assistant|step-start|one two tres cuatro");
  } finally {
    transport.close();
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("To the stock transport on a bare socket a notice of the proxy's is the end, and so is a cut", async () => {
  await using site = await ChatSite.start();
  const protocols = ["bearer", await mint("s1")];
  const transport = new WebSocketChatTransport({ url: site.url, protocols });
  const { chat } = chatOf(transport);
  for (const i of [1, 2]) {
    const done = chat.sendMessage({ text: "hello" });
    await site.asked(i);
    if (i === 1) await site.control.publish(down, '{"type":"control","command":"gap"}');
    else site.relay.cut();
    await soon(done, "the end of an answer");
    const message = i === 1 ? /^Invalid WebSocket chat response frame/ : /network connection/;
    assert.match(chat.error!.message, message);
  }
  transport.close();
  const big = new WebSocketChatTransport({ url: site.url, protocols });
  const text = "x".repeat(2 ** 20);
  const history: UIMessage[] = [{ id: "m1", role: "user", parts: [{ type: "text", text }] }];
  const long = chatOf(big, history);
  await long.chat.sendMessage({ text: "hello" });
  assert.match(long.chat.error!.message, /Invalid WebSocket chat response frame|1009/);
  big.close();
});

Deno.test("What a page was about to show when its user asked does not come behind the question: the page is told later", async () => {
  await using site = await ChatSite.start();
  const former = await Writer.begin(site.control, "former");
  await former.say(...open, ...words("one"));
  site.relay.hangsUp = true;
  const told: (string | undefined)[] = [];
  const { chat } = site.load({ onAnswer: (id) => told.push(id) });
  const resuming = chat.resumeStream();
  await eventually("a connection is refused", () => site.relay.accepted > 0);
  const done = chat.sendMessage({ text: "hello" });
  site.relay.hangsUp = false;
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  await former.say(...words("two"));
  assert.deepEqual([chat.status, shown(chat.messages)], ["submitted", ["user|hello"]]);
  await former.say(...close);
  await former.end();
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("three"));
  await soon(resuming, "the end of what was resumed");
  await says(chat, "user|hello", "assistant|step-start|three");
  await isNow(chat, "streaming");
  assert.deepEqual(told, []);
  await writer.say(...close);
  await writer.end();
  await soon(done, "the end of an answer");
  await says(chat, "user|hello", "assistant|step-start|three");
  await eventually("it is told", () => told.length === 1);
});

Deno.test("A page whose user asks while it loads the history is told once more, after that answer", async () => {
  await using site = await ChatSite.start();
  const loaded = Promise.withResolvers<void>();
  let told = 0;
  const { chat } = site.load({ onAnswer: () => (told++, loaded.promise) });
  await chat.resumeStream();
  const other = await Writer.begin(site.control, "other");
  await other.say(...open, ...words("one"), ...close);
  await other.end();
  await eventually("it is told", () => told === 1);
  const done = chat.sendMessage({ text: "hello" });
  loaded.resolve();
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("two"));
  await says(chat, "user|hello", "assistant|step-start|two");
  assert.equal(told, 1);
  await writer.say(...close);
  await writer.end();
  await soon(done, "the end of an answer");
  await eventually("it is told again", () => told === 2);
});

Deno.test("A question that was stopped at once shows in the end, also when the history that the page loads has it later", async () => {
  await using site = await ChatSite.start();
  const { page, history } = loadAgain(site);
  await page.chat.resumeStream();
  const done = page.chat.sendMessage({ id: "q", parts: [{ type: "text", text: "hello" }] });
  await page.chat.stop();
  await soon(done, "the end of a stream");
  const [{ requestId } = { requestId: "" }] = await site.asked(2);
  // Another tab's, whose turn comes first: the history that the page loads is from before this page's question.
  const other = await Writer.begin(site.control, "other");
  await other.say(...open, ...words("one"), ...close);
  history.messages = [{ id: "other", role: "assistant", parts: [{ type: "text", text: "one" }] }];
  await other.end();
  await says(page.chat, "assistant|one");
  history.messages = [...history.messages, { id: "q", role: "user", parts: [{ type: "text", text: "hello" }] }];
  const writer = await Writer.begin(site.control, requestId);
  await writer.say({ type: "start" }, { type: "abort" });
  await writer.end();
  await says(page.chat, "assistant|one", "user|hello");
});

Deno.test("A history that was loaded before a question was asked does not get its answer alone", async () => {
  await using site = await ChatSite.start();
  const question: UIMessage = { id: "q", role: "user", parts: [{ type: "text", text: "hello" }] };
  const stopped: UIMessage = { id: "stopped", role: "assistant", parts: [{ type: "text", text: "one" }] };
  let stored = [question, stopped];
  let told = 0;
  const loaded = Promise.withResolvers<void>();
  const page: Page = site.load({
    async onAnswer() {
      const messages = stored;
      if (told++ === 0) await loaded.promise;
      page.chat.messages = messages;
      await page.chat.resumeStream();
    },
  }, stored);
  await page.chat.resumeStream();
  const former = await Writer.begin(site.control, "stopped");
  await former.say(...open, ...words("one"), { type: "abort" });
  await former.end();
  await eventually("it is told", () => told === 1);
  // The question is asked again while what was said before comes slowly.
  stored = [question];
  const witness = site.load();
  const seen = witness.chat.resumeStream();
  const writer = await Writer.begin(site.control, "again");
  await writer.say(...open, ...words("two"));
  await says(witness.chat, "assistant|step-start|two");
  loaded.resolve();
  await says(page.chat, "user|hello", "assistant|step-start|two");
  await writer.say(...close);
  await writer.end();
  await soon(seen, "the end of an answer");
  await isNow(page.chat, "ready");
  assert.deepEqual([told, shown(page.chat.messages)], [2, ["user|hello", "assistant|step-start|two"]]);
});

Deno.test("A page that is loaded while an answer comes loads its history again before it shows that, as it may be older", async () => {
  await using site = await ChatSite.start();
  const question: UIMessage = { id: "q", role: "user", parts: [{ type: "text", text: "hello" }] };
  const stopped: UIMessage = { id: "stopped", role: "assistant", parts: [{ type: "text", text: "one" }] };
  let told = 0;
  const page: Page = site.load({
    onAnswer() {
      told++;
      page.chat.messages = [question];
      return page.chat.resumeStream();
    },
  }, [question, stopped]);
  // Another tab asks again after this page has loaded its history.
  const writer = await Writer.begin(site.control, "again");
  const resumed = page.chat.resumeStream();
  await eventually("all has come", () => site.relay.accepted > 0);
  await writer.say(...open, ...words("two"));
  await says(page.chat, "user|hello", "assistant|step-start|two");
  await writer.say(...close);
  await writer.end();
  await soon(resumed, "the end of what the page resumed");
  await isNow(page.chat, "ready");
  assert.deepEqual([told, shown(page.chat.messages)], [1, ["user|hello", "assistant|step-start|two"]]);
  // One that does nothing with that shows the answer all the same, and one without a first word is waited for.
  const next = await Writer.begin(site.control, "next");
  const idle = site.load({ onAnswer() {} });
  const seen = idle.chat.resumeStream();
  await next.say(...open, ...words("three"));
  await says(idle.chat, "assistant|step-start|three");
  await next.say(...close);
  await next.end();
  await soon(seen, "the end of an answer");
  const failing = await Writer.begin(site.control, "failing");
  const waiting = site.load({ onAnswer() {} });
  const none = waiting.chat.resumeStream();
  await eventually("all has come", () => site.relay.accepted > 2);
  await failing.send({ type: "error", errorText: "no luck" });
  await soon(none, "the end of an answer that never began");
  assert.deepEqual([waiting.chat.status, shown(waiting.chat.messages)], ["ready", []]);
});

/** A page that loads a history when it is told to: what that has, and how often it was told. */
function loadAgain(site: ChatSite) {
  const history = { messages: [] as UIMessage[], loads: 0 };
  const page: Page = site.load({
    onAnswer() {
      history.loads++;
      page.chat.messages = history.messages;
      return page.chat.resumeStream();
    },
  });
  return { page, history };
}

Deno.test("A question that Redis has lost stays at the screen with its error, whatever else there is to be told", async () => {
  await using site = await ChatSite.start();
  const { page, history } = loadAgain(site);
  const answer = async (requestId: string, text: string) => {
    const writer = await Writer.begin(site.control, requestId);
    await writer.say(...open, ...words(text), ...close);
    await writer.end();
  };
  const lost = page.chat.sendMessage({ text: "hello" });
  await site.asked(1);
  // Another tab's, which this page is to be told of after its own.
  const other = await Writer.begin(site.control, "other");
  await other.say(...open, ...words("one"));
  site.relay.hangsUp = true;
  site.relay.cut();
  await site.control.flushall();
  site.relay.hangsUp = false;
  await soon(lost, "the end of a question");
  const isKept = () =>
    assert.deepEqual([page.chat.error?.message, history.loads, shown(page.chat.messages)], [
      "part of the answer is missing: ask again",
      0,
      ["user|hello"],
    ]);
  await answer("another", "two");
  const witness = site.load();
  await witness.chat.resumeStream();
  isKept();
  const again = page.chat.regenerate();
  // What the page has of the other answer is of no use.
  const [abort, { requestId: next } = { requestId: "" }] = await site.asked(2);
  assert.deepEqual(abort, { type: "abort", requestId: "other" });
  await answer(next, "three");
  await soon(again, "the end of an answer");
  const three: UIMessage = { id: next, role: "assistant", parts: [{ type: "text", text: "three" }] };
  history.messages = [page.chat.messages[0]!, three];
  await eventually("it is told", () => history.loads > 0);
  assert.deepEqual(shown(page.chat.messages), ["user|hello", "assistant|three"]);
});

Deno.test("What is left of an answer that was lost goes when the next one is there, and an error stays until then", async () => {
  await using site = await ChatSite.start();
  const { page, history } = loadAgain(site);
  const lose = async () => {
    site.relay.hangsUp = true;
    site.relay.cut();
    await site.control.del(down);
    site.relay.hangsUp = false;
  };
  const asking = page.chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one"));
  await says(page.chat, "user|hello", "assistant|step-start|one");
  await lose();
  await soon(asking, "the end of an answer");
  assert.deepEqual([page.chat.status, history.loads], ["error", 0]);
  const asked = page.chat.messages[0]!;
  const next = page.chat.sendMessage({ text: "and now?" });
  const frames = await site.asked(3);
  const other = await Writer.begin(site.control, frames[2]!.requestId);
  await other.say(...open, ...words("two"), ...close);
  history.messages = [asked, ...page.chat.messages.slice(2)];
  await other.end();
  await soon(next, "the end of an answer");
  await eventually("it is told", () => history.loads === 1);
  assert.deepEqual(shown(page.chat.messages), ["user|hello", "user|and now?"]);
  // What another tab asks is shown in the place of an error, if the history has the question.
  const third = page.chat.regenerate();
  const again = await Writer.begin(site.control, (await site.asked(4))[3]!.requestId);
  await again.say(...open, ...words("three"));
  await says(page.chat, "user|hello", "user|and now?", "assistant|step-start|three");
  await lose();
  await soon(third, "the end of an answer");
  assert.deepEqual([page.chat.status, history.loads], ["error", 1]);
  const elsewhere = await Writer.begin(site.control, "elsewhere");
  history.messages = page.chat.messages.slice(0, 2);
  await elsewhere.say(...open, ...words("four"));
  await says(page.chat, "user|hello", "user|and now?", "assistant|step-start|four");
  assert.equal(history.loads, 2);
  await elsewhere.end();
  // A page that shows nothing of it has its gap told as well: something may have been said in it.
  await isNow(page.chat, "ready");
  await lose();
  await eventually("it is told", () => history.loads === 3);
});

Deno.test("A page that is left while it loads its history does not connect again", async () => {
  await using site = await ChatSite.start();
  const loaded = Promise.withResolvers<void>();
  const resumed = Promise.withResolvers<void>();
  let told = 0;
  const page: Page = site.load({
    async onAnswer() {
      told++;
      await loaded.promise;
      resumed.resolve(page.chat.resumeStream());
    },
  });
  await page.chat.resumeStream();
  const writer = await Writer.begin(site.control, "other");
  await writer.say(...open, ...words("one"));
  await eventually("it is told", () => told === 1);
  page.transport.close();
  const { accepted } = site.relay;
  loaded.resolve();
  await soon(resumed.promise, "the end of the resume");
  assert.deepEqual([page.chat.status, site.relay.accepted], ["ready", accepted]);
  // The page is shown once more.
  const again = page.chat.resumeStream();
  await says(page.chat, "assistant|step-start|one");
  await writer.say(...close);
  await writer.end();
  await soon(again, "the end of an answer");
});

onEachEngine("Proxies may be restarted and killed in the middle of an answer", async (env) => {
  await using site = await ChatSite.start(env);
  const { chat, statuses } = site.load();
  const done = chat.sendMessage({ text: "hello" });
  const [{ requestId } = { requestId: "" }] = await site.asked(1);
  const writer = await Writer.begin(site.control, requestId);
  await writer.say(...open, ...words("one"));
  for (const [i, word] of ["two", "three", "four"].entries()) {
    const proxy = await ProxyProcess.start(site.redis, { ...inboxEnv, ...env });
    await proxy.resumable();
    site.relay.target = proxy.port;
    site.relay.cut();
    await writer.say(...words(word));
    await says(chat, "user|hello", `assistant|step-start|one ${["two", "three", "four"].slice(0, i + 1).join(" ")}`);
    proxy.signal(i === 1 ? "SIGTERM" : "SIGKILL");
    await proxy.exit();
    await proxy[Symbol.asyncDispose]();
  }
  site.relay.target = site.proxy.port;
  await writer.say(...words("five"), ...close);
  await writer.end();
  await soon(done, "the end of an answer");
  await says(chat, "user|hello", "assistant|step-start|one two three four five");
  assert.deepEqual(statuses, ["submitted", "streaming", "ready"]);
  assert.equal((await site.asked(1)).length, 1);
});

Deno.test("Without a log a broken connection is the end of an answer, and so is a notice that messages may be missing", async () => {
  await using site = await ChatSite.start();
  class Bare extends WebSocket {
    constructor(url: string | URL, protocols: string[] = []) {
      super(url, protocols.slice(1));
    }
  }
  const { chat } = site.load({ webSocket: Bare });
  const publish = (requestId: string, frame: Record<string, unknown>) =>
    site.control.publish(down, JSON.stringify({ requestId, ...frame }));
  for (const count of [1, 2, 3]) {
    const done = chat.sendMessage({ text: "hello" });
    // Each answer that was lost is stopped besides.
    const { requestId, type } = (await site.asked(2 * count - 1)).at(-1)!;
    assert.equal(type, "send");
    const chunks = [...open, ...words("one"), ...close].map((chunk, sequence) => ({ type: "chunk", sequence, chunk }));
    await publish(requestId, { type: "start", id: "chat" });
    for (const chunk of chunks.slice(0, 4)) await publish(requestId, chunk);
    await eventually("it shows", () => shown(chat.messages).at(-1) === "assistant|step-start|one");
    if (count === 1) site.relay.cut();
    else if (count === 2) await site.control.publish(down, '{"type":"control","command":"gap"}');
    else for (const frame of [...chunks.slice(4), { type: "end" }]) await publish(requestId, frame);
    await soon(done, "the end of an answer");
    assert.equal(chat.error?.message, count === 3 ? undefined : "part of the answer is missing: ask again");
  }
});
