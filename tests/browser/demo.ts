/**
 * The demo, as a person uses it, in a headless Chromium: `deno task test:browser`. With `--screenshots DIR` after "--"
 * it writes docs/demo.png there.
 */

import assert from "node:assert/strict";
import { lines } from "../harness/process.ts";
import { eventually, soon } from "../harness/wait.ts";
import { Browser } from "./browser.ts";

const root = new URL("../../", import.meta.url).pathname;

Deno.test({
  name: "An answer goes on without a hole through a dropped network, a reload, and killed backends and proxies",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    const demo = new Deno.Command(Deno.execPath(), {
      args: ["task", "--quiet", "demo"],
      cwd: root,
      env: { NO_COLOR: "1" },
      stdin: "null",
      stdout: "piped",
      stderr: "inherit",
    }).spawn();
    const output = lines(demo.stdout);
    try {
      const line = await soon(output.until((line) => line.startsWith("Open ")), "the demo");
      output.drain();
      const url = line.split(" ")[1]!;
      await using browser = await Browser.start();
      const number = async (what: string) => await browser.evaluate(`globalThis.demo?.counts.${what}`) as number;
      const shown = async () => await browser.evaluate("document.getElementById('chat').textContent") as string;
      const words = async () => (await shown()).split(/\s+/).length;
      const open = () =>
        eventually("it is connected", async () => await browser.evaluate("demo.connection.open") === true);
      const goesOn = async (what: string) => {
        const before = await words();
        await eventually(`it goes on after ${what}`, async () => await words() > before + 2);
      };
      const click = (id: string) => browser.evaluate(`document.getElementById("${id}").click()`);
      await browser.open(url);
      await open();
      await browser.evaluate("document.getElementById('ask').requestSubmit()");
      await eventually("an answer begins", async () => await words() > 12);
      await click("drop");
      await goesOn("a drop");
      await click("proxy");
      await goesOn("the proxy's death");
      await click("backend");
      await goesOn("the backend's death");
      const before = await shown();
      await browser.open(url);
      await eventually("what was shown is shown again", async () => (await shown()).startsWith(before.slice(0, 100)));
      await goesOn("a reload");
      const answer = Deno.readTextFileSync(`${root}examples/demo/answer.txt`).trim().replace(/\s+/g, " ");
      await browser.keepScreenshot("demo.png");
      await eventually("the answer is whole", async () => (await shown()).replace(/\s+/g, " ").includes(answer));
      // What is asked while the network is away is said to wait, and asked then.
      await click("drop");
      await browser.evaluate("document.getElementById('question').value = 'Is anybody there?'");
      await browser.evaluate("document.getElementById('ask').requestSubmit()");
      const waiting = async () => await browser.evaluate("document.getElementById('waiting').textContent") as string;
      assert.equal(await waiting(), "Waiting for the network: Is anybody there?");
      await eventually("it is asked", async () => (await shown()).includes("Is anybody there?"));
      assert.equal(await waiting(), "");
      await eventually("it is answered", async () => (await shown()).replace(/\s+/g, " ").split(answer).length === 3);
      assert.equal(await number("holes"), 0);
      assert.equal(await number("gaps"), 0);
      await browser.evaluate("sessionStorage.clear()");
      await browser.open(url);
      await eventually("a new tab has all of it", async () => (await shown()).replace(/\s+/g, " ").includes(answer));
    } finally {
      demo.kill("SIGTERM");
      await demo.status;
    }
  },
});
