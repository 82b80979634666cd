/** The systemd unit as systemd reads it. Needs systemd-analyze. */

import assert from "node:assert/strict";

Deno.test("systemd knows every word of the unit", async () => {
  const path = new URL("../../deploy/systemd/wsproxy.service", import.meta.url).pathname;
  const { stderr } = await new Deno.Command("systemd-analyze", { args: ["verify", path] }).output();
  // It checks the machine as well, which has no such user.
  const complaints = new TextDecoder().decode(stderr).split("\n").filter((line) => line.includes("wsproxy.service:"));
  assert.deepEqual(complaints.filter((line) => /Unknown|Failed to parse|Invalid|ignoring/.test(line)), []);
});
