import assert from "node:assert/strict";
import { type Config, ConfigError, readConfig } from "../src/config.ts";
import { secret } from "./harness/token.ts";

function read(env: Record<string, string> = {}): Config {
  return readConfig({ JWT_SECRET: secret, ...env });
}

function problems(env: Record<string, string | undefined>): readonly string[] {
  try {
    readConfig(env);
  } catch (error) {
    assert(error instanceof ConfigError);
    return error.problems;
  }
  throw new assert.AssertionError({ message: "it was accepted" });
}

Deno.test("Only JWT_SECRET has to be set; the rest has the documented defaults", () => {
  assert.deepEqual(read(), {
    listen: { hostname: "0.0.0.0", port: 8080, engine: "deno" },
    redis: { address: { host: "127.0.0.1", port: 6379, db: 0, tls: false }, outageGraceMs: 10_000, gap: "notify" },
    auth: { secrets: [secret], allowedOrigins: undefined, allowQueryToken: false },
    limits: {
      maxMessageBytes: 1_048_576,
      maxBufferBytes: 1_048_576,
      maxMessagesPerSec: 0,
      maxConnections: 0,
      maxConnectsPerSec: 0,
      validateJson: true,
    },
    timing: { pingIntervalMs: 30_000, pingTimeoutMs: 10_000, handshakeTimeoutMs: 5000, shutdownGraceMs: 30_000 },
    log: { level: "info", format: "json" },
    notices: [],
  });
});

Deno.test("Every problem is reported at once, and no secret with it", () => {
  assert.deepEqual(
    problems({
      PORT: "x",
      JWT_SECRET: "short-secret",
      JWT_ALGORITHM: "RS256",
      REDIS_URL: "http://:hunter2@redis",
      MAX_CONNECTIONS: "-1",
      VALIDATE_JSON: "maybe",
      ALLOWED_ORIGINS: "https://app.example/path",
      LOG_LEVEL: "loud",
    }),
    [
      'PORT must be an integer from 0 to 65535: current value is "x"',
      "REDIS_URL must be a redis://, rediss:// or redis+unix:// URL",
      "JWT_SECRET must be 32 bytes or more",
      'JWT_ALGORITHM must be HS256: current value is "RS256"',
      'MAX_CONNECTIONS must be an integer from 0 to 10000000: current value is "-1"',
      'VALIDATE_JSON must be true or false: current value is "maybe"',
      'ALLOWED_ORIGINS must be * or a comma-separated list like https://app.example: current value is "https://app.example/path"',
      'LOG_LEVEL must be one of trace, debug, info, warn, error, fatal, silent: current value is "loud"',
    ],
  );
});

Deno.test("Without JWT_SECRET the problem says how to make one", () => {
  for (const env of [{}, { JWT_SECRET: "" }]) {
    const [problem, ...rest] = problems(env);
    assert.match(problem!, /JWT_SECRET is required.*openssl rand -hex 32/);
    assert.deepEqual(rest, []);
  }
});

Deno.test("An integer is written in digits, and nothing else", () => {
  for (const text of ["1e3", "0x10", "8080.0", " 80", "+80", "8_080", "٣"]) {
    assert.equal(problems({ JWT_SECRET: secret, PORT: text }).length, 1, text);
  }
});

Deno.test("An empty value counts as unset", () => {
  assert.equal(read({ PORT: "", ALLOWED_ORIGINS: "" }).listen.port, 8080);
});

Deno.test("A secret's length is counted in bytes", () => {
  assert.deepEqual(read({ JWT_SECRET: "é".repeat(16) }).auth.secrets, ["é".repeat(16)]);
});

Deno.test("Origins are a set, and * is any", () => {
  const list = read({ ALLOWED_ORIGINS: "https://a.example , http://localhost:3000" });
  assert.deepEqual([...list.auth.allowedOrigins!], ["https://a.example", "http://localhost:3000"]);
});

Deno.test("RUST_LOG is read when LOG_LEVEL is unset", () => {
  assert.equal(read({ RUST_LOG: "info,wsproxy=debug" }).log.level, "debug");
  assert.equal(read({ RUST_LOG: "warn" }).log.level, "warn");
  assert.equal(read({ RUST_LOG: "off" }).log.level, "silent");
  assert.equal(read({ RUST_LOG: "hyper=trace,tower" }).log.level, "info");
  assert.equal(read({ RUST_LOG: "debug", LOG_LEVEL: "error" }).log.level, "error");
});

Deno.test("PUBSUB_POOL_SIZE is accepted and reported as needless", () => {
  assert.match(read({ PUBSUB_POOL_SIZE: "16" }).notices[0]!, /PUBSUB_POOL_SIZE is not needed/);
});
