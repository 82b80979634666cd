/** What becomes of a connection whose request was answered before its body was read. */

import assert from "node:assert/strict";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { soon } from "../harness/wait.ts";
import { readToEnd, readUntil, requestHead, writeAll } from "../harness/wire.ts";

const bytes = (text: string) => new TextEncoder().encode(text);

/** A body that is JSON, of about `size` bytes, and the headers that announce it. */
const kinds: Record<string, (size: number) => [Record<string, string>, Uint8Array]> = {
  "of a known length": (size) => [{ "Content-Length": String(size) }, bytes(`"${"x".repeat(size - 2)}"`)],
  "in chunks": (size) => {
    const chunks = `3e8\r\n${"x".repeat(1000)}\r\n`.repeat(size / 1000);
    return [{ "Transfer-Encoding": "chunked" }, bytes(`1\r\n"\r\n${chunks}1\r\n"\r\n0\r\n\r\n`)];
  },
  "after 100": (size) => {
    const [headers, body] = kinds["of a known length"]!(size);
    return [{ ...headers, Expect: "100-continue" }, body];
  },
  "with an expectation that is none": (size) => {
    const [headers, body] = kinds["of a known length"]!(size);
    return [{ ...headers, Expect: "x" }, body];
  },
};

onEachEngine("No answer that is given before a body was read leaves a connection kept and dead", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { ...engine, MAX_MESSAGE_SIZE_BYTES: "5000" });
  const Authorization = `Bearer ${await mint("s1")}`;
  const asked = [
    [404, "/nothing", {}, "POST"],
    [405, "/health", {}, "POST"],
    [405, "/agent/sse/s1", {}, "PUT"],
    [200, "/ready", {}, "GET"],
    [401, "/agent/sse/s1", {}, "POST"],
    [403, "/agent/sse/s2", { Authorization }, "POST"],
    [413, "/agent/sse/s1", { Authorization }, "POST"],
    [426, "/agent/ws/s1", { Authorization }, "GET"],
  ] as const;
  for (const [kind, make] of Object.entries(kinds)) {
    for (const [status, path, headers, method] of asked) {
      // The whole body before the answer, or most of it after.
      for (const [size, early] of [[6000, 100_000], [300_000, 400_000], [300_000, 5500]] as const) {
        const what = `${status} to ${method} ${path}, ${size} bytes ${kind}, ${early} of them early`;
        using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
        const [announced, body] = make(size);
        await writeAll(connection, bytes(requestHead(path, { method, headers: { ...headers, ...announced } })));
        await writeAll(connection, body.subarray(0, early));
        const answer = await soon(readUntil(connection, /HTTP\/1.1 [2-5].*\r\n\r\n/s), what);
        assert.match(answer, new RegExp(`^(HTTP/1.1 100 Continue\r\n\r\n)?HTTP/1.1 ${status} `), what);
        const kept = !/^connection: close/im.test(answer);
        // The native engine closes what has a body that was not touched.
        assert.equal(kept, engine["WS_ENGINE"] === "ws" || status === 413, what);
        await writeAll(connection, body.subarray(early)).catch((error) => assert(!kept, String(error)));
        if (!kept) await soon(readToEnd(connection), `end after ${what}`);
        else {
          await writeAll(connection, bytes(requestHead("/ready")));
          await soon(readUntil(connection, /"ready"/), `answer after ${what}`);
        }
      }
    }
  }
});

Deno.test("[ws] A body that goes on for ever after its answer is not read for ever", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws" });
  using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  const announced = { "Transfer-Encoding": "chunked" };
  await writeAll(connection, bytes(requestHead("/nothing", { method: "POST", headers: announced })));
  const chunk = bytes(`10000\r\n${"x".repeat(65_536)}\r\n`);
  const write = async () => {
    for (let written = 0; written < 200_000_000; written += chunk.length) await writeAll(connection, chunk);
    assert.fail("all of it was taken");
  };
  const { BrokenPipe, ConnectionReset } = Deno.errors;
  await assert.rejects(soon(write(), "end"), (it) => it instanceof BrokenPipe || it instanceof ConnectionReset);
});

Deno.test("[ws] A body that does not come after its answer is waited for no longer than a request", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { WS_ENGINE: "ws", HANDSHAKE_TIMEOUT_SECS: "1" });
  using connection = await Deno.connect({ hostname: "127.0.0.1", port: proxy.port });
  const announced = { "Content-Length": "1000" };
  await writeAll(connection, bytes(requestHead("/nothing", { method: "POST", headers: announced })));
  await soon(readUntil(connection, /404/), "answer");
  await writeAll(connection, bytes("x"));
  await soon(readToEnd(connection), "end");
});
