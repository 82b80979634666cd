/**
 * The clients tortured: in several runtimes and in pages, through relays that cut, stall, blackhole, slow and refuse, and
 * through balancers that are restarted, to proxies that are killed, frozen and drained, with tokens that run out, hang,
 * fail and are forged. What an oracle wants: every logged message once and in order, or a gap told before anything newer;
 * every message whose receipt came is in a backend's hands; and at the end every client is live again within seconds,
 * with one socket or stream, and one timer.
 */

import type { Redis } from "ioredis";
import { downChannel, upChannel } from "../../src/redis/link.ts";
import { Balancer, haproxy, nginx, type Program } from "../harness/balancer.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { allOfJavaScript, pythonsHere, type Runtime } from "../harness/runtimes.ts";
import { patienceMs } from "../harness/wait.ts";
import { Backend, createRandom, type Harms, oneOf, pause, runOptions, Victim } from "../torture/parts.ts";
import { type Approach, ClientPage, ClientProcess, type ClientTortureReport, type Crowd, Suspect } from "./crowd.ts";

/** What is tortured, and for how long. */
export interface ClientTortureOptions {
  readonly seconds: number;
  /** The same seed does the same things, as far as clocks and the kernel do. */
  readonly seed: number;
  readonly engine: string;
  readonly runtimes: readonly Runtime[];
  /** Also in a page of Chromium. */
  readonly page?: boolean;
  /** What stands between the clients and the proxies. */
  readonly balancer?: Program | undefined;
  /** Sessions of each runtime, every other one over SSE where its client can. */
  readonly sessions: number;
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

/** A relay that may be led away from where it leads. */
class Way extends Relay {
  constructor(readonly home: () => number) {
    super(home);
  }
}

/** What clients come to: a proxy itself, or a balancer in front of two. */
class Front implements AsyncDisposable {
  readonly victims: Victim[] = [];
  /** Behind the balancer, if there is one. */
  readonly inner: Way[] = [];
  balancer: Balancer | undefined;
  approach: Approach = { scheme: "ws" };
  readonly #stack = new AsyncDisposableStack();

  async start(redis: RedisServer, env: Record<string, string>, program: Program | undefined): Promise<void> {
    const count = program ? 2 : 1;
    for (let n = 0; n < count; n++) this.victims.push(this.#stack.use(new Victim(redis.url, env)));
    for (const victim of this.victims) await victim.start();
    if (program === undefined) return;
    for (let n = 0; n < 3; n++) this.inner.push(this.#stack.use(new Way(() => this.#portOf(this.victims[n % count]))));
    const balancer = await Balancer.start(program, this.inner.map(({ port }) => port));
    this.balancer = this.#stack.use(balancer);
    this.approach = { scheme: "wss", ca: `${balancer.folder}/wsproxy.crt` };
  }

  /** A port where nothing listens, while a proxy is away. */
  #portOf(victim: Victim | undefined): number {
    return victim?.port ?? 1;
  }

  /** The way of one client. */
  way(): Way {
    return this.#stack.use(new Way(() => this.balancer?.port ?? this.#portOf(this.victims[0])));
  }

  /** Sessions on all proxies. */
  async sessions(): Promise<number> {
    const counts = await Promise.all(this.victims.map((victim) => victim.sessions()));
    return counts.reduce((sum, count) => sum + count, 0);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync();
  }
}

/** Tortures for a while. @throws what the oracle has seen, or what does not come to rest. */
export async function tortureClients(options: ClientTortureOptions): Promise<Record<string, ClientTortureReport>> {
  const { seconds, seed, engine, runtimes, sessions, page = false } = options;
  const random = createRandom(seed);
  await using redis = await RedisServer.start();
  const control = redis.client();
  await using front = new Front();
  await front.start(redis, {
    WS_ENGINE: engine,
    INBOX: random() < 0.5 ? "true" : "false",
    WS_PING_INTERVAL_SECS: "1",
    WS_PING_TIMEOUT_SECS: "2",
    SHUTDOWN_GRACE_PERIOD_SECS: "1",
  }, options.balancer);
  await using refusing = refuser(random);
  // The kernel accepts connections for it, and nobody answers.
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  await using stack = new AsyncDisposableStack();
  const ways: Way[] = [];
  const suspectsOf = (crowd: number) =>
    Array.from({ length: sessions }, (_, n) => {
      const session = `r${crowd}s${n}`;
      const backend = new Backend((...words) => control.call("FCALL", "wsproxy_send", 1, ...words), session, random);
      const way = front.way();
      ways.push(way);
      return new Suspect(session, way, backend);
    });
  const crowds: Crowd[] = runtimes.map((runtime, r) =>
    stack.use(new ClientProcess(runtime, suspectsOf(r), front.approach, seed + r))
  );
  if (page) {
    const suspects = suspectsOf(runtimes.length);
    crowds.push(stack.use(await ClientPage.open(suspects, front.approach, seed + runtimes.length, random)));
  }
  const suspects = crowds.flatMap(({ suspects }) => suspects);
  const names = suspects.map(({ session }) => session);
  const heard = new Heard(redis, names);
  await heard.subscribe();
  const some = <T>(items: readonly T[]) => oneOf(items, random);
  /** A client's way, or one behind the balancer. */
  const way = () => some(random() < 0.8 ? ways : [...ways, ...front.inner]);
  const lasting = new Set<Promise<void>>();
  /** A harm that lasts, beside others. */
  const lasts = (ms: number, begin: () => void, end: () => void) => {
    begin();
    const done = pause(random() * ms).then(end).finally(() => lasting.delete(done));
    lasting.add(done);
  };
  /** For a while some clients come to another server, or the balancer does. */
  const detour = (port: number) => {
    const chosen = (front.balancer && random() < 0.5 ? front.inner : ways).filter(() => random() < 0.3);
    // Otherwise it is only for what is to come, such as posts beside a stream.
    const cuts = random() < 0.5;
    const lead = (target?: number) => {
      for (const each of chosen) {
        each.target = target ?? each.home;
        if (cuts) each.cut();
      }
    };
    lasts(1500, () => lead(port), lead);
  };
  const harms: Harms = {
    cut: () => way().cut(),
    cutMany: () => ways.forEach((each) => random() < 0.5 && each.cut()),
    cutSoon() {
      const chosen = way();
      const bytes = () => Math.floor(random() * 5000);
      chosen.budgets = Array.from({ length: 3 }, () => (random() < 0.5 ? { down: bytes() } : { up: bytes() }));
      chosen.cut();
    },
    blackhole: () => ways.forEach((each) => random() < 0.2 && each.freezeAll()),
    stall(chosen = way()) {
      lasts(800, () => chosen.freezeAll(), () => chosen.thawAll());
    },
    slow(chosen = way()) {
      lasts(1000, () => (chosen.delayMs = 40, chosen.bytesPerSec = 20_000), () => {
        chosen.delayMs = 0;
        chosen.bytesPerSec = Infinity;
      });
    },
    hangUp(chosen = way()) {
      lasts(1000, () => (chosen.hangsUp = true, chosen.cut()), () => chosen.hangsUp = false);
    },
    refuse: () => detour(refusing.addr.port),
    silence: () => detour(silent.addr.port),
    async killProxy(victim = some(front.victims)) {
      if (random() > 0.3) return;
      await victim.kill();
      await victim.start();
    },
    async drainProxy(victim = some(front.victims)) {
      if (random() > 0.3) return;
      victim.signal("SIGTERM");
      await victim.kill(1500);
      await victim.start();
    },
    freezeProxy: () => some(front.victims).freeze(random() * 1000),
    pauseRedis: () => control.call("CLIENT", "PAUSE", Math.floor(random() * 1500), "WRITE"),
    trim: () => control.xtrim(downChannel(some(names)), "MAXLEN", Math.floor(random() * 20)),
    delete: () => random() < 0.3 && control.del(downChannel(some(names))),
    close: () => control.call("FCALL", "wsproxy_close", 1, downChannel(some(names)), some([1000, 3000, 4000]), "bye"),
    leave: () => random() < 0.5 && heard.leave(random() * 300),
    ...Object.assign({}, ...crowds.map((crowd) => crowd.harms)),
  };
  const { balancer } = front;
  if (balancer) {
    harms["restartBalancer"] = () => random() < 0.4 && balancer.restart();
    harms["reloadBalancer"] = () => random() < 0.4 && balancer.reload();
  }
  const excess: string[] = [];
  const faults = () => [...excess, ...suspects.flatMap(({ faults }) => faults)];
  // Nothing is harmed before all have begun, which takes seconds with many processes.
  await Promise.all(crowds.map((crowd) => crowd.excess()));
  const beginMs = performance.now();
  const elapsedMs = () => performance.now() - beginMs;
  let [lookMs, measureMs] = [1000, seconds * 1000 / 3];
  while (elapsedMs() < seconds * 1000 && faults().length === 0) {
    await Promise.resolve().then(harms[some(Object.keys(harms))]);
    await pause(random() * 400);
    if (elapsedMs() < lookMs) continue;
    excess.push(...(await Promise.all(crowds.map((crowd) => crowd.excess()))).flat());
    // A look takes seconds where there is much to do, and there is to be more than looks.
    lookMs = elapsedMs() + 1000;
    if (elapsedMs() < measureMs) continue;
    // What is in use now is what memory is measured against at the end.
    await Promise.all(crowds.map((crowd) => crowd.unrest()));
    measureMs = Infinity;
  }
  await Promise.all(lasting);
  for (const each of [...ways, ...front.inner]) each.budgets = [];
  // The last harm is one that only a client's own doubt ends.
  for (const [n, { relay }] of suspects.entries()) if (n % 3 === 0) relay.freezeAll();
  await pause(300);
  await Promise.all([...suspects.map(({ backend }) => backend.stop()), ...crowds.map((crowd) => crowd.calm())]);
  // Waits for dead connections, for what a refusal says (Retry-After), and for a machine that has much to do.
  const restMs = performance.now();
  while (faults().length === 0) {
    const restSecs = Math.round((performance.now() - restMs) / 100) / 10;
    const unrests = await Promise.all(crowds.map((crowd) => crowd.unrest()));
    for (const [n, { length }] of unrests.entries()) if (length > 0) crowds[n]!.counts.restSecs = restSecs;
    const unrest = unrests.flat();
    if (unrest.length === 0) {
      // Of a stream that died without a word only the kernel could tell its proxy.
      for (const each of [...ways, ...front.inner]) each.cutFrozen();
      const held = await front.sessions();
      if (held !== suspects.length) unrest.push(`the proxies have ${held} sessions of ${suspects.length} clients`);
    }
    if (unrest.length === 0) break;
    if (performance.now() - restMs > 3 * patienceMs) {
      throw new Error(`seed ${seed}: not at rest: ${unrest.slice(0, 5).join("; ")}`);
    }
    await pause(200);
  }
  const all = await heard.all(control);
  for (const { session, acknowledged, faults } of suspects) {
    const nowhere = [...acknowledged].filter((number) => !all.has(JSON.stringify(`${session}:${number}`)));
    if (nowhere.length > 0) faults.push(`${session}: no backend has ${nowhere.slice(0, 3)}, which were acknowledged`);
  }
  if (faults().length > 0) throw new Error(`seed ${seed}: ${faults().slice(0, 5).join("; ")}`);
  return Object.fromEntries(crowds.map(({ name, counts }) => [name, counts]));
}

/** Whether there is a program on this machine. */
export const has = (command: string): Promise<boolean> =>
  new Deno.Command(command, { args: ["-v"], stdin: "null", stdout: "null", stderr: "null" }).output()
    .then(() => true, () => false);

if (import.meta.main) {
  const { seconds, seed, ...values } = runOptions(60, { only: { type: "string", default: "" } });
  const only = new RegExp(values.only);
  const { found, lacking } = await pythonsHere();
  for (const name of lacking) console.log(`left out: ${name}, which is not on this machine`);
  const programs: (Program | undefined)[] = [undefined];
  for (const program of [nginx, haproxy]) {
    if (await has(program.command)) programs.push(program);
    else console.log(`left out: ${program.command}, which is not on this machine`);
  }
  const page = await has("chromium");
  if (!page) console.log("left out: chromium, which is not on this machine");
  const runtimes = [...await allOfJavaScript(), ...found].filter(({ name }) => only.test(name));
  const rounds = ["deno", "ws"].flatMap((engine) => programs.map((balancer) => ({ engine, balancer })));
  for (const { engine, balancer } of rounds) {
    const words = { engine, through: balancer?.command ?? "relays", seed, seconds: seconds / rounds.length };
    const report = await tortureClients({
      ...{ seconds: words.seconds, seed, engine, balancer, runtimes, sessions: 4 },
      page: page && only.test("chromium"),
    });
    console.log(JSON.stringify({ ...words, ...report }, null, 2));
  }
  Deno.exit();
}
