/**
 * The Python package and the Python examples against the real proxy: with python_suites.ts and torture_python.ts
 * `deno task test:python`, a step of the gate where there is Python.
 */

import assert from "node:assert/strict";
import { dirname } from "node:path";
import { Redis } from "ioredis";
import { sparePort } from "../../scripts/spare_port.ts";
import { Commands, Queue, script } from "../../clients/js/queue.js";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { slotOf } from "../../src/redis/slot.ts";
import { TestCluster } from "../harness/cluster.ts";
import { blockOf } from "../harness/pages.ts";
import { lines } from "../harness/process.ts";
import { onEachEngine, TestProxy } from "../harness/proxy.ts";
import { adapters, checkTypes, clientsVenv, librarySettings, modulesOf, run } from "../harness/python.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { Copy } from "../harness/terminal.ts";
import { mint, secret } from "../harness/token.ts";
import { eventually, soon } from "../harness/wait.ts";
import { testBackend, testWorkers, WorkerProcess } from "../harness/workers.ts";

const root = new URL("../../", import.meta.url).pathname;
const bin = await clientsVenv();

/** A Python program beside the module, with its output line by line. */
class Program implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly output: ReturnType<typeof lines>;
  constructor(source: string, ...args: string[]) {
    this.#child = new Deno.Command(`${bin}/python`, {
      args: ["-u", "-c", source, ...args],
      env: { PYTHONPATH: `${root}clients/python` },
      stdin: "null",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    this.output = lines(this.#child.stdout);
  }
  next(): Promise<string> {
    return soon(this.output.until(() => true), "a line");
  }
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.#child.kill("SIGKILL");
    } catch {
      // It has ended.
    }
    await this.#child.status;
    await this.output.rest();
  }
}

/** tests/clients/torture_client.py: its first lines say what it reads and prints. */
class TortureClient implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #output: ReturnType<typeof lines>;

  constructor(port: number, token: string, { session = "s1", position = "0", path = "ws" } = {}) {
    const url = `ws://127.0.0.1:${port}/agent/${path}/${session}`;
    this.#child = new Deno.Command(`${bin}/python`, {
      args: [`${root}tests/clients/torture_client.py`, url, token, position, "0.2"],
      env: { PYTHONPATH: `${root}clients/python` },
      stdin: "piped",
      stdout: "piped",
      stderr: "null",
    }).spawn();
    this.#stdin = this.#child.stdin.getWriter();
    this.#output = lines(this.#child.stdout);
  }

  async say(...words: readonly unknown[]): Promise<void> {
    for (const word of words) await this.#stdin.write(new TextEncoder().encode(`${JSON.stringify(word)}\n`));
  }

  /** The next event but `live`, which may come again after each reconnect. */
  async next(): Promise<{ event: string; [name: string]: unknown }> {
    return JSON.parse(await soon(this.#output.until((line) => !line.includes('"event": "live"')), "an event"));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stdin.close().catch(() => {});
    const { code } = await soon(this.#child.status, "the end of the Python client");
    await this.#output.rest();
    assert.equal(code, 0);
  }
}

/** A FastAPI example in front of a proxy, until the end of its scope. */
class Served implements AsyncDisposable {
  readonly #server: Deno.ChildProcess;
  readonly #port = sparePort();

  private constructor(app: string, redis: RedisServer, proxy: TestProxy) {
    this.#server = new Deno.Command(`${bin}/uvicorn`, {
      args: ["--app-dir", `${root}examples`, "--port", String(this.#port), "--log-level", "warning", app],
      env: { JWT_SECRET: secret, REDIS_URL: redis.url, PROXY_URL: `ws://127.0.0.1:${proxy.port}` },
      stdin: "null",
      stdout: "null",
      stderr: "inherit",
    }).spawn();
  }

  static async start(app: string, redis: RedisServer, proxy: TestProxy): Promise<Served> {
    const served = new Served(app, redis, proxy);
    await eventually("the backend is there", () => served.open("s1").then(() => true, () => false));
    return served;
  }

  /** What it says about a session: a token, at the least. */
  async open(session: string): Promise<{ token: string; [name: string]: unknown }> {
    const response = await fetch(`http://127.0.0.1:${this.#port}/sessions?session_id=${session}`, { method: "POST" });
    return await response.json();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#server.kill("SIGTERM");
    await this.#server.status;
  }
}

const clientProgram = `
import asyncio, sys
from wsproxy_client import *
async def main():
    async with Client(sys.argv[1], token=sys.argv[2], max_delay=0.2) as client:
        try:
            async for event in client:
                if isinstance(event, Live): continue
                print(event, flush=True)
                if isinstance(event, Message) and event.text == "answer me":
                    await client.send('"answer"')
        except Closed as closed:
            print("closed", closed, flush=True)
asyncio.run(main())
`;

const backendProgram = `
import asyncio, sys, redis, redis.asyncio
from wsproxy_client import Backend, AsyncBackend
backend = Backend(redis.Redis.from_url(sys.argv[1]))
for n in range(50):
    position, receivers = backend.send("s1", f"message {n}")
first, again = backend.send("s1", "once", "nonce"), backend.send("s1", "once", "nonce")
assert first[0] == again[0] and again[1] == 0, (first, again)
async def main():
    async with redis.asyncio.Redis.from_url(sys.argv[1]) as connection:
        other = AsyncBackend(connection)
        print(await other.send("s1", "async"), flush=True)
asyncio.run(main())
`;

onEachEngine("A Python backend's messages reach a Python client once, though its connection breaks", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const control = redis.client();
  await proxy.resumable();
  using relay = new Relay(proxy.port);
  // Each is cut at some byte of the handshake's answer, or of a message.
  relay.budgets = Array.from({ length: 12 }, (_, n) => ({ down: 150 + 50 * n }));
  const url = `ws://127.0.0.1:${relay.port}/agent/ws/s1`;
  {
    await using client = new Program(clientProgram, url, await mint("s1"));
    await using backend = new Program(backendProgram, redis.url);
    assert.match(await backend.next(), /^\('\d+-52', \d\)$/);
    for (let n = 0; n < 50; n++) {
      assert.match(await client.next(), new RegExp(`^Message\\(text='message ${n}', position='\\d+-${n + 1}'\\)$`));
    }
    for (const text of ["once", "async"]) assert.match(await client.next(), new RegExp(`text='${text}'`));
    assert(relay.accepted > 5, `${relay.accepted} connections`);
    relay.budgets = [];
    relay.cut();
    await control.call("FCALL", "wsproxy_send", 1, "session:s1:down", "answer me");
    assert.match(await client.next(), /text='answer me'/);
    assert.match(await client.next(), /^Unheard\(messages=1\)$/);
    await control.call("FCALL", "wsproxy_close", 1, "session:s1:down", 4403, "banned");
    assert.equal(await client.next(), "closed 4403 banned");
  }
});

onEachEngine(
  "What a Python client submits is in the inbox when it is told so, though its connection breaks",
  async (engine) => {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis, { ...engine, INBOX: "true" });
    await proxy.resumable();
    using relay = new Relay(proxy.port);
    // Each is cut at some byte of the handshake, or of a message.
    relay.budgets = Array.from({ length: 12 }, (_, n) => ({ up: 300 + 60 * n }));
    const ids = Array.from({ length: 40 }, (_, n) => `id-${n}`);
    await using client = new TortureClient(relay.port, await mint("s1"));
    await client.say(...ids.map((id) => ({ submit: JSON.stringify(`text of ${id}`), id })));
    const sent = [];
    for (const _ of ids) {
      const { event, id, entered } = await client.next();
      assert.deepEqual([event, entered], ["sent", true]);
      sent.push(id);
    }
    assert.deepEqual(sent.toSorted(), ids.toSorted());
    assert(relay.accepted > 5, `${relay.accepted} connections`);
    const entries = await redis.client().xrange("agent:agent:inbox", "-", "+");
    const entered = new Set(
      entries.filter(([, fields]) => fields.includes("message")).map(([, fields]) =>
        `${fields[fields.indexOf("id") + 1]} ${fields[fields.indexOf("data") + 1]}`
      ),
    );
    assert.deepEqual([...entered].sort(), ids.map((id) => `${id} "text of ${id}"`).sort());
    // What cannot arrive is told at once, and the connection stays.
    await client.say({ submit: "no JSON", id: "a" });
    assert.deepEqual(await client.next(), { event: "unsent", id: "a", reason: "invalid" });
    await client.say({ report: true });
    assert.equal((await client.next()).sockets, 1);
    await client.say({ close: true });
    assert.deepEqual(await client.next(), { event: "closed", code: 1000 });
  },
);

onEachEngine("A Python client says what it is refused for, and stops", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  const refused = [
    ["s1", await mint("s2"), 4403],
    ["s1", "a.b.c", 4403],
    ["s1", "", 4401],
    ["s1%00", await mint("s1"), 4400],
  ] as const;
  for (const [session, token, code] of refused) {
    await using client = new TortureClient(proxy.port, token, { session });
    assert.deepEqual(await client.next(), { event: "closed", code });
  }
  await using client = new TortureClient(proxy.port, await mint("s1"), { path: "nothing" });
  assert.deepEqual(await client.next(), { event: "closed", code: 4404 });
});

onEachEngine("A Python client gives the proxy another token before the end of the last one", async (engine) => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, engine);
  await proxy.resumable();
  using relay = new Relay(proxy.port);
  const asked: number[] = [];
  const renewed = Promise.withResolvers<void>();
  await using service = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async () => {
    const exp = Math.floor(Date.now() / 1000) + (asked.length === 0 ? 3 : 3600);
    if (asked.push(exp) > 1) renewed.resolve();
    return new Response(await mint("s1", { exp }));
  });
  await using client = new TortureClient(relay.port, `http://127.0.0.1:${service.addr.port}/token`);
  await soon(renewed.promise, "another token");
  await eventually("the first token has run out", () => Date.now() > (asked[0]! + 1) * 1000);
  await redis.client().fcall("wsproxy_send", 1, "session:s1:down", "still here");
  assert.equal((await client.next()).text, "still here");
  assert.deepEqual([relay.accepted, asked.length], [1, 2]);
});

const historyProgram = `
import asyncio, sys
from wsproxy_client import *
async def main():
    for history_loaded in (True, False):
        async with Client(sys.argv[1], sys.argv[2], sys.argv[3], history_loaded=history_loaded) as client:
            async for event in client:
                print(type(event).__name__, getattr(event, "text", ""), flush=True)
                if isinstance(event, Live): break
    # It goes on from where the gap led.
    async with Client(sys.argv[1], sys.argv[2], client.position) as client:
        async for event in client:
            print(type(event).__name__, getattr(event, "text", ""), flush=True)
            if isinstance(event, Live): break
asyncio.run(main())
`;

Deno.test("To a Python client with yesterday's history a log that has expired since is no gap", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  await proxy.resumable();
  const control = redis.client();
  const send = async (text: string) =>
    (await control.fcall("wsproxy_send", 1, "session:s1:down", text) as [string, number])[0];
  await send("yesterday");
  const position = await send("yesterday, too");
  await control.del("session:s1:down");
  await send("today");
  const url = `ws://127.0.0.1:${proxy.port}/agent/ws/s1`;
  await using program = new Program(historyProgram, url, await mint("s1"), position);
  const told = ["Message today", "Live ", "Gap ", "Message today", "Live ", "Live "];
  for (const each of told) assert.equal(await program.next(), each);
});

Deno.test("Two questions at once have their answers from backend.py one after the other", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  await using served = await Served.start("backend:app", redis, proxy);
  await using client = await proxy.connect("s1", { token: (await served.open("s1")).token });
  for (const question of ['"one"', '"two"']) client.send(question);
  for (const question of ['"one"', '"two"']) {
    let text = "";
    for (let word = ""; word !== "end"; text += `${word} `) {
      const said = JSON.parse(await client.next());
      word = said.text ?? said.type;
    }
    assert.equal(text, `You said ${question} and Python has this to say about it. end `);
  }
});

Deno.test("backend.py is there before Redis is, and outlives a restart of it, what is no JSON and its own death", () => {
  const args = ["--app-dir", `${root}examples`, "--log-level", "warning", "backend:app", "--port"];
  return testBackend((_, env) => new WorkerProcess(`${bin}/uvicorn`, [...args, String(sparePort())], env));
});

Deno.test("The example worker in Python is killed in the middle of an answer, and another one goes on", () =>
  testWorkers((name, env) => new WorkerProcess(`${bin}/python`, [`${root}examples/inbox_worker.py`, name], env)));

const clusterProgram = `
import asyncio, sys, redis.asyncio
from redis.cluster import RedisCluster
from wsproxy_client import *
host, port, session = "127.0.0.1", int(sys.argv[1]), sys.argv[2]
down, up = f"session:{session}:down", f"session:{session}:up"
with RedisCluster(host=host, port=port) as cluster:
    ear = cluster.pubsub()
    ear.ssubscribe(up)
    while ear.get_sharded_message(timeout=5) is None: pass
    print(cluster.spublish(down, "plain"), flush=True)
    print(*Backend(cluster).send(session, "logged"), flush=True)
    print(cluster.fcall("wsproxy_send", 1, down, "by hand", "nonce")[1], flush=True)
    heard = None
    while heard is None: heard = ear.get_sharded_message(ignore_subscribe_messages=True, timeout=5)
    print(heard["data"].decode(), flush=True)
    ear.close()
async def main():
    async with redis.asyncio.RedisCluster(host=host, port=port) as cluster:
        print(*await AsyncBackend(cluster).send(session, "async"), flush=True)
        print(await AsyncBackend(cluster).close(session, 4000, "bye"), flush=True)
asyncio.run(main())
`;

Deno.test("redis-py's Cluster clients send, close and hear", async () => {
  await using cluster = await TestCluster.start(3);
  await using proxy = await TestProxy.start(cluster.url, {}, { idleSubscriptions: 4 });
  for (const [i, { server }] of cluster.nodes.entries()) {
    const session = `s${i}`;
    await using resuming = await proxy.connect(session, { resume: "0" });
    await resuming.next();
    await using program = new Program(clusterProgram, String(server.port), session);
    assert.equal(await program.next(), "1");
    assert.equal(await resuming.next(), "\nplain");
    const [position, receivers] = (await program.next()).split(" ");
    assert.equal(receivers, "1");
    assert.equal(await resuming.next(), `${position}\nlogged`);
    assert.equal(await program.next(), "1");
    assert.match(await resuming.next(), /\nby hand$/);
    resuming.send('"up"');
    assert.equal(await program.next(), '"up"');
    const [next] = (await program.next()).split(" ");
    assert.equal(await resuming.next(), `${next}\nasync`);
    assert.equal(await program.next(), "1");
    assert.deepEqual(await resuming.ended(), { code: 4000, reason: "bye" });
  }
});

const keysProgram = `
import sys
from redis.asyncio import Redis
from wsproxy_client.queue import Commands, Queue
for agent in sys.argv[1:]: print(*Queue(Commands(Redis()), agent, "answers")._keys)
`;

Deno.test("Workers of both languages have the same keys, in the inbox's slot, whatever braces the agent has", async () => {
  const agents = ["agent", "a{b", "a}b", "a{b}c{d}", "a{}b", "}{", "a{é}"];
  await using program = new Program(keysProgram, ...agents);
  for (const agent of agents) {
    const keys = (await program.next()).split(" ");
    assert.deepEqual(keys, new Queue(new Commands(new Redis({ lazyConnect: true })), agent, "answers").keys);
    for (const key of keys) assert.equal(slotOf(key), slotOf(`agent:${agent}:inbox`), key);
  }
});

/** A part of a page, indented to stand in a function. */
const indented = (text: string, by: string) => text.trimEnd().replaceAll(/^(?=.)/gm, by);

Deno.test("The pages' Python works as printed", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis, { INBOX: "true" }, { idleSubscriptions: 2 });
  await proxy.resumable();
  const token = await run(
    "env",
    `JWT_SECRET=${secret}`,
    `${bin}/python`,
    "-c",
    blockOf("README.md", "import os, time, jwt").text,
  );
  await using client = await proxy.connect("demo", { token: token.trim() });
  const fragments = [
    blockOf("docs/backends.md", "pubsub.subscribe"),
    blockOf("docs/backends.md", "position, receivers"),
    blockOf("docs/backends.md", "redis.xgroup_create"),
    blockOf("docs/resume.md", "position, receivers ="),
    blockOf("docs/resume.md", "wsproxy_begin"),
  ].map(({ text }, n) => `text, nonce = "text ${n}", "nonce ${n}"\n${text}`);
  const prelude = `
import redis as redis_py, sys
from uuid import uuid4
session, worker = "demo", "one"
channel = f"session:{session}:down"
redis = redis_py.Redis.from_url(sys.argv[1], decode_responses=True)
pubsub = redis.pubsub()
`;
  {
    await using program = new Program(`${prelude}${fragments.join("\n")}\nprint(position, receivers)`, redis.url);
    assert.match(await program.next(), /^\d+-\d+ 1$/);
  }
  const sent = ["text 0", "text 1", "text 3", "text 3", '{"type":"start"}', '{"type":"word"}'];
  assert.deepEqual(await client.take(6), sent);
  const client2 = blockOf("clients/python/README.md", "from wsproxy_client import Client").text
    .replace("ws://127.0.0.1:8080", `ws://127.0.0.1:${proxy.port}`);
  const [imports, ...rest] = client2.split("\n");
  await using listening = new Program(
    `import asyncio, sys\n${imports}\nasync def make_token(): return sys.argv[1]\nasync def main():\n` +
      `${indented(rest.join("\n"), "    ")}\nasyncio.run(main())`,
    token.trim(),
  );
  await proxy.counts("wsproxy_connections", 2);
  const backend = blockOf("clients/python/README.md", "from wsproxy_client import Backend").text
    .replace("redis://127.0.0.1:6379", redis.url);
  await using _sending = new Program(backend);
  await client.take(1);
  assert.equal((await client.ended()).code, 4403);
  let line = "";
  while (line !== '{"token":"hello"}') line = await listening.next();
  assert.equal(await listening.next(), "closed for good: 4403 banned");
  const [importUnsent, ...submit] = blockOf("clients/python/README.md", "from wsproxy_client import Unsent").text
    .split("\n");
  await using submitting = new Program(
    `import asyncio, sys\nfrom wsproxy_client import Client\n${importUnsent}\nasync def main():\n` +
      `    async with Client(sys.argv[1], sys.argv[2]) as client:\n${indented(submit.join("\n"), "        ")}\n` +
      "asyncio.run(main())",
    `ws://127.0.0.1:${proxy.port}/agent/ws/demo`,
    token.trim(),
  );
  assert.equal(await submitting.next(), "heard by 0 in the inbox: True");
});

Deno.test("redis-py's Cluster calls work as docs/backends.md prints them", async () => {
  await using cluster = await TestCluster.start(1);
  await using proxy = await TestProxy.start(cluster.url, {}, { idleSubscriptions: 2 });
  await using client = await proxy.connect("s1");
  const text = blockOf("docs/backends.md", "from redis.cluster").text
    .replace('host="redis-1", port=6379', `host="127.0.0.1", port=${cluster.nodes[0]!.server.port}`);
  await using _program = new Program(`session, text, nonce = "s1", "text", "nonce"\n${text}`);
  assert.deepEqual(await client.take(2), ["text", "text"]);
});

Deno.test("The commands of examples/README.md with Python work as printed", async () => {
  await using copy = new Copy();
  const [, , ...backend] = blockOf("examples/README.md", "examples --port 8000 backend:app").text.split("\n");
  // What the first two lines make, which is there already.
  await Deno.mkdir(`${copy.folder}/.tools`);
  await Deno.symlink(dirname(bin), `${copy.folder}/.tools/venv`);
  const port = String(sparePort());
  const env = { INBOX: "true", PROXY_URL: `ws://127.0.0.1:${copy.port}` };
  await using up = copy.run(blockOf("README.md", "redis-server --port 6390").text, env);
  await up.shows("./dev client");
  const connect = blockOf("examples/README.md", "sessions?session_id=chat").text.replace("8000", port);
  await using served = copy.run(backend.join("\n").replace("8000", port), env);
  await served.shows("Uvicorn running");
  await using client = copy.run(connect);
  await client.shows("connected");
  await client.type("a question");
  await client.shows('"You"');
  await client.shows('"end"');
  // The question that backend.py has answered is in the inbox.
  await using worker = copy.run(blockOf("examples/README.md", "inbox_worker.py two").text);
  await worker.shows("two: ready");
  await worker.shows("answered");
});

Deno.test("The Python package is installed as printed, with its types", async () => {
  await using copy = new Copy();
  const install = blockOf("clients/python/README.md", "pip install").text;
  await run(
    "bash",
    "-c",
    `cd "${copy.folder}" && "${bin}/python" -m venv venv && . venv/bin/activate && set -e\n${install}`,
  );
  const program = `${copy.folder}/torture_client.py`;
  for (const name of ["torture_client.py", "tortured.py"]) {
    await Deno.copyFile(`${root}tests/clients/${name}`, `${copy.folder}/${name}`);
  }
  await run(`${copy.folder}/venv/bin/python`, "-c", "import redis, websockets, wsproxy_client");
  // It finds the installed package, and its types by py.typed.
  await run(
    `${bin}/mypy`,
    "--strict",
    "--cache-dir=/dev/null",
    "--python-executable",
    `${copy.folder}/venv/bin/python`,
    program,
  );
});

Deno.test("mypy --strict and pyright find nothing in the Python package", () => {
  const modules = [...Deno.readDirSync(`${root}clients/python/wsproxy_client`)].map(({ name }) => name)
    .filter((name) => name.endsWith(".py") && !adapters.includes(name));
  const tests = ["client_test.py", "worker_test.py", "chat_test.py", "torture_client.py", "tortured.py"];
  return checkTypes(bin, { version: "3.10", files: modulesOf(modules), tests });
});

/** A block whose first line are its imports, and the rest the body of a function. */
function bodied(text: string): string {
  const [imports, ...rest] = text.split("\n");
  return `${imports}\n\n\nasync def snippet() -> None:\n${indented(rest.join("\n"), "    ")}\n`;
}

Deno.test("mypy --strict and pyright find nothing in the blocks of the README of the Python package", async () => {
  const page = "clients/python/README.md";
  const folder = await Deno.makeTempDir();
  const model =
    "from collections.abc import AsyncIterator\n\nasync def model(text: str) -> AsyncIterator[str]:\n    yield text\n";
  const ours = "async def make_token() -> str: return ''\ndef reload_the_state() -> None: ...\n";
  const theirs = "from wsproxy_client import Client\n\nclient = Client('ws://host/agent/ws/s1', '')\n";
  const programs = {
    backend: blockOf(page, "from wsproxy_client import Backend").text,
    worker: model + blockOf(page, "from wsproxy_client.worker").text,
    client: ours + bodied(blockOf(page, "from wsproxy_client import Client").text),
    submit: theirs + bodied(blockOf(page, "from wsproxy_client import Unsent").text),
  };
  try {
    for (const [name, text] of Object.entries(programs)) await Deno.writeTextFile(`${folder}/${name}.py`, text);
    await checkTypes(bin, { version: "3.10", files: Object.keys(programs).map((name) => `${folder}/${name}.py`) });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("Workers of both languages have one script", async () => {
  const text = await Deno.readTextFile(`${root}clients/python/wsproxy_client/queue.py`);
  assert.equal(/^SCRIPT = """([^]*?)"""$/m.exec(text)?.[1], script);
});

Deno.test("The worker in the README of the Python package answers and stops", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  await control.call("FUNCTION", "LOAD", renderLibrary(librarySettings));
  const model = "async def model(question):\n    yield 'one'\n    await asyncio.sleep(question == 'long' and 3600)\n";
  const { text } = blockOf("clients/python/README.md", "from wsproxy_client.worker");
  await using _worker = new Program(model + text.replace("redis://127.0.0.1:6379", redis.url));
  const ask = (data: string) =>
    control.xadd("agent:support:inbox", "*", "type", "message", "session", "s1", "data", data);
  const says = (expected: string[]) =>
    eventually(String(expected), async () => {
      const said = await control.xrange("session:s1:down", "-", "+");
      return JSON.stringify(said.map(([, fields]) => fields[1])) === JSON.stringify(expected);
    });
  const begun = ['{"type":"start"}', "one"];
  await ask("short");
  await says([...begun, '{"type":"end"}']);
  await ask("long");
  await says([...begun, '{"type":"end"}', ...begun]);
  await ask('{"type":"stop"}');
  await says([...begun, '{"type":"end"}', ...begun, '{"type":"stopped"}']);
});
