/**
 * The clients tortured: processes of several runtimes, through relays that cut, stall, blackhole, slow and refuse, to a
 * proxy that is killed, frozen and drained, with tokens that run out, hang, fail and are forged. What an oracle wants:
 * every logged message once and in order, or a gap told before anything newer; every message whose receipt came is in a
 * backend's hands; and at the end every client is live again within seconds, with one socket or stream, and one timer.
 */

import type { Redis } from "ioredis";
import { downChannel, upChannel } from "../../src/redis/link.ts";
import { lines } from "../harness/process.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { allRuntimes, type Runtime } from "../harness/runtimes.ts";
import { secret } from "../harness/token.ts";
import { patienceMs, soon } from "../harness/wait.ts";
import { Backend, createRandom, type Harms, oneOf, option, pause, Victim } from "../torture/parts.ts";
import type { Orders, Report, Status } from "./tortured.js";

/** What is tortured, and for how long. */
export interface ClientTortureOptions {
  readonly seconds: number;
  /** The same seed does the same things, as far as clocks and the kernel do. */
  readonly seed: number;
  readonly engine: string;
  readonly runtimes: readonly Runtime[];
  /** Sessions of each runtime, every other one over SSE. */
  readonly sessions: number;
}

/** What happened to one runtime's clients. */
export interface ClientTortureReport {
  received: number;
  gaps: number;
  connects: number;
  submitted: number;
  acknowledged: number;
  unsent: Record<string, number>;
  ended: number;
  heapMb: number;
}

/** One session's client, as its process tells of it; beside it the oracle. */
class Suspect {
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
        counts.unsent[reason] = (counts.unsent[reason] ?? 0) + 1;
        break;
      case "closed":
        if (!reason.startsWith("1000")) counts.ended++;
    }
  }

  /** What keeps it from being at rest; undefined when nothing does. */
  get unrest(): string | undefined {
    const { open, live, pending } = this.status ?? {};
    if (open && live && pending === 0 && this.status?.carriers === 1 && this.last === this.backend.sent) {
      return undefined;
    }
    return `${this.session} ${JSON.stringify(this.status)} ${this.last}/${this.backend.sent}`;
  }
}

/** A process of clients. */
class ClientProcess implements AsyncDisposable {
  readonly counts: ClientTortureReport = {
    ...{ received: 0, gaps: 0, connects: 0, submitted: 0, acknowledged: 0, unsent: {}, ended: 0, heapMb: 0 },
  };
  readonly #child: Deno.ChildProcess;
  readonly #stdin: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #ended: Promise<unknown>;
  #told: (() => void) | undefined;

  constructor(readonly runtime: Runtime, readonly suspects: readonly Suspect[], seed: number) {
    const clients = suspects.map(({ session, relay }, n) => ({ session, port: relay.port, sse: n % 2 === 1 }));
    const orders: Orders = { clients, secret, seed };
    const program = new URL("tortured_program.js", import.meta.url).pathname;
    this.#child = new Deno.Command(runtime.command, {
      args: [...runtime.args, program, JSON.stringify(orders), ...runtime.ws ? [runtime.ws] : []],
      env: { NO_COLOR: "1" },
      stdin: "piped",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    this.#stdin = this.#child.stdin.getWriter();
    this.#ended = lines(this.#child.stdout).until((line) => this.#hear(JSON.parse(line))).catch(() => {});
  }

  #hear(report: Report): false {
    if (report.event === "status") {
      const statuses = report["status"] as Status[];
      this.counts.heapMb = Number(report["heapMb"]);
      for (const [n, suspect] of this.suspects.entries()) suspect.status = statuses[n];
      this.#told?.();
    } else this.suspects.find(({ session }) => session === report.session)!.see(report, this.counts);
    return false;
  }

  async tell(word: "calm" | "status"): Promise<void> {
    const told = new Promise<void>((resolve) => this.#told = resolve);
    await this.#stdin.write(new TextEncoder().encode(`${word}\n`));
    if (word === "status") await soon(told, `the status of ${this.runtime.name}`);
  }

  /** What keeps its clients from being at rest. */
  async unrest(): Promise<string[]> {
    await this.tell("status");
    const unrest = this.suspects.map(({ unrest }) => unrest).filter((each) => each !== undefined);
    const timers = this.suspects[0]?.status?.timers;
    if (timers !== this.suspects.length) unrest.push(`${timers} timers of ${this.suspects.length} clients`);
    return unrest.map((each) => `${this.runtime.name}: ${each}`);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stdin.close().catch(() => {});
    this.#child.kill("SIGKILL");
    await this.#child.status;
    await this.#ended;
  }
}

/** A server that refuses in every way that something between may have. */
function refuser(random: () => number): Deno.HttpServer<Deno.NetAddr> {
  const answers = [
    () => new Response("no such route", { status: 404 }),
    () => new Response("bad gateway", { status: 502 }),
    () => new Response("draining", { status: 503, headers: { "Retry-After": "1" } }),
    () => new Response("too many", { status: 429 }),
    () => new Response("<html>log in to this network</html>", { headers: { "Content-Type": "text/html" } }),
  ];
  return Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, () => oneOf(answers, random)());
}

/** All that backends were given: over the channels while they are subscribed, and in the inbox. */
class Heard {
  readonly #texts = new Set<string>();
  readonly #client: Redis;
  constructor(redis: RedisServer, readonly sessions: readonly string[]) {
    this.#client = redis.client();
    this.#client.on("message", (_channel, text: string) => this.#texts.add(text));
  }
  async subscribe(): Promise<void> {
    await this.#client.subscribe(...this.sessions.map(upChannel));
  }
  /** For a while no backend is there. */
  async leave(ms: number): Promise<void> {
    await this.#client.unsubscribe();
    await pause(ms);
    await this.subscribe();
  }
  async all(control: Redis): Promise<ReadonlySet<string>> {
    for (const [, fields] of await control.xrange("agent:agent:inbox", "-", "+")) {
      const at = fields.indexOf("data");
      if (at >= 0) this.#texts.add(fields[at + 1]!);
    }
    return this.#texts;
  }
}

/** Tortures for a while. @throws what the oracle has seen, or what does not come to rest. */
export async function tortureClients(options: ClientTortureOptions): Promise<Record<string, ClientTortureReport>> {
  const { seconds, seed, engine, runtimes, sessions } = options;
  const random = createRandom(seed);
  await using redis = await RedisServer.start();
  const control = redis.client();
  await using victim = new Victim(redis.url, {
    WS_ENGINE: engine,
    INBOX: random() < 0.5 ? "true" : "false",
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "2",
    SHUTDOWN_GRACE_PERIOD_SECS: "1",
  });
  await victim.start();
  await using refusing = refuser(random);
  // The kernel accepts connections for it, and nobody answers.
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  await using stack = new AsyncDisposableStack();
  const processes = runtimes.map((runtime, r) => {
    const suspects = Array.from({ length: sessions }, (_, n) => {
      const session = `r${r}s${n}`;
      const backend = new Backend((...words) => control.call("FCALL", "wsproxy_send", 1, ...words), session, random);
      return new Suspect(session, stack.use(new Relay(victim.port!)), backend);
    });
    return stack.use(new ClientProcess(runtime, suspects, seed + r));
  });
  const suspects = processes.flatMap(({ suspects }) => suspects);
  const names = suspects.map(({ session }) => session);
  const heard = new Heard(redis, names);
  await heard.subscribe();
  const some = <T>(items: readonly T[]) => oneOf(items, random);
  const relay = () => some(suspects).relay;
  const lasting = new Set<Promise<void>>();
  /** A harm that lasts, beside others. */
  const lasts = (ms: number, begin: () => void, end: () => void) => {
    begin();
    const done = pause(random() * ms).then(end).finally(() => lasting.delete(done));
    lasting.add(done);
  };
  const restart = async (end: () => Promise<unknown>) => {
    const { port } = victim;
    await end();
    await victim.start();
    for (const { relay } of suspects) if (relay.target === port) relay.target = victim.port!;
  };
  /** For a while some clients come to another server. */
  const detour = (port: number) => {
    const chosen = suspects.filter(() => random() < 0.3).map(({ relay }) => relay);
    const lead = (target: () => number) => {
      for (const relay of chosen) {
        relay.target = target();
        relay.cut();
      }
    };
    lasts(1500, () => lead(() => port), () => lead(() => victim.port!));
  };
  const harms: Harms = {
    cut: () => relay().cut(),
    cutMany: () => suspects.forEach(({ relay }) => random() < 0.5 && relay.cut()),
    cutSoon() {
      const chosen = relay();
      const bytes = () => Math.floor(random() * 5000);
      chosen.budgets = Array.from({ length: 3 }, () => (random() < 0.5 ? { down: bytes() } : { up: bytes() }));
      chosen.cut();
    },
    blackhole: () => suspects.forEach(({ relay }) => random() < 0.2 && relay.freezeAll()),
    stall(chosen = relay()) {
      lasts(800, () => chosen.freezeAll(), () => chosen.thawAll());
    },
    slow(chosen = relay()) {
      lasts(1000, () => (chosen.delayMs = 40, chosen.bytesPerSec = 20_000), () => {
        chosen.delayMs = 0;
        chosen.bytesPerSec = Infinity;
      });
    },
    hangUp(chosen = relay()) {
      lasts(1000, () => (chosen.hangsUp = true, chosen.cut()), () => chosen.hangsUp = false);
    },
    refuse: () => detour(refusing.addr.port),
    silence: () => detour(silent.addr.port),
    killProxy: () => random() < 0.3 && restart(() => victim.kill()),
    drainProxy: () =>
      random() < 0.3 && restart(async () => {
        victim.signal("SIGTERM");
        await victim.kill(1500);
      }),
    freezeProxy: () => victim.freeze(random() * 1000),
    trim: () => control.xtrim(downChannel(some(names)), "MAXLEN", Math.floor(random() * 20)),
    delete: () => random() < 0.3 && control.del(downChannel(some(names))),
    close: () => control.call("FCALL", "wsproxy_close", 1, downChannel(some(names)), some([1000, 3000, 4000]), "bye"),
    leave: () => random() < 0.5 && heard.leave(random() * 300),
  };
  const faults = () => suspects.flatMap(({ faults }) => faults);
  const endMs = performance.now() + seconds * 1000;
  while (performance.now() < endMs && faults().length === 0) {
    await Promise.resolve().then(harms[some(Object.keys(harms))]);
    await pause(random() * 400);
  }
  await Promise.all(lasting);
  for (const { relay } of suspects) {
    relay.budgets = [];
    relay.target = victim.port!;
  }
  // The last harm is one that only a client's own doubt ends.
  for (const [n, { relay }] of suspects.entries()) if (n % 3 === 0) relay.freezeAll();
  await pause(300);
  await Promise.all([
    ...suspects.map(({ backend }) => backend.stop()),
    ...processes.map((process) => process.tell("calm")),
  ]);
  // Waits for dead connections, for what a refusal says (Retry-After), and for a machine that has much to do.
  const restMs = performance.now();
  while (faults().length === 0) {
    const unrest = (await Promise.all(processes.map((process) => process.unrest()))).flat();
    if (unrest.length === 0) break;
    if (performance.now() - restMs > 3 * patienceMs) {
      throw new Error(`seed ${seed}: not at rest: ${unrest.slice(0, 5).join("; ")}`);
    }
    await pause(50);
  }
  const all = await heard.all(control);
  for (const { session, acknowledged, faults } of suspects) {
    const nowhere = [...acknowledged].filter((number) => !all.has(JSON.stringify(`${session}:${number}`)));
    if (nowhere.length > 0) faults.push(`${session}: no backend has ${nowhere.slice(0, 3)}, which were acknowledged`);
  }
  for (const { runtime, counts } of processes) {
    if (counts.heapMb > 100) suspects[0]!.faults.push(`${runtime.name} has a heap of ${counts.heapMb} MB`);
  }
  if (faults().length > 0) throw new Error(`seed ${seed}: ${faults().slice(0, 5).join("; ")}`);
  return Object.fromEntries(processes.map(({ runtime, counts }) => [runtime.name, counts]));
}

if (import.meta.main) {
  const seconds = Number(option("seconds", "60"));
  const seed = Number(option("seed", String(Date.now() % 1e9)));
  const runtimes = await allRuntimes();
  for (const engine of ["deno", "ws"]) {
    const report = await tortureClients({ seconds: seconds / 2, seed, engine, runtimes, sessions: 6 });
    console.log(JSON.stringify({ engine, seed, seconds: seconds / 2, ...report }, null, 2));
  }
  Deno.exit();
}
