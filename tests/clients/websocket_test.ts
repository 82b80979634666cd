/** What a library that takes a WebSocket sees of a connection that resumes. */

import assert from "node:assert/strict";
import type { Redis } from "ioredis";
import { gapCode, type ResumingOptions, ResumingWebSocket, unsentCode } from "../../clients/js/websocket.js";
import { Inbox } from "../harness/inbox.ts";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";

const down = "session:s1:down";

// Clients wait a twentieth of what they would.
const { random } = Math;
Math.random = () => random() / 20;

async function send(redis: Redis, text: string): Promise<string> {
  const [position] = await redis.call("FCALL", "wsproxy_send", 1, down, text) as [string];
  return position;
}

/** A class with a token; `of` makes a socket that notes what it fires. */
function sockets(port: number, options: Partial<ResumingOptions> = {}) {
  const Resuming = ResumingWebSocket.with({ token: () => mint("s1"), ...options });
  return () => {
    const socket = new Resuming(`ws://127.0.0.1:${port}/agent/ws/s1`, ["graphql-transport-ws"]);
    const events = new Inbox();
    for (const type of ["open", "error"]) socket.addEventListener(type, () => events.add(type));
    socket.addEventListener("message", ({ data }) => events.add(data));
    socket.onclose = ({ code, reason }) => events.add(`close ${code} ${reason}`.trim());
    return { socket, events };
  };
}

onEachEngine(
  "A library sees one socket where connections break, and what was sent before a close arrives",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    using relay = new Relay(proxy.port);
    const control = redis.client();
    const backend = await Listener.to(redis, "session:s1:up");
    await send(control, "one");
    const open = sockets(relay.port);
    const { socket, events } = open();
    assert.equal(socket.readyState, WebSocket.CONNECTING);
    assert.throws(() => socket.send('"too early"'), { name: "InvalidStateError" });
    assert.deepEqual(await events.take(2), ["open", "one"]);
    assert.deepEqual([socket.readyState, socket.protocol], [WebSocket.OPEN, "graphql-transport-ws"]);
    relay.cut();
    socket.send('"during a break"');
    await send(control, "two");
    assert.deepEqual(await events.take(1), ["two"]);
    assert.deepEqual(await backend.take(1), ['"during a break"']);
    await eventually("it is acknowledged", () => socket.bufferedAmount === 0);
    relay.cut();
    socket.send('"and goodbye"');
    socket.close(3001, "done");
    assert.equal(socket.readyState, WebSocket.CLOSING);
    assert.deepEqual(await events.take(1), ["close 3001 done"]);
    assert.equal(socket.readyState, WebSocket.CLOSED);
    assert.deepEqual(await backend.take(1), ['"and goodbye"']);
    await send(control, "three");
    const again = open();
    assert.deepEqual(await again.events.take(2), ["open", "three"]);
    assert.throws(() => again.socket.close(1001), { name: "InvalidAccessError" });
    again.socket.close();
    assert.deepEqual(await again.events.take(1), ["close 1000"]);
  },
);

onEachEngine(
  "What it cannot hide is a close with a code: a gap, an unheard message, a backend's close, and one for good",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, engine);
    await proxy.resumable();
    const control = redis.client();
    const position = await send(control, "gone");
    await control.del(down);
    const open = sockets(proxy.port, { position });
    const first = open();
    assert.deepEqual(await first.events.take(2), ["open", `close ${gapCode} messages are missing: lost`]);
    const second = open();
    assert.deepEqual(await second.events.take(1), ["open"]);
    second.socket.send('"to nobody"');
    assert.deepEqual(await second.events.take(1), [`close ${unsentCode} unheard`]);
    const third = open();
    assert.deepEqual(await third.events.take(1), ["open"]);
    await control.call("FCALL", "wsproxy_close", 1, down, 4409, "replaced");
    assert.deepEqual(await third.events.take(1), ["close 4409 replaced"]);
    const fourth = open();
    assert.deepEqual(await fourth.events.take(1), ["open"]);
    await control.call("FCALL", "wsproxy_close", 1, down, 3000, "of the backend");
    assert.deepEqual(await fourth.events.take(1), ["close 3000 of the backend"]);
    const fifth = open();
    fifth.socket.close();
    assert.deepEqual(await fifth.events.take(1), ["close 1006"]);
  },
);

onEachEngine("A socket that begins a conversation is given nothing of a former one", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await proxy.resumable();
  const control = redis.client();
  using relay = new Relay(proxy.port);
  // That the log of a former one has expired is nothing to it.
  const position = await send(control, "expired");
  await control.del(down);
  for (const text of ["begin", "of the former"]) await send(control, text);
  const open = sockets(relay.port, { position, begins: (text) => text === "begin" });
  const first = open();
  assert.deepEqual(await first.events.take(1), ["open"]);
  for (const text of ["of the former, too", "begin", "mine"]) await send(control, text);
  assert.deepEqual(await first.events.take(2), ["begin", "mine"]);
  relay.cut();
  await send(control, "mine, too");
  assert.deepEqual(await first.events.take(1), ["mine, too"]);
  relay.hangsUp = true;
  relay.cut();
  await control.del(down);
  await send(control, "of another log");
  relay.hangsUp = false;
  assert.deepEqual(await first.events.take(1), [`close ${gapCode} messages are missing: lost`]);
  const second = open();
  assert.deepEqual(await second.events.take(1), ["open"]);
  for (const text of ["late", "begin"]) await send(control, text);
  assert.deepEqual(await second.events.take(1), ["begin"]);
  second.socket.close();
  assert.deepEqual(await second.events.take(1), ["close 1000"]);
});
