/** The report for people: one HTML file with nothing from elsewhere, in the reader's light or dark. */

import type { Percentiles, Report, Result } from "./figures.ts";
import type { Sample } from "./outcome.ts";
import { byScenario, count, remarks, scenarioTable } from "./table.ts";

const style = `
:root { color-scheme: light dark; --text: light-dark(#1a2027, #dfe5ec); --quiet: light-dark(#5b6673, #98a4b2);
  --page: light-dark(#fff, #14181d); --panel: light-dark(#f5f7f9, #1c2228); --line: light-dark(#d9dfe6, #333c46);
  --good: light-dark(#0a7a3d, #4fce86); --bad: light-dark(#c02b2b, #ff7d77);
  --c0: light-dark(#1766c2, #62aeff); --c1: light-dark(#7a3fc0, #c79bff); --c2: light-dark(#c2600a, #ffab5c); --c3: light-dark(#0c7f78, #4fd6cb); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: var(--quiet); } .remark { margin: .1rem 0; font-size: .88rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .84rem; margin: .6rem 0; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 500; } td:first-child, th:first-child { text-align: left; }
.goals td:nth-child(2), .goals th:nth-child(2) { text-align: left; } .yes { color: var(--good); } .no { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: .8rem; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .7rem .8rem .4rem; } figcaption { font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.legend { display: flex; gap: 1.2rem; flex-wrap: wrap; font-size: .88rem; } .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.f0 { fill: var(--c0); background: var(--c0); } .f1 { fill: var(--c1); background: var(--c1); } .f2 { fill: var(--c2); background: var(--c2); } .f3 { fill: var(--c3); background: var(--c3); }
`;

const escape = (text: string) => text.replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`);
const colours = 4;

interface Line {
  readonly name: string;
  readonly colour: number;
  readonly points: readonly (readonly [x: number, y: number])[];
  readonly dots?: boolean;
}

interface Axis {
  readonly log?: boolean;
  readonly label: (value: number) => string;
  /** Where labels stand; chosen when absent. */
  readonly ticks?: readonly number[];
}

const width = 440, height = 220, left = 52, right = 12, top = 10, bottom = 26;

/** A line chart as inline SVG. */
function chart(title: string, lines: readonly Line[], xAxis: Axis, yAxis: Axis): string {
  const points = lines.flatMap((line) => line.points);
  if (points.length === 0) return "";
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [xMin, xMax] = [Math.min(...xs), Math.max(...xs)];
  const ticks = yAxis.log ? decades(Math.min(...ys), Math.max(...ys)) : steps(Math.max(...ys));
  const [yMin, yMax] = [ticks[0]!, ticks.at(-1)!];
  const scale = (value: number) => yAxis.log ? Math.log10(value) : value;
  const x = (value: number) => left + (xMax === xMin ? 0.5 : (value - xMin) / (xMax - xMin)) * (width - left - right);
  const y = (value: number) =>
    height - bottom - (scale(value) - scale(yMin)) / (scale(yMax) - scale(yMin)) * (height - top - bottom);
  const at = ([px, py]: readonly [number, number]) => `${x(px).toFixed(1)} ${y(py).toFixed(1)}`;
  const grid = ticks.map((tick) =>
    `<line class="grid" x1="${left}" x2="${width - right}" y1="${y(tick)}" y2="${y(tick)}"/>` +
    `<text x="${left - 6}" y="${y(tick) + 4}" text-anchor="end">${yAxis.label(tick)}</text>`
  );
  const labels = (xAxis.ticks ?? [xMin, (xMin + xMax) / 2, xMax]).map((tick) =>
    `<text x="${x(tick)}" y="${height - 8}" text-anchor="middle">${xAxis.label(tick)}</text>`
  );
  const drawn = lines.filter((line) => line.points.length > 0).map(({ name, colour, points, dots }) =>
    `<path class="s${colour}" d="M${points.map(at).join("L")}"><title>${escape(name)}</title></path>` +
    (dots ? points.map(([px, py]) => `<circle class="f${colour}" cx="${x(px)}" cy="${y(py)}" r="3"/>`).join("") : "")
  );
  const svg = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(title)}">`;
  return `<figure><figcaption>${escape(title)}</figcaption>${svg}${
    [...grid, ...labels, ...drawn].join("")
  }</svg></figure>`;
}

/** Powers of ten around a range; at least one decade. */
function decades(min: number, max: number): number[] {
  const first = Math.floor(Math.log10(min));
  const last = Math.max(first + 1, Math.ceil(Math.log10(max)));
  return Array.from({ length: last - first + 1 }, (_, i) => 10 ** (first + i));
}

/** Round numbers from 0 to at least `max`. */
function steps(max: number): number[] {
  if (max <= 0) return [0, 1];
  const size = 10 ** Math.floor(Math.log10(max));
  const step = [0.25, 0.5, 1, 2].map((share) => share * size).find((step) => max / step <= 5) ?? size * 2;
  return Array.from({ length: Math.ceil(max / step) + 1 }, (_, i) => i * step);
}

const percentileNames = ["p50", "p99", "p99.9", "max"];

function percentileLine(name: string, colour: number, { p50Ms, p99Ms, p999Ms, maxMs }: Percentiles): Line {
  const values = [p50Ms, p99Ms, p999Ms, maxMs];
  return { name, colour, dots: true, points: values.map((value, i) => [i, Math.max(value, 0.01)] as const) };
}

const msLabel = (value: number) => `${value >= 1 ? count(value) : value} ms`;
const rateLabel = (value: number) => value >= 1000 ? `${value / 1000}k` : String(value);

function charts(results: readonly Result[], colourOf: (target: string) => number): string {
  const parts: string[] = [];
  const latency = (title: string, of: (result: Result) => Percentiles | undefined) => {
    const lines = results.flatMap((result) => {
      const percentiles = of(result);
      return percentiles ? [percentileLine(result.target, colourOf(result.target), percentiles)] : [];
    });
    const xAxis = { ticks: [0, 1, 2, 3], label: (i: number) => percentileNames[i]! };
    parts.push(chart(title, lines, xAxis, { log: true, label: msLabel }));
  };
  const flows = results.some(({ figures }) => figures.down || figures.up);
  if (!flows) latency("Connect latency", ({ figures }) => figures.connectLatency);
  if (!results[0]!.saturates) {
    latency("Latency downstream", ({ figures }) => figures.down?.latency);
    latency("Latency upstream", ({ figures }) => figures.up?.latency);
  }
  const seconds = { label: (value: number) => `${value.toFixed(0)} s` };
  const series = (title: string, of: (sample: Sample) => number | undefined, yAxis: Axis) => {
    const lines = results.map(({ target, rounds }): Line => ({
      name: target,
      colour: colourOf(target),
      points: rounds[0]!.series.flatMap((sample) => {
        const value = of(sample);
        return value === undefined ? [] : [[sample.atMs / 1000, value] as const];
      }),
    }));
    parts.push(chart(title, lines, seconds, yAxis));
  };
  if (flows) {
    series("Messages a second", (sample) => sample.downPerSecond + sample.upPerSecond, { label: rateLabel });
    if (!results[0]!.saturates) {
      series("p99 over time", (sample) => sample.p99Us && sample.p99Us / 1000, { log: true, label: msLabel });
    }
  } else series("Open connections", (sample) => sample.connections, { label: rateLabel });
  series("Memory of the server", (sample) => sample.serverBytes / 2 ** 20, { label: (value) => `${value} MiB` });
  return `<div class="charts">${parts.join("")}</div>`;
}

function table([header, ...rows]: readonly (readonly string[])[], name = ""): string {
  const cells = (tag: string, row: readonly string[]) =>
    `<tr>${row.map((cell) => `<${tag}>${cell.startsWith("<") ? cell : escape(cell)}</${tag}>`).join("")}</tr>`;
  const body = rows.map((row) => cells("td", row)).join("");
  return `<div class="scroll"><table class="${name}">${cells("th", header!)}${body}</table></div>`;
}

/** The report as a page. */
export function toHtml({ startedAt, machine, peer, results, goals }: Report): string {
  const targets = [...new Set(results.map(({ target }) => target))];
  const colourOf = (target: string) => targets.indexOf(target) % colours;
  const versions = Object.entries(machine.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  const legend = targets.map((target) => `<span><i class="f${colourOf(target)}"></i>${escape(target)}</span>`).join("");
  const sections = byScenario(results).map((group) =>
    `<h2>${escape(group[0]!.scenario)}</h2><p>${escape(group[0]!.about)}</p>` +
    charts(group, colourOf) + table(scenarioTable(group, peer)) +
    remarks(group).map((line) => `<p class="remark">${escape(line)}</p>`).join("")
  );
  const goalRows = goals.map(({ goal, target, limit, measured, reached }) => [
    goal,
    target,
    limit,
    measured,
    reached ? '<span class="yes">yes</span>' : '<span class="no">no</span>',
  ]);
  const goalTable = goals.length === 0
    ? ""
    : `<h2>Goals</h2>${table([["goal", "target", "wanted", "measured", "reached"], ...goalRows], "goals")}`;
  return `<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>wsproxy: what was measured</title><style>${style}</style>
<h1>wsproxy: what was measured</h1>
<p>${escape(startedAt)}, ${machine.cores} cores, ${escape(machine.system)}, ${escape(versions)}.
CPU is of the server's process, for each message or connect, and "to peer" its ratio to ${escape(peer)}'s.
Charts over time show the first round.</p>
<div class="legend">${legend}</div>
${goalTable}
${sections.join("\n")}
</html>
`;
}
