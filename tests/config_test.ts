import { Buffer } from "node:buffer";
import { generateKeyPairSync, randomBytes } from "node:crypto";
import assert from "node:assert/strict";
import { type Config, ConfigError, readConfig } from "../src/config.ts";
import { parseRedisUrl } from "../src/redis_url.ts";
import { settings } from "../src/settings.ts";
import { certify } from "./harness/certificate.ts";
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
  const { shown, ...config } = read();
  assert.equal(shown["PORT"], "8080");
  assert.deepEqual(config, {
    listen: { hostname: "0.0.0.0", port: 8080, engine: "deno" },
    admin: undefined,
    workers: { count: 1, maxHeapBytes: 0, maxUnopened: 0 },
    metricsAgents: [],
    tracing: false,
    redis: { address: { host: "127.0.0.1", port: 6379, db: 0, tls: false }, outageGraceMs: 10_000, gap: "notify" },
    sessionLogs: { maxMessages: 4096, ttlMs: 3_600_000, maxMessageBytes: 1_048_576 },
    inbox: undefined,
    auth: {
      secrets: [secret],
      publicKeys: undefined,
      leewayMs: 5000,
      issuer: undefined,
      audiences: undefined,
      sessionClaim: "session_id",
      sessionMatch: "exact",
      cookie: undefined,
      allowedOrigins: undefined,
      allowQueryToken: false,
    },
    forwarding: { trusted: undefined, header: "x-forwarded-for" },
    limits: {
      maxMessageBytes: 1_048_576,
      maxBufferBytes: 1_048_576,
      maxMessagesPerSec: 0,
      maxConnections: 0,
      maxConnectsPerSec: 0,
      maxConnectionsPerSession: 0,
      maxConnectionsPerAddress: 0,
      maxConnectsPerAddressPerSec: 0,
      validateJson: true,
      sessionSockets: "all",
    },
    timing: {
      pingIntervalMs: 30_000,
      pingTimeoutMs: 10_000,
      handshakeTimeoutMs: 5000,
      shutdownGraceMs: 30_000,
      keepAliveTimeoutMs: 75_000,
    },
    logging: { level: "info", format: "auto" },
    notices: [],
  });
});

Deno.test("The settings are shown as they are in force, without a secret", () => {
  const { shown } = read({
    JWT_SECRET_PREVIOUS: "hunter2".repeat(5),
    RUST_LOG: "debug",
    REDIS_URL: "redis+sentinel://me:hunter2@one,two/1?sentinel_master_name=m&sentinel_password=hunter2",
  });
  assert.equal(shown["REDIS_URL"], "redis+sentinel://one,two/1?sentinel_master_name=m&sentinel_password=…");
  assert.deepEqual([shown["JWT_SECRET"], shown["LOG_LEVEL"], shown["MAX_CONNECTIONS"]], ["(set)", "debug", "0"]);
  assert.doesNotMatch(JSON.stringify(shown), /hunter|REDIS_CA_FILE/);
  assert.equal(read({ REDIS_URL: "redis://:a@hunter2@redis:1/2" }).shown["REDIS_URL"], "redis://redis:1/2");
  assert.equal(
    read({ REDIS_URL: "redis+unix://:hunter2@/run/redis.sock" }).shown["REDIS_URL"],
    "redis+unix:///run/redis.sock",
  );
});

Deno.test("A secret may stand in a file, whose last line break is dropped, and in one place only", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const file = (name: string, text: string) => {
      Deno.writeTextFileSync(`${folder}/${name}`, text);
      return `${folder}/${name}`;
    };
    const JWT_SECRET_FILE = file("jwt", `${secret}\n`);
    const former = "former".repeat(6);
    const config = readConfig({
      JWT_SECRET_FILE,
      JWT_SECRET_PREVIOUS_FILE: file("former", `${former}\r\n`),
      ADMIN_PORT: "9090",
      ADMIN_PASSWORD_FILE: file("admin", "a-long-password"),
      REDIS_URL: "redis://me@redis",
      REDIS_PASSWORD_FILE: file("redis", "p@ss/word\n"),
    });
    assert.deepEqual(config.auth.secrets, [secret, former]);
    assert.equal(config.admin!.password, "a-long-password");
    assert.deepEqual(config.redis.address, { ...parseRedisUrl("redis://me@redis"), password: "p@ss/word" });
    assert.equal(config.shown["JWT_SECRET_FILE"], JWT_SECRET_FILE);
    assert.doesNotMatch(JSON.stringify(config.shown), /of-the-tests|former.former|long-password|p@ss/);
    const [empty, none, blank] = [file("empty", "\n"), `${folder}/none`, file("blank", `${secret}\n\n`)];
    assert.deepEqual(
      problems({ JWT_SECRET: secret, JWT_SECRET_FILE, ADMIN_PASSWORD_FILE: empty, JWT_SECRET_PREVIOUS_FILE: none }),
      [
        `ADMIN_PASSWORD_FILE must be a file that is not empty: current value is "${empty}"`,
        "JWT_SECRET and JWT_SECRET_FILE must not be given together",
        `JWT_SECRET_PREVIOUS_FILE must be a file that can be read (NotFound): current value is "${none}"`,
      ],
    );
    assert.deepEqual(problems({ JWT_SECRET_FILE: blank }), ["JWT_SECRET must not begin or end with white space"]);
    assert.deepEqual(problems({ JWT_SECRET_FILE: none }).length, 1);
    assert.deepEqual(problems({ JWT_SECRET_FILE, REDIS_URL: "redis://:x@redis", REDIS_PASSWORD_FILE: blank }), [
      "REDIS_PASSWORD_FILE must not be given together with a password in REDIS_URL",
    ]);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("A session's only socket needs room for the next one", () => {
  const env = { JWT_SECRET: secret, SESSION_SOCKETS: "last", MAX_CONNECTIONS_PER_SESSION: "1" };
  assert.deepEqual(problems(env), [
    "MAX_CONNECTIONS_PER_SESSION must be 0, or 2 or more, while SESSION_SOCKETS is last",
  ]);
  assert.equal(read({ ...env, MAX_CONNECTIONS_PER_SESSION: "2" }).limits.maxConnectionsPerSession, 2);
});

Deno.test("Claims are named, or there are none", () => {
  const claims = (INBOX_CLAIMS: string) => read({ INBOX: "true", INBOX_CLAIMS }).inbox!.claims;
  assert.deepEqual(claims(""), ["sub"]);
  assert.deepEqual(claims("-"), []);
  assert.deepEqual(claims("sub, https://app.example/roles,sub"), ["sub", "https://app.example/roles"]);
  for (const list of [",", "sub,", "a b", "1,2,3,4,5,6,7,8,9"]) {
    assert.match(
      problems({ JWT_SECRET: secret, INBOX_CLAIMS: list })[0]!,
      /^INBOX_CLAIMS must be - or at most 8 names/,
      list,
    );
  }
  assert.match(
    problems({ JWT_SECRET: secret, TRUSTED_PROXIES: "10.0.0.0/8,any" })[0]!,
    /"any" is none: current value is/,
  );
});

Deno.test("Every problem is reported at once, and no secret with it", () => {
  assert.deepEqual(
    problems({
      PORT: "x",
      JWT_SECRET: "short-secret",
      JWT_ALGORITHM: "HS256,RS512",
      REDIS_URL: "http://:hunter2@redis",
      MAX_CONNECTIONS: "-1",
      VALIDATE_JSON: "maybe",
      ALLOWED_ORIGINS: "https://app.example/path",
      LOG_LEVEL: "loud",
    }),
    [
      'PORT must be an integer from 0 to 65535: current value is "x"',
      "REDIS_URL must begin with redis://, rediss://, redis+unix://, redis+sentinel://, rediss+sentinel://, redis+cluster:// or rediss+cluster://",
      "JWT_SECRET must be 32 bytes or more",
      'JWT_ALGORITHM must be a list of HS256, RS256, PS256, ES256, EdDSA: current value is "HS256,RS512"',
      'MAX_CONNECTIONS must be an integer from 0 to 10000000: current value is "-1"',
      'VALIDATE_JSON must be true or false: current value is "maybe"',
      'ALLOWED_ORIGINS must be * or a comma-separated list like https://app.example,https://*.example.com,capacitor://localhost,null, each written as browsers send it; "https://app.example/path" can match nothing: current value is "https://app.example/path"',
      'LOG_LEVEL must be one of trace, debug, info, warn, error, fatal, silent, or a filter such as info,wsproxy=debug: current value is "loud"',
    ],
  );
});

Deno.test("What settings do not allow together is reported at once as well, with what is wrong by itself", () => {
  const env = {
    JWT_SECRET: secret,
    ADMIN_PORT: "8080",
    SESSION_SOCKETS: "last",
    MAX_CONNECTIONS_PER_SESSION: "1",
    AUTH_COOKIE: "token",
    JWT_ALGORITHM: "RS256",
    OTEL_DENO: "true",
    ALLOW_QUERY_TOKEN: "true",
  };
  const together = [
    "ADMIN_PORT must be another port than PORT",
    "MAX_CONNECTIONS_PER_SESSION must be 0, or 2 or more, while SESSION_SOCKETS is last",
    "ALLOW_QUERY_TOKEN must be false while OTEL_DENO is true: Deno exports the address of each request",
    "AUTH_COOKIE needs ALLOWED_ORIGINS to be a list of origins, and not *",
    "JWT_ALGORITHM needs public keys: JWT_PUBLIC_KEY_FILE or JWKS_URL must be given",
  ];
  assert.deepEqual(problems(env), together);
  // What is wrong by itself contradicts nothing: it has no value.
  const wrong = problems({ ...env, PORT: "x", ALLOWED_ORIGINS: "*.example", JWT_ALGORITHM: "RS512" });
  assert.deepEqual(wrong.slice(3), [together[1], together[2]]);
  assert.deepEqual(wrong.slice(0, 3).map((problem) => problem.split(" ")[0]), [
    "PORT",
    "JWT_ALGORITHM",
    "ALLOWED_ORIGINS",
  ]);
});

Deno.test("A setting that names a file or a URL and holds a secret by mistake is not shown", () => {
  const pem = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0/c2VjcmV0\n-----END PRIVATE KEY-----";
  const files = ["JWT_SECRET_FILE", "JWT_SECRET_PREVIOUS_FILE", "ADMIN_PASSWORD_FILE", "REDIS_PASSWORD_FILE"];
  for (const name of [...files, "JWT_PUBLIC_KEY_FILE", "REDIS_CA_FILE", "REDIS_CERT_FILE", "REDIS_KEY_FILE"]) {
    const env = name === "JWT_SECRET_FILE" ? {} : { JWT_SECRET: secret };
    for (const text of ["hunter2".repeat(6), "hunter2/hunter2=", "/hunter2hunter2=", pem, `/${pem}`]) {
      assert.deepEqual(problems({ ...env, [name]: text }), [`${name} must be a file that can be read (NotFound)`]);
    }
    assert.deepEqual(problems({ ...env, [name]: "./no/such" }), [
      `${name} must be a file that can be read (NotFound): current value is "./no/such"`,
    ]);
  }
  for (const url of ["https://me:hunter2@idp/keys", "http://idp/keys?key=hunter2", "hunter2"]) {
    const [problem] = problems({ JWT_SECRET: secret, JWT_ALGORITHM: "HS256,RS256", JWKS_URL: url });
    assert.match(problem!, /^JWKS_URL must be an https URL without a user, or http on the loopback \(.*\)$/);
  }
});

Deno.test("A secret's file holds text: bytes that are none would be read as another secret", async () => {
  const path = await Deno.makeTempFile();
  try {
    // As `head -c 48 /dev/urandom` makes one, of which the backend that signs has every byte.
    await Deno.writeFile(path, Uint8Array.from({ length: 48 }, (_, n) => 200 + n));
    for (const name of ["JWT_SECRET_FILE", "ADMIN_PASSWORD_FILE", "REDIS_PASSWORD_FILE"]) {
      const env = name === "JWT_SECRET_FILE" ? {} : { JWT_SECRET: secret };
      assert.deepEqual(problems({ ...env, [name]: path }), [
        `${name} must be a file of text (UTF-8): current value is ${JSON.stringify(path)}`,
      ]);
    }
    await Deno.writeTextFile(path, "p\u00e4ssw\u00f6rter sind auch Text");
    const config = readConfig({ JWT_SECRET: secret, ADMIN_PORT: "1", ADMIN_PASSWORD_FILE: path });
    assert.equal(config.admin?.password, "p\u00e4ssw\u00f6rter sind auch Text");
  } finally {
    await Deno.remove(path);
  }
});

Deno.test("ADMIN_PASSWORD is not short, and never shown", () => {
  assert.equal(
    problems({ JWT_SECRET: secret, ADMIN_PASSWORD: "hunter2" }).join(),
    "ADMIN_PASSWORD must be 12 bytes or more",
  );
  const config = read({ ADMIN_PORT: "9090", ADMIN_PASSWORD: "correct horse" });
  assert.equal(config.admin?.password, "correct horse");
  assert.equal(config.shown["ADMIN_PASSWORD"], "(set)");
});

Deno.test("OTEL_DENO is what Deno understands, and not together with tokens in addresses", () => {
  assert.equal(read({ OTEL_DENO: "true" }).tracing, true);
  assert.equal(problems({ JWT_SECRET: secret, OTEL_DENO: "1" }).length, 1);
  assert.match(
    problems({ JWT_SECRET: secret, OTEL_DENO: "true", ALLOW_QUERY_TOKEN: "true" }).join(),
    /^ALLOW_QUERY_TOKEN must be false while OTEL_DENO is true/,
  );
});

Deno.test("METRICS_AGENTS is a list of agents' ids, and not a long one", () => {
  const agents = (text: string) => read({ METRICS_AGENTS: text }).metricsAgents;
  assert.deepEqual(agents(""), []);
  assert.deepEqual(agents(" a:1, b b ,a:1,, "), ["a:1", "b b"]);
  assert.equal(agents(Array.from({ length: 100 }, (_, n) => `a${n}`).join()).length, 100);
  for (const text of [Array.from({ length: 101 }, (_, n) => `a${n}`).join(), "x".repeat(129), "a\x00"]) {
    assert.match(problems({ JWT_SECRET: secret, METRICS_AGENTS: text }).join(), /^METRICS_AGENTS must be at most 100/);
  }
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

Deno.test("Origins are those of pages and apps, subdomains, or null; * is any", () => {
  assert.equal(read({ ALLOWED_ORIGINS: "*" }).auth.allowedOrigins, undefined);
  const { allowedOrigins } = read({
    ALLOWED_ORIGINS: "https://a.example , http://localhost:3000,capacitor://localhost,ionic://localhost," +
      "tauri://localhost,chrome-extension://abcdefgh,null,https://*.example.com,http://*.dev.test:8080,http://[::1]:3000",
  }).auth;
  for (
    const origin of [
      "https://a.example",
      "http://localhost:3000",
      "capacitor://localhost",
      "ionic://localhost",
      "tauri://localhost",
      "chrome-extension://abcdefgh",
      "null",
      "https://x.example.com",
      "https://x.y-z.example.com",
      "http://a.dev.test:8080",
      "http://[::1]:3000",
    ]
  ) assert(allowedOrigins!.has(origin), origin);
  for (
    const origin of [
      "",
      "https://b.example",
      "http://a.example",
      "https://a.example:8443",
      "http://localhost",
      "https://example.com",
      "https://.example.com",
      "https://xexample.com",
      "https://x.example.com.evil.test",
      "https://evil.test/.example.com",
      "https://evil@x.example.com",
      "http://x.example.com",
      "https://x.example.com:8443",
      "http://a.dev.test",
    ]
  ) assert(!allowedOrigins!.has(origin), origin);
});

Deno.test("An origin that can never match stops the start", () => {
  for (
    const origin of [
      "https://app.example/",
      "https://app.example/path",
      "https://App.example",
      "HTTPS://app.example",
      "https://app.example:443",
      "http://app.example:80",
      "https://bücher.example",
      "https://user@app.example",
      "https://*",
      "https://a.*.example",
      "https://*.app.example/",
      "app.example",
      "*.example.com",
      "https://a.example,",
      "https://a.example:99999",
      "https://a b",
    ]
  ) assert.equal(problems({ JWT_SECRET: secret, ALLOWED_ORIGINS: origin }).length, 1, origin);
});

Deno.test("The log level may be a filter as the Rust service has it, and RUST_LOG wins", () => {
  assert.equal(read({ RUST_LOG: "info,wsproxy=debug" }).logging.level, "debug");
  assert.equal(read({ RUST_LOG: "warn" }).logging.level, "warn");
  assert.equal(read({ RUST_LOG: "off" }).logging.level, "silent");
  assert.equal(read({ RUST_LOG: "hyper=trace,tower" }).logging.level, "info");
  assert.equal(read({ LOG_LEVEL: "info,wsproxy=debug" }).logging.level, "debug");
  assert.equal(read({ LOG_LEVEL: "wsproxy=trace" }).logging.level, "trace");
  assert.equal(read({ RUST_LOG: "debug", LOG_LEVEL: "error" }).logging.level, "debug");
  assert.equal(read({ RUST_LOG: "nonsense", LOG_LEVEL: "error" }).logging.level, "error");
  assert.equal(problems({ JWT_SECRET: secret, LOG_LEVEL: "loud,wsproxy=louder" }).length, 1);
});

Deno.test("REDIS_URL is a server or a socket, with TLS, credentials and a database", () => {
  const address = (REDIS_URL: string) => read({ REDIS_URL }).redis.address;
  const plain = { db: 0, tls: false };
  assert.deepEqual(address("redis://redis"), { host: "redis", port: 6379, ...plain });
  assert.deepEqual(address("redis://redis/"), { host: "redis", port: 6379, ...plain });
  assert.deepEqual(address("rediss://redis:7000/3"), { host: "redis", port: 7000, db: 3, tls: true });
  assert.deepEqual(address("redis://[::1]:7000"), { host: "::1", port: 7000, ...plain });
  assert.deepEqual(address("redis://:p%25%40s@redis"), { host: "redis", port: 6379, password: "p%@s", ...plain });
  assert.deepEqual(address("redis://me:a:b@redis"), {
    host: "redis",
    port: 6379,
    username: "me",
    password: "a:b",
    ...plain,
  });
  assert.deepEqual(address("redis://me:a@b@redis"), {
    host: "redis",
    port: 6379,
    username: "me",
    password: "a@b",
    ...plain,
  });
  assert.deepEqual(address("redis://redis?family=6"), { host: "redis", port: 6379, family: 6, ...plain });
  assert.deepEqual(address("redis+unix:///run/redis.sock"), { path: "/run/redis.sock", ...plain });
  assert.deepEqual(address("redis+unix://:secret@/run/a%20b.sock?db=2"), {
    path: "/run/a b.sock",
    password: "secret",
    db: 2,
    tls: false,
  });
});

Deno.test("REDIS_URL names sentinels, as users of Centrifugo write them", () => {
  const address = (REDIS_URL: string) => read({ REDIS_URL }).redis.address;
  assert.deepEqual(address("redis+sentinel://one:26379,two,[::1]:7000?sentinel_master_name=mymaster"), {
    sentinels: [{ host: "one", port: 26_379 }, { host: "two", port: 26_379 }, { host: "::1", port: 7000 }],
    masterName: "mymaster",
    db: 0,
    tls: false,
  });
  const query = "sentinel_master_name=m&sentinel_user=watch&sentinel_password=a%26b";
  assert.deepEqual(address(`rediss+sentinel://me:p%40s@one/2?${query}`), {
    sentinels: [{ host: "one", port: 26_379 }],
    masterName: "m",
    sentinelUsername: "watch",
    sentinelPassword: "a&b",
    username: "me",
    password: "p@s",
    db: 2,
    tls: true,
  });
});

Deno.test("REDIS_URL names servers of a Cluster", () => {
  const address = (REDIS_URL: string) => read({ REDIS_URL }).redis.address;
  assert.deepEqual(address("redis+cluster://one,[::1]:7001,three:7002"), {
    nodes: [{ host: "one", port: 6379 }, { host: "::1", port: 7001 }, { host: "three", port: 7002 }],
    db: 0,
    tls: false,
  });
  assert.deepEqual(address("rediss+cluster://me:p%40s@one/0"), {
    nodes: [{ host: "one", port: 6379 }],
    username: "me",
    password: "p@s",
    db: 0,
    tls: true,
  });
});

Deno.test("A REDIS_URL that cannot work is one line before the start, and none of it is shown", () => {
  const wrong: Record<string, RegExp> = {
    "http://redis": /must begin with redis:\/\//,
    "redis:6379": /must begin with redis:\/\//,
    "redis://:hunter%2@redis": /must have its password percent-encoded: write % as %25/,
    "redis://:hunter2@": /must name a host|must have a host/,
    "redis://redis/hunter2": /number of a database/,
    "redis://redis/0/1": /number of a database/,
    "redis://redis/-1": /number of a database/,
    "redis://redis:0": /port from 1 to 65535/,
    "redis://redis:65536": /port from 1 to 65535/,
    "redis://redis?hunter2=1": /no query parameters but family/,
    "redis://redis?family=hunter": /a family of 4 or 6/,
    "redis://hunter2#x@redis": /host|#/,
    "redis+unix://host/run/redis.sock": /a path and no host/,
    "redis+unix://": /a path and no host/,
    "redis+unix:///run/redis.sock?db=hunter2": /number of a database/,
    "redis+sentinel://one,two": /sentinel_master_name/,
    "redis+sentinel://?sentinel_master_name=m": /hosts with ports|name a host/,
    "redis+sentinel://one,,two?sentinel_master_name=m": /hosts with ports|name a host/,
    "redis+sentinel://one:0?sentinel_master_name=m": /port from 1 to 65535/,
    "redis+sentinel://one?sentinel_master_name=m&hunter=2": /no query parameters but/,
    "redis+sentinel://one/hunter?sentinel_master_name=m": /number of a database/,
    "redis+cluster://one,": /hosts with ports|name a host/,
    "redis+cluster://one/1": /no database but 0/,
    "redis+cluster://one?pool=3": /no query parameters/,
    "redis+clusters://one": /must begin with redis:\/\//,
  };
  for (const [url, rule] of Object.entries(wrong)) {
    const [problem, ...rest] = problems({ JWT_SECRET: secret, REDIS_URL: url });
    assert.match(problem!, /^REDIS_URL must /, url);
    assert.match(problem!, rule, url);
    assert.doesNotMatch(problem!, /hunter/, url);
    assert.deepEqual(rest, []);
  }
});

Deno.test("HOST may be an IPv6 address, in brackets or not", () => {
  assert.equal(read({ HOST: "[::]" }).listen.hostname, "::");
  assert.equal(read({ HOST: "::1" }).listen.hostname, "::1");
  assert.equal(problems({ JWT_SECRET: secret, HOST: "[::" }).length, 1);
});

Deno.test("PUBSUB_POOL_SIZE is accepted and reported as needless", () => {
  assert.match(read({ PUBSUB_POOL_SIZE: "16" }).notices[0]!, /PUBSUB_POOL_SIZE is not needed/);
});

Deno.test("WORKERS is a number or auto, which is one for each core that the process may use", () => {
  assert.equal(read({ WORKERS: "3" }).workers.count, Deno.build.os === "linux" ? 3 : undefined);
  assert.equal(read({ WORKERS: "auto" }).workers.count, navigator.hardwareConcurrency);
  assert.equal(read({ WORKER_MAX_HEAP_MB: "512" }).workers.maxHeapBytes, 512 * 1024 * 1024);
  for (const WORKERS of ["0", "-1", "1.5", "257", "many"]) {
    assert.match(
      problems({ JWT_SECRET: secret, WORKERS }).join(),
      /^WORKERS must be an integer from 1 to 256, or auto/,
    );
  }
});

Deno.test("ADMIN_PORT is off, on the loopback unless told otherwise, and never the clients' port", () => {
  assert.deepEqual(read({ ADMIN_PORT: "9090" }).admin, { hostname: "127.0.0.1", port: 9090, password: undefined });
  assert.deepEqual(read({ ADMIN_PORT: "9090", ADMIN_HOST: "[::]" }).admin, {
    hostname: "::",
    port: 9090,
    password: undefined,
  });
  assert.deepEqual(problems({ JWT_SECRET: secret, ADMIN_PORT: "8080" }), ["ADMIN_PORT must be another port than PORT"]);
});

Deno.test("A secret with white space around it stops the start, and is not shown", () => {
  for (const name of ["JWT_SECRET", "JWT_SECRET_PREVIOUS", "ADMIN_PASSWORD"]) {
    for (const text of [`${secret}\n`, `${secret}\r\n`, ` ${secret}`, `${secret}\t`, " ".repeat(40)]) {
      const found = problems({ JWT_SECRET: secret, [name]: text });
      assert.deepEqual(found, [`${name} must not begin or end with white space`]);
    }
  }
  // Inside it is a secret like any other.
  assert.equal(read({ ADMIN_PASSWORD: "correct horse", ADMIN_PORT: "1" }).admin?.password, "correct horse");
});

Deno.test("A public key as the secret stops the start, in every form in which keys are handed around", async () => {
  const { certificatePem: certificate } = await certify("issuer.example");
  const { publicKey, privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  const pem = publicKey.export({ type: "spki", format: "pem" }) as string;
  const jwk = publicKey.export({ format: "jwk" });
  const ec = generateKeyPairSync("ec", { namedCurve: "P-256" }).publicKey;
  const forms = [
    pem,
    pem.trim(),
    pem.replaceAll("\n", "\\n"),
    privateKey.export({ type: "pkcs8", format: "pem" }) as string,
    JSON.stringify(jwk),
    JSON.stringify({ keys: [{ ...jwk, use: "sig" }] }, null, 2),
    publicKey.export({ type: "spki", format: "der" }).toString("base64"),
    ec.export({ type: "spki", format: "der" }).toString("base64"),
    publicKey.export({ type: "pkcs1", format: "der" }).toString("base64"),
    publicKey.export({ type: "spki", format: "der" }).toString("hex"),
    publicKey.export({ type: "spki", format: "der" }).toString("hex").replaceAll(/..(?!$)/g, "$&:"),
    // Keycloak and x5c show a certificate so.
    certificate.replaceAll(/-----.*-----|\n/g, ""),
    JSON.stringify([jwk]),
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB0o8zq3yYCt user@host",
    ...[pem, JSON.stringify(jwk)].map((text) => Buffer.from(text).toString("base64")),
  ];
  for (const name of ["JWT_SECRET", "JWT_SECRET_PREVIOUS"]) {
    for (const form of forms) {
      const [problem, ...more] = problems({ JWT_SECRET: secret, [name]: form });
      assert.match(problem ?? "nothing", new RegExp(`^${name} must be a secret of HS256`), form);
      assert.deepEqual(more, []);
      assert(!problem!.includes(form.slice(0, 20)));
    }
  }
  // What `openssl rand` makes is none of them.
  for (let n = 0; n < 200; n++) {
    const bytes = randomBytes(48);
    if (n % 2 === 0) bytes[0] = 0x30;
    for (const encoding of ["hex", "base64", "base64url"] as const) read({ JWT_SECRET: bytes.toString(encoding) });
  }
});

Deno.test("Each setting is used: it has its place in the groups", () => {
  const text = Deno.readTextFileSync(new URL("../src/config.ts", import.meta.url));
  // A file that holds another setting is that one.
  const names = Object.entries(settings).filter(([, setting]) => !("holds" in setting)).map(([name]) => name);
  const unused = names.filter((name) => !new RegExp(`\\bvalues\\.${name}\\b`).test(text));
  assert.deepEqual(unused, []);
});

Deno.test("JWT_SECRET is needed exactly when HS256 may sign, and public keys when another algorithm may", () => {
  const url = "https://issuer.example/jwks.json";
  const keys = (env: Record<string, string>) => readConfig(env).auth;
  assert.deepEqual(keys({ JWT_ALGORITHM: "EdDSA, RS256", JWKS_URL: url }).publicKeys, {
    algorithms: ["RS256", "EdDSA"],
    source: { setting: "JWKS_URL", url, refreshMs: 300_000 },
  });
  const withSecret = { JWT_SECRET: secret, JWT_ALGORITHM: "RS256", JWKS_URL: url };
  assert.deepEqual(keys(withSecret).secrets, [], "a secret may verify nothing where HS256 may not sign");
  assert.match(readConfig(withSecret).notices.join(), /^JWT_SECRET is not used/);
  assert.deepEqual(keys({ ...withSecret, JWT_ALGORITHM: "RS256,HS256" }).secrets, [secret]);
  const told = (env: Record<string, string>) => problems(env).join();
  assert.match(told({ JWT_ALGORITHM: "HS256,RS256", JWKS_URL: url }), /^JWT_SECRET is required/);
  assert.equal(
    told({ JWT_ALGORITHM: "ES256" }),
    "JWT_ALGORITHM needs public keys: JWT_PUBLIC_KEY_FILE or JWKS_URL must be given",
  );
  assert.equal(
    told({ JWT_SECRET: secret, JWKS_URL: url }),
    "JWKS_URL needs an algorithm of public keys: JWT_ALGORITHM must name some of RS256, PS256, ES256, EdDSA",
  );
  for (const JWT_ALGORITHM of ["none", "HS256,", "hs256", "HS512", "RS256 ES256", ","]) {
    assert.match(told({ JWT_SECRET: secret, JWT_ALGORITHM, JWKS_URL: url }), /^JWT_ALGORITHM must be a list of/);
  }
});

Deno.test("JWKS_URL is https, or http on the loopback, and is shown without its query", () => {
  const read = (JWKS_URL: string) => readConfig({ JWT_ALGORITHM: "RS256", JWKS_URL });
  for (const host of ["localhost", "127.0.0.1:8080", "127.1", "[::1]:80"]) read(`http://${host}/jwks`);
  assert.equal(read("https://a.example/jwks?key=hidden").shown["JWKS_URL"], "https://a.example/jwks?…");
  for (
    const url of [
      "http://a.example/jwks",
      "http://127.0.0.1.example/",
      "http://localhost.example/",
      "https://user@a.example/",
      "https://:x@a.example/",
      "file:///jwks.json",
      "a.example",
    ]
  ) {
    assert.match(problems({ JWT_ALGORITHM: "RS256", JWKS_URL: url }).join(), /^JWKS_URL must be an https URL/, url);
  }
});

Deno.test("JWT_PUBLIC_KEY_FILE holds a key that fits, and stands alone", async () => {
  const path = await Deno.makeTempFile();
  try {
    const told = (env: Record<string, string>) =>
      problems({ JWT_ALGORITHM: "ES256", JWT_PUBLIC_KEY_FILE: path, ...env }).join();
    const { publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    await Deno.writeTextFile(path, String(publicKey.export({ type: "spki", format: "pem" })));
    const { publicKeys } = readConfig({ JWT_ALGORITHM: "ES256", JWT_PUBLIC_KEY_FILE: path }).auth;
    assert(publicKeys?.source.setting === "JWT_PUBLIC_KEY_FILE");
    assert.deepEqual(publicKeys.source.keys.keys.map(({ algorithms }) => algorithms), [["ES256"]]);
    assert.match(
      told({ JWT_ALGORITHM: "EdDSA" }),
      /^JWT_PUBLIC_KEY_FILE must hold a public key for EdDSA: .*is for ES256/,
    );
    assert.match(
      told({ JWKS_URL: "https://a.example/" }),
      /^JWT_PUBLIC_KEY_FILE and JWKS_URL must not be given together/,
    );
    assert.match(told({ JWT_ALGORITHM: "HS256", JWT_SECRET: secret }), /^JWT_PUBLIC_KEY_FILE needs an algorithm/);
    assert.match(told({ JWT_PUBLIC_KEY_FILE: `${path}.none` }), /^JWT_PUBLIC_KEY_FILE must be a file that can be read/);
  } finally {
    await Deno.remove(path);
  }
});

Deno.test("AUTH_COOKIE is a name, and needs origins that no foreign page can have", () => {
  const told = (env: Record<string, string>) =>
    problems({ JWT_SECRET: secret, AUTH_COOKIE: "__Host-token", ...env }).join();
  const origins = "https://app.example";
  assert.equal(read({ AUTH_COOKIE: "__Host-token", ALLOWED_ORIGINS: origins }).auth.cookie, "__Host-token");
  assert.match(told({}), /^AUTH_COOKIE needs ALLOWED_ORIGINS to be a list of origins/);
  assert.match(told({ ALLOWED_ORIGINS: `${origins},null` }), /^ALLOWED_ORIGINS must not have null while AUTH_COOKIE/);
  for (const AUTH_COOKIE of ["a b", "a=b", "a;b", "ä"]) {
    assert.match(told({ AUTH_COOKIE, ALLOWED_ORIGINS: origins }), /^AUTH_COOKIE must be the name of a cookie/);
  }
});

Deno.test("What tokens must claim is text, or a list of it", () => {
  const { auth } = read({ JWT_ISSUER: "https://issuer.example/", JWT_AUDIENCE: "a, https://b.example/c" });
  assert.deepEqual([auth.issuer, auth.audiences], ["https://issuer.example/", ["a", "https://b.example/c"]]);
  const wrong = { JWT_ISSUER: " x", JWT_AUDIENCE: "a,,b", JWT_SESSION_CLAIM: "a\nb", JWT_SESSION_MATCH: "suffix" };
  assert.deepEqual(
    problems({ JWT_SECRET: secret, ...wrong }).map((problem) => problem.split(" ")[0]),
    Object.keys(wrong),
  );
});
