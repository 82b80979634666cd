/**
 * The pages of `deno task test:chat --page`: examples/chat as it is, built and served by its API, in a Chromium. What
 * stands there is read from the elements of the page, what is asked is typed, and a user's whole network is one relay.
 */

import { DatabaseSync } from "node:sqlite";
import type { UIMessage } from "ai";
import { sparePort } from "../../scripts/spare_port.ts";
import { Browser, type Tab as BrowserTab } from "../browser/browser.ts";
import { buildPage, Chat, folder, type Shown } from "../browser/chat_page.ts";
import { Relay } from "../harness/relay.ts";
import { socksHost } from "../harness/socks.ts";
import { secret } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { partsExpected } from "./chat_model.ts";
import type { Screen, Store, System, Tab, User } from "./chat_user.ts";
import { oneOf } from "./parts.ts";
import { type Process, processOf, spawn, startProgram } from "./processes.ts";

/** The names that a user's network knows. Pages of theirs are trusted without a certificate. */
const hosts = { api: "chat.localhost", proxy: "proxy.localhost" };
const python = `${folder}/.venv/bin/python`;
/** How long a user waits for what is to become right, in ms. */
const patienceMs = 60_000;
/** How long a page that is loaded may show nothing until its user loads it again, in ms. */
const blankMs = 3000;
/** The text parts of an answer are all that the page shows of it. */
const isShown = (part: string) => part.startsWith("text ");

/** A message as a page shows it. */
const messageOf = (role: UIMessage["role"], text: string, n: number): UIMessage =>
  role === "user"
    ? { id: text.replace("q-", ""), role, parts: [{ type: "text", text }] }
    : { id: `answer ${n}`, role, parts: text === "" ? [] : [{ type: "text", text: `${text} ` }] };

/** What its user waits for, if for anything. */
function statusOf({ isChat, said, buttons, words, failure }: Shown): string {
  if (!isChat) return "no chat";
  if (buttons.includes("Stop")) return said.at(-1)?.startsWith("assistant") ? "streaming" : "submitted";
  if (failure === "The answer broke off.") return "error";
  if (words !== "") return words;
  const canGoOn = said.length === 0 || buttons.includes("Answer again") || buttons.includes("Ask again");
  return canGoOn ? "ready" : "looking";
}

/** A tab that shows a chat. */
class PageTab implements Tab {
  readonly #chat: Chat;
  /** Since it was loaded. */
  #hasAsked = false;
  #hasResumed = false;

  constructor(readonly tab: BrowserTab, readonly user: User) {
    this.#chat = new Chat(tab);
  }

  /** Loads the chat, and again when nothing comes. */
  async open(url: string): Promise<this> {
    this.#hasAsked = this.#hasResumed = false;
    let navigatedMs = -Infinity;
    await eventually("the chat is loaded", async () => {
      if (performance.now() - navigatedMs > blankMs) {
        await this.tab.navigate(url);
        navigatedMs = performance.now();
      }
      // Chromium's own page for what cannot be loaded may be loading it again just now.
      return await this.#chat.look().then(({ isChat }) => isChat, () => false);
    }, patienceMs);
    return this;
  }

  get url(): Promise<string> {
    return this.#chat.url;
  }

  async look(): Promise<Screen> {
    const shown = await this.#chat.look();
    if (this.#chat.complaints.length > 0) throw new Error(`a page complains: ${this.#chat.complaints}`);
    const status = statusOf(shown);
    if (status === "streaming" && !this.#hasAsked && !this.#hasResumed) {
      this.#hasResumed = true;
      this.user.resumed++;
    }
    const messages = shown.said.map((line, n) => {
      const at = line.indexOf(": ");
      return messageOf(line.slice(0, at) as UIMessage["role"], line.slice(at + 2), n);
    });
    return { status, messages, error: shown.failure };
  }

  async ask({ id, text }: { readonly id: string; readonly text: string }): Promise<void> {
    await this.tab.press(...text);
    // There is no button while an answer comes, such as one that was asked for before the page was loaded.
    await eventually(`"${text}" is asked`, async () => {
      await this.tab.press("Enter");
      this.#hasAsked = true;
      return (await this.look()).messages.some((message) => message.id === id);
    }, patienceMs);
  }

  async askAgain(): Promise<boolean> {
    const isAsked = await this.#chat.clickIfShown("Ask again", "Answer again");
    this.#hasAsked ||= isAsked;
    return isAsked;
  }

  /** There is no button when the answer has just ended. */
  async stop(): Promise<void> {
    if (await this.#chat.shows("Stop")) await this.tab.press("Escape");
  }

  goOffline(offline: boolean): Promise<void> {
    return this.tab.goOffline(offline);
  }

  async reload(): Promise<Tab> {
    return await this.open(await this.url);
  }

  leave(): Promise<void> {
    return this.tab.close();
  }
}

/** All that serves the pages besides Redis, proxies and workers; and the browser. */
export class Pages implements System, Store, AsyncDisposable {
  readonly patienceMs = patienceMs;
  readonly lookMs = 100;
  readonly dropped: ReadonlySet<string> = new Set();
  readonly #apiPort = sparePort();
  readonly #profiles = new Map<User, () => Promise<BrowserTab>>();
  readonly #env: Record<string, string>;
  #db: DatabaseSync | undefined;

  private constructor(
    readonly root: string,
    readonly browser: Browser,
    redisUrl: string,
    readonly proxyPorts: () => number[],
  ) {
    this.#env = {
      ...{ REDIS_URL: redisUrl, JWT_SECRET: secret, DATABASE: `${root}/chat.sqlite` },
      PROXY_URL: `ws://${hosts.proxy}`,
    };
  }

  /** Builds the page, and starts a browser. */
  static async start(redisUrl: string, proxyPorts: () => number[]): Promise<Pages> {
    const root = await Deno.makeTempDir();
    // The API serves what is built beside it.
    await Deno.symlink(`${folder}/backend`, `${root}/backend`);
    await buildPage(`${root}/dist`);
    return new Pages(root, await Browser.start(), redisUrl, proxyPorts);
  }

  startWorker(): Promise<Process> {
    return startProgram("chat_page_worker.py", this.#env, { python });
  }

  async startApi(): Promise<Process> {
    const app = ["--app-dir", `${this.root}/backend`, "--log-level", "warning", "app:app"];
    const args = ["-m", "uvicorn", "--port", String(this.#apiPort), ...app];
    const api = processOf(spawn(python, args, this.#env, "inherit"), this.#apiPort);
    await eventually("the API answers", async () => {
      const response = await fetch(`http://127.0.0.1:${this.#apiPort}/`).catch(() => undefined);
      await response?.body?.cancel();
      return response?.ok === true;
    });
    return api;
  }

  /** The network of a user. */
  network(): Relay {
    return new Relay(async (client) => {
      if (await socksHost(client) === hosts.api) return this.#apiPort;
      const ports = this.proxyPorts();
      return ports.length > 0 ? oneOf(ports, Math.random) : 1;
    });
  }

  async open(user: User, i: number): Promise<Tab> {
    let openTab = this.#profiles.get(user);
    if (!openTab) this.#profiles.set(user, openTab = await this.browser.openProfile(user.relay.port));
    const tab = await openTab();
    await tab.look();
    const page = new PageTab(tab, user);
    if (i > 0) return await page.open(`http://${hosts.api}/c/${user.session}`);
    await page.open(`http://${hosts.api}/`);
    user.session = new URL(await page.url).pathname.replace("/c/", "");
    return page;
  }

  expected(question: string): readonly string[] {
    return partsExpected(question).filter(isShown);
  }

  of(session: string): { readonly messages: readonly UIMessage[] } {
    this.#db ??= new DatabaseSync(this.#env.DATABASE!, { readOnly: true });
    const rows = this.#db.prepare("SELECT message FROM messages WHERE chat = ? ORDER BY n").all(session);
    const messages = rows.map(({ message }, n) => {
      const { role, parts } = JSON.parse(String(message)) as UIMessage;
      const text = parts.map((part) => part.type === "text" ? part.text : "").join("");
      return messageOf(role, text.trim(), n);
    });
    return { messages };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.browser[Symbol.asyncDispose]();
    this.#db?.close();
    await Deno.remove(this.root, { recursive: true });
  }
}
