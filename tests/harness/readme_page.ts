/** A React page of clients/js/README.md in a document of its own, as it is printed but for its addresses. */

import assert from "node:assert/strict";
import { type HTMLElement, Window } from "happy-dom";
import { mint } from "./token.ts";
import { eventually } from "./wait.ts";

/** What the page is made of. */
export interface ReadmePageOptions {
  /** The block of the README, whose component is called `Page`. */
  readonly code: string;
  /** The module of clients/js that it imports, and the constant with what has to be closed in the end. */
  readonly module: string;
  readonly closes: string;
  /** Of the session `s1`. */
  readonly url: string;
  /** What the page loads, besides its token. */
  readonly history: () => unknown;
}

/** The page, which may be loaded several times, under StrictMode. */
export class ReadmePage implements AsyncDisposable {
  readonly #options: ReadmePageOptions;
  readonly #window = new Window();
  readonly #folder = Deno.makeTempDirSync();
  readonly #unload: (() => void)[] = [];
  readonly #server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    const { pathname } = new URL(request.url);
    return pathname === "/token" ? new Response(await mint("s1")) : Response.json(this.#options.history());
  });

  constructor(options: ReadmePageOptions) {
    this.#options = options;
    Object.assign(globalThis, { window: this.#window, document: this.#window.document });
  }

  /** Loads it once more. */
  async load(): Promise<LoadedPage> {
    const { code, module, closes, url } = this.#options;
    const { createElement, StrictMode } = await import("react");
    const { createRoot } = await import("react-dom/client");
    const text = code.replace(`"./${module}"`, `"${new URL(`../../clients/js/${module}`, import.meta.url)}"`)
      .replace("wss://example.com/agent/ws/demo", url).replace('threadId: "demo"', 'threadId: "t"')
      .replaceAll('fetch("', `fetch("http://127.0.0.1:${this.#server.addr.port}`);
    const file = `${this.#folder}/${this.#unload.length}.jsx`;
    await Deno.writeTextFile(file, `/** @jsxImportSource react */\n${text}\nexport { ${closes} };`);
    const { Page, [closes]: open } = await import(`file://${file}`);
    const element = this.#window.document.createElement("div");
    this.#window.document.body.appendChild(element);
    const root = createRoot(element as never);
    root.render(createElement(StrictMode, null, createElement(Page)));
    this.#unload.push(() => {
      root.unmount();
      open.close();
    });
    return new LoadedPage(this.#window, element);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const unload of this.#unload) unload();
    await this.#window.happyDOM.close();
    await this.#server.shutdown();
    await Deno.remove(this.#folder, { recursive: true });
  }
}

/** What a user sees and does. */
class LoadedPage {
  readonly #window: Window;
  readonly #element: HTMLElement;

  constructor(window: Window, element: HTMLElement) {
    this.#window = window;
    this.#element = element;
  }

  get html(): string {
    return this.#element.innerHTML;
  }

  /** Waits until it shows this. */
  async has(text: string): Promise<void> {
    await eventually(text, () => this.html.includes(text)).catch((error) => assert.equal(this.html, text, error));
  }

  /** Writes into its input, as React hears it. */
  write(text: string): void {
    const input = this.#element.querySelector("input")!;
    Object.getOwnPropertyDescriptor(this.#window.HTMLInputElement.prototype, "value")!.set!.call(input, text);
    input.dispatchEvent(new this.#window.Event("input", { bubbles: true }));
  }

  /** Presses its button. */
  press(): void {
    this.#element.querySelector("button")!.click();
  }
}
