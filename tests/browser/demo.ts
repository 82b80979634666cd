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
      const answer = Deno.readTextFileSync(`${root}examples/demo/answer.txt`).trim().replace(/\s+/g, " ");
      const text = async () => (await shown()).replace(/\s+/g, " ").trim();
      // A slow machine may have all of an answer before we look.
      const goesOn = async (what: string) => {
        const before = await words();
        const isFurther = async () => await words() > before + 2 || (await text()).endsWith(answer);
        await eventually(`it goes on after ${what}`, isFurther);
      };
      const click = (id: string) => browser.evaluate(`document.getElementById("${id}").click()`);
      // An answer takes nine seconds, and a new question ends it. A young one has not ended before the next thing happens,
      // however long the one before has taken.
      const ask = async () => {
        const before = await words();
        await browser.evaluate("document.getElementById('ask').requestSubmit()");
        await eventually("an answer begins", async () => await words() > before + 12);
      };
      await browser.open(url);
      await open();
      for (const [id, what] of [["drop", "a drop"], ["proxy", "the proxy's death"]] as const) {
        await open();
        await ask();
        const connects = await number("connects");
        await click(id);
        await eventually(`it is connected again after ${what}`, async () => await number("connects") > connects);
        await goesOn(what);
      }
      await ask();
      await click("backend");
      await goesOn("the backend's death");
      assert.equal(await number("holes"), 0);
      assert.equal(await number("gaps"), 0);
      const before = await shown();
      await browser.open(url);
      await eventually("what was shown is shown again", async () => (await shown()).startsWith(before.slice(0, 100)));
      await goesOn("a reload");
      await browser.keepScreenshot("demo.png");
      const whole = async () => (await text()).split(answer).length - 1;
      await eventually("the answer is whole", async () => await whole() > 0);
      const had = await whole();
      // What is asked while the network is away is said to wait, and asked then.
      await click("drop");
      await browser.evaluate("document.getElementById('question').value = 'Is anybody there?'");
      await browser.evaluate("document.getElementById('ask').requestSubmit()");
      const waiting = async () => await browser.evaluate("document.getElementById('waiting').textContent") as string;
      assert.equal(await waiting(), "Waiting for the network: Is anybody there?");
      await eventually("it is asked", async () => (await shown()).includes("Is anybody there?"));
      assert.equal(await waiting(), "");
      await eventually("it is answered", async () => await whole() > had);
      assert.equal(await number("holes"), 0);
      assert.equal(await number("gaps"), 0);
      await browser.evaluate("sessionStorage.clear()");
      await browser.open(url);
      await eventually("a new tab has all of it", async () => (await text()).includes(answer));
    } finally {
      demo.kill("SIGTERM");
      await demo.status;
    }
  },
});
