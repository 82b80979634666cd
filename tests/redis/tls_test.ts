/** A Redis with a certificate of its own authority, which asks for ours. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { certify } from "../harness/certificate.ts";
import { ProxyProcess, testEnv, TestProxy } from "../harness/proxy.ts";
import { slotOf } from "../../src/redis/slot.ts";
import { type ClusterNode, sessionIn, TestCluster } from "../harness/cluster.ts";
import { faultOfPair, faultOfPem } from "../../src/pem.ts";
import { RedisServer } from "../harness/redis.ts";

/** An authority, and certificates that it has signed for a server and a client, in a folder of their own. */
async function makeCertificates(): Promise<(name: string) => string> {
  const directory = await Deno.makeTempDir();
  const path = (name: string) => `${directory}/${name}`;
  const authority = await certify("authority", { authority: true });
  await Deno.writeTextFile(path("ca.key"), authority.keyPem);
  await Deno.writeTextFile(path("ca.pem"), authority.certificatePem);
  for (const name of ["server", "client"]) {
    const { keyPem, certificatePem } = await certify(name, { issuer: authority });
    await Deno.writeTextFile(path(`${name}.key`), keyPem);
    await Deno.writeTextFile(path(`${name}.pem`), certificatePem);
  }
  return path;
}

Deno.test("Redis with an authority of its own that wants a certificate of its clients", async () => {
  const path = await makeCertificates();
  const tlsPort = sparePort();
  const certificate = ["--tls-cert-file", path("server.pem"), "--tls-key-file", path("server.key")];
  const port = ["--tls-port", String(tlsPort), "--tls-ca-cert-file", path("ca.pem"), "--tls-auth-clients", "yes"];
  await using _redis = await RedisServer.start(...port, ...certificate);
  const url = `rediss://localhost:${tlsPort}`;
  const files = {
    REDIS_CA_FILE: path("ca.pem"),
    REDIS_CERT_FILE: path("client.pem"),
    REDIS_KEY_FILE: path("client.key"),
  };
  {
    await using proxy = await TestProxy.start(url, files);
    await using _client = await proxy.connect("s1");
  }
  {
    // As it is run, with the right to read just these.
    const denoArgs = [`--allow-read=${Object.values(files).join()}`];
    await using proxy = await ProxyProcess.start(url, files, { denoArgs });
    assert(proxy.port > 0);
  }
  const refused = async (env: Record<string, string>, reason: RegExp) => {
    await using proxy = ProxyProcess.spawn(testEnv(url, { LOG_LEVEL: "info", ...env }), [
      `--allow-read=${Object.values(files).join()}`,
    ]);
    await proxy.log.until((line) => /could not be reached/.test(line) && reason.test(line));
  };
  await refused({}, /certificate|UnknownIssuer/i);
  await refused({ REDIS_CA_FILE: path("client.pem") }, /certificate|issuer/i);
  await refused({ REDIS_CA_FILE: path("ca.pem") }, /certificate|hung up/i);
});

Deno.test("A Cluster over TLS, which announces its ports for that: all shards carry messages, and a slot moves", async () => {
  const path = await makeCertificates();
  const certificate = ["--tls-cert-file", path("server.pem"), "--tls-key-file", path("server.key")];
  const tls = [
    "--tls-cluster",
    "yes",
    "--tls-port",
    "spare",
    "--tls-ca-cert-file",
    path("ca.pem"),
    "--tls-auth-clients",
    "yes",
  ];
  await using cluster = await TestCluster.start(2, 0, ...tls, ...certificate);
  const [from, to] = cluster.nodes as [ClusterNode, ClusterNode];
  const env = {
    REDIS_CA_FILE: path("ca.pem"),
    REDIS_CERT_FILE: path("client.pem"),
    REDIS_KEY_FILE: path("client.key"),
  };
  await using proxy = await TestProxy.start(`rediss+cluster://localhost:${from.tlsPort}`, env, {
    idleSubscriptions: 3,
  });
  const slots = await cluster.slotsOf(from);
  for (const session of [sessionIn((slot) => slots.has(slot)), sessionIn((slot) => !slots.has(slot))]) {
    await proxy.resumable(session);
    await using client = await proxy.connect(session, { resume: "0" });
    assert.match(await client.next(), /^!live/);
    const position = await cluster.send(session, "logged");
    assert.equal(await client.next(), `${position}\nlogged`);
    const slot = slotOf(`session:${session}:down`);
    const [here, there] = slots.has(slot) ? [from, to] : [to, from];
    await cluster.beginMove(slot, here, there);
    await cluster.finishMove(slot, here, there);
    const next = await cluster.send(session, "moved");
    let frame = "";
    while (frame !== `${next}\nmoved`) frame = await client.next();
  }
});

Deno.test("A certificate that cannot be used stops the start with a line that names its setting", async () => {
  const path = await makeCertificates();
  const told = async (env: Record<string, string>, denoArgs: string[] = [`--allow-read=${path("")}`]) => {
    const url = env["REDIS_URL"] ?? "rediss://localhost:1";
    await using proxy = ProxyProcess.spawn(testEnv(url, env), denoArgs);
    assert.equal((await proxy.exit()).code, 1);
    return await proxy.errors;
  };
  assert.match(await told({ REDIS_CA_FILE: path("none.pem") }), /^REDIS_CA_FILE must be a file that can be read/m);
  assert.match(await told({ REDIS_CA_FILE: path("ca.pem") }, []), /^REDIS_CA_FILE must be readable: .*--allow-read/m);
  assert.match(await told({ REDIS_CA_FILE: path("ca.key") }), /^REDIS_CA_FILE must hold a CERTIFICATE as PEM/m);
  await Deno.writeTextFile(path("cut.pem"), (await Deno.readTextFile(path("ca.pem"))).replace(/^(.*\n){9}/, "$&!"));
  const cut = { REDIS_CA_FILE: path("cut.pem"), REDIS_CERT_FILE: path("cut.pem"), REDIS_KEY_FILE: path("ca.key") };
  assert.match(
    await told(cut),
    /^REDIS_CA_FILE must hold CERTIFICATEs .* line 1 is damaged[^]*^REDIS_CERT_FILE must hold .* line 1 is damaged/m,
  );
  assert.match(
    await told({ REDIS_CERT_FILE: path("client.pem") }),
    /^REDIS_CERT_FILE and REDIS_KEY_FILE must be given/m,
  );
  const swapped = { REDIS_CERT_FILE: path("client.key"), REDIS_KEY_FILE: path("client.pem") };
  assert.match(
    await told(swapped),
    /^REDIS_CERT_FILE must hold a CERTIFICATE[^]*^REDIS_KEY_FILE must hold a PRIVATE KEY/m,
  );
  const other = { REDIS_CERT_FILE: path("client.pem"), REDIS_KEY_FILE: path("server.key") };
  assert.match(await told(other), /^REDIS_KEY_FILE must be the key of REDIS_CERT_FILE/m);
  const plain = { REDIS_URL: "redis://localhost:1", REDIS_CA_FILE: path("ca.pem") };
  assert.match(await told(plain), /^REDIS_CA_FILE needs TLS: REDIS_URL must begin with rediss/m);
});

Deno.test("Every block of a PEM file is read at the start, and the line where a damaged one begins is named", async () => {
  const path = await makeCertificates();
  const read = (name: string) => Deno.readTextFile(path(name));
  const [one, two, key, foreign] = await Promise.all(["ca.pem", "client.pem", "client.key", "ca.key"].map(read));
  const lines = (pem: string) => pem.trim().split("\n");
  const lineOfTwo = lines(one!).length + 1;
  const fault = (...texts: string[]) => faultOfPem("CERTIFICATE", texts.join(""));
  for (const good of [one! + two, `words\n${one}\n# more\n${two}`, (one! + two).replaceAll("\n", "\r\n"), key! + one]) {
    assert.equal(fault(good), undefined);
  }
  const damaged = (line: number) => new RegExp(`^must hold CERTIFICATEs .* begins in line ${line} is damaged$`);
  const withoutLines = (pem: string, from: number, to: number) =>
    lines(pem).toSpliced(from, to - from).join("\n") + "\n";
  for (
    const [texts, rule] of [
      [[one!, withoutLines(two!, 9, lines(two!).length - 1)], damaged(lineOfTwo)],
      [[one!, two!.replace(/^((.*\n){5}.{7})[^-]*/, "$1\n")], damaged(lineOfTwo)],
      [[withoutLines(one!, 3, 4), two!], damaged(1)],
      [[one!.replace(/\n[^-]{4}/, "\n!!!!")], damaged(1)],
      [
        [withoutLines(one!, lines(one!).length - 1, Infinity), two!],
        /^must hold whole PEM blocks: .* line 1 has no END$/,
      ],
      [[one!, withoutLines(two!, 0, 1)], /^must hold whole PEM blocks: the one that ends in line \d+ has no BEGIN$/],
      [
        [one!.trim(), two!],
        new RegExp(`^must have each BEGIN and END on a line of its own.*: line ${lineOfTwo - 1} is`),
      ],
      [[one!.slice(1), two!], /^must have each BEGIN .*: line 1 is/],
      [[one!, two!.replaceAll("CERTIFICATE", "TRUSTED CERTIFICATE")], /begins in line \d+ is a TRUSTED CERTIFICATE/],
      [[one!.replace("END CERTIFICATE", "END PRIVATE KEY")], /line 1 ends as another$/],
      [[], /^must hold a CERTIFICATE as PEM$/],
    ] as const
  ) assert.match(fault(...texts) ?? "none", rule);
  // A copy that ended early, wherever that was: a few hyphens alone may be a comment.
  for (let end = 0; end < one!.length + two!.length; end++) {
    const text = (one! + two).slice(0, end);
    const isWhole = end >= one!.trim().length && /^-{0,5}$/.test(text.slice(one!.length));
    assert.equal(fault(text) === undefined, isWhole || end === one!.length + two!.trim().length, `cut at ${end}`);
  }
  const keyFault = (text: string) => faultOfPem("PRIVATE KEY", text);
  assert.equal(keyFault(key!), undefined);
  assert.match(keyFault(withoutLines(key!, 5, 6))!, /line 1 is damaged$/);
  assert.match(keyFault(key!.replaceAll("PRIVATE", "ENCRYPTED PRIVATE"))!, /line 1 is locked with a password$/);
  assert.equal(faultOfPair(two! + one, key!), undefined);
  assert.equal(faultOfPair(two!, foreign!), "must be the key of REDIS_CERT_FILE");
});
