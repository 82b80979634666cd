/**
 * The settings as the program uses them: in groups, one for each part of it. settings.ts declares each one; a new one
 * needs its row there, and its place in {@linkcode group} here. What contradicts another setting is found here, too.
 */

import { faultOfPair } from "./pem.ts";
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
  const { values, problems } = parseSettings(env);
  const found = problems.length > 0 ? problems : problemsBetween(values);
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
        /** How long a session without sockets is not told vacant. */
        vacatedGraceMs: values.VACATED_GRACE_SECS,
        /** How long an inbox is kept after its last entry that no group reads. */
        unreadTtlMs: values.LOG_TTL_SECS,
      }
      : undefined,
    /** Which clients may connect. */
    auth: {
      /** The current secret, and during a rotation its predecessor. */
      secrets: [values.JWT_SECRET, values.JWT_SECRET_PREVIOUS].filter((secret) => secret !== undefined),
      /** How far the clock of a backend that makes tokens may differ from ours. */
      leewayMs: values.JWT_LEEWAY_SECS,
      /** Undefined for any. */
      allowedOrigins: values.ALLOWED_ORIGINS,
      allowQueryToken: values.ALLOW_QUERY_TOKEN,
    },
    /** What one client, or all of them, may take; 0 is no limit where a limit may be off. */
    limits: {
      maxMessageBytes: values.MAX_MESSAGE_SIZE_BYTES,
      maxBufferBytes: values.MAX_BUFFER_SIZE_BYTES,
      maxMessagesPerSec: values.MAX_MESSAGES_PER_SEC,
      maxConnections: values.MAX_CONNECTIONS,
      maxConnectsPerSec: values.MAX_CONNECTS_PER_SEC,
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
    notices: env["PUBSUB_POOL_SIZE"]
      ? ["PUBSUB_POOL_SIZE is not needed: a few Redis connections serve all sessions"]
      : [],
  } as const;
}

const certificateNames = ["REDIS_CA_FILE", "REDIS_CERT_FILE", "REDIS_KEY_FILE"] as const;

function addressOf(values: Values): RedisAddress {
  const given: Certificates = {
    ...values.REDIS_CA_FILE === undefined ? {} : { ca: values.REDIS_CA_FILE },
    ...values.REDIS_CERT_FILE === undefined ? {} : { cert: values.REDIS_CERT_FILE },
    ...values.REDIS_KEY_FILE === undefined ? {} : { key: values.REDIS_KEY_FILE },
  };
  return Object.keys(given).length === 0 ? values.REDIS_URL : { ...values.REDIS_URL, certificates: given };
}

/** What each setting allows for itself, and not with the others. */
function problemsBetween(values: Values): string[] {
  if (values.ADMIN_PORT > 0 && values.ADMIN_PORT === values.PORT) {
    return ["ADMIN_PORT must be another port than PORT"];
  }
  if (values.OTEL_DENO && values.ALLOW_QUERY_TOKEN) {
    return ["ALLOW_QUERY_TOKEN must be false while OTEL_DENO is true: Deno exports the address of each request"];
  }
  const given = certificateNames.filter((name) => values[name] !== undefined);
  if (values.REDIS_URL.tls === false && given.length > 0) {
    return [`${given[0]} needs TLS: REDIS_URL must begin with rediss`];
  }
  if ((values.REDIS_CERT_FILE === undefined) !== (values.REDIS_KEY_FILE === undefined)) {
    return ["REDIS_CERT_FILE and REDIS_KEY_FILE must be given together"];
  }
  if (values.REDIS_CERT_FILE !== undefined) {
    const fault = faultOfPair(values.REDIS_CERT_FILE, values.REDIS_KEY_FILE!);
    if (fault !== undefined) return [`REDIS_KEY_FILE ${fault}`];
  }
  return [];
}

/** The environment's values for every name wsproxy reads. Needs `--allow-env` for exactly those. */
export function readEnvironment(): Environment {
  return Object.fromEntries(environmentNames.map((name) => [name, Deno.env.get(name)]));
}
