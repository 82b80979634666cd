/** clients/js in a page: what a browser does to one that sleeps, and to one whose network goes and comes back. */

import assert from "node:assert/strict";
import { TestProxy } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { Relay } from "../harness/relay.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { Browser } from "./browser.ts";

const moduleText = Deno.readTextFileSync(new URL("../../clients/js/wsproxy.js", import.meta.url));

const page = (port: number, token: string) =>
  `<!doctype html><script type="module">
  import { Connection } from "/wsproxy.js";
  globalThis.seen = [];
  globalThis.states = [];
  globalThis.connection = new Connection({
    url: "ws://127.0.0.1:${port}/agent/ws/s1",
    token: () => "${token}",
    onMessage: (text) => seen.push(text),
    onState: (state, close) => states.push(state + " " + (close ? close.code + " " + close.reason : "")),
  });
</script>`;

Deno.test({
  name: "A page whose socket died while it slept, or while its network was away, finds out at once",
  sanitizeOps: false,
  sanitizeResources: false,
  async fn() {
    await using redis = await RedisServer.start();
    await using proxy = await TestProxy.start(redis);
    using relay = new Relay(proxy.port);
    const control = redis.client();
    const send = (text: string) => control.call("FCALL", "wsproxy_send", 1, "session:s1:down", text);
    const token = await mint("s1");
    await using server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
      const isModule = new URL(url).pathname === "/wsproxy.js";
      const headers = { "Content-Type": isModule ? "text/javascript" : "text/html" };
      return new Response(isModule ? moduleText : page(relay.port, token), { headers });
    });
    await using browser = await Browser.start();
    await browser.open(`http://127.0.0.1:${server.addr.port}/`);
    const seen = async () => await browser.evaluate("seen.join()") as string;
    await eventually("it is open", async () => await browser.evaluate("connection.open") === true);
    relay.freezeAll();
    await send("while it had no network");
    await browser.goOffline(true);
    await eventually("the page knows", async () => await browser.evaluate("navigator.onLine") === false);
    await browser.goOffline(false);
    await eventually("it has dialed anew", async () => await seen() === "while it had no network");
    await browser.freeze(true);
    relay.freezeAll();
    await send("while it slept");
    await browser.freeze(false);
    await eventually("it has dialed anew", async () => (await seen()).endsWith("while it slept"));
    assert.match(await browser.evaluate("states.join()") as string, /1006 no sign of life/);
    // A refused handshake is 1006 for a page, unless it asks for a close.
    await browser.evaluate(`globalThis.refused = new (connection.constructor)({
      url: "ws://127.0.0.1:${proxy.port}/agent/ws/another", token: () => "${token}", onMessage() {},
      onState: (state, close) => globalThis.end = state + " " + close?.code,
    })`);
    await eventually("it has ended", async () => await browser.evaluate("end") === "closed 4403");
    await browser.evaluate("connection.close()");
  },
});
