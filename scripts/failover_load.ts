/**
 * Clients under load through a balancer (WSPROXY_URL), while another process ends one of the proxies behind it: numbers
 * what is sent both ways, lets clients come back, and counts what was lost, and whether the one that lost it was told.
 * Prints `loaded` when the proxy can be ended, then one JSON object. Exits with 1 when a message was lost on a socket
 * that stayed open, or out of the middle of one: a loss that was not told.
 *
 * Arguments: the number of clients, then the base URLs of the proxies, asked for how many sockets each holds.
 */

import { Redis } from "ioredis";
import { SignJWT } from "jose";

const [clientsArg = "90", ...proxyUrls] = Deno.args;
const tickMs = 100;
/** Messages that every client must get before the end of a proxy, and again afterwards. */
const steady = 20;
/** A client comes back after a random part of this. */
const maxJitterMs = 1000;
const patienceMs = 60_000;

const need = (name: string) => Deno.env.get(name) || fail(`${name} must be set`);
const baseUrl = need("WSPROXY_URL").replace(/^http/, "ws");
const key = new TextEncoder().encode(need("JWT_SECRET"));
const publisher = new Redis(need("REDIS_URL"));
const listener = new Redis(need("REDIS_URL"));
const run = crypto.randomUUID();

function fail(message: string): never {
  console.error(message);
  Deno.exit(1);
}

/** What one socket carried, by the sequence numbers of its session. */
interface Leg {
  /** The down messages that it brought, in the order of their arrival. */
  readonly received: number[];
  /** The first up message handed to it, and the one after the last. */
  readonly sentFrom: number;
  sentTo: number;
  code?: number;
}

class Client {
  readonly legs: Leg[] = [];
  /** How long each return took, from the close to the open. */
  readonly returnsMs: number[] = [];
  refusals = 0;
  published = 0;
  /** Those that PUBLISH said no proxy got. */
  readonly unheard = new Set<number>();
  readonly heard: number[] = [];
  #socket: WebSocket | undefined;
  #sent = 0;
  #token = "";
  #stopping = false;

  constructor(readonly session: string) {}

  get isOpen(): boolean {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  async connect(closedAtMs?: number): Promise<void> {
    this.#token ||= await new SignJWT({ session_id: this.session, iat: Math.floor(Date.now() / 1000) })
      .setProtectedHeader({ alg: "HS256" }).sign(key);
    const socket = new WebSocket(`${baseUrl}/agent/ws/${this.session}`, ["bearer", this.#token]);
    let leg: Leg | undefined;
    socket.onopen = () => {
      this.#socket = socket;
      leg = { received: [], sentFrom: this.#sent, sentTo: this.#sent };
      this.legs.push(leg);
      if (closedAtMs !== undefined) this.returnsMs.push(performance.now() - closedAtMs);
    };
    socket.onmessage = ({ data }) => leg!.received.push(JSON.parse(data).n);
    socket.onerror = (event) => event.preventDefault();
    socket.onclose = ({ code }) => {
      if (leg) leg.code = code;
      else this.refusals++;
      if (this.#stopping) return;
      const since = leg ? performance.now() : closedAtMs;
      setTimeout(() => this.connect(since), Math.random() * maxJitterMs);
    };
  }

  tick(): void {
    const n = this.published++;
    publisher.publish(`session:${this.session}:down`, JSON.stringify({ n }))
      .then((receivers) => receivers === 0 && this.unheard.add(n));
    if (!this.isOpen) return;
    this.#socket!.send(JSON.stringify({ n: this.#sent++ }));
    this.legs.at(-1)!.sentTo = this.#sent;
  }

  /** The last of both ways has arrived. */
  get isComplete(): boolean {
    return this.isOpen && this.legs.at(-1)!.received.at(-1) === this.published - 1 &&
      this.heard.at(-1) === this.#sent - 1;
  }

  stop(): void {
    this.#stopping = true;
    this.#socket?.close();
  }

  /** Lost messages; untold are those that no close of a socket explains. */
  count() {
    const received = this.legs.flatMap((leg) => leg.received);
    const heard = new Set(this.heard);
    const down = { published: this.published, received: received.length, lost: 0, unheard: 0, untold: 0 };
    const up = { sent: this.#sent, heard: heard.size, lost: 0, untold: 0 };
    const got = new Set(received);
    for (let n = received[0] ?? 0; n < this.published; n++) {
      if (got.has(n)) continue;
      down.lost++;
      if (this.unheard.has(n)) down.unheard++;
    }
    for (const { received, sentFrom, sentTo, code } of this.legs) {
      // Within one socket: consecutive, without a hole, and nothing twice.
      for (let i = 1; i < received.length; i++) if (received[i] !== received[i - 1]! + 1) down.untold++;
      let ended = false;
      for (let n = sentFrom; n < sentTo; n++) {
        if (!heard.has(n)) {
          up.lost++;
          ended = true;
          if (code === undefined) up.untold++;
        } else if (ended) up.untold++;
      }
    }
    // Nothing twice and nothing out of order, over all sockets.
    for (let i = 1; i < this.heard.length; i++) if (this.heard[i]! <= this.heard[i - 1]!) up.untold++;
    return { down, up };
  }
}

async function until(what: string, done: () => boolean): Promise<void> {
  const endMs = performance.now() + patienceMs;
  while (!done()) {
    if (performance.now() > endMs) fail(`${what}: not within ${patienceMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, tickMs / 2));
  }
}

/** Open sockets by proxy; null for one that does not answer. */
async function spread(): Promise<Record<string, number | null>> {
  const entries = proxyUrls.map(async (url) => {
    try {
      const answer = await fetch(`${url}/metrics`, { signal: AbortSignal.timeout(1000) });
      return [url, Number(/^wsproxy_connections (\d+)$/m.exec(await answer.text())?.[1])] as const;
    } catch {
      return [url, null] as const;
    }
  });
  return Object.fromEntries(await Promise.all(entries));
}

const clients = Array.from({ length: Number(clientsArg) }, (_, i) => new Client(`failover-${run}-${i}`));
const bySession = new Map(clients.map((client) => [`session:${client.session}:up`, client]));
listener.on("message", (channel, text) => bySession.get(channel)!.heard.push(JSON.parse(text).n));
await listener.subscribe(...bySession.keys());
for (const client of clients) await client.connect();
await until("all clients connected", () => clients.every((client) => client.isOpen));
const ticker = setInterval(() => clients.forEach((client) => client.tick()), tickMs);
await until("a steady load", () => clients.every((client) => client.legs.at(-1)!.received.length >= steady));
const before = await spread();
console.log("loaded");

await until("an end of some sockets", () => clients.some((client) => client.legs[0]!.code !== undefined));
await until(
  "all back at a steady load",
  () => clients.every((client) => client.isOpen && client.legs.at(-1)!.received.length >= steady),
);
// A drain closes sockets over some time: no client may be left on a proxy that is going.
let sockets = 0;
const legs = () => clients.reduce((sum, client) => sum + client.legs.length, 0);
while (sockets !== (sockets = legs())) await new Promise((resolve) => setTimeout(resolve, steady * tickMs));
clearInterval(ticker);
await until("the last messages", () => clients.every((client) => client.isComplete));
const after = await spread();

const counts = clients.map((client) => client.count());
const sum = (pick: (count: typeof counts[number]) => number) => counts.reduce((total, count) => total + pick(count), 0);
const codes: Record<string, number> = {};
for (const { code } of clients.flatMap((client) => client.legs)) {
  if (code !== undefined) codes[code] = (codes[code] ?? 0) + 1;
}
const returnsMs = clients.flatMap((client) => client.returnsMs);
const result = {
  clients: clients.length,
  before,
  after,
  cut: clients.filter((client) => client.legs.length > 1).length,
  codes,
  refusals: clients.reduce((total, client) => total + client.refusals, 0),
  backWithinMs: Math.round(Math.max(...returnsMs)),
  down: {
    published: sum(({ down }) => down.published),
    received: sum(({ down }) => down.received),
    lost: sum(({ down }) => down.lost),
    lostThatPublishTold: sum(({ down }) => down.unheard),
    untold: sum(({ down }) => down.untold),
  },
  up: {
    sent: sum(({ up }) => up.sent),
    heard: sum(({ up }) => up.heard),
    lost: sum(({ up }) => up.lost),
    untold: sum(({ up }) => up.untold),
  },
};
console.log(JSON.stringify(result));
for (const client of clients) client.stop();
publisher.disconnect();
listener.disconnect();
if (result.down.untold > 0 || result.up.untold > 0) fail("messages were lost, and neither client nor backend was told");
