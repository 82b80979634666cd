/**
 * `deno task demo`: Redis, the proxy, a backend and a chat page that shows what resuming is: drop the network, reload,
 * open a second tab, kill the backend or the proxy, and see the answer go on without a hole.
 */

import {
  Child,
  freePort,
  type Interrupt,
  runUntilInterrupted,
  startProxy,
  startRedis,
  waitUntilHealthy,
} from "./processes.ts";
import { mintToken } from "../src/cli/token.ts";

const page = new URL("../examples/demo/", import.meta.url);
const clientModule = new URL("../clients/js/wsproxy.js", import.meta.url);
const session = "demo";

/** A child that is started again whenever it is killed. */
class Immortal implements AsyncDisposable {
  #child: Child;
  #disposed = false;
  constructor(readonly start: () => Child) {
    this.#child = start();
    this.#watch();
  }
  kill(): void {
    this.#child.kill();
  }
  async #watch(): Promise<void> {
    while (!this.#disposed) {
      await this.#child.ended;
      if (!this.#disposed) this.#child = this.start();
    }
  }
  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    await this.#child[Symbol.asyncDispose]();
  }
}

async function run(interrupt: Interrupt): Promise<void> {
  const secret = crypto.randomUUID() + crypto.randomUUID();
  const [redisPort, proxyPort, pagePort] = [0, 0, Number(Deno.env.get("PORT")) || 0].map((port) =>
    freePort("127.0.0.1", port)
  ) as [number, number, number];
  const redisUrl = `redis://127.0.0.1:${redisPort}`;
  await using redis = await startRedis(redisPort);
  await using proxy = new Immortal(() =>
    startProxy({
      HOST: "127.0.0.1",
      PORT: String(proxyPort),
      REDIS_URL: redisUrl,
      JWT_SECRET: secret,
      LOG_FORMAT: "text",
      LOG_LEVEL: "warn",
    })
  );
  await waitUntilHealthy(`http://127.0.0.1:${proxyPort}`);
  await using backend = new Immortal(() =>
    new Child("backend", "deno", {
      args: [
        ...["run", "--quiet", "--no-prompt", "--frozen", "--allow-env=REDIS_URL", "--ignore-env"],
        ...["--allow-net=127.0.0.1", "--allow-read=examples/demo", "examples/demo/backend.ts"],
      ],
      env: { REDIS_URL: redisUrl },
      stdout: "null",
    })
  );
  const victims: Record<string, Immortal> = { proxy, backend };
  const html = (file: URL, type: string) =>
    new Response(Deno.readTextFileSync(file), { headers: { "Content-Type": type } });
  await using server = Deno.serve({ hostname: "127.0.0.1", port: pagePort, onListen() {} }, (request) => {
    const { pathname } = new URL(request.url);
    const victim = victims[pathname.replace("/kill/", "")];
    if (pathname === "/") return html(new URL("index.html", page), "text/html; charset=utf-8");
    if (pathname === "/wsproxy.js") return html(clientModule, "text/javascript");
    if (pathname === "/session") {
      const token = mintToken(secret, { sessionId: session, ttlSecs: 3600 });
      return Response.json({ session, url: `ws://127.0.0.1:${proxyPort}/demo/ws/${session}`, token });
    }
    if (request.method === "POST" && victim) {
      victim.kill();
      return new Response(null, { status: 204 });
    }
    return new Response("no such path\n", { status: 404 });
  });
  console.log(`\nOpen http://127.0.0.1:${server.addr.port}/ and ask something. Ctrl-C ends all of it.\n`);
  await Promise.race([interrupt.received, redis.ended]);
}

await runUntilInterrupted(run);
