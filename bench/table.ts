/** The report as text. */

import { type Figures, flawsOf, type FlowFigures, type Report, type Result } from "./figures.ts";

/** Columns of text, as wide as they need to be; the first is flush left. */
export function align(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  const line = (row: readonly string[]) =>
    row.map((cell, column) => column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!)).join("  ");
  return rows.map((row) => line(row).trimEnd()).join("\n");
}

/** A number of milliseconds with three significant digits. */
export const ms = (value: number) => value === 0 ? "-" : value >= 100 ? value.toFixed(0) : value.toPrecision(3);
/** A number of microseconds. */
export const us = (value: number | undefined) =>
  value === undefined ? "-" : value >= 100 ? value.toFixed(0) : value.toFixed(1);
/** A count with its thousands apart. */
export const count = (value: number) => Math.round(value).toLocaleString("en-US");
const kib = (bytes: number) => `${(bytes / 1024).toFixed(1)} KiB`;
const percent = (share: number) => `${(share * 100).toFixed(0)} %`;
const times = (ours: number | undefined, peers: number | undefined) =>
  ours === undefined || !peers ? "-" : (ours / peers).toFixed(2);

/** The table of one scenario: a header and rows. */
export function scenarioTable(results: readonly Result[], peer: string): string[][] {
  const peers = results.find(({ target }) => target === peer)?.figures;
  const flows = (["down", "up"] as const).filter((direction) => results.some(({ figures }) => figures[direction]));
  if (flows.length === 0) {
    const header = ["", "connects/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "CPU us", "to peer", "generator us"];
    const row = ({ target, figures }: Result) => {
      const { p50Ms, p99Ms, p999Ms, maxMs } = figures.connectLatency;
      return [
        target,
        count(figures.connectsPerSecond),
        ...[p50Ms, p99Ms, p999Ms, maxMs].map(ms),
        us(figures.serverUsPerConnect),
        times(figures.serverUsPerConnect, peers?.serverUsPerConnect),
        us(figures.loadUsPerConnect),
        us(figures.redisUsPerConnect),
        kib(figures.bytesPerConnection),
        figures.idleUsPerSecond === undefined ? "-" : figures.idleUsPerSecond.toFixed(2),
        String(figures.notOpened),
      ];
    };
    return [[...header, "redis us", "memory each", "idle us/s", "not opened"], ...results.map(row)];
  }
  const header = [
    "",
    "msg/s",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "max ms",
    "CPU us",
    "to peer",
    "generator us",
    "redis us",
    "core",
    "generator's",
    "sent",
    "received",
    "lost",
    "dup",
    "late",
    "away",
    "closed",
  ];
  const row = (target: string, direction: string, figures: Figures, flow: FlowFigures) => {
    const { p50Ms, p99Ms, p999Ms, maxMs } = flow.latency;
    return [
      `${target} ${direction}`,
      count(flow.perSecond),
      ...[p50Ms, p99Ms, p999Ms, maxMs].map(ms),
      us(figures.serverUsPerMessage),
      times(figures.serverUsPerMessage, peers?.serverUsPerMessage),
      us(figures.loadUsPerMessage),
      us(figures.redisUsPerMessage),
      percent(figures.serverCores),
      percent(figures.loadCores),
      count(flow.sent),
      count(flow.received),
      count(flow.lost + flow.misrouted),
      count(flow.duplicated),
      count(flow.reordered),
      count(flow.away + flow.toSlow),
      Object.entries(figures.closes).map(([code, number]) => `${number}x${code}`).join(" ") || "-",
    ];
  };
  return [
    header,
    ...results.flatMap(({ target, figures }) =>
      flows.flatMap((direction) => figures[direction] ? [row(target, direction, figures, figures[direction])] : [])
    ),
  ];
}

/** Remarks under a scenario's table, without which its figures mislead. */
export function remarks(results: readonly Result[]): string[] {
  const lines: string[] = [];
  const saturates = results.some((result) => result.saturates);
  if (saturates) lines.push("Latency is the length of the queue here, and says nothing else.");
  const lags = results.map(({ figures }) => figures.lag.p99Ms).filter((lag) => lag > 0);
  if (lags.length > 0 && !saturates) {
    lines.push(
      `The generator itself was late by up to ${ms(Math.max(...lags))} ms (p99), which the latencies include.`,
    );
  }
  for (const { target, saturates, isFull, figures } of results) {
    if (saturates && !isFull) {
      lines.push(`${target}: ${percent(figures.serverCores)} of a core is not all that it could do: read no rate.`);
    }
    if (figures.notOpened > 0) lines.push(`${target}: ${figures.notOpened} handshakes did not open.`);
    if (figures.reconnects !== undefined && figures.reconnectLatency) {
      const { p50Ms, p99Ms } = figures.reconnectLatency;
      lines.push(`${target}: ${count(figures.reconnects)} reconnects, p50 ${ms(p50Ms)} ms, p99 ${ms(p99Ms)} ms.`);
    }
    const flaws = flawsOf(figures);
    if (flaws > 0) lines.push(`${target}: ${count(flaws)} messages did not arrive once, in order, where they should.`);
  }
  return lines;
}

/** Results by scenario, in the order in which they were run. */
export function byScenario(results: readonly Result[]): Result[][] {
  return [...Map.groupBy(results, ({ scenario }) => scenario).values()];
}

/** The whole report. */
export function toText({ results, goals, peer }: Report): string {
  const parts = byScenario(results).map((group) =>
    [`${group[0]!.scenario}: ${group[0]!.about}`, align(scenarioTable(group, peer)), ...remarks(group)].join("\n")
  );
  if (goals.length > 0) {
    const rows = goals.map((
      { goal, target, limit, measured, reached },
    ) => [goal, target, limit, measured, reached ? "yes" : "NO"]);
    parts.push(align([["goal", "target", "wanted", "measured", "reached"], ...rows]));
  }
  return parts.join("\n\n");
}
