/** A page in a headless Chromium, driven over the DevTools protocol. */

import { lines } from "../harness/process.ts";
import { eventually, soon } from "../harness/wait.ts";

const keyCodes: Readonly<Record<string, { code: number; text?: string } | undefined>> = {
  Tab: { code: 9 },
  Enter: { code: 13, text: "\r" },
  Escape: { code: 27 },
};

/** One browser with one page. */
export class Browser implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  #socket: WebSocket | undefined;
  #sent = 0;
  readonly #waiting = new Map<number, (reply: { result: unknown; error?: { message: string } }) => void>();
  readonly #output: ReturnType<typeof lines>;
  /** Addresses that the page has asked for. */
  readonly requested: string[] = [];
  /** What the page, or the browser about it, has complained of. */
  readonly complaints: string[] = [];

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
      const { id, method, params, ...reply } = JSON.parse(data);
      if (method !== undefined) return browser.#hear(method, params);
      browser.#waiting.get(id)?.(reply);
      browser.#waiting.delete(id);
    };
    await soon(new Promise((resolve) => socket.onopen = resolve), "the page's socket");
    for (const domain of ["Page", "Network", "Log", "Runtime"]) await browser.#command(`${domain}.enable`);
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

  /** Keeps a picture of the page, when the run was asked for them by `--screenshots DIR`. */
  async keepScreenshot(name: string): Promise<void> {
    const at = Deno.args.indexOf("--screenshots");
    if (at < 0) return;
    const { data } = await this.#command("Page.captureScreenshot", { format: "png" }) as { data: string };
    await Deno.writeFile(`${Deno.args[at + 1]}/${name}`, Uint8Array.from(atob(data), (char) => char.charCodeAt(0)));
  }

  /** Presses keys one after the other, as a keyboard does. */
  async press(...keys: string[]): Promise<void> {
    for (const key of keys) {
      const known = keyCodes[key];
      const text = known ? known.text : key;
      const event = { key, code: key, windowsVirtualKeyCode: known?.code ?? key.toUpperCase().charCodeAt(0) };
      await this.#command("Input.dispatchKeyEvent", { type: text ? "keyDown" : "rawKeyDown", text, ...event });
      await this.#command("Input.dispatchKeyEvent", { type: "keyUp", ...event });
    }
  }

  /** Whether the page is told that its reader likes it dark. */
  async prefer(scheme: "light" | "dark"): Promise<void> {
    await this.#command("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
  }

  /** Gives the page a size, in pixels. */
  async resize(width: number, height: number): Promise<void> {
    const metrics = { width, height, deviceScaleFactor: 1, mobile: false };
    await this.#command("Emulation.setDeviceMetricsOverride", metrics);
  }

  /** Takes the page its network, as far as the browser goes, or gives it back. */
  async goOffline(offline: boolean): Promise<void> {
    const conditions = { offline, latency: 0, downloadThroughput: -1, uploadThroughput: -1 };
    await this.#command("Network.emulateNetworkConditions", conditions);
  }

  /** Freezes the page as one that is not looked at for long, or wakes it. */
  async freeze(frozen: boolean): Promise<void> {
    await this.#command("Page.setWebLifecycleState", { state: frozen ? "frozen" : "active" });
  }

  // deno-lint-ignore no-explicit-any -- the protocol has a shape for each event
  #hear(method: string, params: any): void {
    if (method === "Network.requestWillBeSent") this.requested.push(params.request.url);
    if (method === "Log.entryAdded") this.complaints.push(params.entry.text);
    if (method === "Runtime.exceptionThrown") this.complaints.push(params.exceptionDetails.exception?.description);
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
