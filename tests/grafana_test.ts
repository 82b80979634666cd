/** Every query of the dashboard and of the alert rules is PromQL, and asks for what the proxy exports. */

import assert from "node:assert/strict";
import { parser } from "@prometheus-io/lezer-promql";
import { ProxyProcess } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { metricRows } from "../src/metrics.ts";
import { request } from "./harness/wire.ts";

const read = (path: string) => Deno.readTextFileSync(new URL(`../deploy/grafana/${path}`, import.meta.url));

/** The names that a query uses. */
function namesIn(query: string): { metrics: string[]; labels: string[] } {
  const metrics: string[] = [];
  const labels: string[] = [];
  // Grafana's own variables.
  const text = query.replaceAll("$__rate_interval", "1m").replaceAll("$instance", ".*");
  parser.parse(text).iterate({
    enter({ type, from, to, node }) {
      assert(!type.isError, `${query}: not PromQL at ${from}`);
      const name = text.slice(from, to);
      if (type.name === "Identifier" && node.parent?.name === "VectorSelector") metrics.push(name);
      if (type.name === "LabelName") labels.push(name);
    },
  });
  assert(metrics.length > 0, query);
  return { metrics, labels };
}

const dashboardQueries = (JSON.parse(read("dashboard.json")).panels as { targets: { expr: string }[] }[])
  .flatMap(({ targets }) => targets.map(({ expr }) => expr));
const alertQueries = [...read("alerts.yml").matchAll(/^ *expr: (.*)$/gm)].map(([, expr]) => expr!);

Deno.test("Every query of the dashboard and of the alerts asks for what the proxy exports", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const { body } = await request(proxy.port, "/metrics");
  const exported = new Set<string>(["up"]);
  for (const [, name, type] of body.matchAll(/^# TYPE (\S+) (\S+)$/gm)) {
    if (type !== "histogram") exported.add(name!);
    else for (const part of ["bucket", "count", "sum"]) exported.add(`${name}_${part}`);
  }
  const labels = new Set([
    "job",
    "instance",
    "le",
    ...Object.values(metricRows).flatMap((row) => "labels" in row ? [...row.labels] : []),
  ]);
  assert(dashboardQueries.length > 20 && alertQueries.length > 8);
  for (const query of [...dashboardQueries, ...alertQueries]) {
    const names = namesIn(query);
    for (const metric of names.metrics) assert(exported.has(metric), `${metric} in ${query}`);
    for (const label of names.labels) assert(labels.has(label as never), `${label} in ${query}`);
  }
});

Deno.test("The dashboard shows every metric", () => {
  const used = new Set(dashboardQueries.flatMap((query) => namesIn(query).metrics));
  // Told by others: a message that is no JSON is a client's own matter, and the rest shows as closes or in the log.
  const elsewhere = [
    "wsproxy_subscriptions",
    "wsproxy_opened_total",
    "wsproxy_invalid_json_total",
    "wsproxy_upstream_refused_total",
  ];
  for (const { name, type } of Object.values(metricRows)) {
    const names = type === "histogram" ? [`${name}_bucket`] : [name];
    assert(elsewhere.includes(name) || names.some((each) => used.has(each)), name);
  }
});
