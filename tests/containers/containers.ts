/**
 * Checks the image, docker-compose.yml and deploy/ for real: `deno task test:containers`. Needs Docker with Compose
 * 2.24, whatever engine `docker` reaches, and nothing else; what needs one thing more says so and is ignored without
 * it. Works in a copy of the project, on free ports, under a project name of its own, and removes what it made.
 * Names are facts about the product, as in tests/.
 */

import assert from "node:assert/strict";
import { settings } from "../../src/settings.ts";
import { checkManifests } from "./manifests.ts";
import { checkTls } from "./tls.ts";
import { balancerPort, Checkout, type Failover, image, proxyPort, secret, version, workersPort } from "./checkout.ts";
import { ask, inspect, Lone, openSocket } from "./container.ts";
import { docker, eventually, run, succeed } from "./shell.ts";

// Compose takes these from the shell before it looks into .env, which is what is tried here.
for (const name of [...Object.keys(settings), "WSPROXY_URL"]) Deno.env.delete(name);

const [major = 0, minor = 0] = (await run("docker", ["compose", "version", "--short"])).stdout.split(".").map(Number);
if (major < 2 || (major === 2 && minor < 24)) {
  console.error("Docker with Compose 2.24 or later is needed, and `docker compose version` did not show it");
  Deno.exit(1);
}

Deno.test("Containers", async (t) => {
  await using checkout = await Checkout.create();

  await t.step("`docker compose up` without JWT_SECRET stops with a line that says what to do", async () => {
    const { code, stderr } = await checkout.compose("up");
    assert.notEqual(code, 0);
    assert.match(
      stderr,
      /JWT_SECRET is missing a value: make one with: \.\/dev init/,
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
    const files = (await docker("run", "--rm", image, "sh", "-c", "find /app -type f | LC_ALL=C sort")).split("\n");
    const decoys = ["src/.env.local", "src/tls.key"];
    const sources = (await succeed("sh", ["-c", "find src -type f | LC_ALL=C sort"], { cwd: checkout.path }))
      .split("\n").filter((file) => !decoys.includes(file));
    const scripts = ["container_start.sh", "start_flags.ts"].map((name) => `scripts/${name}`);
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
        assert.match(await lone.logs(), new RegExp(`"engine":"${WS_ENGINE}",.*"msg":"listening"`));
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
    assert.match(stderr, /^REDIS_URL must begin with redis:/);
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
    await checkout.endToEnd({ WSPROXY_URL: "http://haproxy:8080" });
  });

  await t.step(
    "One of three is killed under load: its clients come back on the others, every loss is told",
    async () => {
      const counted = await checkout.failover(() =>
        checkout.composed("--profile", "*", "kill", "--signal", "KILL", "proxy-2")
      );
      assert(counted.before["http://proxy-2:8080"]! > 0, "it had clients");
      assert.equal(counted.cut, counted.before["http://proxy-2:8080"], "no other socket closed");
      assertAllBack(counted, "http://proxy-2:8080");
      await checkout.composed("--profile", "*", "up", "--wait", "proxy-2");
    },
  );

  await t.step(
    "One of three is stopped under load: HAProxy sends no client there, its clients are told 1001",
    async () => {
      const counted = await checkout.failover(() => checkout.composed("--profile", "*", "stop", "proxy-3"));
      const { State } = await inspect(await checkout.container("proxy-3"));
      await checkout.composed("--profile", "*", "up", "--wait", "proxy-3");
      assert.equal(State.ExitCode, 0);
      assertAllBack(counted, "http://proxy-3:8080");
      assert.deepEqual(Object.keys(counted.codes), ["1001"]);
    },
  );

  await t.step(
    "deploy/haproxy.cfg and deploy/nginx.conf pass their own checks, carry sockets over TLS, and hide /metrics",
    () => checkTls(checkout),
  );

  const topologies = [
    ["sentinel", "redis-1", "redis+sentinel://sentinel-1,sentinel-2,sentinel-3?sentinel_master_name=wsproxy"],
    ["cluster", "cluster-1", "redis+cluster://cluster-2,cluster-3"],
  ] as const;
  for (const [profile, master, redisUrl] of topologies) {
    await t.step(
      `\`--profile ${profile} up\` passes the end-to-end tests, without its first master, and with it again`,
      async () => {
        const passes = () => checkout.endToEnd({ WSPROXY_URL: `http://proxy-${profile}:8080`, REDIS_URL: redisUrl });
        await checkout.composed("--profile", profile, "up", "--wait");
        const proxy = await checkout.container(`proxy-${profile}`);
        const healthy = async () => {
          const { stdout } = await run("docker", ["exec", proxy, "sh", "scripts/container_start.sh", "health"]);
          return stdout.includes('"status":"healthy"');
        };
        await passes();
        await checkout.composed("--profile", profile, "kill", master);
        await eventually("another master", healthy);
        await passes();
        await checkout.composed("--profile", profile, "up", "--wait");
        await passes();
      },
    );
  }

  await t.step(
    "`--profile workers up` passes the end-to-end tests, and refuses no client while SIGHUP replaces",
    async () => {
      await checkout.composed("--profile", "workers", "up", "--wait");
      const metrics = async () => (await ask(workersPort, "/metrics")).body;
      assert.match(await metrics(), /^wsproxy_workers 2$/m);
      await checkout.endToEnd({ WSPROXY_URL: "http://proxy-workers:8080" });
      const container = await checkout.container("proxy-workers");
      assert.equal(await docker("exec", container, "cat", "/proc/sys/net/ipv4/tcp_migrate_req"), "1");
      const sockets = await Promise.all(Array.from({ length: 8 }, (_, n) => openSocket(workersPort, `replaced-${n}`)));
      let replaced = false;
      const closed = Promise.all(sockets.map(({ closed }) => closed)).finally(() => replaced = true);
      await docker("kill", "--signal", "HUP", container);
      while (!replaced) assert.equal((await ask(workersPort, "/ready")).status, 200);
      assert.deepEqual(new Set(await closed), new Set([1001]));
      await checkout.composed("--profile", "workers", "stop", "proxy-workers");
      assert.equal((await inspect(container)).State.ExitCode, 0);
    },
  );

  await t.step("deploy/kubernetes/ and the Helm chart fit Kubernetes' schemas", () => checkManifests(checkout));
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
