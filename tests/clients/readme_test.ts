/** The blocks of clients/js/README.md, run as they are printed: beside the modules, against a proxy and a small backend. */

import assert from "node:assert/strict";
import { useSession } from "../../clients/js/react.js";
import { Window } from "happy-dom";
import { serveGraphql, Told } from "../harness/graphql.ts";
import { Inbox } from "../harness/inbox.ts";
import { blockOf } from "../harness/pages.ts";
import { TestProxy } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { WorkerProcess } from "../harness/workers.ts";

const history = blockOf("clients/js/README.md", "historyLoaded").text;
const stored = blockOf("clients/js/README.md", "sessionStorage").text;
const socket = blockOf("clients/js/README.md", "new Socket(").text;
const graphql = blockOf("clients/js/README.md", "webSocketImpl").text;
const react = blockOf("clients/js/README.md", "useSession").text;
const worker = blockOf("clients/js/README.md", "./backend.js").text;

const down = "session:demo:down";

/** A proxy, the backend of a page with its tokens and history, and what the page shows. */
class Site implements AsyncDisposable {
  readonly shown = new Inbox();
  history: { messages: string[]; position?: string } = { messages: [] };
  readonly #server: Deno.HttpServer<Deno.NetAddr>;
  readonly #folder = Deno.makeTempDirSync();
  private constructor(readonly redis: RedisServer, readonly proxy: TestProxy) {
    const listen = { hostname: "127.0.0.1", port: 0, onListen() {} };
    this.#server = Deno.serve(listen, async (request) => {
      const { pathname } = new URL(request.url);
      return pathname === "/token" ? new Response(await mint("demo")) : Response.json(this.history);
    });
    Object.assign(globalThis, {
      show: (text: string) => this.shown.add(text),
      showAll: (texts: string[]) => this.shown.add(`history: ${texts}`),
      showState: (state: string, reason = "") => this.shown.add(`${state} ${reason}`.trim()),
      showUnsent: (text: string, reason: string) => this.shown.add(`unsent ${text}: ${reason}`),
    });
  }
  static async start(): Promise<Site> {
    const redis = await RedisServer.start();
    const proxy = await TestProxy.start(redis);
    await proxy.resumable();
    return new Site(redis, proxy);
  }
  get url(): string {
    return `ws://127.0.0.1:${this.proxy.port}/agent/ws/demo`;
  }
  async log(text: string): Promise<string> {
    const [position] = await this.redis.client().call("FCALL", "wsproxy_send", 1, down, text) as [string];
    return position;
  }
  /** Runs a block as a module, and returns what it exports. */
  async run(block: string, exports: string, name = "page.js"): Promise<Record<string, unknown>> {
    const origin = `http://127.0.0.1:${this.#server.addr.port}`;
    const text = block.replace(
      /"\.\/(\w+\.js)"/g,
      (_, name) => `"${new URL(`../../clients/js/${name}`, import.meta.url)}"`,
    )
      .replace("wss://example.com/agent/ws/demo", this.url)
      .replace(/fetch\("/g, `fetch("${origin}`);
    const file = `${this.#folder}/${performance.now()}${name}`;
    await Deno.writeTextFile(file, `${text}\n${exports}`);
    return await import(`file://${file}`);
  }
  async [Symbol.asyncDispose](): Promise<void> {
    await this.proxy[Symbol.asyncDispose]();
    await this.#server.shutdown();
    await this.redis[Symbol.asyncDispose]();
    await Deno.remove(this.#folder, { recursive: true });
  }
}

Deno.test("The recipe of the README: the history, then what came after it, also when its log has expired", async () => {
  await using site = await Site.start();
  const position = await site.log("yesterday");
  site.history = { messages: ["yesterday"], position };
  await site.redis.client().del(down);
  const backend = await Listener.to(site.redis, "session:demo:up");
  const { connection, ask } = await site.run(history, "export { ask, connection };") as {
    connection: { close(): void };
    ask(text: string): Promise<void>;
  };
  try {
    assert.deepEqual(await site.shown.take(3), ["history: yesterday", "connecting", "open"]);
    await ask("how are you?");
    assert.deepEqual(await backend.take(1), ['{"text":"how are you?"}']);
    await site.log("today");
    assert.deepEqual(await site.shown.take(1), ["today"]);
  } finally {
    connection.close();
  }
  assert.deepEqual(await site.shown.take(1), ["closed"]);
  await ask("still there?");
  assert.deepEqual(await site.shown.take(1), ["unsent still there?: closed"]);
});

Deno.test("The page of the README that stores its position is loaded again once for a gap", async () => {
  await using site = await Site.start();
  sessionStorage.setItem("position", await site.log("of a former log"));
  await site.redis.client().del(down);
  await site.log("of the present one");
  const connections: { close(): void }[] = [];
  let loads = 0;
  const load = async () => {
    loads++;
    connections.at(-1)?.close();
    const imports = `import { Connection } from "./wsproxy.js";\n`;
    const { connection } = await site.run(imports + stored, "export { connection };");
    connections.push(connection as { close(): void });
  };
  Object.assign(globalThis, { location: { reload: load } });
  try {
    await load();
    await eventually("it is shown", () => site.shown.size > 0);
    assert.deepEqual(site.shown.takeAll(), ["of the present one"]);
    assert.equal(loads, 2);
  } finally {
    for (const connection of connections) connection.close();
    sessionStorage.removeItem("position");
    Reflect.deleteProperty(globalThis, "location");
  }
});

Deno.test("The socket of the README talks, and hears", async () => {
  await using site = await Site.start();
  const backend = await Listener.to(site.redis, "session:demo:up");
  const made = await site.run(socket, "export { socket };");
  assert.deepEqual(await backend.take(1), ['{"text":"hello"}']);
  await site.log("hello yourself");
  assert.deepEqual(await site.shown.take(1), ["hello yourself"]);
  (made["socket"] as WebSocket).close();
  assert.deepEqual(await site.shown.take(1), ["closed 1000"]);
});

Deno.test("The client of graphql-ws of the README subscribes, also where the log has a former conversation", async () => {
  await using site = await Site.start();
  await serveGraphql(site.redis, "demo", new Told());
  for (let visit = 0; visit < 2; visit++) {
    const { client } = await site.run(graphql, "export { client };") as { client: import("graphql-ws").Client };
    const counted: unknown[] = [];
    for await (const { data } of client.iterate({ query: "subscription { counted(to: 3) }" })) {
      counted.push(data?.["counted"]);
    }
    assert.deepEqual(counted, [0, 1, 2]);
    await site.proxy.empty();
  }
});

Deno.test("The component of the README shows what comes, and its button stops", async () => {
  assert(useSession);
  await using site = await Site.start();
  await site.log("hello");
  const window = new Window();
  Object.assign(globalThis, { window, document: window.document });
  const { createElement } = await import("react");
  const { createRoot } = await import("react-dom/client");
  const { Chat } = await site.run(`/** @jsxImportSource react */\n${react}`, "", "page.jsx");
  const element = window.document.createElement("div");
  window.document.body.appendChild(element);
  const root = createRoot(element as never);
  root.render(createElement(Chat as never, { url: site.url, token: () => mint("demo") }));
  await eventually("it is shown", () => element.innerHTML.includes("<p>hello</p>"));
  const button = element.querySelector("button")!;
  await eventually("it can be stopped", () => !button.disabled);
  const problem = () => element.querySelector('[role="alert"]')!.textContent;
  button.click();
  await eventually("it is told that no backend heard", () => problem() === "message not sent: unheard");
  const backend = await Listener.to(site.redis, "session:demo:up");
  button.click();
  assert.deepEqual(await backend.take(1), ['"stop"']);
  await eventually("that is over", () => problem() === "");
  const complaints: unknown[] = [];
  const { error } = console;
  console.error = (...words) => complaints.push(words);
  button.click();
  root.unmount();
  await site.proxy.empty();
  console.error = error;
  assert.deepEqual(complaints, []);
  await window.happyDOM.close();
});

Deno.test("The worker of the README answers, and its process ends when it is told to", async () => {
  await using redis = await RedisServer.start();
  await using _proxy = await TestProxy.start(redis);
  const folder = await Deno.makeTempDir();
  const model = 'async function* model(text) { yield "to " + text; }\n';
  const module = new URL("../../clients/js/backend.js", import.meta.url);
  await Deno.writeTextFile(`${folder}/worker.js`, model + worker.replace('"./backend.js"', `"${module}"`));
  const config = new URL("../../deno.json", import.meta.url).pathname;
  const args = ["run", "--quiet", "--no-prompt", "--frozen", "--config", config, "--allow-all", `${folder}/worker.js`];
  {
    await using running = new WorkerProcess(Deno.execPath(), args, { REDIS_URL: redis.url });
    const control = redis.client();
    await control.xadd("agent:support:inbox", "*", "type", "message", "session", "demo", "data", '"x"');
    const answer = async () =>
      (await control.xrange(down, "-", "+")).map(([, fields]) => fields[1]).filter((text) => text);
    await eventually("it is answered", async () => (await answer()).at(-1) === '{"type":"end"}');
    assert.deepEqual(await answer(), ['{"type":"start"}', 'to "x"', '{"type":"end"}']);
    assert.equal(await running.stop(), 0);
  }
  await Deno.remove(folder, { recursive: true });
});
