/** The page of examples/chat, as its reader sees it. */

import assert from "node:assert/strict";
import { run } from "../harness/python.ts";
import { eventually } from "../harness/wait.ts";
import type { Tab } from "./browser.ts";

/** The folder of examples/chat. */
export const folder = new URL("../../examples/chat", import.meta.url).pathname;

/** Installs what the page and its backend need, unless it is there. */
export async function installPage(): Promise<void> {
  await run(Deno.execPath(), "task", "--quiet", "--cwd", `${folder}/../..`, "chat", "--install");
}

/** Builds the page into a folder. */
export async function buildPage(into = `${folder}/dist`): Promise<void> {
  await run("sh", "-c", `cd ${folder} && node_modules/.bin/vite build --logLevel error --emptyOutDir --outDir ${into}`);
}

/** Longer than a lease, and the time that clients wait before they come back. */
const takeoverMs = 30_000;

/** The kept answer as a page shows it. */
export const answer = Deno.readTextFileSync(`${folder}/backend/answer.md`)
  .replaceAll(/^\d+\. /gm, "").replaceAll(/[*`]/g, "").replaceAll(/\s+/g, " ").trim();

/** What stands on a page. */
export interface Shown {
  /** It is a chat, and not what a browser or the page shows in its place. */
  readonly isChat: boolean;
  /** What was said, each after the name of who said it. */
  readonly said: string[];
  /** About the connection. */
  readonly words: string;
  readonly buttons: string[];
  /** What has failed. */
  readonly failure: string;
}

const look = `(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const textOf = (selector) => all(selector).map((each) => each.textContent).join(" ");
  return {
    isChat: document.activeElement?.tagName === "TEXTAREA",
    said: all("article").map(({ className, children: [, ...parts], childNodes }) =>
      className + ": " + (className === "user" ? childNodes[1].data : parts.map((part) => part.textContent).join(" "))
        .replaceAll(/\\s+/g, " ").trim()),
    words: textOf(".state"),
    buttons: all("button").map((each) => each.textContent),
    failure: textOf(".failure p"),
  };
})()`;

/** What a tab shows of the chat. */
export class Chat {
  constructor(readonly tab: Tab) {}

  async open(url: string): Promise<this> {
    await this.tab.open(url);
    await eventually("the page is there", async () => (await this.look()).isChat);
    return this;
  }

  async #get<T>(expression: string): Promise<T> {
    return await this.tab.evaluate(expression) as T;
  }

  get url(): Promise<string> {
    return this.#get("location.href");
  }

  /** All that it shows, at one moment. */
  async look(): Promise<Shown> {
    return await this.tab.evaluate(look) as Shown;
  }

  /** What it complains of, besides what it asked for in vain, of which Chromium itself tells. */
  get complaints(): string[] {
    return this.tab.complaints.filter((text) => !/^Failed to load resource|^WebSocket connection to/.test(text));
  }

  /** What was said, each after the name of who said it. */
  get said(): Promise<string[]> {
    return this.look().then(({ said }) => said);
  }

  async last(): Promise<string> {
    return (await this.said).at(-1) ?? "";
  }

  get words(): Promise<string> {
    return this.look().then(({ words }) => words);
  }

  /** Types into whatever has the focus, as a person would. */
  async ask(text: string): Promise<void> {
    await this.tab.press(...text, "Enter");
    await this.isAsked(text);
  }

  async isAsked(text: string): Promise<void> {
    await eventually(`"${text}" is asked`, async () => (await this.said).includes(`user: ${text}`));
  }

  /** The answer to the last question is under way, and has so many words at the least. */
  async hasBegun(words = 10): Promise<void> {
    await eventually("an answer begins", async () => {
      const last = await this.last();
      return last.startsWith("assistant: ") && last.split(" ").length > words;
    });
  }

  /** Everything asked is answered, and no answer is short, doubled or under way. */
  async isWhole(count: number, forMs = takeoverMs): Promise<void> {
    let said: string[] = [];
    const expected = Array.from({ length: count }, () => `assistant: ${answer}`);
    await eventually(`${count} whole answers`, async () => {
      const { words, ...shown } = await this.look();
      said = shown.said;
      return words === "" && said.length === 2 * count && said.at(-1) === expected[0];
    }, forMs).catch((error) => {
      throw new Error(`${error.message}: ${JSON.stringify(said.at(-1))}, the ${said.length}th`);
    });
    assert.deepEqual(said.filter((_, n) => n % 2 === 1), expected);
  }

  async click(name: string): Promise<void> {
    await eventually(`there is ${name}`, () => this.clickIfShown(name));
  }

  /** Clicks the first button that has one of these names, unless there is none; the page has heard of it then. */
  clickIfShown(...names: string[]): Promise<boolean> {
    return this.#get(`(async () => {
      const all = [...document.querySelectorAll("button")];
      const button = all.find(({ textContent }) => ${JSON.stringify(names)}.includes(textContent));
      button?.click();
      await new Promise((resolve) => setTimeout(resolve));
      return button !== undefined;
    })()`);
  }

  /** Whether there is a button of this name. */
  async shows(name: string): Promise<boolean> {
    return (await this.look()).buttons.includes(name);
  }
}
