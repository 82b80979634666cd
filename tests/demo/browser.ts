/** A page in a headless Chromium, driven over the DevTools protocol. */

import { lines } from "../harness/process.ts";
import { eventually, soon } from "../harness/wait.ts";

/** One browser with one page. */
export class Browser implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  #socket: WebSocket | undefined;
  #sent = 0;
  readonly #waiting = new Map<number, (reply: { result: unknown; error?: { message: string } }) => void>();
  readonly #output: ReturnType<typeof lines>;

  private constructor(profile: string) {
    this.#process = new Deno.Command("chromium", {
      args: [
        ...["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
        ...["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"],
        ...["--window-size=900,760", `--user-data-dir=${profile}`, "about:blank"],
      ],
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).spawn();
    this.#output = lines(this.#process.stderr);
  }

  /** Starts a browser. */
  static async start(): Promise<Browser> {
    const browser = new Browser(await Deno.makeTempDir());
    const line = await soon(browser.#output.until((line) => line.includes("DevTools listening on")), "a browser");
    browser.#output.drain();
    const { host } = new URL(line.slice(line.indexOf("ws://")));
    let page: string | undefined;
    await eventually("a page", async () => {
      const targets = await (await fetch(`http://${host}/json`)).json();
      page = targets.find(({ type }: { type: string }) => type === "page")?.webSocketDebuggerUrl;
      return page !== undefined;
    });
    const socket = browser.#socket = new WebSocket(page!);
    socket.onmessage = ({ data }) => {
      const { id, ...reply } = JSON.parse(data);
      browser.#waiting.get(id)?.(reply);
      browser.#waiting.delete(id);
    };
    await soon(new Promise((resolve) => socket.onopen = resolve), "the page's socket");
    await browser.#command("Page.enable");
    return browser;
  }

  /** Goes to an address, and waits until its modules have run. */
  async open(url: string): Promise<void> {
    await this.#command("Page.navigate", { url });
    await eventually("the page is there", async () => await this.evaluate("document.readyState") === "complete");
  }

  /** The value of an expression in the page. */
  async evaluate(expression: string): Promise<unknown> {
    const reply = await this.#command("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
    return (reply as { result: { value: unknown } }).result.value;
  }

  /** What the page looks like, as PNG. */
  async screenshot(): Promise<Uint8Array<ArrayBuffer>> {
    const { data } = await this.#command("Page.captureScreenshot", { format: "png" }) as { data: string };
    return Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  }

  #command(method: string, params: object = {}): Promise<unknown> {
    const id = ++this.#sent;
    const reply = new Promise((resolve, reject) =>
      this.#waiting.set(id, ({ result, error }) => error ? reject(new Error(error.message)) : resolve(result))
    );
    this.#socket!.send(JSON.stringify({ id, method, params }));
    return soon(reply, method);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket?.close();
    this.#process.kill("SIGKILL");
    await this.#process.status;
  }
}
