/** The commands besides `start`, run as users run them. */

import assert from "node:assert/strict";
import { startWords } from "../scripts/start_flags.ts";
import { Client } from "./harness/client.ts";
import { type Env, ProxyProcess, testEnv } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
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

Deno.test("check-config says that a proxy can serve, with which settings, and no secret", async () => {
  await using redis = await RedisServer.start("--requirepass", "hidden words");
  const url = `redis://:hidden%20words@127.0.0.1:${redis.port}`;
  const { code, lines, settings, errors } = await wsproxy(["check-config"], testEnv(url, { INBOX: "true" }));
  assert.equal(code, 0, errors);
  assert.deepEqual(lines, [
    "ok: 127.0.0.1:0 is free",
    "ok: Redis: messages flow both ways",
    "ok: Redis: a session's down channel can be subscribed to",
    "ok: Redis: a session's up channel can be published to",
    "ok: Redis: inboxes can be written",
    "ok: Redis: clients can resume",
    "ok: the proxy can serve",
  ]);
  assert(settings.includes("setting: JWT_SECRET=(set)"));
  assert(!`${lines}${settings}`.includes("hidden"));
});

Deno.test("check-config lists every wrong setting, and what Redis refuses", async () => {
  const wrong = await wsproxy(["check-config"], { JWT_SECRET: "short", PORT: "http" });
  assert.equal(wrong.code, 1);
  assert.deepEqual(wrong.lines, [
    'error: PORT must be an integer from 0 to 65535: current value is "http"',
    "error: JWT_SECRET must be 32 bytes or more",
  ]);
  await using redis = await RedisServer.start();
  const control = redis.client();
  const user =
    "~* &session:*:down &wsproxy:canary:* &wsproxy:control -@all +ping +role +client|setname +subscribe +unsubscribe +publish";
  for (
    const [rules, code, line] of [
      ["", 1, /^error: Redis: no messages flow: .*WRONGPASS/],
      [user, 1, /^error: Redis: a session would be refused: .*NOPERM/],
      [user.replace("&session:*:down", "&session:*:up"), 1, /^error: Redis: a session would be refused: .*NOPERM/],
      [user.replace("&session:*:down", "&session:*"), 0, /^warning: Redis: clients cannot resume/],
    ] as const
  ) {
    if (rules) await control.call("ACL", "SETUSER", "wsproxy", "reset", "on", ">password", ...rules.split(" "));
    const url = `redis://wsproxy:${rules ? "password" : "wrong"}@127.0.0.1:${redis.port}`;
    const outcome = await wsproxy(["check-config"], testEnv(url));
    assert.equal(outcome.code, code, outcome.lines.join("\n") + outcome.errors);
    assert(outcome.lines.some((each) => line.test(each)), outcome.lines.join("\n"));
  }
});

Deno.test("check-config tells of a port in use, and of one that nobody may have", async () => {
  await using redis = await RedisServer.start();
  const taken = await wsproxy(["check-config"], testEnv(redis, { PORT: String(redis.port) }));
  assert.equal(taken.code, 0);
  assert.equal(taken.lines[0], `note: 127.0.0.1:${redis.port} is in use, perhaps by wsproxy`);
  const foreign = await wsproxy(["check-config"], testEnv(redis, { HOST: "192.0.2.1" }));
  assert.equal(foreign.code, 1);
  assert.match(foreign.lines[0]!, /^error: PORT: /);
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

Deno.test("healthcheck asks the proxy of the same settings", async () => {
  await using redis = await RedisServer.start();
  await using proxy = await ProxyProcess.start(redis);
  const env = { HOST: "127.0.0.1", PORT: String(proxy.port) };
  const healthy = await wsproxy(["healthcheck"], env);
  assert.equal(healthy.code, 0);
  assert.match(healthy.lines[0]!, /^200 \{"status":"healthy"/);
  await proxy[Symbol.asyncDispose]();
  const gone = await wsproxy(["healthcheck"], env);
  assert.equal(gone.code, 1);
  assert.match(gone.lines[0]!, /refused/);
});
