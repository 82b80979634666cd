/**
 * `deno task bench`: runs scenarios against the proxy and its peer, alternating, so that every figure can be read as a
 * ratio of two that were measured at the same time on the same machine.
 */

import { parseArgs } from "node:util";
import { goalsOf, type Report, resultOf } from "./figures.ts";
import { toHtml } from "./html.ts";
import type { Flow, Load, Outcome } from "./outcome.ts";
import { generate, type Listening, pinnedTo, prepare, startRedis, startTarget } from "./processes.ts";
import { scaleScenarios, type Scenario, scenarios } from "./scenarios.ts";
import { toText } from "./table.ts";
import { formerOf, type Target, targets } from "./targets.ts";

const usage = `Usage: deno task bench [options]

  --scale          the scenarios of deno task bench:scale instead
  --only NAMES     scenarios, comma-separated: ${[...scenarios, ...scaleScenarios].map(({ name }) => name).join(", ")}
  --target NAMES   servers, comma-separated: ${targets.map(({ name }) => name).join(", ")}
  --against DIR    compare with another checkout, for example of a former commit, instead of the peer; below this folder:
                   git worktree add --detach bench/out/former COMMIT
  --pin CPUS       servers on these cores, such as 0 or 0,2-3; put taskset in front of it all for the rest:
                   taskset -c 1 deno task bench --pin 0
  --pin-redis CPUS Redis on these, so that the generator has a core of its own:
                   taskset -c 1 deno task bench --pin 0 --pin-redis 0
  --rounds N       rounds of each scenario, instead of its own number
  --seconds N      measured time of each round
  --sessions N     sessions of each scenario
  --rate N         messages a second, where a scenario has a rate
  --drop N         publish N messages to a name without a subscriber: they must show as lost
  --json FILE      write everything that was measured
  --html FILE      write a report with charts; files go below bench/out or /tmp
  --help`;

/** Longer than any terminal's line of ours, to wipe it. */
const wipe = "\r\x1b[K";

class UsageError extends Error {}

interface Options {
  readonly scenarios: readonly Scenario[];
  readonly targets: readonly Target[];
  readonly pin: string | undefined;
  readonly pinRedis: string | undefined;
  readonly json: string | undefined;
  readonly html: string | undefined;
}

function readOptions(args: string[]): Options | undefined {
  const text = { type: "string" } as const;
  const flag = { type: "boolean" } as const;
  const { values } = parseArgs({
    args,
    options: {
      scale: flag,
      only: text,
      target: text,
      against: text,
      pin: text,
      "pin-redis": text,
      rounds: text,
      seconds: text,
      sessions: text,
      rate: text,
      drop: text,
      json: text,
      html: text,
      help: flag,
    },
  });
  if (values.help) return undefined;
  const number = (name: "rounds" | "seconds" | "sessions" | "rate" | "drop") => {
    const value = values[name] === undefined ? undefined : Number(values[name]);
    if (value !== undefined && !(value > 0)) throw new UsageError(`--${name} must be a positive number`);
    return value;
  };
  const all = values.only ? [...scenarios, ...scaleScenarios] : values.scale ? scaleScenarios : scenarios;
  const changes = {
    rounds: number("rounds"),
    seconds: number("seconds"),
    sessions: number("sessions"),
    rate: number("rate"),
    drop: number("drop"),
  };
  // At scale the question is whether the proxy holds, not what it is compared with.
  const chosen = values.against
    ? against(choose("--target", values.target ?? "wsproxy", targets), values.against)
    : choose("--target", values.target ?? (values.scale ? "wsproxy" : undefined), targets);
  return {
    scenarios: choose("--only", values.only, all).map((scenario) => change(scenario, changes)),
    targets: chosen.map((target) => ({ ...target, command: [...pinnedTo(values.pin), ...target.command] })),
    pin: values.pin,
    pinRedis: values["pin-redis"],
    json: values.json,
    html: values.html,
  };
}

/** One server of this checkout, and the same one of another. */
function against([target, ...others]: Target[], directory: string): Target[] {
  if (others.length > 0) throw new UsageError("--against compares one target");
  return [target!, formerOf(target!, directory)];
}

function choose<T extends { readonly name: string; readonly optional?: true }>(
  option: string,
  names: string | undefined,
  all: readonly T[],
): T[] {
  if (names === undefined) return all.filter(({ optional }) => !optional);
  return names.split(",").map((name) => {
    const chosen = all.find((item) => item.name === name);
    if (!chosen) throw new UsageError(`${option} ${name}: must be of ${all.map((item) => item.name).join(", ")}`);
    return chosen;
  });
}

function change(
  scenario: Scenario,
  { rounds, seconds, sessions, rate, drop }: Partial<
    Record<"rounds" | "seconds" | "sessions" | "rate" | "drop", number>
  >,
): Scenario {
  const flow = (flow: Flow | undefined) => flow?.perSecond && rate ? { ...flow, perSecond: rate } : flow;
  const { load } = scenario;
  const share = sessions === undefined ? 1 : sessions / load.sessions;
  const part = (number: number) => Math.max(1, Math.round(number * share));
  const changed: Load = {
    ...load,
    sessions: sessions ?? load.sessions,
    ...(load.warmSessions === undefined ? {} : { warmSessions: part(load.warmSessions) }),
    ...(load.slow === undefined ? {} : { slow: part(load.slow) }),
    ...(load.storm === undefined ? {} : { storm: { ...load.storm, sessions: part(load.storm.sessions) } }),
    ...(seconds === undefined || load.measureMs === 0 ? {} : { measureMs: seconds * 1000 }),
    down: flow(load.down),
    up: flow(load.up),
    drop,
  };
  return { ...scenario, rounds: rounds ?? scenario.rounds, load: changed };
}

/** Progress: one line that changes on a terminal, a line per round elsewhere. */
function show(line: string, last = false): void {
  const terminal = Deno.stderr.isTerminal();
  if (terminal) Deno.stderr.writeSync(new TextEncoder().encode(`${wipe}${line}${last ? "\n" : ""}`));
  else if (last) console.error(line);
}

async function runOne(scenario: Scenario, target: Target, redis: Listening, label: string): Promise<Outcome> {
  const secret = crypto.randomUUID();
  await using server = await startTarget(target, redis, secret);
  return await generate({
    load: scenario.load,
    port: server.port,
    redisPort: redis.port,
    serverPid: server.pid,
    redisPid: redis.pid,
    secret,
  }, (progress) => show(`${label} (process ${server.pid}): ${progress}`));
}

async function measure(options: Options): Promise<Report> {
  const startedAt = new Date().toISOString();
  const startMs = performance.now();
  for (const target of options.targets) await prepare(target);
  await using redis = await startRedis(options.pinRedis);
  const redisBeside = options.pin !== undefined && options.pin === options.pinRedis;
  const total = options.scenarios.reduce((sum, { rounds }) => sum + rounds, 0) * options.targets.length;
  let done = 0;
  const results = [];
  for (const scenario of options.scenarios) {
    const outcomes = new Map<Target, Outcome[]>(options.targets.map((target) => [target, []]));
    for (let round = 0; round < scenario.rounds; round++) {
      // There and back again, so that a machine that grows slower or faster favours no target.
      const order = round % 2 === 0 ? options.targets : options.targets.toReversed();
      for (const target of order) {
        const label = `[${++done}/${total}] ${scenario.name}, ${target.name}`;
        const outcome = await runOne(scenario, target, redis, label);
        outcomes.get(target)!.push(outcome);
        show(`${label}: done at ${((performance.now() - startMs) / 1000).toFixed(0)} s`, true);
      }
    }
    for (const [target, rounds] of outcomes) results.push(resultOf(scenario, target.name, rounds, redisBeside));
  }
  const peer = (options.targets.find(({ name }) => name === "former") ?? options.targets.at(-1)!).name;
  const machine = { cores: navigator.hardwareConcurrency, system: Deno.build.target, versions: await versions() };
  return { startedAt, machine, peer, results, goals: goalsOf(results, peer) };
}

async function versions(): Promise<Record<string, string>> {
  const node = await new Deno.Command("node", { args: ["--version"] }).output();
  const redis = await new Deno.Command("redis-server", { args: ["--version"] }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return {
    deno: Deno.version.deno,
    node: text(node.stdout).replace(/^v/, ""),
    redis: /v=(\S+)/.exec(text(redis.stdout))?.[1] ?? "unknown",
  };
}

async function write(file: string, content: string): Promise<void> {
  const directory = file.includes("/") ? file.slice(0, file.lastIndexOf("/")) : ".";
  if (directory !== "") await Deno.mkdir(directory, { recursive: true });
  await Deno.writeTextFile(file, content);
  console.error(`wrote ${file}`);
}

async function main(): Promise<void> {
  let options;
  try {
    options = readOptions(Deno.args);
  } catch (error) {
    if (!(error instanceof UsageError) && !(error instanceof TypeError)) throw error;
    console.error(`${error.message}\n\n${usage}`);
    Deno.exit(2);
  }
  if (!options) return console.log(usage);
  const report = await measure(options);
  console.log(toText(report));
  if (options.json) await write(options.json, JSON.stringify(report));
  if (options.html) await write(options.html, toHtml(report));
}

if (import.meta.main) await main();
