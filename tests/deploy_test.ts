/**
 * Numbers that must agree between the files of docker-compose.yml and deploy/. What needs their programs is in
 * tests/tools/, what needs Docker in test:containers.
 */

import assert from "node:assert/strict";
import { parse as parseYaml } from "yaml";
import { settings } from "../src/settings.ts";
import { closes } from "../src/replies.ts";
import { TestProxy } from "./harness/proxy.ts";
import { RedisServer } from "./harness/redis.ts";

const read = (path: string) => Deno.readTextFileSync(new URL(`../${path}`, import.meta.url));

/** The number that a pattern's first group finds. */
function numberIn(text: string, pattern: RegExp): number {
  const match = pattern.exec(text);
  assert(match, `${pattern} is not there`);
  return Number(match[1]);
}

Deno.test("Compose waits longer for a stop than the drain takes", () => {
  const compose = read("docker-compose.yml");
  const graceSecs = numberIn(compose, /SHUTDOWN_GRACE_PERIOD_SECS: "(\d+)"/);
  assert(numberIn(compose, /x-proxy[^]*?stop_grace_period: (\d+)s/) > graceSecs);
});

Deno.test("Kubernetes waits longer for a stop than preStop and the drain take", () => {
  const deployment = read("deploy/kubernetes/deployment.yaml");
  const graceSecs = numberIn(deployment, /SHUTDOWN_GRACE_PERIOD_SECS, value: "(\d+)"/);
  const preStopSecs = numberIn(deployment, /\["sleep", "(\d+)"\]/);
  assert(numberIn(deployment, /terminationGracePeriodSeconds: (\d+)/) > preStopSecs + graceSecs);
});

Deno.test("systemd waits longer for a stop than the drain takes", () => {
  const unit = read("deploy/systemd/wsproxy.service");
  const graceSecs = Number(settings.SHUTDOWN_GRACE_PERIOD_SECS.default);
  assert(numberIn(unit, /^TimeoutStopSec=(\d+)$/m) > graceSecs);
});

Deno.test("The image has the Deno that ./dev installs", () => {
  const [, installed] = /^deno_version=([\d.]+)$/m.exec(read("dev")) ?? [];
  const [, image] = /^ARG DENO_VERSION=([\d.]+)$/m.exec(read("Dockerfile")) ?? [];
  assert(installed);
  assert.equal(image, installed);
});

Deno.test("What compose gives its containers is there, and what needs no password is for this machine only", () => {
  const { services, configs } = parseYaml(read("docker-compose.yml"), { merge: true, maxAliasCount: -1 }) as {
    services: Record<string, { profiles?: string[]; ports?: string[]; configs?: { source: string }[] }>;
    configs: Record<string, { file: string }>;
  };
  const used = Object.values(services).flatMap((service) => service.configs ?? []).map(({ source }) => source);
  assert.deepEqual(used.sort(), Object.keys(configs).sort());
  for (const { file } of Object.values(configs)) assert(read(file).length > 0);
  const observers = Object.values(services).filter(({ profiles }) => profiles?.includes("observe"));
  assert.equal(observers.length, 2);
  for (const { ports } of observers) for (const port of ports!) assert.match(port, /^127\.0\.0\.1:/);
});

Deno.test("One REDIS_PASSWORD in .env is enough for all of compose, with and without one", async () => {
  for (const password of ["", "a-password"]) {
    const text = read("docker-compose.yml").replace(/\$\{REDIS_PASSWORD:-\}/g, password).replaceAll("$$", "$");
    const { services } = parseYaml(text, { merge: true, maxAliasCount: -1 }) as {
      services: Record<
        string,
        { environment: Record<string, string>; command: string[]; healthcheck: { test: string[] } }
      >;
    };
    const { redis, proxy, tests } = services;
    await using server = await RedisServer.start(...redis!.command.slice(1));
    const [, check] = redis!.healthcheck.test;
    const { success } = await new Deno.Command("sh", {
      args: ["-c", check!.replace("redis-cli", `redis-cli -p ${server.port}`)],
      env: redis!.environment,
    }).output();
    assert(success, "the health check");
    assert.equal(tests!.environment["REDIS_URL"], proxy!.environment["REDIS_URL"]);
    await using served = await TestProxy.start(
      proxy!.environment["REDIS_URL"]!.replace("redis:6379", `127.0.0.1:${server.port}`),
    );
    assert(await served.isHealthy());
    for (const [name, { environment, command }] of Object.entries(services)) {
      const asked = String(command).includes("redis-server");
      if (asked) assert.equal(environment["REDISCLI_AUTH"], password, name);
      if (name.startsWith("proxy")) assert(environment["REDIS_URL"]!.includes(`://:${password}@`), name);
    }
  }
});

Deno.test("The balancers wait longer than a handshake may take", () => {
  const handshakeSecs = Number(settings.HANDSHAKE_TIMEOUT_SECS.default);
  for (const path of ["deploy/haproxy.cfg", "deploy/haproxy.compose.cfg"]) {
    assert(numberIn(read(path), /timeout server (\d+)s/) > handshakeSecs);
  }
});

Deno.test("The two HAProxy configurations treat the proxies alike", () => {
  const backendOf = (path: string) => read(path).split("\nbackend proxies\n")[1]!.replace(/^ *server .*\n/gm, "");
  assert.equal(backendOf("deploy/haproxy.cfg"), backendOf("deploy/haproxy.compose.cfg"));
});

Deno.test("Whatever names settings in compose and Kubernetes names ones that exist", () => {
  const names = [...read("deploy/kubernetes/deployment.yaml").matchAll(/name: ([A-Z_]{2,})\b/g)].map((match) =>
    match[1]!
  );
  const [, block = ""] = /x-proxy[^]*?\n {2}environment:.*\n((?: {4}.*\n)+)/.exec(read("docker-compose.yml")) ?? [];
  names.push(...[...block.matchAll(/^ {4}([A-Z_]+):/gm)].map((match) => match[1]!));
  assert(names.length > 8);
  for (const name of names) assert(name in settings, name);
});

Deno.test("The operators' pages explain every close code, and name metrics and settings that exist", () => {
  const run = read("docs/run.md");
  for (const { code } of Object.values(closes)) assert.match(run, new RegExp(`^\\| [^|]*\\b${code}\\b`, "m"));
  const page = `${run}${read("docs/deploy.md")}${read("docs/redis.md")}`;
  const names = new Set([...read("src/metrics.ts").matchAll(/"(wsproxy_\w+)"/g)].map((match) => match[1]!));
  for (const [, name] of page.matchAll(/`(wsproxy_\w+_(?:total|up))/g)) assert(names.has(name!), name!);
  for (const [, name] of page.matchAll(/`([A-Z]+_[A-Z_]+)`/g)) {
    assert(
      name! in settings || /^((SCALE|SENTINEL|CLUSTER|WORKERS|GRAFANA|PROMETHEUS)_PORT|REDIS_PASSWORD)$/.test(name!) ||
        name!.startsWith("OTEL_"),
      name!,
    );
  }
});
