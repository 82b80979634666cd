/** useSession in a real React, in a document of happy-dom. */

import assert from "node:assert/strict";
// The client looks for a document when it is loaded, and these tests have none to hide.
import { type Session, useSession } from "../../clients/js/react.js";
import { Window } from "happy-dom";
import { Inbox } from "../harness/inbox.ts";
import { TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

const window = new Window();
Object.assign(globalThis, { window, document: window.document });
const { createElement, StrictMode } = await import("react");
const { createRoot } = await import("react-dom/client");

Deno.test("A session lives as long as its component, goes on after StrictMode's second mount, and follows its url", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  await proxy.resumable();
  const control = redis.client();
  const send = (session: string, text: string) =>
    control.call("FCALL", "wsproxy_send", 1, `session:${session}:down`, text);
  const backend = await Listener.to(redis, "session:s2:up");
  await send("s1", "one");
  const seen = new Inbox();
  const shown = new Inbox();
  let session: Session | undefined;
  function Chat({ id, greeting }: { id: string; greeting: string }) {
    session = useSession({
      url: `ws://127.0.0.1:${proxy.port}/agent/ws/${id}`,
      token: () => mint(id),
      // The latest of these functions is called.
      onMessage: (text) => seen.add(`${greeting} ${text}`),
    });
    shown.add(session.state);
    return createElement("p", null, session.state);
  }
  const root = createRoot(window.document.createElement("div") as never);
  const render = (id: string, greeting: string) =>
    root.render(createElement(StrictMode, null, createElement(Chat, { id, greeting })));
  const opens = () => eventually("it is open", () => session?.state === "open");
  render("s1", "hello");
  assert.deepEqual(await seen.take(1), ["hello one"]);
  await opens();
  assert.equal(proxy.proxy.sessions, 1);
  render("s1", "good day");
  await eventually("it is rendered", () => shown.takeAll().length > 0);
  await send("s1", "two");
  assert.deepEqual(await seen.take(1), ["good day two"]);
  const { submit } = session!;
  render("s2", "hello");
  await eventually("the other session is open", () => proxy.proxy.sessions === 1 && session?.state === "open");
  await send("s2", "three");
  assert.deepEqual(await seen.take(1), ["hello three"]);
  assert.equal((await submit('"up"')).receivers, 1);
  assert.deepEqual(await backend.take(1), ['"up"']);
  assert(session!.send('"up again"'));
  await control.call("FCALL", "wsproxy_close", 1, "session:s2:down", 4409, "replaced");
  await eventually("it is closed for good", () => session?.state === "closed" && session.close?.code === 4409);
  render("s1", "hello");
  await opens();
  root.unmount();
  await proxy.empty();
  await assert.rejects(submit('"too late"'), { name: "UnsentError", reason: "closed" });
  assert(!session!.send('"too late"'));
  await window.happyDOM.close();
});
