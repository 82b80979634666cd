/** Pages in a headless Chromium, driven over the DevTools protocol. */

import { lines } from "../harness/process.ts";
import { eventually, soon } from "../harness/wait.ts";

const keyCodes: Readonly<Record<string, { code: number; text?: string } | undefined>> = {
  Tab: { code: 9 },
  Enter: { code: 13, text: "\r" },
  Escape: { code: 27 },
};

/** As the protocol writes it. */
const shift = 8;

/** What the protocol's commands are given to. */
class Target {
  #socket: WebSocket | undefined;
  #sent = 0;
  readonly #waiting = new Map<number, (reply: { result: unknown; error?: { message: string } }) => void>();

  /** Connects to it by its address. */
  async attach(url: string): Promise<void> {
    const socket = this.#socket = new WebSocket(url);
    socket.onmessage = ({ data }) => {
      const { id, method, params, ...reply } = JSON.parse(data);
      if (method !== undefined) return this.hear(method, params);
      this.#waiting.get(id)?.(reply);
      this.#waiting.delete(id);
    };
    await soon(new Promise((resolve) => socket.onopen = resolve), "a socket of the browser's");
  }

  /** It is left as it is. */
  detach(): void {
    this.#socket?.close();
  }

  command(method: string, params: object = {}): Promise<unknown> {
    const id = ++this.#sent;
    const reply = new Promise((resolve, reject) =>
      this.#waiting.set(id, ({ result, error }) => error ? reject(new Error(error.message)) : resolve(result))
    );
    this.#socket!.send(JSON.stringify({ id, method, params }));
    return soon(reply, method);
  }

  // deno-lint-ignore no-explicit-any -- the protocol has a shape for each event
  protected hear(_method: string, _params: any): void {}
}

/** A tab of a browser. */
export class Tab extends Target {
  /** Addresses that the page has asked for. */
  readonly requested: string[] = [];
  /** What the page, or the browser about it, has complained of. */
  readonly complaints: string[] = [];

  readonly #bindings = new Map<string, (text: string) => void>();

  /** Connects to a tab by its address. */
  override async attach(url: string): Promise<void> {
    await super.attach(url);
    for (const domain of ["Page", "Network", "Log", "Runtime"]) await this.command(`${domain}.enable`);
  }

  /** Goes to an address, and does not wait for what comes. */
  async navigate(url: string): Promise<void> {
    await this.command("Page.navigate", { url });
  }

  /** Goes to an address, and waits until its modules have run. */
  async open(url: string): Promise<void> {
    await this.navigate(url);
    await eventually("the page is there", async () => await this.evaluate("document.readyState") === "complete");
  }

  /** The value of an expression in the page. */
  async evaluate(expression: string): Promise<unknown> {
    const reply = await this.command("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
    return (reply as { result: { value: unknown } }).result.value;
  }

  /** Gives the pages to come a function of one text, which calls this one. */
  async bind(name: string, called: (text: string) => void): Promise<void> {
    this.#bindings.set(name, called);
    await this.command("Runtime.addBinding", { name });
  }

  /** Memory in use by the page's JavaScript after a collection, in MB. */
  async heapMb(): Promise<number> {
    await this.command("HeapProfiler.collectGarbage");
    const { usedSize } = await this.command("Runtime.getHeapUsage") as { usedSize: number };
    return Math.round(usedSize / 2 ** 20);
  }

  /** Keeps a picture of the page, when the run was asked for them by `--screenshots DIR`. */
  async keepScreenshot(name: string): Promise<void> {
    const at = Deno.args.indexOf("--screenshots");
    if (at < 0) return;
    const { data } = await this.command("Page.captureScreenshot", { format: "png" }) as { data: string };
    await Deno.writeFile(`${Deno.args[at + 1]}/${name}`, Uint8Array.from(atob(data), (char) => char.charCodeAt(0)));
  }

  /** Presses keys one after the other, as a keyboard does; `Shift+Enter` is one. */
  async press(...keys: string[]): Promise<void> {
    for (const pressed of keys) {
      const key = pressed.replace("Shift+", "");
      const known = keyCodes[key];
      const text = known ? known.text : key;
      const code = known?.code ?? key.toUpperCase().charCodeAt(0);
      const event = { key, code: key, windowsVirtualKeyCode: code, modifiers: key === pressed ? 0 : shift };
      await this.command("Input.dispatchKeyEvent", { type: text ? "keyDown" : "rawKeyDown", text, ...event });
      await this.command("Input.dispatchKeyEvent", { type: "keyUp", ...event });
    }
  }

  /** Whether the page is told that its reader likes it dark. */
  async prefer(scheme: "light" | "dark"): Promise<void> {
    await this.command("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
  }

  /** Brings it in front of the other tabs: one that is behind them is not drawn, and does not see its size change. */
  async show(): Promise<void> {
    await this.command("Page.bringToFront");
  }

  /** Gives the page a size, in pixels. */
  async resize(width: number, height: number): Promise<void> {
    const metrics = { width, height, deviceScaleFactor: 1, mobile: false };
    await this.command("Emulation.setDeviceMetricsOverride", metrics);
  }

  /** Turns the wheel over the page, down by so many pixels. */
  async wheel(deltaY: number): Promise<void> {
    await this.command("Input.dispatchMouseEvent", { type: "mouseWheel", x: 100, y: 100, deltaX: 0, deltaY });
  }

  /** Puts headers on all that the page asks for. */
  async sendHeaders(headers: Record<string, string>): Promise<void> {
    await this.command("Network.setExtraHTTPHeaders", { headers });
  }

  /** Takes the page its network, as far as the browser goes, or gives it back. */
  async goOffline(offline: boolean): Promise<void> {
    const conditions = { offline, latency: 0, downloadThroughput: -1, uploadThroughput: -1 };
    await this.command("Network.emulateNetworkConditions", conditions);
  }

  /** Closes it. */
  async close(): Promise<void> {
    await this.command("Page.close");
    this.detach();
  }

  /** Lets the page take itself for the one that is looked at, as each is in a window of its own. */
  async look(): Promise<void> {
    await this.command("Emulation.setFocusEmulationEnabled", { enabled: true });
  }

  /** Freezes the page as one that is not looked at for long, or wakes it. */
  async freeze(frozen: boolean): Promise<void> {
    await this.command("Page.setWebLifecycleState", { state: frozen ? "frozen" : "active" });
  }

  // deno-lint-ignore no-explicit-any -- the protocol has a shape for each event
  protected override hear(method: string, params: any): void {
    if (method === "Network.requestWillBeSent") this.requested.push(params.request.url);
    if (method === "Log.entryAdded") this.complaints.push(params.entry.text);
    if (method === "Runtime.bindingCalled") this.#bindings.get(params.name)?.(params.payload);
    if (method === "Runtime.exceptionThrown") this.complaints.push(params.exceptionDetails.exception?.description);
  }
}

/** One browser, and its first tab. */
export class Browser extends Tab implements AsyncDisposable {
  readonly #process: Deno.ChildProcess;
  readonly #output: ReturnType<typeof lines>;
  #host = "";
  readonly #profiles: Target[] = [];

  private constructor(profile: string, flags: readonly string[]) {
    super();
    this.#process = new Deno.Command("chromium", {
      args: [
        ...["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
        ...["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"],
        ...["--window-size=900,760", `--user-data-dir=${profile}`, ...flags, "about:blank"],
      ],
      stdin: "null",
      stdout: "null",
      stderr: "piped",
    }).spawn();
    this.#output = lines(this.#process.stderr);
  }

  /** Starts a browser, with flags of Chromium. */
  static async start(...flags: string[]): Promise<Browser> {
    const browser = new Browser(await Deno.makeTempDir(), flags);
    const line = await soon(browser.#output.until((line) => line.includes("DevTools listening on")), "a browser");
    browser.#output.drain();
    browser.#host = new URL(line.slice(line.indexOf("ws://"))).host;
    let page: string | undefined;
    await eventually("a page", async () => {
      const targets = await (await fetch(`http://${browser.#host}/json`)).json();
      page = targets.find(({ type }: { type: string }) => type === "page")?.webSocketDebuggerUrl;
      return page !== undefined;
    });
    await browser.attach(page!);
    return browser;
  }

  /** Another tab, with the cookies of the first one. */
  async openTab(): Promise<Tab> {
    const target = await (await fetch(`http://${this.#host}/json/new?about:blank`, { method: "PUT" })).json();
    const tab = new Tab();
    await tab.attach(target.webSocketDebuggerUrl);
    return tab;
  }

  /**
   * Someone else at this browser, with cookies of their own, and a network that is a SOCKS proxy at this port. Returns what
   * opens a tab.
   */
  async openProfile(socksPort: number): Promise<() => Promise<Tab>> {
    const browser = new Target();
    const { webSocketDebuggerUrl } = await (await fetch(`http://${this.#host}/json/version`)).json();
    await browser.attach(webSocketDebuggerUrl);
    this.#profiles.push(browser);
    // A proxy is not asked for addresses of this machine, unless it is told to be.
    const proxy = { proxyServer: `socks5://127.0.0.1:${socksPort}`, proxyBypassList: "<-loopback>" };
    const context = await browser.command("Target.createBrowserContext", proxy) as { browserContextId: string };
    return async () => {
      const target = await browser.command("Target.createTarget", { url: "about:blank", ...context });
      const tab = new Tab();
      await tab.attach(`ws://${this.#host}/devtools/page/${(target as { targetId: string }).targetId}`);
      return tab;
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const profile of this.#profiles) profile.detach();
    this.detach();
    this.#process.kill("SIGKILL");
    await this.#process.status;
  }
}
