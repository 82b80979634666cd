/**
 * The Autobahn suite's cases against both engines: `deno task test:autobahn`. Its fuzzing client wants an echo server
 * at "/", so a relay puts a session's path and a token into each handshake, and a backend publishes back what comes.
 *
 * wsproxy carries text only: a case that sends a binary message passes when that is refused with 1003. The `ws` engine
 * must fail none; what the native engine fails must be what docs/engines.md lists.
 */

import assert from "node:assert/strict";
import { engines, ProxyProcess } from "../harness/proxy.ts";
import { run, venv } from "../harness/python.ts";
import { RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { writeAll } from "../harness/wire.ts";

const root = new URL("../../", import.meta.url).pathname;

/** A line of cases.py. */
interface Outcome {
  readonly case?: string;
  readonly behavior: string;
  readonly close: string;
  readonly code: number | null;
  readonly passed: boolean;
  readonly description: string;
}

/** Gives each handshake a session of its own, and carries the rest as it is. */
function relay(port: number) {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  let sessions = 0;
  async function carry(client: Deno.TcpConn): Promise<void> {
    const session = `case-${++sessions}`;
    using proxy = await Deno.connect({ hostname: "127.0.0.1", port });
    const chunk = new Uint8Array(65_536);
    let head = "";
    while (!head.includes("\r\n\r\n")) {
      const count = await client.read(chunk);
      if (count === null) return;
      head += new TextDecoder("latin1").decode(chunk.subarray(0, count));
    }
    const start = `GET /autobahn/ws/${session} HTTP/1.1\r\nAuthorization: Bearer ${await mint(session)}\r\n`;
    const text = start + head.slice(head.indexOf("\r\n") + 2);
    await writeAll(proxy, Uint8Array.from(text, (char) => char.charCodeAt(0)));
    const ends = { preventAbort: true, preventCancel: true };
    await Promise.all([
      client.readable.pipeTo(proxy.writable, ends),
      proxy.readable.pipeTo(client.writable, ends),
    ]);
  }
  (async () => {
    for await (const client of listener) {
      carry(client).catch(() => {}).finally(() => {
        try {
          client.close();
        } catch {
          // Its stream has closed it.
        }
      });
    }
  })();
  return {
    port: listener.addr.port,
    /** Cases so far: each has a connection of its own. */
    get cases() {
      return sessions;
    },
    [Symbol.dispose]: () => listener.close(),
  };
}

async function failures(engine: string, bin: string): Promise<string[]> {
  await using redis = await RedisServer.start("--client-output-buffer-limit", "pubsub 1gb 1gb 60");
  await using proxy = await ProxyProcess.start(redis, {
    WS_ENGINE: engine,
    VALIDATE_JSON: "false",
    MAX_MESSAGE_SIZE_BYTES: String(32 * 1024 * 1024),
    MAX_BUFFER_SIZE_BYTES: String(256 * 1024 * 1024),
  });
  const [ear, mouth] = [redis.client(), redis.client()];
  ear.on("pmessageBuffer", (_pattern, channel: Uint8Array, message) => {
    mouth.publish(new TextDecoder().decode(channel).replace(/:up$/, ":down"), message);
  });
  await ear.psubscribe("session:*:up");
  using cases = relay(proxy.port);
  const lines = (await run(`${bin}/python`, `${root}tests/autobahn/cases.py`, String(cases.port))).trim();
  const outcomes: Outcome[] = lines.split("\n").map((line) => JSON.parse(line)).filter((line) => line.case);
  const failed = outcomes.filter(({ passed, code, description }) =>
    !passed && !(code === 1003 && /binary/i.test(description))
  );
  for (const { case: id, behavior, close, code, description } of failed) {
    console.log(`[${engine}] ${id}: ${behavior}, close ${close} (${code}): ${description.slice(0, 100)}`);
  }
  const refused = outcomes.filter(({ passed }) => !passed).length - failed.length;
  console.log(`[${engine}] ${cases.cases} cases, ${failed.length} failed, ${refused} refused as binary, with 1003`);
  // All but compression: a run without cases would find nothing.
  assert(cases.cases > 200, `${cases.cases} cases`);
  return failed.map(({ case: id }) => id!);
}

Deno.test("Autobahn", async (test) => {
  const bin = await venv("autobahn", ["kosoku==0.1.0"]);
  const page = Deno.readTextFileSync(`${root}docs/engines.md`);
  const listed = /^Autobahn cases that the native engine fails: (.*)\.$/m.exec(page)?.[1]?.split(", ") ?? [];
  const known: Record<string, string[]> = { deno: listed, ws: [] };
  for (const engine of engines) {
    await test.step(engine, async () => assert.deepEqual(await failures(engine, bin), known[engine]));
  }
});
