/** The page of ADMIN_PORT, as an operator uses it, in a headless Chromium: `deno task test:browser`. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { Client } from "../harness/client.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { eventually } from "../harness/wait.ts";
import { Browser } from "./browser.ts";

/** Begins as others do. */
const long = "tenant-of-a-long-name-conversation-number-1";
const markup = "<img src=x onerror=alert(1)>";

Deno.test({
  name: "An operator sees what goes on, finds a session and ends it, with the keyboard alone, by day and by night",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    await using redis = await RedisServer.start();
    const ADMIN_PORT = sparePort();
    await using proxy = await ProxyProcess.start(redis, { WORKERS: "2", ADMIN_PORT: String(ADMIN_PORT) });
    const control = redis.client();
    const clients = await Promise.all(
      Array.from({ length: 12 }, (_, n) => Client.connect(proxy.port, n === 0 ? markup : n === 1 ? long : `chat-${n}`)),
    );
    const loud = await Client.connect(proxy.port, "loud", { resume: "0", agent: "writer" });
    const tokens = setInterval(() => {
      for (let n = 1; n < clients.length; n++) {
        control.publish(`session:${n === 1 ? long : `chat-${n}`}:down`, "a token of an answer");
      }
      for (let n = 0; n < 20; n++) control.fcall("wsproxy_send", 1, "session:loud:down", "x".repeat(100));
      for (const client of clients) if (client.socket.readyState === WebSocket.OPEN) client.send('"stop"');
    }, 50);
    try {
      await using browser = await Browser.start();
      const text = async (id: string) =>
        String(await browser.evaluate(`document.getElementById("${id}")?.textContent`));
      const focused = async () =>
        String(await browser.evaluate("document.activeElement.id || document.activeElement.textContent"));
      const tabTo = async (wanted: string) => {
        for (let n = 0; await focused() !== wanted; n++) {
          assert(n < 40, `${wanted} cannot be reached`);
          await browser.press("Tab");
        }
      };
      await browser.resize(1200, 900);
      await browser.open(`http://127.0.0.1:${ADMIN_PORT}/`);
      await eventually("it is healthy", async () => await text("health") === "healthy");
      await eventually("charts move", async () => {
        const points = await browser.evaluate(
          "Math.min(...[...document.querySelectorAll('polyline')].slice(0, 5).map(({ points }) => points.numberOfItems))",
        );
        return Number(points) >= 3;
      });
      const charts = await text("charts");
      assert.match(charts, /Connectionsopen 13/);
      assert.match(charts, /Messages a seconddown \d+up \d+/);
      assert.match(charts, /Latency downp50 [\d.]+ (µs|ms)p99 [\d.]+ (µs|ms)/);
      assert.match(await text("build"), /^[\d.]+ on Deno [\d.]+, engine deno, 2 workers, \d+ MiB$/);
      // The busiest comes first, and what a client chose as its name is text and nothing else.
      await eventually("the busiest is first", async () => (await text("sessions")).startsWith("loudwriter1"));
      assert((await text("sessions")).includes(markup));
      assert.equal(await browser.evaluate("document.querySelector('#sessions img')"), null);
      if (Deno.args.includes("--screenshots")) await new Promise((resolve) => setTimeout(resolve, 25_000));
      await browser.keepScreenshot("admin.png");

      // With the keyboard alone: to its button, into its detail, out again, and the focus is where it was.
      await tabTo("loud");
      await browser.press("Enter");
      await eventually("its detail", async () => await text("detail-title") === "Session loud");
      assert.match(await text("sockets"), /^\w+-\d+writer\d+ s\d+ snever\d+-\d+[\d.]+ [KM]iB[\d.]+ (B|KiB)\d+ B$/);
      assert.equal(await focused(), "close");
      await browser.press("Escape");
      assert.equal(await browser.evaluate("document.getElementById('detail').open"), false);
      assert.equal(await focused(), "loud");
      // Ending asks first.
      await browser.press("Enter");
      await eventually("its detail again", async () => await focused() === "close");
      await tabTo("end");
      await browser.press("Enter");
      assert.equal(await focused(), "cancel");
      await browser.press("Enter");
      assert.equal(await focused(), "end");
      assert.equal(loud.socket.readyState, WebSocket.OPEN);
      await browser.press("Enter");
      await tabTo("end-now");
      await browser.press("Enter");
      assert.deepEqual(await loud.ended(), { code: 4403, reason: "closed by an operator" });
      await eventually("it is told", async () => await text("detail-note") === "Ended: 1 socket.");
      assert.equal(await browser.evaluate("document.getElementById('end').checkVisibility()"), false);
      await browser.press("Escape");
      await eventually("it is listed no more", async () => !(await text("sessions")).includes("loud"));
      await eventually("its close is counted", async () => (await text("closes")).includes("4403: 1"));
      // No longer than the page is open.
      assert.match(await text("closes-title"), /^Closes of the last \d+ s, by code$/);
      // One that is not in the list is found by its name.
      await browser.evaluate("document.getElementById('find-id').focus()");
      await browser.press(..."loud", "Enter");
      await eventually("it has gone", async () => await text("found") === "the session has no socket here");
      await browser.evaluate(`document.getElementById('find-id').value = ${JSON.stringify(markup)}`);
      await browser.press("Enter");
      await eventually("found", async () => await text("detail-title") === `Session ${markup}`);
      await browser.press("Escape");

      const back = () => browser.evaluate("getComputedStyle(document.body).backgroundColor");
      await browser.prefer("light");
      assert.equal(await back(), "rgb(251, 251, 250)");
      await browser.prefer("dark");
      assert.equal(await back(), "rgb(20, 21, 23)");
      await browser.resize(390, 800);
      // All values of a row, and both ends of its name.
      const rowShows = await browser.evaluate(`[...document.querySelectorAll("#sessions tr")].every((row) =>
        [...row.cells].every((cell) => cell.getBoundingClientRect().right <= innerWidth && cell.offsetWidth > 0))`);
      assert.equal(rowShows, true);
      assert.match(await text("sessions"), /tenant-of-a-l…ation-number-1agent/);
      await browser.evaluate("document.getElementById('closes-title').scrollIntoView()");
      await browser.keepScreenshot("admin-phone.png");
      assert.equal(await browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), true);

      redis.signal("SIGSTOP");
      await eventually("it is told that Redis is away", async () => (await text("health")).startsWith("unhealthy: "));
      redis.signal("SIGCONT");
      await eventually("and that it is back", async () => await text("health") === "healthy");
      for (const url of browser.requested) {
        assert(url.startsWith(`http://127.0.0.1:${ADMIN_PORT}/`) || url === "data:,");
      }
      // Chromium itself tells of a 404, and of a 503, that a page asked for.
      const complaints = browser.complaints.filter((text) => !/status of (404|503)/.test(text));
      assert.deepEqual(complaints, []);
    } finally {
      clearInterval(tokens);
    }
  },
});
