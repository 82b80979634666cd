/** The benchmark itself: that it runs, that its report has its shape, and that what it says of loss can be believed. */

import assert from "node:assert/strict";
import { type Report, resultOf } from "../bench/figures.ts";
import { Histogram } from "../bench/load/histogram.js";
import { Ledger } from "../bench/load/ledger.js";
import type { Outcome } from "../bench/outcome.ts";
import { scenarios } from "../bench/scenarios.ts";
import { remarks } from "../bench/table.ts";

/** Runs the command as `deno task bench` does, against the proxy only. */
async function bench(...args: string[]): Promise<{ report: Report; text: string; html: string }> {
  const directory = await Deno.makeTempDir({ dir: "/tmp" });
  try {
    const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["task", "bench", ...args, "--json", `${directory}/report.json`, "--html", `${directory}/report.html`],
      stdout: "piped",
      stderr: "piped",
    }).output();
    assert.ok(success, new TextDecoder().decode(stderr));
    return {
      report: JSON.parse(await Deno.readTextFile(`${directory}/report.json`)),
      text: new TextDecoder().decode(stdout),
      html: await Deno.readTextFile(`${directory}/report.html`),
    };
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
}

const tiny = ["--target", "wsproxy", "--sessions", "20", "--rounds", "1", "--seconds", "0.5"];

Deno.test("The benchmark reports rate, latency, CPU and memory, and no loss", async () => {
  const { report, text, html } = await bench(...tiny, "--only", "both,up", "--rate", "500");
  assert.deepEqual(report.results.map(({ scenario, target }) => [scenario, target]), [
    ["both", "wsproxy"],
    ["up", "wsproxy"],
  ]);
  for (const { figures, rounds } of report.results) {
    assert.equal(figures.connects, 20);
    assert.equal(figures.notOpened, 0);
    assert.ok(rounds[0]!.series.length > 0);
    assert.ok(rounds[0]!.memory.openBytes > 0);
    for (const flow of [figures.down, figures.up]) {
      if (!flow) continue;
      assert.ok(flow.sent > 0 && flow.perSecond > 0);
      assert.equal(flow.received, flow.sent);
      const { lost, duplicated, reordered, misrouted } = flow;
      assert.deepEqual({ lost, duplicated, reordered, misrouted }, {
        lost: 0,
        duplicated: 0,
        reordered: 0,
        misrouted: 0,
      });
      const { p50Ms, p99Ms, p999Ms, maxMs } = flow.latency;
      assert.ok(0 < p50Ms && p50Ms <= p99Ms && p99Ms <= p999Ms && p999Ms <= maxMs);
    }
    for (const cpu of ["serverUsPerMessage", "loadUsPerMessage", "redisUsPerMessage"] as const) {
      assert.equal(typeof figures[cpu], "number");
    }
  }
  assert.match(text, /both: 10,000 tokens\/s down/);
  assert.match(html, /<svg/);
  assert.doesNotMatch(html, /https?:/, "the report needs nothing from elsewhere");
});

Deno.test("The benchmark finds every message that is lost", async () => {
  const { report, text } = await bench(...tiny, "--only", "stream,down", "--rate", "500", "--drop", "3");
  for (const { scenario, figures } of report.results) {
    assert.equal(figures.down?.lost, 3, scenario);
    assert.equal(figures.down.received, figures.down.sent - 3);
  }
  assert.match(text, /3 messages did not arrive/);
});

/** A round of a minute in which server and Redis took so much of a core. */
function minute(serverCores: number, redisCores = 0): Outcome {
  const cpu = (cores: number) => cores * 60e6;
  const nothing = { server: 0, load: 0, redis: 0 };
  return {
    connect: { opened: 10, refused: {}, failed: {}, tookMs: 1, latency: [], cpu: nothing },
    memory: { baseBytes: 0, openBytes: 0, perConnectionBytes: 0, peakBytes: 0 },
    measuredMs: 60_000,
    cpu: { server: cpu(serverCores), load: cpu(0.5), redis: cpu(redisCores) },
    lag: [],
    closes: {},
    foreign: { count: 0 },
    series: [{ atMs: 0, connections: 12_000, downPerSecond: 0, upPerSecond: 0, serverBytes: 0 }],
  };
}

Deno.test("A saturated rate is marked when the server's core was not full", () => {
  const scenario = scenarios.find(({ saturates }) => saturates)!;
  const marked = (outcome: Outcome, redisBeside: boolean) =>
    remarks([resultOf(scenario, "wsproxy", [outcome], redisBeside)]).filter((line) => line.includes("read no rate"));
  assert.deepEqual(marked(minute(0.9, 0.1), false), [
    "wsproxy: 90 % of a core is not all that it could do: read no rate.",
  ]);
  assert.deepEqual(marked(minute(0.9, 0.1), true), [], "Redis had the rest of the same core");
  assert.deepEqual(marked(minute(1), false), []);
});

Deno.test("An idle connection's CPU is told when it was measured for a ping interval", () => {
  const idle = scenarios.find(({ name }) => name === "idle")!;
  const cost = (outcome: Outcome) => resultOf(idle, "wsproxy", [outcome], false).figures.idleUsPerSecond;
  assert.equal(cost(minute(0.012)), 1);
  assert.equal(cost({ ...minute(0.012), measuredMs: 1000 }), undefined);
});

Deno.test("A ledger tells loss, doubles and disorder apart", () => {
  const ledger = new Ledger(2, 2);
  for (let i = 0; i < 6; i++) ledger.send(0);
  ledger.send(1);
  for (const number of [0, 2, 1, 2, 4]) ledger.receive(0, 0, number);
  ledger.receive(0, 1, 0);
  const { sent, received, lost, reordered, duplicated, misrouted } = ledger.close();
  // Of session 0, numbers 3 and 5 never came; session 1's only message came to session 0.
  assert.deepEqual({ sent, received, lost }, { sent: 7, received: 4, lost: 3 });
  assert.deepEqual({ reordered, duplicated, misrouted }, { reordered: 1, duplicated: 1, misrouted: 1 });
});

Deno.test("A ledger does not count what no client was there for as lost", () => {
  const ledger = new Ledger(1, 1);
  ledger.send(0);
  ledger.receive(0, 0, 0);
  ledger.send(0); // on its way when the client goes
  ledger.cut(0);
  ledger.send(0); // while it is away
  ledger.send(0); // after its new socket was opened, before it knew
  ledger.reopen(0);
  ledger.receive(0, 0, 3);
  ledger.send(0);
  ledger.send(0);
  ledger.receive(0, 0, 5);
  const { sent, received, lost, away, duplicated } = ledger.close();
  assert.deepEqual({ sent, received, lost, away, duplicated }, {
    sent: 6,
    received: 3,
    lost: 1,
    away: 2,
    duplicated: 0,
  });
});

Deno.test("A histogram's percentiles are at most 1.6 % too high, and merge", () => {
  const low = new Histogram();
  const high = new Histogram();
  for (let us = 1; us <= 100_000; us++) (us <= 50_000 ? low : high).record(us);
  const merged = new Histogram().add(low.toBuckets()).add(high.toBuckets());
  assert.equal(merged.count, 100_000);
  assert.equal(merged.percentile(100), 100_000);
  for (const percent of [1, 50, 99, 99.9]) {
    const value = merged.percentile(percent)!;
    assert.ok(value >= percent * 1000 && value <= percent * 1000 * 1.016, `p${percent} is ${value}`);
  }
});

Deno.test("A profile is summed up by the innermost JavaScript function", async () => {
  const command = new Deno.Command("deno", {
    args: ["run", "--no-prompt", "bench/profile.ts"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const writer = command.stdin.getWriter();
  const deliver = "\t 7f01 JS:*'deliver file:///w/src/session.ts:86:99+0x6a9 (/tmp/perf-1.map)\n";
  await writer.write(new TextEncoder().encode([
    `deno 1 0.1: 666 cpu-clock:ppp: \n${deliver}`,
    `deno 1 0.2: 666 cpu-clock:ppp: \n\t 1f01 [unknown] (/usr/bin/deno)\n${deliver}`,
    "deno 1 0.3: 666 cpu-clock:ppp: \n\tffff01 __sys_sendto+0x1 ([kernel.kallsyms])\n",
    "deno 1 0.4: 666 cpu-clock:ppp: \n\tffff01 __sys_sendto+0x1 ([kernel.kallsyms])\n",
  ].join("\n")));
  await writer.close();
  const lines = new TextDecoder().decode((await command.output()).stdout).trim().split("\n");
  assert.deepEqual(lines.slice(1).map((line) => line.trim().split(/\s{2,}/)), [
    ["100.0", "50.0", "25.0", "25.0", "all"],
    ["50.0", "0.0", "25.0", "25.0", "deliver session.ts:86"],
    ["50.0", "50.0", "0.0", "0.0", "(outside JavaScript)"],
  ]);
});
