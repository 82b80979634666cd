/** Prometheus' configuration and alert rules, as Prometheus reads them. Needs promtool. */

import assert from "node:assert/strict";

Deno.test("Prometheus takes its configuration, and its alert rules", async () => {
  const path = new URL("../../deploy/grafana/prometheus.yml", import.meta.url).pathname;
  const { success, stderr } = await new Deno.Command("promtool", { args: ["check", "config", path] }).output();
  assert(success, new TextDecoder().decode(stderr));
});
