/**
 * From outcomes to figures that can be compared, and the goals. Of a scenario's rounds each figure is the median, so
 * that one round in which the machine did something else does not count; but counts are sums, and a maximum is one.
 */

import { Histogram } from "./load/histogram.js";
import type { Account, Buckets, Cpu, FlowOutcome, Outcome } from "./outcome.ts";
import type { Scenario } from "./scenarios.ts";

/** Percentiles of a latency, in milliseconds: the medians of the rounds, and the maximum of all. */
export interface Percentiles {
  readonly p50Ms: number;
  readonly p99Ms: number;
  readonly p999Ms: number;
  readonly maxMs: number;
}

/** One direction's figures. */
export interface FlowFigures extends Account {
  readonly perSecond: number;
  readonly latency: Percentiles;
}

/** The figures of one target in one scenario. CPU is in microseconds. */
export interface Figures {
  readonly connects: number;
  readonly connectsPerSecond: number;
  readonly connectLatency: Percentiles;
  /** Handshakes that were refused or failed, reconnects included. */
  readonly notOpened: number;
  readonly serverUsPerConnect: number;
  readonly loadUsPerConnect: number;
  readonly redisUsPerConnect: number;
  readonly bytesPerConnection: number;
  readonly peakBytes: number;
  readonly down?: FlowFigures;
  readonly up?: FlowFigures;
  /** A message is one that was received, in either direction. */
  readonly serverUsPerMessage?: number;
  readonly loadUsPerMessage?: number;
  readonly redisUsPerMessage?: number;
  /** CPU of one connection in a second without messages; absent when that was not measured for long enough. */
  readonly idleUsPerSecond?: number;
  /** Share of one core in the measured time. */
  readonly serverCores: number;
  readonly loadCores: number;
  readonly redisCores: number;
  /** How late the generator itself sent; every latency includes it. */
  readonly lag: Percentiles;
  readonly reconnects?: number;
  readonly reconnectLatency?: Percentiles;
  readonly closes: Readonly<Record<string, number>>;
}

/** One target in one scenario. */
export interface Result {
  readonly scenario: string;
  readonly about: string;
  readonly saturates: boolean;
  /** The server had no more of its core to give: the rate is its own, not the generator's. */
  readonly isFull: boolean;
  readonly target: string;
  readonly figures: Figures;
  readonly rounds: readonly Outcome[];
}

/** A whole run, as `--json` writes it. */
export interface Report {
  readonly startedAt: string;
  readonly machine: { readonly cores: number; readonly system: string; readonly versions: Record<string, string> };
  /** What the ratios compare with; the first target of each kind is what they are of. */
  readonly peer: string;
  readonly results: readonly Result[];
  readonly goals: readonly Goal[];
}

/** From this share of a core on, nothing more is to be had of it. */
const fullCore = 0.95;
/** The default one: in less time an idle connection may cost nothing. */
const pingIntervalMs = 30_000;

function percentiles(rounds: readonly Buckets[]): Percentiles {
  const histograms = rounds.map((buckets) => {
    const histogram = new Histogram();
    histogram.add(buckets);
    return histogram;
  });
  const ms = (percent: number) => histograms.map((histogram) => (histogram.percentile(percent) ?? 0) / 1000);
  return { p50Ms: median(ms(50)), p99Ms: median(ms(99)), p999Ms: median(ms(99.9)), maxMs: Math.max(...ms(100)) };
}

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length / 2;
  return (sorted[Math.ceil(middle) - 1]! + sorted[Math.floor(middle)]!) / 2;
}

function flowFigures(flows: readonly FlowOutcome[]): FlowFigures {
  const total = (name: keyof Account) => sum(flows, ({ account }) => account[name]);
  return {
    sent: total("sent"),
    received: total("received"),
    lost: total("lost"),
    duplicated: total("duplicated"),
    reordered: total("reordered"),
    misrouted: total("misrouted"),
    away: total("away"),
    toSlow: total("toSlow"),
    perSecond: median(flows.map(({ perSecond }) => perSecond)),
    latency: percentiles(flows.map(({ latency }) => latency)),
  };
}

function sum<T>(items: readonly T[], of: (item: T) => number): number {
  return items.reduce((total, item) => total + of(item), 0);
}

/** Puts the rounds of one target together. */
export function figuresOf(rounds: readonly Outcome[]): Figures {
  const downs = rounds.flatMap(({ down }) => down ?? []);
  const ups = rounds.flatMap(({ up }) => up ?? []);
  const messages = ({ down, up }: Outcome) => (down?.messages ?? 0) + (up?.messages ?? 0);
  const count = (counts: Readonly<Record<string, number>>) => sum(Object.values(counts), (value) => value);
  const reconnects = rounds.flatMap(({ reconnect }) => reconnect ?? []);
  const closes: Record<string, number> = {};
  for (const round of rounds) {
    for (const [code, times] of Object.entries(round.closes)) closes[code] = (closes[code] ?? 0) + times;
  }
  const typical = (of: (round: Outcome) => number) => median(rounds.map(of));
  const perMessage = (of: keyof Cpu) =>
    rounds.every(messages) ? typical((round) => round.cpu[of] / messages(round)) : undefined;
  const perConnect = (of: keyof Cpu) => typical(({ connect }) => connect.cpu[of] / connect.opened);
  const cores = (of: keyof Cpu) => typical(({ cpu, measuredMs }) => cpu[of] / measuredMs / 1000);
  return {
    connects: sum(rounds, ({ connect }) => connect.opened),
    connectsPerSecond: typical(({ connect }) => connect.opened / connect.tookMs * 1000),
    connectLatency: percentiles(rounds.map(({ connect }) => connect.latency)),
    notOpened: sum(rounds, ({ connect }) => count(connect.refused) + count(connect.failed)),
    serverUsPerConnect: perConnect("server"),
    loadUsPerConnect: perConnect("load"),
    redisUsPerConnect: perConnect("redis"),
    bytesPerConnection: typical(({ memory }) => memory.perConnectionBytes),
    peakBytes: Math.max(...rounds.map(({ memory }) => memory.peakBytes)),
    down: downs.length > 0 ? flowFigures(downs) : undefined,
    up: ups.length > 0 ? flowFigures(ups) : undefined,
    serverUsPerMessage: perMessage("server"),
    loadUsPerMessage: perMessage("load"),
    redisUsPerMessage: perMessage("redis"),
    idleUsPerSecond: rounds.every((round) => messages(round) === 0 && round.measuredMs >= pingIntervalMs)
      ? typical(({ cpu, measuredMs, series }) => cpu.server / measuredMs * 1000 / series.at(-1)!.connections)
      : undefined,
    serverCores: cores("server"),
    loadCores: cores("load"),
    redisCores: cores("redis"),
    lag: percentiles(rounds.map(({ lag }) => lag)),
    reconnects: reconnects.length > 0 ? sum(reconnects, ({ opened }) => opened) : undefined,
    reconnectLatency: reconnects.length > 0 ? percentiles(reconnects.map(({ latency }) => latency)) : undefined,
    closes,
  };
}

/** A result of one target from its rounds. `redisBeside`: Redis has no other core than the server. */
export function resultOf(
  scenario: Scenario,
  target: string,
  rounds: readonly Outcome[],
  redisBeside: boolean,
): Result {
  const { name, about, saturates = false } = scenario;
  const figures = figuresOf(rounds);
  const isFull = figures.serverCores + (redisBeside ? figures.redisCores : 0) >= fullCore;
  return { scenario: name, about, saturates, isFull, target, figures, rounds };
}

/** Messages that did not arrive as they should: once, in order, at the right session. */
export function flawsOf({ down, up }: Figures): number {
  return sum([down, up], (flow) => flow ? flow.lost + flow.duplicated + flow.reordered + flow.misrouted : 0);
}

/** What the project wants to reach, and what this run measured. */
export interface Goal {
  readonly goal: string;
  readonly target: string;
  readonly limit: string;
  readonly measured: string;
  readonly reached: boolean;
}

interface GoalRow {
  readonly goal: string;
  readonly scenario: string;
  /** Only for this target; for every one but the peer when undefined. */
  readonly target?: string;
  readonly atMost?: number;
  /** The same where the peer is Bun. */
  readonly atMostOfBun?: number;
  readonly atLeast?: number;
  readonly unit: string;
  readonly measure: (ours: Figures, peers: Figures | undefined) => number | undefined;
}

const ratio = (ours: number | undefined, peers: number | undefined) =>
  ours === undefined || peers === undefined ? undefined : ours / peers;

const goalRows: readonly GoalRow[] = [
  {
    goal: "downstream CPU per message at saturation, to the peer's",
    scenario: "down",
    atMost: 0.9,
    atMostOfBun: 1,
    unit: "",
    measure: (ours, peers) => ratio(ours.serverUsPerMessage, peers?.serverUsPerMessage),
  },
  {
    goal: "upstream CPU per message at saturation, to the peer's",
    scenario: "up",
    atMost: 0.8,
    atMostOfBun: 1,
    unit: "",
    measure: (ours, peers) => ratio(ours.serverUsPerMessage, peers?.serverUsPerMessage),
  },
  {
    goal: "CPU per connect, to the peer's",
    scenario: "connect",
    atMost: 0.5,
    atMostOfBun: 2,
    unit: "",
    measure: (ours, peers) => ratio(ours.serverUsPerConnect, peers?.serverUsPerConnect),
  },
  {
    goal: "new connections a second",
    scenario: "connect",
    atLeast: 1000,
    unit: "/s",
    measure: (ours) => ours.connectsPerSecond,
  },
  {
    goal: "p99 at 20,000 messages a second over 1,000 sessions",
    scenario: "stream",
    atMost: 5,
    unit: " ms",
    measure: (ours) => ours.down?.latency.p99Ms,
  },
  {
    goal: "the same p99, to the peer's",
    scenario: "stream",
    atMost: 1,
    unit: "",
    measure: (ours, peers) => ratio(ours.down?.latency.p99Ms, peers?.down?.latency.p99Ms),
  },
  {
    goal: "tokens lost, doubled or out of order at 20,000 a second",
    scenario: "stream",
    atMost: 0,
    unit: "",
    measure: flawsOf,
  },
  {
    goal: "memory per idle connection",
    scenario: "idle",
    target: "wsproxy",
    atMost: 24,
    unit: " KiB",
    measure: (ours) => ours.bytesPerConnection / 1024,
  },
  {
    goal: "memory per idle connection",
    scenario: "idle",
    target: "wsproxy-ws",
    atMost: 14,
    unit: " KiB",
    measure: (ours) => ours.bytesPerConnection / 1024,
  },
  {
    goal: "connections not opened, of 10,000",
    scenario: "scale",
    atMost: 0,
    unit: "",
    measure: (ours) => ours.notOpened,
  },
  {
    goal: "p99 with 10,000 connections at 20,000 messages a second",
    scenario: "scale",
    atMost: 50,
    unit: " ms",
    measure: (ours) => ours.down?.latency.p99Ms,
  },
  {
    goal: "tokens lost, doubled or out of order with 10,000 connections",
    scenario: "scale",
    atMost: 0,
    unit: "",
    measure: flawsOf,
  },
];

/** The goals that these results say something about. */
export function goalsOf(results: readonly Result[], peer: string): Goal[] {
  const goals: Goal[] = [];
  for (const row of goalRows) {
    const atMost = peer === "bun" ? row.atMostOfBun ?? row.atMost : row.atMost;
    const peers = results.find((result) => result.scenario === row.scenario && result.target === peer)?.figures;
    for (const { scenario, target, figures } of results) {
      if (scenario !== row.scenario || target === peer || (row.target ?? target) !== target) continue;
      const measured = row.measure(figures, peers);
      if (measured === undefined) continue;
      const text = (value: number) =>
        `${Number.isInteger(value) ? value : value.toFixed(value < 100 ? 2 : 0)}${row.unit}`;
      const reached = measured <= (atMost ?? Infinity) && measured >= (row.atLeast ?? 0);
      const limit = atMost === undefined ? `at least ${text(row.atLeast!)}` : `at most ${text(atMost)}`;
      goals.push({ goal: row.goal, target, limit, measured: text(measured), reached });
    }
  }
  return goals;
}
