/** The frames of both dialects, and what clients know of them. */

import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { dialects, liveNotice, notices } from "../../src/session/frames.ts";

const root = new URL("../../", import.meta.url);

/** Notices that answer a frame of the client's own, which not every client sends. */
const answers = ["error", "pong", "sent", "unsent"];

for (
  const [path, pattern] of [
    ["clients/js/wsproxy.js", /(?:case |name === )"(\w+)"/g],
    ["clients/python/wsproxy_client/client.py", /case "(\w+)":/g],
  ] as const
) {
  Deno.test(`${path} knows every notice that comes unasked, and none that is not sent`, () => {
    const text = Deno.readTextFileSync(new URL(path, root));
    const known = [...text.matchAll(pattern)].map(([, name]) => name!).filter((name) => !notOfTheProxy.has(name));
    assert.deepEqual(known.filter((name) => !(name in notices)), []);
    const unknown = Object.keys(notices).filter((name) => !known.includes(name) && !answers.includes(name));
    assert.deepEqual(unknown, []);
  });
}

/** Other words in such places: fields and names of the events of a stream. */
const notOfTheProxy = new Set(["event", "id", "data", "close", "message"]);

Deno.test("A logged message costs a resuming WebSocket no copy: its frame is a part of what was published", () => {
  const envelope = Buffer.from("?1-2\npayload");
  const frame = dialects.socket.resuming.published(envelope, 5) as Buffer;
  assert.equal(frame.toString(), "1-2\npayload");
  assert.equal(frame.buffer, envelope.buffer);
});

Deno.test("A message has the same frame whether it was read from the log or published", () => {
  const envelope = Buffer.from("?1-2\ngrüße\n💡\r\nend");
  for (const { bare, resuming } of [dialects.socket, dialects.stream]) {
    for (const dialect of [bare, resuming]) {
      const published = dialect.published(envelope, 5).toString();
      assert.equal(dialect.logged({ ms: 1, n: 2 }, envelope.subarray(5)).toString(), published);
    }
  }
});

Deno.test("An event has an id where it tells of a position, and no line of it is anything but a field", () => {
  const { resuming, bare } = dialects.stream;
  assert.equal(resuming.notice(liveNotice({ ms: 1, n: 2 })), "event: live\nid: 1-2\ndata: 1-2\n\n");
  assert.equal(resuming.plain(Buffer.from("a\r\nid: 9-9\rb\n")), "data: a\ndata: id: 9-9\ndata: b\ndata: \n\n");
  assert.equal(bare.plain(Buffer.from("a\nb")), "data: a\ndata: b\n\n");
  assert.equal(bare.notice(liveNotice({ ms: 1, n: 2 })), undefined);
});
