/** The balancers of deploy/ with TLS, in front of three proxies. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { certify } from "../harness/certificate.ts";
import { mint } from "../harness/token.ts";
import { readReply, type Reply, requestHead, writeAll } from "../harness/wire.ts";
import { type Checkout, maxDescriptors, project, secret } from "./checkout.ts";
import { docker, eventually, run } from "./shell.ts";

/** Puts each balancer of deploy/ in front of the three proxies of the scale profile. */
export async function checkTls(checkout: Checkout): Promise<void> {
  const { keyPem, certificatePem } = await certify("localhost");
  await Deno.writeTextFile(`${checkout.path}/wsproxy.key`, keyPem);
  await Deno.writeTextFile(`${checkout.path}/wsproxy.crt`, certificatePem);
  await Deno.writeTextFile(`${checkout.path}/wsproxy.pem`, certificatePem + keyPem);
  const hosts: string[] = [];
  for (const [n, service] of ["proxy", "proxy-2", "proxy-3"].entries()) {
    const format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    const address = await docker("inspect", "--format", format, await checkout.container(service));
    hosts.push("--add-host", `wsproxy-${n + 1}:${address}`);
  }
  const balancers = [
    {
      image: "haproxy:3.2-alpine",
      check: ["haproxy", "-c", "-f", "/usr/local/etc/haproxy/haproxy.cfg"],
      files: [["deploy/haproxy.cfg", "/usr/local/etc/haproxy/haproxy.cfg"], [
        "wsproxy.pem",
        "/etc/haproxy/certs/wsproxy.pem",
      ]],
    },
    {
      image: "nginx:1.28-alpine",
      check: ["nginx", "-t"],
      files: [
        ["deploy/nginx.conf", "/etc/nginx/nginx.conf"],
        ["wsproxy.crt", "/etc/nginx/certs/wsproxy.crt"],
        ["wsproxy.key", "/etc/nginx/certs/wsproxy.key"],
      ],
    },
  ];
  for (const { image, check, files } of balancers) {
    // Baked into an image, as mounts would need the engine to see our files.
    const copies = files.map(([from, to]) => `COPY --chmod=644 ${from} ${to}\n`).join("");
    await Deno.writeTextFile(`${checkout.path}/check.Dockerfile`, `FROM ${image}\n${copies}`);
    await Deno.writeTextFile(`${checkout.path}/check.Dockerfile.dockerignore`, "");
    const tag = `${project}-balancer`;
    await docker("build", "--quiet", "--tag", tag, "--file", `${checkout.path}/check.Dockerfile`, checkout.path);
    const limits = ["--ulimit", `nofile=${maxDescriptors}`];
    // HAProxy's image is not root, and these listen on 80 and 443.
    const network = [...hosts, "--network", `${project}_default`, "--sysctl", "net.ipv4.ip_unprivileged_port_start=0"];
    try {
      await docker("run", "--rm", ...network, ...limits, tag, ...check);
      const port = sparePort();
      const container = await docker(
        "run",
        "--detach",
        ...network,
        ...limits,
        "--publish",
        `127.0.0.1:${port}:443`,
        tag,
      );
      try {
        await checkTlsRelay(checkout, image, port, certificatePem, container);
      } finally {
        await docker("rm", "--force", "--volumes", container);
      }
    } finally {
      await run("docker", ["image", "rm", "--force", tag]);
    }
  }
}

async function checkTlsRelay(checkout: Checkout, what: string, port: number, certificate: string, container: string) {
  const connect = async (path: string, headers: Record<string, string>): Promise<[Reply, Deno.TlsConn]> => {
    const tcp = await Deno.connect({ hostname: "127.0.0.1", port });
    const tls = await Deno.startTls(tcp, { hostname: "localhost", caCerts: [certificate] });
    await writeAll(tls, new TextEncoder().encode(requestHead(path, { headers: { Host: "localhost", ...headers } })));
    return [await readReply(tls), tls];
  };
  const status = async (path: string, headers: Record<string, string> = {}): Promise<number> => {
    const [reply, tls] = await connect(path, headers);
    tls.close();
    return reply.status;
  };
  await eventually(`${what} up`, async () => {
    try {
      return await status("/nowhere") === 404;
    } catch (error) {
      if (error instanceof Deno.errors.InvalidData) throw error; // the certificate
      return false; // not listening yet
    }
  });
  for (const path of ["/metrics", "/health", "/ready"]) assert.equal(await status(path), 404, `${what} ${path}`);
  const session = `tls-${crypto.randomUUID()}`;
  const path = `/agent/ws/${session}`;
  const handshake = {
    Upgrade: "websocket",
    Connection: "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
  };
  assert.equal(await status(path, handshake), 401, what);
  // A token of nearly 8 KiB, the longest that wsproxy looks at, in the header line it comes in.
  const long = await mint(session, { filler: "x".repeat(5900) }, secret);
  assert(long.length > 8000 && long.length <= 8192);
  const [reply, tls] = await connect(`${path}?token=seen-in-no-log`, { ...handshake, Authorization: `Bearer ${long}` });
  assert.equal(reply.status, 101, what);
  const publish = ["redis-cli", "publish", `session:${session}:down`, "over TLS"];
  assert.equal(await checkout.composed("exec", "-T", "redis", ...publish), "1");
  const frame = new Uint8Array(64);
  const count = await tls.read(frame);
  // One unmasked text frame (RFC 6455, section 5.2): FIN and opcode 1, the length, the payload.
  assert.equal(new TextDecoder().decode(frame.subarray(2, count!)), "over TLS", what);
  assert.deepEqual([...frame.subarray(0, 2)], [0x81, 8]);
  tls.close();
  const { stdout, stderr } = await run("docker", ["logs", container]);
  assert.match(stdout + stderr, new RegExp(path), `${what} logs the path`);
  assert.doesNotMatch(stdout + stderr, /seen-in-no-log/, `${what} logs no query`);
}
