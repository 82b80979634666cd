/** An agent of AG-UI over a session, under the real `AbstractAgent` of @ag-ui/client; a writer says what each test wants. */

import assert from "node:assert/strict";
import type { Message } from "@ag-ui/client";
import { SessionAgent, type SessionOptions } from "../../clients/js/ag_ui.js";
import { ChatSite, forgetful } from "../harness/chat.ts";
import { blockOf } from "../harness/pages.ts";
import { close, open, RunWriter, words } from "../harness/runs.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";

const down = "session:s1:down";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

const page = blockOf("docs/chat.md", "new SessionAgent").text;

const hello: Message = { id: "m1", role: "user", content: "hello" };
const shown = (agent: SessionAgent) =>
  agent.messages.map(({ role, content }) => `${role}|${String(content).trim()}`).join(" ");
const says = (agent: SessionAgent, expected: string) =>
  eventually(expected, () => shown(agent) === expected).catch((error) => assert.equal(shown(agent), expected, error));

/** Pages of a session. */
async function start() {
  const site = await ChatSite.start();
  const agents: SessionAgent[] = [];
  const load = (initialMessages: Message[] = [hello], options: Partial<SessionOptions> = {}) => {
    const session = { url: site.url, token: () => mint("s1"), onError() {}, ...options };
    const agent = new SessionAgent({ session, threadId: "t", initialMessages });
    agents.push(agent);
    return agent;
  };
  return {
    ...{ site, load, control: site.control },
    async [Symbol.asyncDispose]() {
      for (const agent of agents) agent.close();
      await site[Symbol.asyncDispose]();
    },
  };
}

Deno.test("A run of AG-UI shows over sockets that are cut, in a page that is loaded again, and begun anew", async () => {
  await using pages = await start();
  const { site, load, control } = pages;
  const agent = load();
  await load().connectAgent();
  const done = agent.runAgent({ runId: "r1" });
  const [frame] = await site.asked(1) as unknown as {
    type: string;
    requestId: string;
    input: { messages: Message[] };
  }[];
  assert.deepEqual([frame!.type, frame!.requestId, frame!.input.messages], ["run", "r1", [hello]]);
  const former = await RunWriter.begin(control, "r1");
  await former.say(open("a"), ...words("a", "one two"));
  await says(agent, "user|hello assistant|one two");
  site.relay.cut();
  await former.say(...words("a", "three"));
  const reloaded = load();
  const partial = load([hello, { id: "a", role: "assistant", content: "one" }]);
  const others = [reloaded, partial, agent.clone()];
  others[2]!.setMessages([hello]);
  const resumed = others.map((each) => each.connectAgent());
  for (const each of [agent, ...others]) await says(each, "user|hello assistant|one two three");
  const writer = await RunWriter.begin(control, "r1");
  await writer.say(open("b"), ...words("b", "uno"));
  for (const each of [agent, ...others]) await says(each, "user|hello assistant|uno");
  site.relay.cut();
  await writer.say(...words("b", "dos"), close("b"));
  await writer.end();
  await soon(Promise.all([done, ...resumed]), "the end of all");
  for (const each of [agent, ...others]) {
    await says(each, "user|hello assistant|uno dos");
    assert.equal(each.isRunning, false);
  }
});

Deno.test("A run of AG-UI is stopped wherever it is watched, and no run stays open", async () => {
  await using pages = await start();
  const { site, load, control } = pages;
  const agent = load();
  const failures: string[] = [];
  const run = (runId: string) =>
    agent.runAgent({ runId }).then(() => "done", (error) => {
      failures.push(error.message);
      return "failed";
    });
  const stopped = run("r1");
  await site.asked(1);
  const writer = await RunWriter.begin(control, "r1");
  await writer.say(open("a"), ...words("a", "one"));
  const second = load();
  const resumed = second.connectAgent();
  await says(second, "user|hello assistant|one");
  second.abortRun();
  await soon(resumed, "the end of an answer");
  assert.deepEqual((await site.asked(2)).slice(1), [{ type: "abort", requestId: "r1" }]);
  await writer.say(close("a"));
  await writer.end();
  assert.equal(await soon(stopped, "the end of a run"), "done");
  const failed = run("r2");
  await site.asked(3);
  const another = await RunWriter.begin(control, "r2");
  await another.say({ type: "RUN_ERROR", message: "no luck" });
  await soon(failed, "the end of an answer");
  const refused = agent.runAgent({ runId: "r0" });
  await site.asked(4);
  await control.call("FCALL", "wsproxy_send", 1, down, '{"type":"RUN_ERROR","message":"not understood"}');
  await soon(refused, "the end of an answer");
  const lost = run("r3");
  await site.asked(5);
  const third = await RunWriter.begin(control, "r3");
  await third.say(open("c"), ...words("c", "one"));
  await says(agent, "user|hello assistant|one assistant|one");
  site.relay.hangsUp = true;
  site.relay.cut();
  await third.say(...words("c", "two"));
  await control.xtrim(down, "MAXLEN", 1);
  site.relay.hangsUp = false;
  assert.equal(await soon(lost, "the end of a run"), "failed");
  const closed = run("r4");
  await site.asked(6);
  await control.call("FCALL", "wsproxy_close", 1, down, 4403, "no more");
  assert.equal(await soon(closed, "the end of a run"), "failed");
  assert.deepEqual(failures.slice(-2), [
    "part of the run is missing: ask again",
    "the connection has ended: 4403 no more",
  ]);
});

Deno.test("Of a run that begins after a gap nothing is missing, and one that does not may have begun before", async () => {
  for (const [begins, confirmed] of [[true, "before"], [false, "before"], [true, "after"]] as const) {
    await using server = forgetful((runId) => {
      const ids = { threadId: "t", runId };
      const all = [{ type: "RUN_STARTED", ...ids }, open("a"), ...words("a", "one"), close("a")];
      return begins ? [...all, { type: "RUN_FINISHED", ...ids }] : [];
    }, confirmed);
    const session = { url: `ws://127.0.0.1:${server.port}/agent/ws/s1`, token: () => mint("s1") };
    const agent: SessionAgent = new SessionAgent({ session, threadId: "t", initialMessages: [hello] });
    const ended = await soon(agent.runAgent().then(() => "well", (error: Error) => error.message), "an end");
    assert.deepEqual(
      [ended, agent.messages.length],
      begins ? ["well", 2] : ["part of the run is missing: ask again", 1],
    );
    agent.close();
  }
});

Deno.test("The page of docs/chat.md shows the run of AG-UI that is under way when it is loaded", async () => {
  await using pages = await start();
  const { site, control } = pages;
  const folder = await Deno.makeTempDir();
  const writer = await RunWriter.begin(control, "r1");
  await writer.say(open("a"), ...words("a", "one"), close("a"));
  await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/history") return Response.json([hello]);
    await writer.end();
    return new Response(await mint("s1"));
  });
  const code = page.replace('"./ag_ui.js"', `"${new URL("../../clients/js/ag_ui.js", import.meta.url)}"`)
    .replace("wss://example.com/agent/ws/demo", site.url)
    .replaceAll('fetch("', `fetch("http://127.0.0.1:${server.addr.port}`);
  await Deno.writeTextFile(`${folder}/page.js`, `${code}\nexport { agent };`);
  const { agent } = await import(`file://${folder}/page.js`);
  agent.close();
  assert.equal(agent.isRunning, false);
  await Deno.remove(folder, { recursive: true });
});
