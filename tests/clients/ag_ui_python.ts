/** AG-UI at both ends: clients/js under the real `AbstractAgent` and `ChatClient`, and workers of clients/python. */

import assert from "node:assert/strict";
import { ChatClient } from "@tanstack/ai-client";
import { SessionAgent } from "../../clients/js/ag_ui.js";
import { SessionConnection } from "../../clients/js/tanstack.js";
import { ChatSite } from "../harness/chat.ts";
import { clientsVenv } from "../harness/python.ts";
import { mint } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { WorkerProcess } from "../harness/workers.ts";

const root = new URL("../../", import.meta.url).pathname;
const python = `${await clientsVenv()}/python`;
const words = (name: string) => Array.from({ length: 40 }, (_, n) => `${name}-${n} `).join("");

const program = (site: ChatSite, name: string) =>
  new WorkerProcess(python, ["-u", `${root}tests/clients/ag_ui_program.py`, site.redis.url, name], {
    PYTHONPATH: `${root}clients/python`,
  });

Deno.test("A run whose worker is killed is begun anew in all pages, over sockets that are cut, and a stop ends one", async () => {
  await using site = await ChatSite.start();
  await using one = program(site, "one");
  await using two = program(site, "two");
  for (const worker of [one, two]) await worker.output.until((line) => line === "ready");
  const load = () =>
    new SessionAgent({
      session: { url: site.url, token: () => mint("s1"), onError() {} },
      threadId: "t",
      initialMessages: [{ id: "m1", role: "user", content: "who are you?" }],
    });
  const [asking, reloaded] = [load(), load()];
  try {
    const said = (agent: SessionAgent) => agent.messages.slice(1).map(({ content }) => String(content));
    const asked = asking.runAgent();
    await eventually("it begins", () => (said(asking)[0] ?? "").includes("-9 "));
    const seen = reloaded.connectAgent();
    await eventually("it shows in the other page", () => (said(reloaded)[0] ?? "").includes("-9 "));
    const isOne = said(asking)[0]!.startsWith("one");
    await (isOne ? one : two)[Symbol.asyncDispose]();
    site.relay.cut();
    await soon(Promise.all([asked, seen]), "the end of a run", 30_000);
    for (const agent of [asking, reloaded]) assert.deepEqual(said(agent), [words(isOne ? "two" : "one")]);
    const stopped = asking.runAgent();
    await eventually("another one begins", () => (said(asking)[1] ?? "").includes("-5 "));
    asking.abortRun();
    await soon(stopped, "the end of a run");
    const part = said(asking)[1]!;
    assert(words(isOne ? "two" : "one").startsWith(part) && !part.includes("-39 "), part);
    // The worker has ended it, and is free for the next one.
    await soon(asking.runAgent(), "the end of a run");
    assert.equal(said(asking)[2], words(isOne ? "two" : "one"));
  } finally {
    for (const agent of [asking, reloaded]) agent.close();
  }
});

Deno.test("The ChatClient of TanStack AI shows one answer whole when its worker is killed, in a page that is loaded again too", async () => {
  await using site = await ChatSite.start();
  await using one = program(site, "one");
  await using two = program(site, "two");
  for (const worker of [one, two]) await worker.output.until((line) => line === "ready");
  const connections: SessionConnection[] = [];
  const load = (messages: ReturnType<ChatClient["getMessages"]>) => {
    const session = { url: site.url, token: () => mint("s1"), onError() {} };
    const connection = new SessionConnection({ ...session, history: () => ({ messages }) });
    connections.push(connection);
    const client = new ChatClient({ connection, threadId: "t", persistence: true });
    client.attach();
    return client;
  };
  const asking = load([]);
  const said = (client: ChatClient) =>
    client.getMessages().slice(1).map(({ parts }) =>
      parts.map((part) => part.type === "text" ? part.content : "").join()
    );
  const asked = asking.sendMessage("who are you?");
  await eventually("it begins", () => (said(asking)[0] ?? "").includes("-9 "));
  const reloaded = load(asking.getMessages());
  await eventually("it shows in the other page", () => (said(reloaded)[0] ?? "").includes("-10 "));
  const isOne = said(asking)[0]!.startsWith("one");
  await (isOne ? one : two)[Symbol.asyncDispose]();
  site.relay.cut();
  await soon(asked, "the end of a run", 30_000);
  await eventually("it ends in the other page", () => reloaded.getStatus() === "ready");
  for (const client of [asking, reloaded]) assert.deepEqual(said(client), [words(isOne ? "two" : "one")]);
  for (const client of [asking, reloaded]) client.dispose();
  for (const connection of connections) connection.close();
});
