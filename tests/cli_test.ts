/** The commands besides `start`, run as users run them. */

import assert from "node:assert/strict";
import { sparePort } from "../scripts/spare_port.ts";
import { startWords } from "../scripts/start_flags.ts";
import { Client } from "./harness/client.ts";
import { type ClusterNode, TestCluster } from "./harness/cluster.ts";
import { createKeyPair, jwks, KeyServer } from "./harness/key_server.ts";
import { type Env, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { SentinelGroup } from "./harness/sentinel.ts";
import { mint, secret } from "./harness/token.ts";

const denoJson = Deno.readTextFileSync(new URL("../deno.json", import.meta.url));

async function wsproxy(args: readonly string[], env: Env = {}) {
  const words = startWords(denoJson, "--env-file");
  const command = new Deno.Command(Deno.execPath(), { args: [...words, ...args], env: { ...env, NO_COLOR: "1" } });
  const { code, stdout, stderr } = await command.output();
  const text = (bytes: Uint8Array<ArrayBuffer>) => new TextDecoder().decode(bytes).trim();
  const lines = text(stdout).split("\n").filter((line) => !line.startsWith("setting: "));
  return {
    code,
    lines,
    settings: text(stdout).split("\n").filter((line) => line.startsWith("setting: ")),
    errors: text(stderr),
  };
}

Deno.test("--version, --help, and what is no command", async () => {
  assert.deepEqual((await wsproxy(["--version"])).lines, [JSON.parse(denoJson).version]);
  const { code, lines } = await wsproxy(["--help"]);
  assert.equal(code, 0);
  const help = lines.join("\n");
  for (
    const [args, error] of [[["sing"], /^there is no command "sing"/], [
      ["start", "x"],
      /^start takes no arguments/,
    ]] as const
  ) {
    const { code, errors } = await wsproxy(args);
    assert.equal(code, 1);
    assert.match(errors, error);
    assert(errors.endsWith(help));
  }
});

/** Every setting that needs something of Redis or of the machine. */
const everything = { INBOX: "true", VACATED_GRACE_SECS: "0", SESSION_SOCKETS: "last" };

const canServe = [
  "ok: Redis: messages flow both ways",
  "ok: Redis: a session's down channel can be subscribed to",
  "ok: Redis: a session's up channel can be published to",
  "ok: Redis: inboxes can be written",
  "ok: Redis: a session's other sockets can be closed",
  "ok: Redis: clients can resume",
  "ok: the proxy can serve",
];

Deno.test("check-config says that a proxy can serve, with which settings, and no secret", async () => {
  await using redis = await RedisServer.start("--requirepass", "hidden words");
  const url = `redis://:hidden%20words@127.0.0.1:${redis.port}`;
  const admin = sparePort();
  const env = testEnv(url, { ...everything, ADMIN_PORT: String(admin) });
  const { code, lines, settings, errors } = await wsproxy(["check-config"], env);
  assert.equal(code, 0, errors);
  assert.deepEqual(lines, ["ok: 127.0.0.1:0 is free", `ok: 127.0.0.1:${admin} is free`, ...canServe]);
  assert(settings.includes("setting: JWT_SECRET=(set)"));
  assert(!`${lines}${settings}`.includes("hidden"));
});

Deno.test("check-config lists every wrong setting", async () => {
  const wrong = await wsproxy(["check-config"], { JWT_SECRET: "short", PORT: "http" });
  assert.equal(wrong.code, 1);
  assert.deepEqual(wrong.lines, [
    'error: PORT must be an integer from 0 to 65535: current value is "http"',
    "error: JWT_SECRET must be 32 bytes or more",
  ]);
});

Deno.test("check-config names all that Redis refuses, whatever needs it, and a wrong password", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const all = ["reset", "on", ">password", "~*", "&*", "+@all"];
  const url = `redis://wsproxy:password@127.0.0.1:${redis.port}`;
  for (
    const [rules, found] of [
      [["-xrange", "-hincrby", "-hgetall", "-zrem", "(+hgetall ~wsproxy:{proxies})"], [
        "Redis refuses what resuming needs: XRANGE session:*:down (NOPERM)",
        "Redis refuses what revocation needs: HGETALL wsproxy:revoked (NOPERM)",
        "Redis refuses what INBOX=true needs: ZREM wsproxy:{proxies}:* (NOPERM), HINCRBY wsproxy:{agent:*:inbox}:* (NOPERM), ZREM wsproxy:{agent:*:inbox}:* (NOPERM)",
      ]],
      [["resetchannels", "&session:*:down", "&wsproxy:canary:*"], [
        "Redis refuses what every session needs: PUBLISH session:*:up (NOPERM)",
        "Redis refuses what the control channel needs: SUBSCRIBE wsproxy:control (NOPERM)",
      ]],
      [["resetchannels", "&session:*", "&wsproxy:control"], [
        "Redis refuses what every session needs: PUBLISH wsproxy:canary:* (NOPERM), SUBSCRIBE wsproxy:canary:* (NOPERM)",
        /^no messages flow: .*NOPERM/,
      ]],
      [["resetpass", ">another"], [/^no messages flow: .*WRONGPASS/]],
    ] as const
  ) {
    await control.acl("SETUSER", "wsproxy", ...all, ...rules);
    const { code, lines, errors } = await wsproxy(["check-config"], testEnv(url, everything));
    assert.equal(code, 1, errors);
    const told = lines.filter((line) => line.startsWith("error: Redis: "));
    assert.equal(told.length, found.length, lines.join("\n"));
    for (const [i, text] of found.entries()) {
      if (typeof text === "string") assert.equal(told[i], `error: Redis: ${text}`);
      else assert.match(told[i]!.slice("error: Redis: ".length), text);
    }
    assert(!lines.includes("ok: the proxy can serve"));
  }
});

Deno.test("check-config tells of ports in use, of an address that no program may have, and of a Redis that evicts", async () => {
  await using redis = await RedisServer.start("--maxmemory-policy", "allkeys-lru");
  const port = String(redis.port);
  const taken = await wsproxy(["check-config"], testEnv(redis, { PORT: port }));
  assert.equal(taken.code, 1);
  const evicts = "error: Redis: Redis may evict inboxes, records of connections, revoked tokens and session logs: " +
    "maxmemory-policy allkeys-lru";
  assert.deepEqual(taken.lines.filter((line) => line.startsWith("error: ")), [
    `error: PORT: 127.0.0.1:${port} is in use by something else than wsproxy`,
    evicts,
  ]);
  await redis.client().config("SET", "maxmemory-policy", "noeviction");
  const foreign = await wsproxy(["check-config"], testEnv(redis, { HOST: "192.0.2.1", ADMIN_PORT: port }));
  assert.equal(foreign.code, 1);
  assert.match(foreign.lines[0]!, /^error: PORT: /);
  assert.equal(foreign.lines[1], `error: ADMIN_PORT: 127.0.0.1:${port} is in use by something else than wsproxy`);
  const admin = String(sparePort());
  await using proxy = await ProxyProcess.start(redis, { ADMIN_PORT: admin });
  const running = testEnv(redis, { ...everything, HOST: "0.0.0.0", PORT: String(proxy.port), ADMIN_PORT: admin });
  const beside = await wsproxy(["check-config"], running);
  assert.equal(beside.code, 0);
  const notes = [`0.0.0.0:${proxy.port}`, `127.0.0.1:${admin}`].map((address) =>
    `note: ${address} is in use by wsproxy`
  );
  assert.deepEqual(beside.lines, [...notes, ...canServe]);
});

Deno.test("check-config tries every server of a Cluster, and the master that sentinels name", async () => {
  await using cluster = await TestCluster.start(2);
  const env = testEnv(cluster.url, everything);
  assert.deepEqual((await wsproxy(["check-config"], env)).lines.slice(1), canServe);
  const [{ server, control }] = cluster.nodes as [ClusterNode];
  await control.acl("SETUSER", "default", "-xrange", "-ssubscribe", "(+ssubscribe &wsproxy:* &session:*)");
  const broken = await wsproxy(["check-config"], env);
  assert.equal(broken.code, 1);
  const refused = `127.0.0.1:${server.port}: Redis refuses what resuming needs: XRANGE session:*:down (NOPERM)`;
  assert.deepEqual(broken.lines.filter((line) => line.startsWith("error: ")), [`error: Redis: ${refused}`]);
  await using sentinels = await SentinelGroup.start();
  assert.deepEqual((await wsproxy(["check-config"], testEnv(sentinels.url, everything))).lines.slice(1), canServe);
});

Deno.test("token --verify says what the proxy would say, and why", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const nowSecs = Math.floor(Date.now() / 1000);
  const { lines: [made] } = await wsproxy(["token", "s1", "--agent", "agent", "--ttl", "1h"], { JWT_SECRET: secret });
  const expired = await mint("s1", { iat: nowSecs - 100, exp: nowSecs - 50 });
  const forged = await mint("s1", {}, "some other secret, 32 bytes or more");
  for (
    const [token, args, verdict] of [
      [made!, [], /^valid for session "s1" of agent "agent": issued .*Z, expires .*Z$/],
      [made!, ["--session", "s2"], /^refused with 403: the token is not for this session$/],
      [made!, ["--agent", "b"], /^refused with 403: the token is not for this agent$/],
      [expired, [], /^refused with 403: the token has expired$/],
      [forged, [], /^refused with 403: the token's signature does not match$/],
      ["x.y.z", [], /^refused with 403: the token is malformed$/],
    ] as const
  ) {
    const { code, lines } = await wsproxy(["token", "--verify", token, ...args], {
      JWT_SECRET: secret,
      JWT_LEEWAY_SECS: "0",
    });
    assert.match(lines.join("\n"), verdict);
    assert.equal(code, verdict.source.startsWith("^valid") ? 0 : 1);
    if (args.length > 0) continue;
    const connecting = Client.connect(proxy.port, "s1", { token }).then(
      (client) => client.close().then(() => 0),
      () => 1,
    );
    assert.equal(await connecting, code);
  }
});

Deno.test("healthcheck asks the proxy of the same settings, whatever forward proxy is set", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  let asked = 0;
  await using forward = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, ({ url }) => {
    // Deno itself may ask it for a newer version of Deno.
    if (url.endsWith("/health")) asked++;
    return new Response("", { status: 502 });
  });
  const env: Record<string, string> = { HOST: "127.0.0.1", PORT: String(proxy.port) };
  for (const name of ["HTTP_PROXY", "http_proxy", "ALL_PROXY"]) env[name] = `http://127.0.0.1:${forward.addr.port}`;
  const healthy = await wsproxy(["healthcheck"], env);
  assert.equal(healthy.code, 0);
  assert.match(healthy.lines[0]!, /^200 \{"status":"healthy"/);
  // As the image asks.
  const script = new URL("../scripts/container_start.sh", import.meta.url).pathname;
  const image = new Deno.Command("sh", { args: [script, "health"], cwd: new URL("..", import.meta.url), env });
  assert.equal((await image.output()).code, 0);
  await proxy[Symbol.asyncDispose]();
  const gone = await wsproxy(["healthcheck"], env);
  assert.equal(gone.code, 1);
  assert.match(gone.lines[0]!, /ECONNREFUSED/);
  assert.equal(asked, 0);
});

Deno.test("What switches protocols when it is asked is not healthy, and no proxy", async () => {
  await using redis = await RedisServer.start();
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const answering = (async () => {
    for await (const socket of listener) {
      await socket.write(
        new TextEncoder().encode("HTTP/1.1 101 Other\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n"),
      );
      socket.close();
    }
  })();
  const env = testEnv(redis, { PORT: String(port) });
  const [health, checked] = await Promise.all([wsproxy(["healthcheck"], env), wsproxy(["check-config"], env)]);
  assert.deepEqual([health.code, health.errors], [1, ""]);
  assert.equal(checked.code, 1);
  assert.equal(checked.lines[0], `error: PORT: 127.0.0.1:${port} is in use by something else than wsproxy`);
  listener.close();
  await answering;
});

Deno.test("check-config tries JWKS_URL, says which keys it has, and what it leaves out", async () => {
  await using redis = await RedisServer.start();
  const [ec, rsa] = await Promise.all([createKeyPair("ES256", "ec"), createKeyPair("RS256", "rsa")]);
  await using server = new KeyServer(jwks(ec, rsa));
  const env = testEnv(redis, { ...everything, JWT_SECRET: "", JWT_ALGORITHM: "ES256", JWKS_URL: server.url });
  const { code, lines, errors } = await wsproxy(["check-config"], env);
  assert.equal(code, 0, errors);
  assert.deepEqual(lines.filter((line) => line.includes("JWKS_URL")), [
    "note: JWT_AUDIENCE and JWT_ISSUER are not set: a token that JWKS_URL's provider made for another service is taken",
    'note: JWKS_URL: left out: key 2 (kid "rsa") is for RS256',
    'ok: JWKS_URL: a key for ES256, kid "ec"',
  ]);
  server.answer = () => new Response(null, { status: 404 });
  const gone = await wsproxy(["check-config"], env);
  assert.equal(gone.code, 1);
  assert.deepEqual(gone.lines.filter((line) => line.startsWith("error")), [
    "error: JWKS_URL: it answers with status 404",
  ]);
});

Deno.test("token makes what the settings want, and --verify judges tokens of an identity provider", async () => {
  const wanted = { JWT_ISSUER: "us", JWT_AUDIENCE: "a,b", JWT_SESSION_CLAIM: "sub", JWT_SESSION_MATCH: "prefix" };
  const bySecret = { JWT_SECRET: secret, ...wanted };
  const { lines: [made] } = await wsproxy(["token", "user", "--ttl", "1h"], bySecret);
  const own = await wsproxy(["token", "--verify", made!, "--session", "user:1"], bySecret);
  assert.match(own.lines[0]!, /^valid for session "user:1" of any agent/);
  const ec = await createKeyPair("ES256", "ec");
  await using server = new KeyServer(jwks(ec));
  const env = { JWT_ALGORITHM: "ES256", JWKS_URL: server.url };
  const judge = async (token: string) => (await wsproxy(["token", "--verify", token], env)).lines[0];
  assert.match((await judge(await ec.sign("s1")))!, /^valid for session "s1"/);
  assert.equal(await judge(await ec.sign("s1", {}, { kid: "x" })), "refused with 403: no key fits the token");
  assert.match((await wsproxy(["token", "s1"], env)).errors, /^JWT_ALGORITHM has no HS256/);
  server.serve("oh no");
  assert.match((await wsproxy(["token", "--verify", "x.y.z"], env)).errors, /^JWKS_URL: must hold public keys/);
});

Deno.test("The container may reach the host of JWKS_URL, read JWT_PUBLIC_KEY_FILE, and no more", async () => {
  const dir = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(`${dir}/start.flags`, "run --no-prompt");
    await Deno.writeTextFile(`${dir}/deno`, '#!/bin/sh\necho "$@"\n', { mode: 0o755 });
    const script = new URL("../scripts/container_start.sh", import.meta.url).pathname;
    const flags = async (env: Env) => {
      const PATH = `${dir}:${Deno.env.get("PATH")}`;
      const { stdout } = await new Deno.Command("sh", { args: [script], cwd: dir, env: { ...env, PATH } }).output();
      return new TextDecoder().decode(stdout).trim();
    };
    const started = (files: string, net: string) =>
      `run --no-prompt ${files}--cached-only --allow-net=0.0.0.0:8080,redis:6379${net} main.ts`;
    assert.equal(await flags({}), started("", ""));
    assert.equal(await flags({ JWT_PUBLIC_KEY_FILE: "/run/keys.pem" }), started("--allow-read=/run/keys.pem ", ""));
    for (
      const [url, net] of [
        ["https://issuer.example/.well-known/jwks.json", "issuer.example:443"],
        ["https://issuer.example:8443?a=b", "issuer.example:8443"],
        ["http://localhost/jwks", "localhost:80"],
        ["http://[::1]:81/jwks", "[::1]:81"],
        ["https://[2001:db8::1]/jwks", "[2001:db8::1]:443"],
      ] as const
    ) {
      assert.equal(await flags({ JWKS_URL: url }), started("", `,${net}`));
    }
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});
