/** The steps of examples/chat/README.md, from a clone to a page of one's own, as they stand there: `deno task test:page`. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { type Block, blockOf } from "../harness/pages.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Copy, Terminal } from "../harness/terminal.ts";
import { secret } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { Browser } from "./browser.ts";
import { Chat } from "./chat_page.ts";

const folder = new URL("../../examples/chat", import.meta.url).pathname;
const take = blockOf("examples/chat/README.md", "cp -R examples/chat");
const install = blockOf("examples/chat/README.md", "npm install ./wsproxy-client");
const start = blockOf("examples/chat/README.md", "my-chat # Ctrl-C");
const name = blockOf("examples/chat/README.md", "const name =");
const colour = blockOf("examples/chat/README.md", "--accent:");
const model = blockOf("examples/chat/README.md", "MODEL=test");
const tool = blockOf("examples/chat/README.md", "@agent.tool_plain");
const signIn = blockOf("examples/chat/README.md", "async def signed_in_user");
const build = blockOf("examples/chat/README.md", "npm run build");
const api = blockOf("examples/chat/README.md", "app:app");
const worker = blockOf("examples/chat/README.md", "python backend/worker.py");

/** It starts eight processes, of which five load libraries. */
const startMs = 120_000;

Deno.test({
  name: "Ten steps lead from a clone to a page of one's own, with its name, colour, model, tool and sign-in",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    await using copy = new Copy();
    const mine = `${copy.folder}/my-chat`;
    const env = {
      ...{ GIT_AUTHOR_NAME: "A", GIT_AUTHOR_EMAIL: "a@b.c", GIT_COMMITTER_NAME: "A", GIT_COMMITTER_EMAIL: "a@b.c" },
      HOME: copy.folder,
      PATH: `${Deno.execPath().replace(/\/deno$/, "")}:${Deno.env.get("PATH")}`,
      NO_COLOR: "1",
    };
    /** A block, typed at the top level of the copy, or in the folder that is made of the example. */
    const type = ({ text }: Block, { cwd = copy.folder, ...more }: Record<string, string> = {}) =>
      new Terminal(text.replaceAll("../my-chat", mine).replaceAll("--port 8000", `--port ${more["PORT"]}`), cwd, {
        ...env,
        ...more,
      });
    const done = async (block: Block, options?: Record<string, string>) => {
      await using terminal = type(block, options);
      await terminal.ends();
    };
    /** An edit of a file, by hand. */
    const edit = (path: string, change: (text: string) => string) =>
      Deno.writeTextFileSync(`${mine}/${path}`, change(Deno.readTextFileSync(`${mine}/${path}`)));

    await done(take);
    // What would be fetched, and is there already: the packages that npm and pip have put into examples/chat.
    await new Deno.Command("cp", { args: ["-R", `${folder}/node_modules`, mine] }).output();
    await Deno.symlink(`${folder}/.venv`, `${mine}/.venv`);
    await done(install, { npm_config_prefer_offline: "true", npm_config_cache: `${Deno.env.get("HOME")}/.npm` });

    await using browser = await Browser.start();
    const page = new Chat(browser);
    const address = (line: string) => line.split(" ")[1]!;
    {
      await using running = type(start, { PORT: String(sparePort()) });
      await page.open(address(await running.shows("Open http", startMs)));
      await page.ask("Whose?");
      await page.isWhole(1);
      // What is saved shows at once.
      await done(name, { cwd: mine });
      await eventually(
        "its name",
        async () => await browser.evaluate("document.querySelector('h1').textContent") === "Ask Ada",
      );
      await browser.prefer("light");
      await done(colour, { cwd: mine });
      const accent = "getComputedStyle(document.querySelector('form button')).backgroundColor";
      await eventually("its colour", async () => await browser.evaluate(accent) === "rgb(122, 46, 142)");
      await page.isWhole(1);
    }
    await edit("backend/agent.py", (text) => `${text}\n\n${tool.text}`);
    await edit(
      "backend/app.py",
      (text) => text.replace(/^async def signed_in_user[^]*?(?=\n\n\n)/m, signIn.text.trimEnd()),
    );
    await browser.sendHeaders({ "X-Forwarded-User": "ada" });
    {
      await using running = type(model, { PORT: String(sparePort()) });
      const url = address(await running.shows("Open http", startMs));
      assert.equal((await fetch(`${url}api/chats`)).status, 401);
      await page.open(url);
      await page.ask("When are you open?");
      await eventually("the tool is asked", async () => (await page.last()).includes('"opening_hours":"from 9 to 17"'));
    }

    await done(build, { cwd: mine });
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, { INBOX: "true" });
    const served = {
      ...{ cwd: mine, MODEL: "test", JWT_SECRET: secret, REDIS_URL: redis.url, DATABASE: `${mine}/chat.sqlite` },
      ...{ PORT: String(sparePort()), PROXY_URL: `ws://127.0.0.1:${proxy.port}` },
    };
    await using backend = type(api, served);
    await using _worker = type(worker, served);
    await backend.shows("Uvicorn running");
    await page.open(`http://127.0.0.1:${served.PORT}/`);
    assert.equal(await browser.evaluate("document.querySelector('h1').textContent"), "Ask Ada");
    await page.ask("When are you open?");
    await eventually("it is answered", async () => (await page.last()).includes('"opening_hours":"from 9 to 17"'));
  },
});
