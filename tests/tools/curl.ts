/** The pages' commands with curl, as printed. Needs curl. */

import assert from "node:assert/strict";
import { blockOf } from "../harness/pages.ts";
import { Copy } from "../harness/terminal.ts";
import { mint } from "../harness/token.ts";

const quickStart = blockOf("README.md", "redis-server --port 6390").text;
const restart = blockOf("docs/migrating.md", "curl http://127.0.0.1:8080/health").text;
const admin = blockOf("docs/run.md", "curl http://127.0.0.1:9090/sessions ").text;
const stream = blockOf("docs/resume.md", "curl -N").text;

Deno.test("The pages' commands with curl work as printed", async () => {
  await using copy = new Copy();
  await using up = copy.run(quickStart, { ADMIN_PORT: String(copy.adminPort) });
  await using client = copy.run((await up.shows("./dev client")).trim());
  await client.shows("connected");
  const secret = /^JWT_SECRET=(.*)$/m.exec(Deno.readTextFileSync(`${copy.folder}/.env`))![1]!;
  await using events = copy.run(stream, { TOKEN: await mint("demo", {}, secret) });
  await events.shows("event: ");
  await using restarted = copy.run(restart);
  const [unhealthy, healthy, published] = (await restarted.ends()).match(/\{"status":"\w+"|\d+$/g)!;
  assert.deepEqual([unhealthy, healthy, published], ['{"status":"unhealthy"', '{"status":"healthy"', "1"]);
  await client.shows('"after"');
  await events.shows('data: "after"');
  await using ended = copy.run(admin);
  assert.match(await ended.ends(), /"demo"/);
  await client.shows("stopped (4403");
});
