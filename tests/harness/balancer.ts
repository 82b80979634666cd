/** The balancers of deploy/ as programs of this machine, and what each of them must do. */

import assert from "node:assert/strict";
import { upChannel } from "../../src/redis/link.ts";
import { certify } from "./certificate.ts";
import { TestProxy } from "./proxy.ts";
import { RedisServer } from "./redis.ts";
import { mint } from "./token.ts";
import { eventually, soon } from "./wait.ts";
import { handshake, readUntil, requestHead, sparePort, writeAll } from "./wire.ts";

/** How to run a balancer with its file from deploy/. */
export interface Program {
  readonly command: string;
  readonly file: string;
  /** The arguments that check a configuration, and those that serve with it in the foreground. */
  check(config: string, folder: string): string[];
  serve(config: string, folder: string): string[];
  /** What must differ on this machine, besides servers, ports and certificate. */
  adapt?(text: string, folder: string): string;
}

/** A balancer in front of three servers, until the end of its scope. */
class Balancer implements AsyncDisposable {
  readonly #child: Deno.ChildProcess;

  private constructor(program: Program, config: string, folder: string, readonly port: number, readonly ca: string) {
    const args = program.serve(config, folder);
    this.#child = new Deno.Command(program.command, { args, stdin: "null", stdout: "null", stderr: "null" }).spawn();
  }

  static async start(program: Program, servers: readonly number[]): Promise<Balancer> {
    const folder = await Deno.makeTempDir();
    const { keyPem, certificatePem } = await certify("localhost");
    await Deno.writeTextFile(`${folder}/wsproxy.key`, keyPem);
    await Deno.writeTextFile(`${folder}/wsproxy.crt`, certificatePem);
    await Deno.writeTextFile(`${folder}/wsproxy.pem`, certificatePem + keyPem);
    const port = sparePort();
    let text = await Deno.readTextFile(new URL(`../../deploy/${program.file}`, import.meta.url));
    for (const [n, server] of servers.entries()) text = text.replace(`wsproxy-${n + 1}:8080`, `127.0.0.1:${server}`);
    text = text.replace(/\/etc\/\w+\/certs/g, folder)
      .replace(/^( +(?:bind|listen)) :?443\b/m, `$1 127.0.0.1:${port}`)
      .replace(/^( +(?:bind|listen)) :?80\b/m, `$1 127.0.0.1:${sparePort()}`)
      // What must not end a quiet stream does so soon, if it does.
      .replace(/timeout (client|server) 30s/g, "timeout $1 1s");
    const config = `${folder}/${program.file}`;
    await Deno.writeTextFile(config, program.adapt?.(text, folder) ?? text);
    const checked = await new Deno.Command(program.command, { args: program.check(config, folder) }).output();
    assert(checked.success, new TextDecoder().decode(checked.stderr));
    const balancer = new Balancer(program, config, folder, port, certificatePem);
    await eventually("the balancer listens", () => balancer.connect().then((tls) => (tls.close(), true), () => false));
    return balancer;
  }

  connect(): Promise<Deno.TlsConn> {
    return Deno.connectTls({ hostname: "localhost", port: this.port, caCerts: [this.ca] });
  }

  /** A connection on which a request has been sent. */
  async request(method: string, path: string, headers: Record<string, string>, body = ""): Promise<Deno.TlsConn> {
    const tls = await this.connect();
    await writeAll(tls, new TextEncoder().encode(requestHead(path, { method, headers }) + body));
    return tls;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL");
    await this.#child.status;
  }
}

/** The tests of one balancer. */
export function testBalancer(program: Program): void {
  Deno.test(`deploy/${program.file} keeps a session's sockets and streams together, however quiet they are`, async () => {
    await using redis = await RedisServer.start();
    await using one = await TestProxy.start(redis);
    await using two = await TestProxy.start(redis);
    await using three = await TestProxy.start(redis);
    const proxies = [one, two, three];
    await using balancer = await Balancer.start(program, proxies.map(({ port }) => port));
    const control = redis.client();
    const sessions = ["s1", "s2", "s3", "s4", "s5"];
    const streams: Deno.TlsConn[] = [];
    try {
      for (const session of sessions) {
        const socket = await balancer.request("GET", `/agent/ws/${session}`, await handshake(session));
        streams.push(socket);
        await readUntil(socket, /101 Switching/);
        const headers = { Authorization: `Bearer ${await mint(session)}` };
        const stream = await balancer.request("GET", `/agent/sse/${session}`, headers);
        streams.push(stream);
        await readUntil(stream, /200 OK[^]*\r\n\r\n/);
      }
      for (const { proxy } of proxies) assert.equal(proxy.sessions % 2, 0, "a session is on two proxies");
      await eventually("all are open", () => proxies.reduce((sum, { proxy }) => sum + proxy.sessions, 0) === 10);
      // Longer than the timeouts of a request.
      await new Promise((resolve) => setTimeout(resolve, 2500));
      for (const session of sessions) await control.publish(`session:${session}:down`, '"still here"');
      for (const stream of streams) await soon(readUntil(stream, /"still here"/), "the message");
      const ear = redis.client();
      const heard = new Promise((resolve) => ear.on("message", (_channel, text) => resolve(text)));
      await ear.subscribe(upChannel("s1"));
      const headers = { Authorization: `Bearer ${await mint("s1")}`, "Content-Length": "4" };
      const post = await balancer.request("POST", "/agent/sse/s1", headers, '"up"');
      streams.push(post);
      await readUntil(post, /^HTTP\/1.1 2\d\d /);
      assert.equal(await heard, '"up"');
    } finally {
      for (const stream of streams) stream.close();
    }
  });

  Deno.test(`deploy/${program.file} sends no POST twice`, async () => {
    const posts: string[] = [];
    const servers = [0, 1, 2].map(() => Deno.listen({ hostname: "127.0.0.1", port: 0 }));
    // Takes a POST, and is gone before it has answered.
    const serve = async (server: Deno.Listener) => {
      for await (const connection of server) {
        try {
          const head = await readUntil(connection, /\r\n\r\n/);
          if (head.startsWith("POST")) posts.push(head);
          else await writeAll(connection, new TextEncoder().encode("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
        } catch {
          // A look at whether something listens.
        }
        connection.close();
      }
    };
    const served = servers.map(serve);
    {
      await using balancer = await Balancer.start(program, servers.map(({ addr }) => (addr as Deno.NetAddr).port));
      const client = await balancer.request("POST", "/agent/sse/s1", { "Content-Length": "4" }, '"up"');
      await readUntil(client, /^HTTP\/1.1 502 /);
      client.close();
    }
    for (const server of servers) server.close();
    await Promise.all(served);
    assert.equal(posts.length, 1);
  });
}
