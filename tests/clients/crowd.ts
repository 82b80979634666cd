/** The clients that are tortured, as torture.ts sees them: processes and pages of clients, and what the oracle knows. */

import { Browser } from "../browser/browser.ts";
import { lines } from "../harness/process.ts";
import type { Relay } from "../harness/relay.ts";
import type { Runtime } from "../harness/runtimes.ts";
import { secret } from "../harness/token.ts";
import { soon } from "../harness/wait.ts";
import { type Backend, count, type Harms, pause } from "../torture/parts.ts";
import type { Orders, Report, Status, Summary } from "./tortured.js";

/** What happened to the clients of one runtime. */
export interface ClientTortureReport {
  received: number;
  gaps: number;
  connects: number;
  submitted: number;
  acknowledged: number;
  unsent: Record<string, number>;
  ended: number;
  heapMb: number;
  /** After the last harm, until all were at rest. */
  restSecs: number;
}

/** One session's client, as its process tells of it; beside it the oracle. */
export class Suspect {
  readonly faults: string[] = [];
  readonly acknowledged = new Set<number>();
  last = 0;
  status: Status | undefined;
  #toldOfGap = true;
  constructor(readonly session: string, readonly relay: Relay, readonly backend: Backend) {}

  see({ event, number = 0, reason = "" }: Report, counts: ClientTortureReport): void {
    switch (event) {
      case "message":
        if (number !== this.last + 1 && (!this.#toldOfGap || number <= this.last)) {
          this.faults.push(`${this.session}: ${number} after ${this.last}`);
        }
        this.#toldOfGap = false;
        this.last = number;
        counts.received++;
        break;
      case "gap":
        this.#toldOfGap = true;
        counts.gaps++;
        break;
      case "open":
        counts.connects++;
        break;
      case "submitted":
        counts.submitted++;
        break;
      case "acknowledged":
        this.acknowledged.add(number);
        counts.acknowledged++;
        break;
      case "unsent":
        count(counts.unsent, reason);
        break;
      case "fault":
        this.faults.push(`${this.session}: ${reason}`);
        break;
      case "closed":
        if (!reason.startsWith("1000")) counts.ended++;
    }
  }

  /** What keeps it from being at rest; undefined when nothing does. */
  get unrest(): string | undefined {
    const { open, live, pending, carriers } = this.status ?? {};
    if (open && live && pending === 0 && carriers?.length === 1 && this.last === this.backend.sent) {
      return undefined;
    }
    return `${this.session} ${JSON.stringify(this.status)} ${this.last}/${this.backend.sent}`;
  }
}

/** Memory that may be in use at the end beyond what was in use at first, in MB. */
const maxGrowthMb = 30;

/** The clients of one runtime. */
export abstract class Crowd implements AsyncDisposable {
  readonly counts: ClientTortureReport = {
    ...{
      received: 0,
      gaps: 0,
      connects: 0,
      submitted: 0,
      acknowledged: 0,
      unsent: {},
      ended: 0,
      heapMb: 0,
      restSecs: 0,
    },
  };
  /** What only this runtime goes through. */
  readonly harms: Harms = {};
  #heapMbAtFirst: number | undefined;
  #carriers: readonly (readonly number[])[] = [];
  #hadTooManyTimers = false;
  constructor(readonly name: string, readonly suspects: readonly Suspect[]) {}

  abstract calm(): Promise<void>;
  protected abstract summarize(): Promise<Summary>;
  abstract [Symbol.asyncDispose](): Promise<void>;

  protected hear(report: Report): void {
    this.suspects.find(({ session }) => session === report.session)!.see(report, this.counts);
  }

  /** What its clients have too much of, and had when it was last asked: what ends at the moment is not too much. */
  async excess(): Promise<string[]> {
    const { clients, timers } = await this.summarize();
    const excess = clients.flatMap(({ carriers }, n) => {
      const lasting = carriers.filter((each) => this.#carriers[n]?.includes(each));
      return lasting.length > 1 ? [`${this.suspects[n]!.session} has more than one socket or stream`] : [];
    });
    const hasTooManyTimers = timers > clients.length;
    if (hasTooManyTimers && this.#hadTooManyTimers) excess.push("there are more timers than clients");
    this.#carriers = clients.map(({ carriers }) => carriers);
    this.#hadTooManyTimers = hasTooManyTimers;
    return excess.map((each) => `${this.name}: ${each}`);
  }

  /** What keeps its clients from being at rest. */
  async unrest(): Promise<string[]> {
    const { clients, timers, listeners, heapMb } = await this.summarize();
    this.#heapMbAtFirst ??= heapMb;
    this.counts.heapMb = heapMb;
    for (const [n, suspect] of this.suspects.entries()) suspect.status = clients[n];
    const unrest = this.suspects.map(({ unrest }) => unrest).filter((each) => each !== undefined);
    const { length } = clients;
    if (timers !== length) unrest.push(`${timers} timers of ${length} clients`);
    // Of each client those of `online` and `pageshow`, in a page two more; and none in Python.
    if (![0, 2, 4].some((each) => listeners === each * length)) {
      unrest.push(`${listeners} listeners of ${length} clients`);
    }
    if (heapMb - this.#heapMbAtFirst > maxGrowthMb) unrest.push(`${heapMb} MB after ${this.#heapMbAtFirst}`);
    return unrest.map((each) => `${this.name}: ${each}`);
  }
}

/** How clients are reached: `ws://` or `wss://`, and who vouches for the certificate. */
export interface Approach {
  readonly scheme: "ws" | "wss";
  /** A file of PEM. */
  readonly ca?: string;
}

/** What a crowd is to do. Every other client goes by SSE, where its runtime can. */
function ordersFor(suspects: readonly Suspect[], { scheme }: Approach, seed: number, sse = true): Orders {
  const clients = suspects.map(({ session, relay }, n) => ({
    session,
    url: `${scheme}://127.0.0.1:${relay.port}/agent/ws/${session}`,
    sse: sse && n % 2 === 1,
  }));
  return { clients, secret, seed };
}

/** A process of clients. */
export class ClientProcess extends Crowd {
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #ended: Promise<unknown>;
  #told: ((summary: Summary) => void) | undefined;

  constructor(runtime: Runtime, suspects: readonly Suspect[], approach: Approach, seed: number) {
    super(runtime.name, suspects);
    const orders = ordersFor(suspects, approach, seed, runtime.sse);
    const { ca = "" } = approach;
    const trust: Record<string, string> = ca ? { DENO_CERT: ca, NODE_EXTRA_CA_CERTS: ca, SSL_CERT_FILE: ca } : {};
    this.#child = new Deno.Command(runtime.command, {
      args: [...runtime.args, JSON.stringify(orders), ...runtime.ws ? [runtime.ws] : []],
      env: { NO_COLOR: "1", ...trust, ...runtime.env },
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    this.#stdin = this.#child.stdin.getWriter();
    this.#ended = lines(this.#child.stdout).until((line) => {
      const report = JSON.parse(line);
      if (report.event === "summary") this.#told?.(report);
      else this.hear(report);
      return false;
    }).catch(() => {});
  }

  async #tell(word: "calm" | "summarize"): Promise<void> {
    await this.#stdin.write(new TextEncoder().encode(`${word}\n`));
  }

  override calm(): Promise<void> {
    return this.#tell("calm");
  }

  protected override async summarize(): Promise<Summary> {
    const told = new Promise<Summary>((resolve) => this.#told = resolve);
    await this.#tell("summarize");
    return await soon(told, `the summary of ${this.name}`);
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    await this.#stdin.close().catch(() => {});
    try {
      this.#child.kill("SIGKILL");
    } catch {
      // It has ended.
    }
    await this.#child.status;
    await this.#ended;
  }
}

const root = new URL("../../", import.meta.url);
/** The page, and the modules that it asks for by their places here. */
const modules = ["tests/clients/tortured.js", "clients/js/wsproxy.js"];

/** A page of clients, in a Chromium of its own. */
export class ClientPage extends Crowd {
  readonly #stack = new AsyncDisposableStack();
  #browser: Browser | undefined;

  /** Starts one; `random` says how long a harm lasts. */
  static async open(suspects: readonly Suspect[], approach: Approach, seed: number, random: () => number) {
    const page = new ClientPage("chromium", suspects);
    try {
      await page.#open(ordersFor(suspects, approach, seed), random);
    } catch (error) {
      await page[Symbol.asyncDispose]();
      throw error;
    }
    return page;
  }

  async #open(orders: Orders, random: () => number): Promise<void> {
    const html = `<!doctype html><script type="module">
      import { begin } from "/${modules[0]}";
      const orders = ${JSON.stringify(orders)};
      const print = (each) => report(JSON.stringify(each));
      const { session } = orders.clients[0];
      addEventListener("unhandledrejection", ({ reason }) => print({ session, event: "fault", reason: String(reason) }));
      addEventListener("error", ({ message }) => print({ session, event: "fault", reason: message }));
      globalThis.clients = begin(orders, WebSocket, print);
    </script>`;
    const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
      const path = new URL(url).pathname.slice(1);
      const [type, body] = modules.includes(path)
        ? ["text/javascript", Deno.readTextFileSync(new URL(path, root))]
        : ["text/html", html];
      return new Response(body, { headers: { "Content-Type": type } });
    });
    this.#stack.defer(() => server.shutdown());
    const browser = this.#browser = this.#stack.use(await Browser.start("--ignore-certificate-errors"));
    await browser.bind("report", (text) => this.hear(JSON.parse(text)));
    await browser.open(`http://127.0.0.1:${server.addr.port}/`);
    const lasting = async (begin: () => Promise<void>, end: () => Promise<void>) => {
      await begin();
      await pause(random() * 1500);
      await end();
    };
    Object.assign(this.harms, {
      freezePage: () => lasting(() => browser.freeze(true), () => browser.freeze(false)),
      goOffline: () => lasting(() => browser.goOffline(true), () => browser.goOffline(false)),
    });
  }

  override async calm(): Promise<void> {
    await this.#browser!.evaluate("clients.calm()");
  }

  protected override async summarize(): Promise<Summary> {
    const heapMb = await this.#browser!.heapMb();
    return { ...await this.#browser!.evaluate("clients.summarize()") as Summary, heapMb };
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}
