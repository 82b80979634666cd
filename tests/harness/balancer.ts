/** The balancers of deploy/ as programs of this machine, and what each of them must do. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { upChannel } from "../../src/redis/link.ts";
import { certify } from "./certificate.ts";
import { entriesWith } from "./entries.ts";
import { TestProxy } from "./proxy.ts";
import { RedisServer } from "./redis.ts";
import { mint } from "./token.ts";
import { eventually, soon } from "./wait.ts";
import { handshake, readUntil, requestHead, writeAll } from "./wire.ts";

/** How to run a balancer with its file from deploy/. */
export interface Program {
  readonly command: string;
  readonly file: string;
  /** The arguments that check a configuration, and those that serve with it in the foreground. */
  check(config: string, folder: string): string[];
  serve(config: string, folder: string): string[];
  /** Asks it to stop listening, and to end with its last connection. */
  readonly softStop: Deno.Signal;
  /** What must differ on this machine, besides servers, ports and certificate. */
  adapt?(text: string, folder: string): string;
  /** The same, for one that connects to its servers from 127.0.0.9. */
  from(text: string, folder: string): string;
}

/** HAProxy. */
export const haproxy: Program = {
  command: "haproxy",
  file: "haproxy.cfg",
  check: (config) => ["-c", "-q", "-f", config],
  serve: (config) => ["-db", "-f", config],
  softStop: "SIGUSR1",
  from: (text) => text.replace(/^backend proxies\n/m, (line) => `${line}  source 127.0.0.9\n`),
};

const directives = (folder: string) => ["-p", folder, "-e", "stderr", "-g", `daemon off; pid ${folder}/pid;`];

/** nginx. */
export const nginx: Program = {
  command: "nginx",
  file: "nginx.conf",
  check: (config, folder) => ["-t", "-q", "-c", config, ...directives(folder)],
  serve: (config, folder) => ["-c", config, ...directives(folder)],
  softStop: "SIGQUIT",
  // Where a user who is not root may write.
  adapt: (text, folder) =>
    text.replace(
      /^http \{\n/m,
      (line) =>
        line +
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `  ${name}_temp_path ${folder};\n`).join(""),
    ).replaceAll("/dev/stdout", `${folder}/log`).replaceAll("/dev/stderr", `${folder}/errors`),
  from: (text, folder) =>
    nginx.adapt!(text, folder).replace(
      /^( +)proxy_pass /m,
      (line, indent) => `${indent}proxy_bind 127.0.0.9;\n${line}`,
    ),
};

/** A balancer in front of three servers, until the end of its scope. */
export class Balancer implements AsyncDisposable {
  /** The last one listens; those before it keep their connections. */
  readonly #children: Deno.ChildProcess[] = [];

  private constructor(
    readonly program: Program,
    readonly config: string,
    readonly folder: string,
    readonly port: number,
    /** The authority that has signed its certificate, as PEM. */
    readonly ca: string,
  ) {}

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
    await balancer.#serve();
    return balancer;
  }

  async #serve(): Promise<void> {
    const { command, serve } = this.program;
    const args = serve(this.config, this.folder);
    this.#children.push(new Deno.Command(command, { args, stdin: "null", stdout: "null", stderr: "null" }).spawn());
    await eventually("the balancer listens", () => this.connect().then((tls) => (tls.close(), true), () => false));
  }

  /** Kills it, and starts it again. */
  async restart(): Promise<void> {
    await this.#kill();
    await this.#serve();
  }

  /** Starts another one in its place, which takes the connections to come; the old one keeps those that there are. */
  async reload(): Promise<void> {
    this.#children.at(-1)!.kill(this.program.softStop);
    await eventually(
      "the old balancer listens no more",
      () => this.connect().then((tls) => (tls.close(), false), () => true),
    );
    await this.#serve();
  }

  async #kill(): Promise<void> {
    for (const child of this.#children.splice(0)) {
      try {
        // Not SIGKILL, which the workers of nginx outlive.
        child.kill("SIGTERM");
      } catch {
        // It has ended.
      }
      await child.status;
    }
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
    await this.#kill();
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

  Deno.test(`deploy/${program.file} says where a client is, whatever the client says`, async () => {
    await using redis = await RedisServer.start();
    // The balancer has another address than its clients.
    const env = { TRUSTED_PROXIES: "127.0.0.9", INBOX: "true", VACATED_GRACE_SECS: "0", INBOX_ADDRESS: "true" };
    await using proxy = await TestProxy.start(redis, { ...env, MAX_CONNECTIONS_PER_ADDRESS: "2" });
    const servers = [proxy.port, proxy.port, proxy.port];
    await using balancer = await Balancer.start({ ...program, adapt: program.from }, servers);
    const connections: Deno.TlsConn[] = [];
    const answer = async (n: number) => {
      const headers = { ...await handshake(`s${n}`), "X-Forwarded-For": `6.6.6.${n}`, Forwarded: `for=6.6.6.${n}` };
      const connection = await balancer.request("GET", `/agent/ws/s${n}`, headers);
      connections.push(connection);
      return await readUntil(connection, /^HTTP\/1.1 (101|4\d\d) [^]*\r\n\r\n/);
    };
    try {
      for (const n of [1, 2]) assert.match(await answer(n), / 101 /);
      assert.match(await answer(3), / 429 [^]*retry-after: [1-5]\r\n/i);
      const told = await entriesWith(redis.client(), "connected", 2);
      assert.deepEqual(told.map(({ address }) => address), ["127.0.0.1", "127.0.0.1"]);
    } finally {
      for (const connection of connections) connection.close();
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
