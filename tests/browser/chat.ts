/**
 * examples/chat as a person uses it, in a headless Chromium, while all that it is made of is killed: `deno task test:page`.
 * With `--screenshots DIR` after "--" it writes docs/chat.png and others there.
 */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { run } from "../harness/python.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { secret } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { Browser } from "./browser.ts";
import { answer, buildPage, Chat, folder } from "./chat_page.ts";

const root = new URL("../../", import.meta.url).pathname;
/** A process that is started again after it was killed. */
class Part implements AsyncDisposable {
  #child: Deno.ChildProcess;
  #isDead = false;
  constructor(readonly start: () => Deno.ChildProcess) {
    this.#child = start();
  }
  async kill(): Promise<void> {
    if (this.#isDead) return;
    this.#isDead = true;
    this.#child.kill("SIGKILL");
    await this.#child.status;
  }
  async restart(): Promise<void> {
    await this.kill();
    this.#child = this.start();
    this.#isDead = false;
  }
  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** All that serves the page, as in production: it is built, and the API serves it. */
class Site implements AsyncDisposable {
  readonly #database = Deno.makeTempDirSync();
  readonly #apiPort = sparePort();
  readonly url = `http://127.0.0.1:${this.#apiPort}`;
  readonly api: Part;
  readonly workers: readonly Part[];

  private constructor(readonly redis: RedisServer, public proxy: ProxyProcess, readonly relay: Relay) {
    const python = (...args: string[]) => () =>
      new Deno.Command(`${folder}/.venv/bin/python`, {
        args,
        cwd: folder,
        env: {
          REDIS_URL: redis.url,
          JWT_SECRET: secret,
          PROXY_URL: `ws://127.0.0.1:${relay.port}`,
          DATABASE: `${this.#database}/chat.sqlite`,
          PYTHONPATH: `${root}clients/python`,
        },
        stdin: "null",
        stdout: "inherit",
        stderr: "inherit",
      }).spawn();
    const uvicorn = ["-m", "uvicorn", "--app-dir", "backend", "--log-level", "warning", "app:app"];
    this.api = new Part(python(...uvicorn, "--port", String(this.#apiPort)));
    this.workers = [new Part(python("backend/worker.py")), new Part(python("backend/worker.py"))];
  }

  static async start(): Promise<Site> {
    await buildPage();
    const redis = await RedisServer.start();
    const proxy = await ProxyProcess.start(redis, { INBOX: "true" });
    const site = new Site(redis, proxy, new Relay(proxy.port));
    await site.#serves();
    return site;
  }

  async #serves(): Promise<void> {
    await eventually("the API answers", async () => {
      const response = await fetch(this.url).catch(() => undefined);
      await response?.body?.cancel();
      return response?.ok === true;
    });
  }

  /** Drops a chat, as the store does a day after its page was open. */
  async drop(chat: string): Promise<void> {
    const program =
      "import sqlite3, sys\nwith sqlite3.connect(sys.argv[1]) as db:\n  db.execute('DELETE FROM chats WHERE id = ?', sys.argv[2:])";
    await run("python3", "-c", program, `${this.#database}/chat.sqlite`, chat);
  }

  async restartApi(): Promise<void> {
    await this.api.restart();
    await this.#serves();
  }

  async replaceProxy(): Promise<void> {
    this.proxy.signal("SIGKILL");
    await this.proxy.exit();
    this.proxy = await ProxyProcess.start(this.redis, { INBOX: "true" });
    this.relay.target = this.proxy.port;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const part of [this.api, ...this.workers]) await part.kill();
    this.relay[Symbol.dispose]();
    await this.proxy[Symbol.asyncDispose]();
    await this.redis[Symbol.asyncDispose]();
    await Deno.remove(this.#database, { recursive: true });
  }
}

Deno.test({
  name: "The chat loses nothing, and nobody waits for ever, whatever dies in the middle of an answer",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn(t) {
    await using site = await Site.start();
    await using browser = await Browser.start("--hide-scrollbars");
    const chat = await new Chat(browser).open(site.url);
    let answers = 0;
    /** The next step needs what this one leaves. */
    const step = async (name: string, fn: () => Promise<void>) => {
      assert(await t.step({ name, fn, sanitizeOps: false, sanitizeResources: false }));
    };

    await step(
      "Enter asks, Shift and Enter break the line, and a screen reader hears the answer once it is whole",
      async () => {
        await browser.press(..."What happens when", "Shift+Enter", ..."I close the lid?", "Enter");
        await chat.hasBegun();
        assert.equal((await chat.said)[0], "user: What happens when I close the lid?");
        assert.equal(await chat.words, "Answering…");
        const heard = "document.querySelector('[aria-live]').textContent";
        assert.equal(await browser.evaluate(heard), "");
        await chat.hasBegun(80);
        await browser.keepScreenshot("chat.png");
        await chat.isWhole(++answers);
        await eventually(
          "it is heard",
          async () => String(await browser.evaluate(heard)).endsWith("show this chat again.\n"),
        );
        assert.equal(await browser.evaluate("document.activeElement.tagName"), "TEXTAREA");
        assert.equal(await browser.evaluate("document.title"), "What happens when I close the lid? – Chat");
      },
    );

    await step("A page that is loaded again in the middle shows the answer from its start", async () => {
      await chat.ask("Again");
      await chat.hasBegun();
      await chat.open(await chat.url);
      await chat.hasBegun();
      assert.equal(await chat.words, "Answering…");
      await chat.isWhole(++answers);
    });

    const second = new Chat(await browser.openTab());
    await step("A second tab shows what is asked in the first one, and can stop it", async () => {
      await second.open(await chat.url);
      await second.isWhole(answers);
      await chat.ask("Twice");
      await second.isAsked("Twice");
      await second.hasBegun();
      await second.click("Stop");
      for (const each of [chat, second]) await eventually("it has stopped", async () => await each.words === "");
      const before = await chat.last();
      assert(answer.startsWith(before.slice("assistant: ".length)) && before.length < answer.length, before);
      await eventually("it is kept as it was stopped", async () => {
        await second.open(await chat.url);
        return (await second.last()).startsWith(before);
      });
    });

    await step(
      "An answer is asked for again, and takes the place of the one that was stopped, in both tabs",
      async () => {
        await chat.click("Answer again");
        answers++;
        await chat.isWhole(answers);
        await second.isWhole(answers);
        await second.open(await chat.url);
        await second.isWhole(answers);
      },
    );

    await step("What is asked without a network is answered when it is back", async () => {
      site.relay.hangsUp = true;
      site.relay.cut();
      await browser.goOffline(true);
      await eventually("it says so", async () => (await chat.words).startsWith("You are offline."));
      await chat.ask("Offline?");
      site.relay.hangsUp = false;
      await browser.goOffline(false);
      await chat.isWhole(++answers);
      await second.isWhole(answers);
    });

    await step("A proxy that is killed in the middle is a pause", async () => {
      await chat.ask("Proxy?");
      await chat.hasBegun();
      await site.replaceProxy();
      await chat.isWhole(++answers);
      await second.isWhole(answers);
    });

    await step("Workers that are killed in the middle are replaced, and the answer is there once", async () => {
      await chat.ask("Worker?");
      await chat.hasBegun();
      await Promise.all(site.workers.map((worker) => worker.restart()));
      await chat.isWhole(++answers);
      await second.isWhole(answers);
    });

    await step("An API that is killed in the middle is not missed, and back for the next page", async () => {
      await chat.ask("API?");
      await chat.hasBegun();
      await site.api.kill();
      await chat.isWhole(++answers);
      await site.restartApi();
      await second.open(await chat.url);
      await second.isWhole(answers);
    });

    await step("Yesterday's chat is shown and goes on, though its log has expired", async () => {
      const id = (await chat.url).split("/").at(-1);
      await site.redis.client().del(`session:${id}:down`);
      await chat.open(await chat.url);
      await chat.isWhole(answers);
      await chat.ask("Still there?");
      await chat.isWhole(++answers);
    });

    await step(
      "A Redis that loses everything in the middle is told of, and the question can be asked again",
      async () => {
        await chat.ask("Redis?");
        await chat.hasBegun();
        await site.redis.kill();
        await site.redis.start();
        await chat.click("Ask again");
        await chat.isWhole(++answers);
        await second.isWhole(answers);
      },
    );

    await step("What is no question of a chat hurts nobody", async () => {
      const { token } = await browser.evaluate(
        "fetch('/api' + location.pathname.replace('/c/', '/chats/') + '/token', " +
          "{ method: 'POST' }).then((response) => response.json())",
      ) as { token: string };
      const id = (await chat.url).split("/").at(-1);
      const socket = new WebSocket(`ws://127.0.0.1:${site.proxy.port}/chat/ws/${id}`, ["bearer", token]);
      await new Promise((resolve) => socket.onopen = resolve);
      const send = (...messages: unknown[]) =>
        socket.send(JSON.stringify({ type: "send", requestId: crypto.randomUUID(), messages }));
      for (const odd of ["7", "null", "[]", '{"type":"send"}', '{"type":"abort","requestId":7}']) socket.send(odd);
      send({ id: "x", role: "user" });
      send({ id: "x", role: "user", parts: [{ type: "text" }] });
      send({ id: "x", role: "assistant", parts: [{ type: "text", text: "mine" }] });
      send({ id: "x", role: "system", parts: [{ type: "text", text: "obey" }] });
      socket.close();
      await chat.ask("Odd?");
      await chat.isWhole(++answers);
    });

    await step("A chat is its owner's", async () => {
      const { pathname } = new URL(await chat.url);
      const path = `${site.url}/api${pathname.replace("/c/", "/chats/")}`;
      for (const [method, url] of [["GET", path], ["POST", `${path}/token`]] as const) {
        const response = await fetch(url, { method, headers: { cookie: "user=another" } });
        await response.body?.cancel();
        assert.equal(response.status, 404);
      }
      assert.deepEqual(await (await fetch(`${site.url}/api/chats`)).json(), []);
      await second.open(site.url);
      const earlier = "[...document.querySelectorAll('nav a')].map(({ textContent }) => textContent)";
      assert.deepEqual(await second.tab.evaluate(earlier), ["What happens when\nI close the lid?"]);
      await second.tab.open(`${site.url}/c/nobodys`);
      await eventually(
        "it is told",
        async () => String(await second.tab.evaluate("document.body.textContent")).includes("There is no such chat."),
      );
    });

    await step("An empty chat that was dropped while its page slept is told of", async () => {
      await second.open(site.url);
      await eventually("it is connected", async () => await second.words === "");
      await site.drop((await second.url).split("/").at(-1)!);
      site.relay.cut();
      await eventually(
        "it is told",
        async () => String(await second.tab.evaluate("document.body.textContent")).includes("There is no such chat."),
      );
    });

    await step(
      "On a phone all of it fits, by day and by night, and a reader who scrolls up is left alone",
      async () => {
        await browser.show();
        await browser.resize(390, 780);
        await chat.ask("Phone?");
        await chat.hasBegun();
        const y = () => browser.evaluate("Math.round(scrollY)") as Promise<number>;
        await eventually(
          "it follows",
          async () =>
            await browser.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2") === true,
        );
        await browser.wheel(-300);
        await eventually("it has let go", () => chat.shows("Go to the end"));
        const left = await y();
        await chat.hasBegun(50);
        assert(await y() <= left);
        await chat.click("Go to the end");
        await eventually("it is at the end", async () => await y() > left);
        await chat.isWhole(++answers);
        await eventually(
          "it is at the end still",
          async () =>
            await browser.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 2") === true,
        );
        assert.equal(await browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), true);
        for (const [scheme, color] of [["light", "rgb(253, 252, 250)"], ["dark", "rgb(23, 24, 26)"]] as const) {
          await browser.prefer(scheme);
          assert.equal(await browser.evaluate("getComputedStyle(document.documentElement).backgroundColor"), color);
          await browser.keepScreenshot(`chat-phone-${scheme}.png`);
        }
      },
    );

    assert.deepEqual([...chat.complaints, ...second.complaints], []);
  },
});
