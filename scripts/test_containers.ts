/**
 * Checks the image, docker-compose.yml and deploy/ for real: `deno task test:containers`. Needs Docker with Compose
 * 2.24, whatever engine `docker` reaches, and nothing else; what needs one thing more says so and is ignored without
 * it. Works in a copy of the project, on free ports, under a project name of its own, and removes what it made.
 * Names are facts about the product, as in tests/.
 */

import assert from "node:assert/strict";
import { settings } from "../src/config.ts";
import { mint } from "../tests/harness/token.ts";
import { readReply, type Reply, requestHead, sparePort, writeAll } from "../tests/harness/wire.ts";

/** Building and pulling take their time; everything else is far below this. */
const patienceMs = 300_000;
const repo = new URL("..", import.meta.url).pathname;
const project = `wsproxy-check-${Deno.pid}`;
const proxyPort = sparePort();
const balancerPort = sparePort();
const secret = crypto.randomUUID() + crypto.randomUUID();
const version = "9.8.7-check";
const image = `wsproxy:${version}`;
/** An engine without the right to raise limits (rootless) cannot give more than it has itself. */
const maxDescriptors = Math.min(65536, Number((await run("sh", ["-c", "ulimit -Hn"])).stdout) || 65536);

// Compose takes these from the shell before it looks into .env, which is what is tried here.
for (const name of [...Object.keys(settings), "WSPROXY_URL"]) Deno.env.delete(name);

interface Result {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

interface RunOptions {
  cwd?: string;
  env?: Record<string, string>;
}

async function run(command: string, args: string[], { cwd, env }: RunOptions = {}): Promise<Result> {
  const { code, stdout, stderr } = await new Deno.Command(command, {
    args,
    cwd,
    env,
    stdin: "null",
    signal: AbortSignal.timeout(patienceMs),
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Standard output of a command that must succeed. */
async function succeed(command: string, args: string[], options: RunOptions = {}): Promise<string> {
  const { code, stdout, stderr } = await run(command, args, options);
  assert.equal(code, 0, `${command} ${args.join(" ")}\n${stdout}\n${stderr}`);
  return stdout;
}

const docker = (...args: string[]) => succeed("docker", args);

/** A command is there and works; if not, says so, for what is ignored must be seen. */
async function present(command: string, args: string[], what: string): Promise<boolean> {
  try {
    if ((await run(command, args)).code === 0) return true;
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
  console.error(`IGNORED: ${what}: "${command} ${args.join(" ")}" does not work here`);
  return false;
}

async function eventually(what: string, check: () => Promise<boolean>): Promise<void> {
  const endMs = performance.now() + 60_000;
  while (!await check()) {
    if (performance.now() > endMs) throw new Error(`${what}: not within a minute`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

/** The project as it would be cloned, plus what must never get into an image; and a user's `.env`. */
class Checkout implements AsyncDisposable {
  private constructor(readonly path: string) {}

  static async create(): Promise<Checkout> {
    const checkout = new Checkout(await Deno.makeTempDir({ prefix: "wsproxy-check-" }));
    const files = await succeed("git", ["ls-files", "--cached", "--others", "--exclude-standard"], { cwd: repo });
    for (const file of files.split("\n")) {
      await Deno.mkdir(`${checkout.path}/${file}/..`.replace(/[^/]+\/\.\.$/, ""), { recursive: true });
      await Deno.copyFile(`${repo}/${file}`, `${checkout.path}/${file}`).catch((error) => {
        if (!(error instanceof Deno.errors.NotFound)) throw error; // deleted, and not committed yet
      });
    }
    for (const decoy of ["src/.env.local", "src/tls.key", "tests/client.pem", ".git/config", "notes.txt"]) {
      await Deno.mkdir(`${checkout.path}/${decoy.replace(/[^/]+$/, "")}`, { recursive: true });
      await Deno.writeTextFile(`${checkout.path}/${decoy}`, "a decoy");
    }
    return checkout;
  }

  settings(env: Record<string, string>): Promise<void> {
    const lines = Object.entries(env).map(([name, value]) => `${name}=${value}\n`);
    return Deno.writeTextFile(`${this.path}/.env`, lines.join(""));
  }

  readonly #env = {
    COMPOSE_PROJECT_NAME: project,
    PORT: String(proxyPort),
    SCALE_PORT: String(balancerPort),
    NOFILE: String(maxDescriptors),
    VERSION: version,
    REVISION: "0123456789abcdef",
    SOURCE: "https://source.example/wsproxy",
  };

  compose(...args: string[]): Promise<Result> {
    return run("docker", ["compose", ...args], { cwd: this.path, env: this.#env });
  }

  async composed(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await this.compose(...args);
    assert.equal(code, 0, `docker compose ${args.join(" ")}\n${stdout}\n${stderr}`);
    return stdout;
  }

  /** The container's id. */
  container(service: string): Promise<string> {
    return this.composed("--profile", "*", "ps", "--all", "--quiet", service);
  }

  /** Runs the load of failover_load.ts, ends a proxy when it is loaded, and returns what it counted. */
  async failover(end: () => Promise<unknown>): Promise<Failover> {
    const child = new Deno.Command("docker", {
      args: [
        ...["compose", "--profile", "*", "run", "--rm", "--no-deps", "-T", "-e", "WSPROXY_URL=http://haproxy:8080"],
        ...["tests", "deno", "run", "--no-prompt", "--frozen", "--cached-only"],
        ...["--allow-env", "--allow-net=haproxy,redis,proxy,proxy-2,proxy-3", "scripts/failover_load.ts", "90"],
        ...["http://proxy:8080", "http://proxy-2:8080", "http://proxy-3:8080"],
      ],
      cwd: this.path,
      env: this.#env,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
    const stderr = new Response(child.stderr).text();
    let output = "";
    for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
      const before = output;
      output += text;
      if (!before.includes("loaded") && output.includes("loaded")) await end();
    }
    assert.equal((await child.status).code, 0, `${output}\n${await stderr}`);
    await stderr;
    const json = output.slice(output.indexOf("{"));
    console.log(json.trim());
    return JSON.parse(json);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "1");
    await run("docker", ["image", "rm", "--force", image, `wsproxy-tests:${version}`]);
    await Deno.remove(this.path, { recursive: true });
  }
}

/** What failover_load.ts prints. */
interface Failover {
  clients: number;
  before: Record<string, number | null>;
  after: Record<string, number | null>;
  cut: number;
  codes: Record<string, number>;
  down: { published: number; received: number; lost: number; untold: number };
  up: { sent: number; heard: number; lost: number; untold: number };
}

/** A container of the image alone, hardened as compose does it, removed at the end. */
class Lone implements AsyncDisposable {
  private constructor(readonly id: string) {}

  static async start(env: Record<string, string>, ...args: string[]): Promise<Lone> {
    const names = Object.entries(env).flatMap(([name, value]) => ["--env", `${name}=${value}`]);
    const hard = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"];
    return new Lone(await docker("run", "--detach", ...hard, ...names, ...args, image));
  }

  async logs(): Promise<string> {
    const { stdout, stderr } = await run("docker", ["logs", this.id]);
    return `${stdout}\n${stderr}`;
  }

  /** Its command line, once wsproxy itself runs. */
  async command(): Promise<string> {
    let command = "";
    await eventually("deno runs", async () => {
      command = await processes(this.id);
      return /^deno run .*main\.ts/m.test(command);
    });
    return command;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await run("docker", ["rm", "--force", "--volumes", this.id]);
  }
}

/** Command lines of a container's processes, one a line. */
async function processes(container: string): Promise<string> {
  const { stdout } = await run("docker", ["top", container, "-o", "pid,args"]);
  return stdout.split("\n").slice(1).map((line) => line.trim().replace(/^\d+ +/, "")).join("\n");
}

async function inspect(container: string): Promise<Inspection> {
  return JSON.parse(await docker("inspect", container))[0];
}

/** The part of `docker inspect` that is looked at. */
interface Inspection {
  Image: string;
  RestartCount: number;
  State: {
    Status: string;
    ExitCode: number;
    StartedAt: string;
    Health?: { Status: string; Log: { Output: string }[] };
  };
  Config: { User: string; StopTimeout?: number; Labels: Record<string, string> };
  HostConfig: {
    ReadonlyRootfs: boolean;
    CapDrop: string[];
    SecurityOpt: string[];
    Memory: number;
    NanoCpus: number;
    PidsLimit: number;
    RestartPolicy: { Name: string };
    PortBindings: Record<string, unknown>;
  };
}

async function ask(port: number, path: string): Promise<{ status: number; body: string }> {
  const answer = await fetch(`http://127.0.0.1:${port}${path}`, { signal: AbortSignal.timeout(5000) });
  return { status: answer.status, body: await answer.text() };
}

/** A client's socket through the published port, and the code it closes with. */
async function openSocket(port: number, session: string): Promise<{ closed: Promise<number>; next: Promise<string> }> {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/agent/ws/${session}`, [
    "bearer",
    await mint(session, {}, secret),
  ]);
  const closed = new Promise<number>((resolve) => socket.onclose = ({ code }) => resolve(code));
  const next = new Promise<string>((resolve) => socket.onmessage = ({ data }) => resolve(data));
  await new Promise<void>((resolve, reject) => {
    socket.onopen = () => resolve();
    socket.onerror = () => reject(new Error("refused"));
  });
  return { closed, next };
}

const [major = 0, minor = 0] = (await run("docker", ["compose", "version", "--short"])).stdout.split(".").map(Number);
if (major < 2 || (major === 2 && minor < 24)) {
  console.error("Docker with Compose 2.24 or later is needed, and `docker compose version` did not show it");
  Deno.exit(1);
}
const hasOpenssl = await present("openssl", ["version"], "nginx.conf and haproxy.cfg: a certificate to try them with");
const hasPython = await present("python3", ["-m", "venv", "--help"], "schemas by local Python; a container has to do");

Deno.test("Containers", async (t) => {
  await using checkout = await Checkout.create();

  await t.step("`docker compose up` without JWT_SECRET stops with a line that says what to do", async () => {
    const { code, stderr } = await checkout.compose("up");
    assert.notEqual(code, 0);
    assert.match(
      stderr,
      /JWT_SECRET is missing a value: make one with: echo JWT_SECRET=\$\(openssl rand -hex 32\) >> \.env/,
    );
  });

  await checkout.settings({ JWT_SECRET: secret });

  await t.step("The image builds, and has its version, revision and source as labels", async () => {
    await checkout.composed("build", "proxy");
    const { Config } = JSON.parse(await docker("image", "inspect", image))[0];
    assert.equal(Config.Labels["org.opencontainers.image.version"], version);
    assert.equal(Config.Labels["org.opencontainers.image.revision"], "0123456789abcdef");
    assert.equal(Config.Labels["org.opencontainers.image.source"], "https://source.example/wsproxy");
    assert.equal(Config.User, "deno");
  });

  await t.step("The image has the program and nothing else: no secret, no .env, no git, no tests", async () => {
    const files = (await docker("run", "--rm", image, "sh", "-c", "find /app -type f | sort")).split("\n");
    const sources = (await succeed("sh", ["-c", "find src -name '*.ts' | sort"], { cwd: checkout.path })).split("\n");
    const scripts = ["container_start.sh", "health.ts", "start_flags.ts"].map((name) => `scripts/${name}`);
    assert.deepEqual(
      files,
      ["deno.json", "deno.lock", "main.ts", ...scripts, ...sources, "start.flags"].map((file) => `/app/${file}`),
    );
  });

  await t.step("The image without JWT_SECRET says how to make one, and exits with 1", async () => {
    const { code, stderr } = await run("docker", ["run", "--rm", image]);
    assert.equal(code, 1);
    assert.match(stderr, /^JWT_SECRET is required .*openssl rand -hex 32/);
  });

  for (const WS_ENGINE of ["deno", "ws"]) {
    await t.step(
      `[${WS_ENGINE}] Without any network it starts, reports that Redis is away, and SIGTERM ends it with 0`,
      async () => {
        await using lone = await Lone.start({ JWT_SECRET: secret, WS_ENGINE }, "--network", "none");
        await eventually("a report", async () => (await lone.logs()).includes("Redis could not be reached"));
        assert.match(await lone.logs(), new RegExp(`"engine":"${WS_ENGINE}","msg":"listening"`));
        assert.doesNotMatch(await lone.logs(), /error|[Dd]ownload|warning/);
        await docker("kill", "--signal", "TERM", lone.id);
        assert.equal(await docker("wait", lone.id), "0");
      },
    );
  }

  await t.step("The flags are those of the start task, but the network's, which names its hosts", async () => {
    await using lone = await Lone.start({ JWT_SECRET: secret });
    const { tasks } = JSON.parse(await Deno.readTextFile(`${checkout.path}/deno.json`));
    const outside = String(tasks.start.command).split(" ");
    const inside = /^deno run .*main\.ts/m.exec(await lone.command())![0].split(" ");
    assert(outside.includes("--allow-net"));
    const added = inside.filter((word) => !outside.includes(word));
    assert.deepEqual(added, ["--cached-only", "--allow-net=0.0.0.0:8080,redis:6379"]);
    const dropped = outside.filter((word) => !inside.includes(word));
    assert.deepEqual(dropped, ["--env-file", "--allow-net"]);
  });

  const networks: [string, Record<string, string>, string][] = [
    ["a host without a port", { REDIS_URL: "redis://cache.example" }, "0.0.0.0:8080,cache.example:6379"],
    [
      "a password, a database",
      { REDIS_URL: "rediss://u:hidden%40@cache.example:7000/2" },
      "0.0.0.0:8080,cache.example:7000",
    ],
    ["options", { REDIS_URL: "redis://cache.example?family=6" }, "0.0.0.0:8080,cache.example:6379"],
    ["IPv6", { REDIS_URL: "redis://[fd00::1]:6380/0", HOST: "::" }, "[::]:8080,[fd00::1]:6380"],
    ["IPv6 without a port", { REDIS_URL: "redis://[fd00::1]" }, "0.0.0.0:8080,[fd00::1]:6379"],
    ["an empty value, as compose passes unset ones", { REDIS_URL: "", PORT: "9000" }, "0.0.0.0:9000,redis:6379"],
  ];
  for (const [what, env, allowed] of networks) {
    await t.step(`REDIS_URL with ${what} is what the network permission names, and shows no password`, async () => {
      await using lone = await Lone.start({ JWT_SECRET: secret, ...env }, "--network", "none");
      const command = await lone.command();
      assert.match(command, new RegExp(`--allow-net=${allowed.replace(/[[\].]/g, "\\$&")} `));
      assert.doesNotMatch(command, /hidden/);
    });
  }

  await t.step("A REDIS_URL that is none is refused by wsproxy itself, in its own words", async () => {
    const { code, stderr } = await run("docker", [
      "run",
      "--rm",
      "-e",
      `JWT_SECRET=${secret}`,
      "-e",
      "REDIS_URL=cache:6379",
      image,
    ]);
    assert.equal(code, 1);
    assert.equal(stderr, "REDIS_URL must be a redis:// or rediss:// URL");
  });

  await t.step("`docker compose up --wait` gives a working proxy, and publishes nothing else", async () => {
    await checkout.composed("up", "--wait");
    assert.equal((await ask(proxyPort, "/health")).status, 200);
    const { HostConfig: redis } = await inspect(await checkout.container("redis"));
    assert.deepEqual(redis.PortBindings ?? {}, {});
    const { HostConfig: proxy } = await inspect(await checkout.container("proxy"));
    assert.deepEqual(Object.keys(proxy.PortBindings), ["8080/tcp"]);
  });

  await t.step("Both run read-only, without capabilities, with limits, and come back after a crash", async () => {
    for (const service of ["redis", "proxy"]) {
      const container = await checkout.container(service);
      const { HostConfig } = await inspect(container);
      assert.equal(HostConfig.ReadonlyRootfs, true);
      assert.deepEqual(HostConfig.CapDrop, ["ALL"]);
      assert.deepEqual(HostConfig.SecurityOpt, ["no-new-privileges:true"]);
      assert.equal(HostConfig.RestartPolicy.Name, "unless-stopped");
      assert(HostConfig.Memory > 0 && HostConfig.NanoCpus > 0 && HostConfig.PidsLimit > 0);
      const status = await docker("exec", container, "cat", "/proc/1/status");
      assert.match(status, /^CapEff:\s0+$/m);
      assert.match(status, /^NoNewPrivs:\s1$/m);
      assert.doesNotMatch(status, /^Uid:\s0/m);
      assert.notEqual((await run("docker", ["exec", container, "touch", "/etc/x"])).code, 0);
    }
    const { Config } = await inspect(await checkout.container("proxy"));
    assert.equal(Config.StopTimeout, 40);
    const container = await checkout.container("proxy");
    // Killed from inside, as a crash is: what `docker kill` ends stays ended.
    await docker("exec", container, "sh", "-c", "kill -9 $(grep -lz '^deno$' /proc/[0-9]*/cmdline | cut -d/ -f3)");
    await eventually("a restart", async () => (await inspect(container)).RestartCount === 1);
    await eventually("health", async () => (await inspect(container)).State.Health?.Status === "healthy");
  });

  await t.step("Redis has the settings of docker-compose.yml", async () => {
    const get = (name: string) => checkout.composed("exec", "-T", "redis", "redis-cli", "config", "get", name);
    assert.match(await get("client-output-buffer-limit"), /pubsub 268435456 134217728 30/);
    assert.equal(await get("maxclients"), "maxclients\n10000");
    assert.equal((await get("save")).trim(), "save");
    assert.equal(await get("appendonly"), "appendonly\nno");
    assert.equal(await get("tcp-keepalive"), "tcp-keepalive\n60");
  });

  for (const ALLOW_QUERY_TOKEN of ["false", "true"]) {
    await t.step(
      `The end-to-end tests pass against the containers (ALLOW_QUERY_TOKEN=${ALLOW_QUERY_TOKEN})`,
      async () => {
        await checkout.settings({ JWT_SECRET: secret, ALLOW_QUERY_TOKEN });
        const { code, stdout, stderr } = await checkout.compose(
          "--profile",
          "tests",
          "run",
          "--build",
          "--rm",
          "-T",
          "tests",
        );
        assert.equal(code, 0, `${stdout}\n${stderr}`);
        assert.match(stdout, /1 passed \(12 steps\) \| 0 failed/);
      },
    );
  }

  await t.step("The end-to-end tests' failure is the command's exit code", async () => {
    const wrong = ["-e", `JWT_SECRET=${"wrong".repeat(8)}`];
    const { code, stdout } = await checkout.compose("--profile", "tests", "run", "--rm", "-T", ...wrong, "tests");
    assert.equal(code, 1, stdout);
    assert.match(stdout, /0 passed .* 1 failed/);
  });

  await t.step("While Redis is down the container is unhealthy, stays ready, and is not restarted", async () => {
    const container = await checkout.container("proxy");
    const { State: before } = await inspect(container);
    await checkout.composed("stop", "redis");
    await eventually("unhealthy", async () => (await inspect(container)).State.Health?.Status === "unhealthy");
    const { State: during, RestartCount } = await inspect(container);
    assert.match(during.Health!.Log.at(-1)!.Output, /^503 \{"status":"unhealthy"/);
    assert.equal((await ask(proxyPort, "/health")).status, 503);
    assert.deepEqual(await ask(proxyPort, "/ready"), { status: 200, body: '{"status":"ready"}' });
    await checkout.composed("start", "redis");
    await eventually("healthy again", async () => (await inspect(container)).State.Health?.Status === "healthy");
    const { State: after } = await inspect(container);
    assert.equal(after.StartedAt, before.StartedAt);
    assert.equal(RestartCount, 0);
  });

  await t.step("`docker compose stop` closes clients with 1001 and ends with 0", async () => {
    const { closed } = await openSocket(proxyPort, "stopped");
    const container = await checkout.container("proxy");
    await checkout.composed("stop", "proxy");
    assert.equal(await closed, 1001);
    assert.equal((await inspect(container)).State.ExitCode, 0);
  });

  await t.step("`--profile scale up` gives three proxies behind HAProxy, which pass the end-to-end tests", async () => {
    await checkout.composed("--profile", "scale", "up", "--wait");
    assert.equal((await ask(balancerPort, "/ready")).status, 200);
    const through = ["-e", "WSPROXY_URL=http://haproxy:8080"];
    const { code, stdout, stderr } = await checkout.compose(
      ...["--profile", "tests", "run", "--rm", "-T", "--no-deps", ...through, "tests"],
    );
    assert.equal(code, 0, `${stdout}\n${stderr}`);
  });

  await t.step(
    "One of three is killed under load: its clients come back on the others, every loss is told",
    async () => {
      const counted = await checkout.failover(() =>
        checkout.composed("--profile", "*", "kill", "--signal", "KILL", "proxy-2")
      );
      assert(counted.before["http://proxy-2:8080"]! > 0, "it had clients");
      assert.equal(counted.cut, counted.before["http://proxy-2:8080"], "nobody else's socket closed");
      assertAllBack(counted, "http://proxy-2:8080");
      await checkout.composed("--profile", "*", "up", "--wait", "proxy-2");
    },
  );

  await t.step(
    "One of three is stopped under load: HAProxy sends nobody there, its clients are told 1001",
    async () => {
      const counted = await checkout.failover(() => checkout.composed("--profile", "*", "stop", "proxy-3"));
      const { State } = await inspect(await checkout.container("proxy-3"));
      await checkout.composed("--profile", "*", "up", "--wait", "proxy-3");
      assert.equal(State.ExitCode, 0);
      assertAllBack(counted, "http://proxy-3:8080");
      assert.deepEqual(Object.keys(counted.codes), ["1001"]);
    },
  );

  await t.step({
    name: "deploy/haproxy.cfg and deploy/nginx.conf pass their own checks, carry sockets over TLS, and hide /metrics",
    ignore: !hasOpenssl,
    fn: () => checkTls(checkout),
  });

  await t.step("deploy/kubernetes/ fits Kubernetes' schemas", () => checkManifests(checkout));
});

function assertAllBack(counted: Failover, ended: string): void {
  assert.equal(counted.after[ended], null);
  const open = Object.values(counted.after).reduce((sum: number, sockets) => sum + (sockets ?? 0), 0);
  assert.equal(open, counted.clients);
  assert.equal(counted.down.untold, 0);
  assert.equal(counted.up.untold, 0);
  assert.equal(counted.down.received + counted.down.lost, counted.down.published);
  assert.equal(counted.up.heard + counted.up.lost, counted.up.sent);
}

/** Puts each balancer of deploy/ in front of the three proxies of the scale profile. */
async function checkTls(checkout: Checkout): Promise<void> {
  const openssl = (...args: string[]) => succeed("openssl", args, { cwd: checkout.path });
  const names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"];
  // By default it would be an authority's, which no server may show.
  names.push("-addext", "basicConstraints=critical,CA:FALSE");
  const files = ["-keyout", "wsproxy.key", "-out", "wsproxy.crt"];
  await openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", ...names, ...files);
  const certificate = await Deno.readTextFile(`${checkout.path}/wsproxy.crt`);
  const key = await Deno.readTextFile(`${checkout.path}/wsproxy.key`);
  await Deno.writeTextFile(`${checkout.path}/wsproxy.pem`, certificate + key);
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
        await checkTlsRelay(checkout, image, port, certificate, container);
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

/** kubernetes-validate carries the schemas; strict, so that a misspelt field is an error. */
async function checkManifests(checkout: Checkout): Promise<void> {
  const tool = "kubernetes-validate==1.37.0";
  const names = [...Deno.readDirSync(`${checkout.path}/deploy/kubernetes`)].map(({ name }) => name);
  assert(names.length >= 4);
  const files = names.map((name) => `deploy/kubernetes/${name}`);
  const install = "python3 -m venv $0 && $0/bin/pip install --quiet --disable-pip-version-check";
  const script = `${install} ${tool} && exec $0/bin/kubernetes-validate --strict "$@"`;
  if (hasPython) {
    await succeed("sh", ["-c", script, `${checkout.path}/venv`, ...files], { cwd: checkout.path });
    return;
  }
  const dockerfile = `FROM python:3-slim\nCOPY deploy/kubernetes /deploy/kubernetes\nWORKDIR /\n`;
  await Deno.writeTextFile(`${checkout.path}/check.Dockerfile`, dockerfile);
  await Deno.writeTextFile(`${checkout.path}/check.Dockerfile.dockerignore`, "");
  const tag = `${project}-manifests`;
  await docker("build", "--quiet", "--tag", tag, "--file", `${checkout.path}/check.Dockerfile`, checkout.path);
  await docker("run", "--rm", tag, "sh", "-c", script, "/tmp/venv", ...files);
  await docker("image", "rm", "--force", tag);
}
