/** The scenarios: one row each. Rates are of all sessions together; sizes are bytes of a message. */

import type { Load } from "./outcome.ts";

/** A scenario. */
export interface Scenario {
  readonly name: string;
  readonly about: string;
  readonly load: Load;
  /** How often it is run, alternating between the targets; short noise then hits all of them. */
  readonly rounds: number;
  /** Latency says how long the queue is and nothing else: messages are sent as fast as they go. */
  readonly saturates?: boolean;
}

/** An LLM's token in its JSON. */
const token = 64;
const kib = 1024;

const usual = { connecting: 100, settleMs: 200, warmupMs: 1000, measureMs: 3000, sampleMs: 250 };

/** What `deno task bench` runs. */
export const scenarios: readonly Scenario[] = [
  {
    name: "connect",
    about: "2,000 clients connect, 100 at a time, as fast as they are let in",
    load: { ...usual, sessions: 3000, warmSessions: 1000, measureMs: 0 },
    rounds: 3,
  },
  {
    name: "idle",
    about: "memory of 8,000 clients more, and what it costs to hold 10,000",
    load: { ...usual, sessions: 10_000, warmSessions: 2000, settleMs: 1500, measureMs: 1000 },
    rounds: 2,
  },
  {
    name: "stream",
    about: "20,000 tokens/s to 1,000 clients, half of which get 40 a second each at a time",
    load: { ...usual, sessions: 1000, down: { perSecond: 20_000, bytes: token, active: 0.5 } },
    rounds: 4,
  },
  {
    name: "down",
    about: "downstream saturation: 1,000 clients, 8,000 messages under way",
    load: { ...usual, sessions: 1000, down: { window: 8000, bytes: token } },
    rounds: 3,
    saturates: true,
  },
  {
    name: "up",
    about: "upstream saturation: 1,000 clients, 8,000 messages under way",
    load: { ...usual, sessions: 1000, up: { window: 8000, bytes: token } },
    rounds: 2,
    saturates: true,
  },
  {
    name: "both",
    about: "10,000 tokens/s down and 5,000 messages/s up, 1,000 clients",
    load: {
      ...usual,
      sessions: 1000,
      down: { perSecond: 10_000, bytes: token, active: 0.5 },
      up: { perSecond: 5000, bytes: token },
    },
    rounds: 1,
  },
  {
    name: "storm",
    about: "10,000 tokens/s to 800 clients while 400 more break and reconnect at once, every second",
    load: {
      ...usual,
      sessions: 1200,
      down: { perSecond: 10_000, bytes: token },
      storm: { sessions: 400, everyMs: 1000 },
    },
    rounds: 1,
  },
  {
    name: "slow",
    about: "20 clients that read and 5 that do not, 160 messages of 16 KiB a second each",
    load: {
      ...usual,
      sessions: 25,
      warmupMs: 500,
      measureMs: 6000,
      slow: 5,
      down: { perSecond: 4000, bytes: 16 * kib },
    },
    rounds: 1,
  },
  {
    name: "large",
    about: "128 KiB messages, 200/s down and 200/s up, 100 clients",
    load: {
      ...usual,
      sessions: 100,
      down: { perSecond: 200, bytes: 128 * kib },
      up: { perSecond: 200, bytes: 128 * kib },
    },
    rounds: 1,
  },
];

/** What `deno task bench:scale` runs. */
export const scaleScenarios: readonly Scenario[] = [
  {
    name: "scale",
    about: "10,000 clients connect, and half of them get 4 tokens a second each: 20,000 tokens/s",
    load: {
      ...usual,
      sessions: 10_000,
      warmSessions: 1000,
      settleMs: 2000,
      warmupMs: 2000,
      measureMs: 10_000,
      down: { perSecond: 20_000, bytes: token, active: 0.5 },
      sampleMs: 500,
    },
    rounds: 1,
  },
  {
    name: "soak",
    about: "10,000 clients, 10,000 tokens/s down and 1,000 messages/s up, for ten minutes",
    load: {
      ...usual,
      sessions: 10_000,
      warmSessions: 1000,
      settleMs: 2000,
      warmupMs: 5000,
      measureMs: 600_000,
      down: { perSecond: 10_000, bytes: token, active: 0.5 },
      up: { perSecond: 1000, bytes: token },
      sampleMs: 2000,
    },
    rounds: 1,
  },
];
