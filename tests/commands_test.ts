/** Every block of code in the pages works as it is printed, or stands below with the reason why it is not run. */

import assert from "node:assert/strict";
import { sparePort } from "../scripts/spare_port.ts";
import { certify } from "./harness/certificate.ts";
import { type Block, blockOf, blocks } from "./harness/pages.ts";
import { TestProxy } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";
import { Copy } from "./harness/terminal.ts";
import { secret } from "./harness/token.ts";
import { eventually, soon } from "./harness/wait.ts";

const root = new URL("../", import.meta.url);
const docker = "needs Docker: test:containers does the same in a copy of the project";

/** Blocks that no test runs, and why. */
const never: readonly (readonly [page: string, part: string, reason: string])[] = [
  ["docs/chat.md", "--against stock", "tests/torture/chat_test.ts runs a short one; these take minutes"],
  ["docs/chat.md", "test:chat --page", "needs Chromium: tests/browser/chat_torture.ts runs a short one"],
  ["CONTRIBUTING.md", "./dev ok", "is the gate itself; ./dev docs is compared by docs_test.ts"],
  ["CONTRIBUTING.md", "./dev test:browser", "needs Chromium, and Python: the gate has a step for each"],
  ["README.md", "./dev chat", "is driven by tests/browser/chat_steps.ts; ./dev up is run below"],
  [
    "examples/chat/README.md",
    "./dev chat\n",
    "is driven by tests/browser/chat_steps.ts, with the folder of another step",
  ],
  ["README.md", "Connect a client, in another terminal:", "is output, which examples_test.ts reads"],
  ["README.md", "docker compose", docker],
  ["docs/deploy.md", "--profile '*' down", docker],
  ["docs/redis.md", "http://proxy-cluster:8080", docker],
  [
    "docs/deploy.md",
    "kubectl create secret",
    "needs a cluster: test:containers validates the files by their schemas",
  ],
  ["docs/deploy.md", "helm install", "needs a cluster: tests/tools/helm.ts renders with the same command"],
  ["docs/deploy.md", "useradd", "changes the machine: tests/tools/systemd.ts checks the unit"],
  ["docs/redis.md", "-@all", "is run line by line by acl_test.ts"],
  ["docs/redis.md", "+script|load", "is run line by line by acl_test.ts"],
  ["docs/redis.md", "+xreadgroup", "is run line by line by acl_test.ts"],
  ["docs/redis.md", "+cluster|slots", "is run line by line by acl_test.ts"],
  ["docs/run.md", "services:", "is a file for Docker Compose"],
  ["docs/performance.md", "git worktree add", "takes half an hour, and the project's history"],
];

const ran = new Set<Block>();

/** The block, which the calling test runs. */
function take(page: string, part: string): Block {
  const block = blockOf(page, part);
  ran.add(block);
  return block;
}

const quickStart = take("README.md", "redis-server --port 6390");
const sameStart = ["examples/README.md", "docs/migrating.md"].map((page) => take(page, "--daemonize yes\n./dev up"));
const sameBackend = take("examples/README.md", "./dev backend demo");
const backend = take("README.md", "./dev backend demo");
const [subscribe, publish, shutdown] = take("examples/README.md", "redis-cli -p 6390 shutdown").text.split("\n");
const connect = take("examples/README.md", "./dev token demo --ttl 1h");
const pipeline = take("docs/migrating.md", "--pipe");
const [count, hear] = take("docs/migrating.md", "client list").text.split("\n");
const [colon, publishToColon] = take("docs/migrating.md", "user%3A1").text.split("\n");
const [inboxUp, firstWorker, secondWorker] = take("docs/backends.md", "INBOX=true ./dev up").text.split("\n");
const worker = take("examples/README.md", "./dev worker one");
const start = take("README.md", "deno task start");
const [checkConfig] = take("docs/run.md", "check-config").text.split("\n");
const overSocket = take("docs/redis.md", "redis.sock");
const overTls = take("docs/redis.md", "client.pem");
const inFiles = take("docs/run.md", "jwt_secret");
const traced = take("docs/run.md", "OTEL_DENO=true");
const jose = take("README.md", 'import { SignJWT } from "jose"');
const jsSocket = take("docs/resume.md", "new WebSocket");

Deno.test("The pages' commands, from ./dev init to a talk between client, backend and worker, work as printed", async () => {
  for (const block of sameStart) assert.equal(block.text, quickStart.text);
  assert.equal(sameBackend.text, backend.text);
  await using copy = new Copy();
  {
    await using up = copy.run(quickStart.text);
    await using first = copy.run((await up.shows("./dev client")).trim());
    await first.shows("connected");
    await using second = copy.run(connect.text);
    await second.shows("connected");
    await using ear = copy.run(subscribe!);
    await ear.shows("session:demo:up");
    await using other = copy.run(hear!);
    await other.shows("session:demo:up");
    await using published = copy.run(publish!);
    assert.equal(await published.ends(), "1");
    for (const client of [first, second]) await client.shows('"hello"');
    await using counted = copy.run(count!);
    assert.equal(await counted.ends(), "3");
    await using piped = copy.run(pipeline.text);
    await piped.shows("replies: 300");
    for (let n = 1; n <= 300; n++) assert.equal(await first.shows(""), `${n}`);
    for (let n = 0; n < 5; n++) await first.type(`"line ${n}"`);
    for (let n = 0; n < 5; n++) for (const terminal of [ear, other]) await terminal.shows(`"line ${n}"`);
    await using withColon = copy.run(colon!);
    await withColon.shows("connected");
    await using toColon = copy.run(publishToColon!);
    assert.equal(await toColon.ends(), "1");
    await withColon.shows('"hello"');
    await using answers = copy.run(backend.text);
    await using asking = copy.run(await answers.shows("./dev client"));
    await asking.shows("connected");
    await asking.type("a question");
    for (const word of ["You", "said", "and"]) await asking.shows(`"${word}"`);
  }
  await using up = copy.run(inboxUp!);
  await up.shows("./dev client");
  await using one = copy.run(worker.text);
  await one.shows("one: ready");
  assert.equal(firstWorker, worker.text.trim());
  await using two = copy.run(secondWorker!);
  await two.shows("two: ready");
  await using client = copy.run(connect.text);
  await client.shows("connected");
  await client.type("a question");
  await client.shows('"You"');
  await using stopped = copy.run(shutdown!);
  await stopped.ends();
});

Deno.test("The commands that start a proxy without ./dev up work as printed", async () => {
  await using copy = new Copy();
  const certificates = `${copy.folder}/secrets`;
  const socket = `${copy.folder}/redis.sock`;
  await Deno.mkdir(certificates);
  const ca = await certify("authority", { authority: true });
  await Deno.writeTextFile(`${certificates}/ca.pem`, ca.certificatePem);
  for (const name of ["server", "client"]) {
    const { keyPem, certificatePem } = await certify(name, { issuer: ca });
    await Deno.writeTextFile(`${certificates}/${name}.key`, keyPem);
    await Deno.writeTextFile(`${certificates}/${name}.pem`, certificatePem);
  }
  const tlsPort = sparePort();
  await using redis = await RedisServer.start(
    ...["--unixsocket", socket, "--tls-port", String(tlsPort), "--tls-ca-cert-file", `${certificates}/ca.pem`],
    ...["--tls-cert-file", `${certificates}/server.pem`, "--tls-key-file", `${certificates}/server.key`],
  );
  const serves = async (script: string, env: Record<string, string>) => {
    await using _proxy = copy.run(script, { HOST: "127.0.0.1", LOG_FORMAT: "json", REDIS_URL: redis.url, ...env });
    await eventually("messages flow", async () => {
      const answer = await fetch(`http://127.0.0.1:${copy.port}/health`).catch(() => undefined);
      await answer?.body?.cancel();
      return answer?.status === 200;
    });
  };
  await serves(start.text, {});
  await serves(traced.text.replace("4318", String(sparePort())), {});
  await serves(overSocket.text.replaceAll("/run/redis/redis.sock", socket), { REDIS_URL: `redis+unix://${socket}` });
  await serves(overTls.text.replaceAll("/run/secrets", certificates), {
    REDIS_URL: `rediss://localhost:${tlsPort}`,
    REDIS_CA_FILE: `${certificates}/ca.pem`,
    REDIS_CERT_FILE: `${certificates}/client.pem`,
    REDIS_KEY_FILE: `${certificates}/client.key`,
  });
  await using checked = copy.run(checkConfig!, { REDIS_URL: redis.url });
  assert.match(await checked.ends(), /ok: the proxy can serve$/);
  await redis.client().config("SET", "requirepass", "p@ss/word");
  for (const [name, text] of Object.entries({ jwt_secret: secret, redis_password: "p@ss/word" })) {
    await Deno.writeTextFile(`${certificates}/${name}`, `${text}\n`);
  }
  await serves(inFiles.text.replaceAll("/run/secrets", certificates), {
    JWT_SECRET: "",
    JWT_SECRET_FILE: `${certificates}/jwt_secret`,
    REDIS_PASSWORD_FILE: `${certificates}/redis_password`,
  });
});

Deno.test("The pages' JavaScript works as printed", async () => {
  await using copy = new Copy();
  await Deno.writeTextFile(`${copy.folder}/token.ts`, jose.text);
  await using made = copy.run("deno run --quiet --allow-env token.ts", { JWT_SECRET: secret });
  const token = await made.ends();
  await using redis = await RedisServer.start();
  await using proxy = await TestProxy.start(redis);
  const url = `ws://127.0.0.1:${proxy.port}/agent/ws/demo`;
  await redis.client().fcall("wsproxy_send", 1, "session:demo:down", "logged");
  const socket: WebSocket = new Function("url", "position", "token", `${jsSocket.text}; return socket;`)(
    url,
    "0",
    token,
  );
  const first = await soon(new Promise<string>((done) => socket.onmessage = ({ data }) => done(data)), "a frame");
  assert.match(first, /\nlogged$/);
  const closed = new Promise((done) => socket.onclose = done);
  socket.close();
  await closed;
});

/** The tests: one that runs a block calls `blockOf` with the page and the part as they are, in double quotes. */
function filesBelow(folder: string): string[] {
  return [...Deno.readDirSync(new URL(folder, root))].flatMap(({ name, isDirectory }) => {
    if (isDirectory) return filesBelow(`${folder}${name}/`);
    return name.endsWith(".ts") ? [`${folder}${name}`] : [];
  });
}

Deno.test("Every block of every page is run by a test, or has a reason why not", () => {
  const known = new Set(ran);
  for (const file of filesBelow("tests/")) {
    const text = Deno.readTextFileSync(new URL(file, root));
    for (const [, page, part] of text.matchAll(/blockOf\(\s*"([^"]+)",\s*"([^"]+)",?\s*\)/g)) {
      known.add(blockOf(page!, part!));
    }
  }
  for (const [page, part, reason] of never) {
    const block = blockOf(page, part);
    assert(!known.has(block), `${page}: ${part}: a test runs it, or it stands here twice: ${reason}`);
    known.add(block);
  }
  const unknown = blocks.filter((block) => !known.has(block)).map(({ page, text }) => `${page}: ${text}`);
  assert.deepEqual(unknown, []);
});
