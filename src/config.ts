/**
 * The settings as the program uses them: in groups, one for each part of it. settings.ts declares each one; a new one
 * needs its row there, and its place in {@linkcode group} here. What contradicts another setting is found here, too.
 */

import { faultOfPair } from "./pem.ts";
import { parsePublicKeys, type PublicAlgorithm, publicAlgorithms, type PublicKeys } from "./public_keys.ts";
import type { Certificates, RedisAddress } from "./redis_url.ts";
import { type Environment, environmentNames, parseSettings, showSettings, type Values } from "./settings.ts";

/** The parsed settings in groups, sizes in bytes and times in milliseconds. */
export type Config = Readonly<ReturnType<typeof group>>;

/** What all proxies of one Redis must agree on: how the logs of sessions are kept. */
export type LogSettings = Config["sessionLogs"];

/** How inboxes are kept. */
export type InboxSettings = NonNullable<Config["inbox"]>;

/** Thrown by {@linkcode readConfig}; its message has one line per problem. */
export class ConfigError extends Error {
  /** `ConfigError`. */
  override readonly name = "ConfigError";
  /** One sentence a problem, with the setting's name. */
  constructor(readonly problems: readonly string[]) {
    super(problems.join("\n"));
  }
}

/**
 * The settings from an environment. An empty value counts as unset, as `docker compose` passes unset variables.
 * @throws {ConfigError} with every problem found; no secret is ever part of it.
 */
export function readConfig(env: Environment): Config {
  const { values, problems, broken } = parseSettings(env);
  const found = [...problems, ...problemsBetween(values, broken)];
  if (found.length > 0) throw new ConfigError(found);
  return group(values, env);
}

/**
 * Which part of the program each setting is for.
 * @internal
 */
function group(values: Values, env: Environment) {
  return {
    /** Where to listen, and with what. */
    listen: { hostname: values.HOST, port: values.PORT, engine: values.WS_ENGINE },
    /** Where operators are served; undefined for where clients are. */
    admin: values.ADMIN_PORT > 0
      ? { hostname: values.ADMIN_HOST, port: values.ADMIN_PORT, password: values.ADMIN_PASSWORD }
      : undefined,
    /** How many threads serve, and what of one is too much; 0 is no limit. */
    workers: {
      count: values.WORKERS,
      maxHeapBytes: values.WORKER_MAX_HEAP_MB,
      maxUnopened: values.WORKER_MAX_UNOPENED,
    },
    /** Agents that have metrics of their own. */
    metricsAgents: values.METRICS_AGENTS ?? [],
    /** How to reach Redis, and what its outages mean to clients. */
    redis: { address: addressOf(values), outageGraceMs: values.REDIS_OUTAGE_GRACE_SECS, gap: values.REDIS_GAP },
    /** How the logs of sessions are kept: what all proxies of one Redis must agree on. */
    sessionLogs: {
      /** Entries that a log keeps, about. */
      maxMessages: values.LOG_MAX_MESSAGES,
      /** How long a log is kept after the last message. */
      ttlMs: values.LOG_TTL_SECS,
      /** Largest payload. */
      maxMessageBytes: values.LOG_MAX_MESSAGE_BYTES,
    },
    /** How inboxes are kept; undefined when there are none. */
    inbox: values.INBOX
      ? {
        /** Entries that an inbox keeps, about. */
        maxEntries: values.INBOX_MAX_ENTRIES,
        /** Claims of tokens that backends read, by name. */
        claims: values.INBOX_CLAIMS,
        /** Backends read clients' addresses. */
        address: values.INBOX_ADDRESS,
        /** How long a session without sockets is not told vacant. */
        vacatedGraceMs: values.VACATED_GRACE_SECS,
        /** How long an inbox is kept after its last entry that no group reads. */
        unreadTtlMs: values.LOG_TTL_SECS,
      }
      : undefined,
    /** Which clients may connect. */
    auth: {
      /** For HS256, the current secret, and during a rotation its predecessor; none where HS256 may not sign. */
      secrets: secretsOf(values),
      /** What may sign besides HS256, and where its keys are; undefined where HS256 is all. */
      publicKeys: publicKeysOf(values),
      /** How far the clock of a backend that makes tokens may differ from ours. */
      leewayMs: values.JWT_LEEWAY_SECS,
      /** What tokens must have as `iss`, and one of what they must have in `aud`; undefined for anything. */
      issuer: values.JWT_ISSUER,
      audiences: values.JWT_AUDIENCE,
      /** The claim that says which session a token allows, and how. */
      sessionClaim: values.JWT_SESSION_CLAIM,
      sessionMatch: values.JWT_SESSION_MATCH,
      /** The cookie that may have the token; undefined for none. */
      cookie: values.AUTH_COOKIE,
      /** Undefined for any. */
      allowedOrigins: values.ALLOWED_ORIGINS,
      allowQueryToken: values.ALLOW_QUERY_TOKEN,
    },
    /** Which proxies say where clients are, and in which header. */
    forwarding: { trusted: values.TRUSTED_PROXIES, header: values.FORWARDED_HEADER },
    /** What one client, or all of them, may take; 0 is no limit where a limit may be off. */
    limits: {
      maxMessageBytes: values.MAX_MESSAGE_SIZE_BYTES,
      maxBufferBytes: values.MAX_BUFFER_SIZE_BYTES,
      maxMessagesPerSec: values.MAX_MESSAGES_PER_SEC,
      maxConnections: values.MAX_CONNECTIONS,
      maxConnectsPerSec: values.MAX_CONNECTS_PER_SEC,
      maxConnectionsPerSession: values.MAX_CONNECTIONS_PER_SESSION,
      maxConnectionsPerAddress: values.MAX_CONNECTIONS_PER_ADDRESS,
      maxConnectsPerAddressPerSec: values.MAX_CONNECTS_PER_ADDRESS_PER_SEC,
      validateJson: values.VALIDATE_JSON,
      /** Sockets of one session. */
      sessionSockets: values.SESSION_SOCKETS,
    },
    /** How long things may take. */
    timing: {
      pingIntervalMs: values.WS_PING_INTERVAL_SECS,
      pingTimeoutMs: values.WS_PING_TIMEOUT_SECS,
      handshakeTimeoutMs: values.HANDSHAKE_TIMEOUT_SECS,
      shutdownGraceMs: values.SHUTDOWN_GRACE_PERIOD_SECS,
      keepAliveTimeoutMs: values.KEEP_ALIVE_TIMEOUT_SECS,
    },
    /** Deno exports traces. */
    tracing: values.OTEL_DENO,
    /** What the program itself logs, and how. */
    logging: { level: values.LOG_LEVEL, format: values.LOG_FORMAT },
    /** Every setting as it is in force, by its name, for the log: without secrets, and without credentials. */
    shown: showSettings(env),
    /** Things an operator should know and that stop nothing, as sentences. */
    notices: noticesOf(values, env),
  } as const;
}

function noticesOf(values: Values, env: Environment): readonly string[] {
  const notices: string[] = [];
  if (env["PUBSUB_POOL_SIZE"]) {
    notices.push("PUBSUB_POOL_SIZE is not needed: a few Redis connections serve all sessions");
  }
  if (values.JWT_SECRET !== undefined && !values.JWT_ALGORITHM.includes("HS256")) {
    notices.push("JWT_SECRET is not used: JWT_ALGORITHM does not name HS256");
  }
  if (values.JWKS_URL !== undefined && values.JWT_ISSUER === undefined && values.JWT_AUDIENCE === undefined) {
    notices.push(
      "JWT_AUDIENCE and JWT_ISSUER are not set: a token that JWKS_URL's provider made for another service is taken",
    );
  }
  return notices;
}

function secretsOf(values: Values): readonly string[] {
  if (!values.JWT_ALGORITHM.includes("HS256")) return [];
  return [values.JWT_SECRET, values.JWT_SECRET_PREVIOUS].filter((secret) => secret !== undefined);
}

/** Which public keys verify tokens. */
export interface PublicKeySettings {
  readonly algorithms: readonly PublicAlgorithm[];
  /** Where they are, by the setting that says so. */
  readonly source:
    | { readonly setting: "JWT_PUBLIC_KEY_FILE"; readonly path: string; readonly keys: PublicKeys }
    | { readonly setting: "JWKS_URL"; readonly url: string; readonly refreshMs: number };
}

/** @throws {Error} whose message says what the file must hold. */
function publicKeysOf(values: Values): PublicKeySettings | undefined {
  const algorithms = publicAlgorithms.filter((algorithm) => values.JWT_ALGORITHM.includes(algorithm));
  if (algorithms.length === 0) return undefined;
  const file = values.JWT_PUBLIC_KEY_FILE;
  if (file === undefined) {
    return { algorithms, source: { setting: "JWKS_URL", url: values.JWKS_URL!, refreshMs: values.JWKS_REFRESH_SECS } };
  }
  const keys = parsePublicKeys(file.text, algorithms);
  return { algorithms, source: { setting: "JWT_PUBLIC_KEY_FILE", path: file.path, keys } };
}

const certificateNames = ["REDIS_CA_FILE", "REDIS_CERT_FILE", "REDIS_KEY_FILE"] as const;

function addressOf(values: Values): RedisAddress {
  const given: Certificates = {
    ...values.REDIS_CA_FILE === undefined ? {} : { ca: values.REDIS_CA_FILE },
    ...values.REDIS_CERT_FILE === undefined ? {} : { cert: values.REDIS_CERT_FILE },
    ...values.REDIS_KEY_FILE === undefined ? {} : { key: values.REDIS_KEY_FILE },
  };
  return {
    ...values.REDIS_URL,
    ...values.REDIS_PASSWORD_FILE === undefined ? {} : { password: values.REDIS_PASSWORD_FILE },
    ...Object.keys(given).length === 0 ? {} : { certificates: given },
  };
}

/** What settings allow each for itself, and not together. */
interface Contradiction {
  /** The settings that it looks at. */
  readonly of: readonly (keyof Values)[];
  /** A sentence, where there is one. */
  readonly find: (values: Values) => string | false | undefined;
}

const contradictions: readonly Contradiction[] = [
  {
    of: ["ADMIN_PORT", "PORT"],
    find: ({ ADMIN_PORT, PORT }) =>
      ADMIN_PORT > 0 && ADMIN_PORT === PORT && "ADMIN_PORT must be another port than PORT",
  },
  {
    of: ["SESSION_SOCKETS", "MAX_CONNECTIONS_PER_SESSION"],
    find: ({ SESSION_SOCKETS, MAX_CONNECTIONS_PER_SESSION }) =>
      SESSION_SOCKETS === "last" && MAX_CONNECTIONS_PER_SESSION === 1 &&
      "MAX_CONNECTIONS_PER_SESSION must be 0, or 2 or more, while SESSION_SOCKETS is last",
  },
  {
    of: ["OTEL_DENO", "ALLOW_QUERY_TOKEN"],
    find: ({ OTEL_DENO, ALLOW_QUERY_TOKEN }) =>
      OTEL_DENO && ALLOW_QUERY_TOKEN &&
      "ALLOW_QUERY_TOKEN must be false while OTEL_DENO is true: Deno exports the address of each request",
  },
  {
    // A browser sends a cookie whatever page makes the request, so the page's origin has to be a known one.
    of: ["AUTH_COOKIE", "ALLOWED_ORIGINS"],
    find({ AUTH_COOKIE, ALLOWED_ORIGINS }) {
      if (AUTH_COOKIE === undefined) return undefined;
      if (ALLOWED_ORIGINS === undefined) return "AUTH_COOKIE needs ALLOWED_ORIGINS to be a list of origins, and not *";
      return ALLOWED_ORIGINS.has("null") &&
        "ALLOWED_ORIGINS must not have null while AUTH_COOKIE is set: any page can make a frame whose origin that is";
    },
  },
  { of: ["JWT_ALGORITHM", "JWT_PUBLIC_KEY_FILE", "JWKS_URL"], find: faultOfKeys },
  {
    of: ["REDIS_PASSWORD_FILE", "REDIS_URL"],
    find: ({ REDIS_PASSWORD_FILE, REDIS_URL }) =>
      REDIS_PASSWORD_FILE !== undefined && REDIS_URL.password !== undefined &&
      "REDIS_PASSWORD_FILE must not be given together with a password in REDIS_URL",
  },
  {
    of: ["REDIS_URL", ...certificateNames],
    find(values) {
      const given = certificateNames.filter((name) => values[name] !== undefined);
      return values.REDIS_URL.tls === false && given.length > 0 &&
        `${given[0]} needs TLS: REDIS_URL must begin with rediss`;
    },
  },
  {
    of: ["REDIS_CERT_FILE", "REDIS_KEY_FILE"],
    find({ REDIS_CERT_FILE: cert, REDIS_KEY_FILE: key }) {
      if (cert === undefined && key === undefined) return undefined;
      if (cert === undefined || key === undefined) return "REDIS_CERT_FILE and REDIS_KEY_FILE must be given together";
      const fault = faultOfPair(cert, key);
      return fault && `REDIS_KEY_FILE ${fault}`;
    },
  },
];

/** All contradictions between settings of which none is `broken` by itself. */
function problemsBetween(values: Values, broken: ReadonlySet<string>): string[] {
  return contradictions.filter(({ of }) => !of.some((name) => broken.has(name)))
    .map(({ find }) => find(values)).filter((problem) => typeof problem === "string");
}

/** What is wrong with the public keys, or where they come from. */
function faultOfKeys(values: Values): string | undefined {
  const { JWT_ALGORITHM: algorithms, JWT_PUBLIC_KEY_FILE: file, JWKS_URL: url } = values;
  const names = publicAlgorithms.join(", ");
  if (algorithms.every((algorithm) => algorithm === "HS256")) {
    if (file === undefined && url === undefined) return undefined;
    const name = file === undefined ? "JWKS_URL" : "JWT_PUBLIC_KEY_FILE";
    return `${name} needs an algorithm of public keys: JWT_ALGORITHM must name some of ${names}`;
  }
  if (file === undefined && url === undefined) {
    return "JWT_ALGORITHM needs public keys: JWT_PUBLIC_KEY_FILE or JWKS_URL must be given";
  }
  if (file !== undefined && url !== undefined) return "JWT_PUBLIC_KEY_FILE and JWKS_URL must not be given together";
  try {
    publicKeysOf(values);
  } catch (error) {
    return `JWT_PUBLIC_KEY_FILE ${(error as Error).message}: current value is ${JSON.stringify(file?.path)}`;
  }
}

/** The environment's values for every name wsproxy reads. Needs `--allow-env` for exactly those. */
export function readEnvironment(): Environment {
  return Object.fromEntries(environmentNames.map((name) => [name, Deno.env.get(name)]));
}
