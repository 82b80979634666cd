/**
 * Every setting of wsproxy, declared once: name, default, rule, one line of help. `.env.example`, docs/reference.md
 * and the start task's list of environment names are generated from `settings` (`deno task docs`). config.ts says which
 * part of the program each value is for.
 */

import { isId, maxIdChars } from "./ids.ts";
import { isLoopback, Networks } from "./ip.ts";
import { Origins } from "./origins.ts";
import { faultOfPem, isAsymmetricKey, type PemKind } from "./pem.ts";
import { publicAlgorithms } from "./public_keys.ts";
import { parseRedisUrl } from "./redis_url.ts";

/** One environment variable. One that has no default has no value when it is not given, unless it is required. */
export interface Setting<T, Default extends string | undefined = string> {
  /** As written in `.env.example`; undefined where there is none. */
  readonly default: Default;
  readonly help: string;
  /** It has no default, and the start stops without it where this says so. */
  readonly required?: (env: Environment) => boolean;
  /** What may be shown of its value; all of it where this says nothing. */
  readonly shown?: (text: string) => string;
  /** It names a file with the value of another setting. */
  readonly holds?: string;
  /** The value in the program's units, or a rule as a sentence ("must be …") when the text breaks it. */
  readonly parse: (text: string) => T | Broken;
}

type AnySetting = Setting<unknown, string | undefined>;

/** The rule that a value breaks. */
export class Broken {
  /** `rule` is a sentence that begins with "must"; the value of a `secret` setting is never shown. */
  constructor(readonly rule: string, readonly secret = false) {}
}

/** What `parse` returns, or the rule that it throws. */
function orBroken<T>(parse: () => T, secret = false): T | Broken {
  try {
    return parse();
  } catch (error) {
    return new Broken((error as Error).message, secret);
  }
}

/** Shortest secret for HS256: RFC 7518, section 3.2 asks for a key of at least the hash's size. */
const minSecretBytes = 32;
const minPasswordBytes = 12;

const integer = (fallback: number, min: number, max: number, help: string): Setting<number> => ({
  default: String(fallback),
  help,
  parse(text) {
    const value = Number(text);
    const ok = /^\d+$/.test(text) && value >= min && value <= max;
    return ok ? value : new Broken(`must be an integer from ${min} to ${max}`);
  },
});

const host = (fallback: string, help: string): Setting<string> => ({
  default: fallback,
  help,
  parse(text) {
    // An IPv6 address stands in brackets in URLs, and in the Rust service's HOST.
    const name = text.replace(/^\[([0-9a-f:.]+)\]$/i, "$1");
    return /^[\w.:-]+$/.test(name) ? name : new Broken("must be an IP address or a host name");
  },
});

/** A setting whose value is so many times what is written. */
const scaled = (factor: number, { parse, ...setting }: Setting<number>): Setting<number> => ({
  ...setting,
  parse(text) {
    const value = parse(text);
    return value instanceof Broken ? value : value * factor;
  },
});

/** A setting in seconds, whose value is in milliseconds. */
const seconds = (fallback: number, min: number, max: number, help: string): Setting<number> =>
  scaled(1000, integer(fallback, min, max, help));

/** A setting in MiB, whose value is in bytes. */
const mebibytes = (fallback: number, min: number, max: number, help: string): Setting<number> =>
  scaled(1_048_576, integer(fallback, min, max, help));

const boolean = (fallback: boolean, help: string): Setting<boolean> => ({
  default: String(fallback),
  help,
  parse(text) {
    const value = text.toLowerCase();
    if (value === "true" || value === "1") return true;
    if (value === "false" || value === "0") return false;
    return new Broken("must be true or false");
  },
});

const text = (help: string): Setting<string, undefined> => ({
  default: undefined,
  help,
  parse: (text) =>
    // deno-lint-ignore no-control-regex
    /^[^\s\x00-\x1f][^\x00-\x1f]*$/.test(text) ? text : new Broken("must be text that begins with no space"),
});

const oneOf = <const T extends string>(fallback: T, values: readonly T[], help: string): Setting<T> => ({
  default: fallback,
  help,
  parse: (text) =>
    values.find((value) => value === text.toLowerCase()) ?? new Broken(`must be one of ${values.join(", ")}`),
});

const secret = (minBytes: number, help: string): Setting<string, undefined> => ({
  default: undefined,
  help,
  shown: () => "(set)",
  parse(text) {
    // Read from a file with a last line break, or copied with a blank: the backend that signs has another one.
    if (text !== text.trim()) return new Broken("must not begin or end with white space", true);
    if (new TextEncoder().encode(text).length >= minBytes) return text;
    return new Broken(`must be ${minBytes} bytes or more`, true);
  },
});

/** A secret that signs tokens. */
const signingSecret = (help: string): Setting<string, undefined> => {
  const { parse, ...setting } = secret(minSecretBytes, help);
  return {
    ...setting,
    parse(text) {
      if (!isAsymmetricKey(text)) return parse(text);
      return new Broken(
        "must be a secret of HS256, and is a key of another kind or a set of them (PEM, JWK, JWKS): " +
          "with a public key every client could sign tokens",
        true,
      );
    },
  };
};

/**
 * A file's text. A path that has no slash at its begin is not shown, as it may be what the file should have held; so
 * may one of several lines.
 */
function readFile(path: string): string | Broken {
  const isShown = /^\.{0,2}\/[^\n]*[^\n=]$/.test(path);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Deno.readFileSync(path));
  } catch (error) {
    // Bytes that are no text would all be read as the same character.
    if (error instanceof TypeError) return new Broken("must be a file of text (UTF-8)", !isShown);
    if (error instanceof Deno.errors.NotCapable) {
      return new Broken("must be readable: start with --allow-read=PATH", !isShown);
    }
    return new Broken(`must be a file that can be read (${(error as Error).name})`, !isShown);
  }
}

/** What a file holds, without a line break at its end: many editors, and `echo`, write one. */
function readSecret(path: string): string | Broken {
  const text = readFile(path);
  if (text instanceof Broken) return text;
  return text.replace(/\r?\n$/, "") || new Broken("must be a file that is not empty");
}

/** A file with a secret, as Docker and Kubernetes mount them. */
const secretFile = (holds: string): Setting<string, undefined> => ({
  default: undefined,
  help: `File that holds \`${holds}\`, in place of it; a line break at its end is dropped.`,
  holds,
  parse: readSecret,
});

/** A PEM file, whose value is its text. Read at the start, once. */
const pemFile = (kind: PemKind, help: string): Setting<string, undefined> => ({
  default: undefined,
  help,
  parse(path) {
    const text = readFile(path);
    if (text instanceof Broken) return text;
    const fault = faultOfPem(kind, text);
    return fault === undefined ? text : new Broken(fault);
  },
});

/** What may sign a token. */
const algorithms = ["HS256", ...publicAlgorithms] as const;

function parseAlgorithms(text: string): readonly (typeof algorithms[number])[] | Broken {
  const names = text.split(",").map((name) => name.trim());
  const known = algorithms.filter((algorithm) => names.includes(algorithm));
  const isKnown = known.length > 0 && names.every((name) => known.some((algorithm) => algorithm === name));
  return isKnown ? known : new Broken(`must be a list of ${algorithms.join(", ")}`);
}

/** Whether keys may come from there: no network on the way can change them. */
function isKeyUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, hostname, username, password } = new URL(text);
  if (username !== "" || password !== "") return false;
  return protocol === "https:" || (protocol === "http:" && isLoopback(hostname.replace(/^\[(.*)\]$/, "$1")));
}

const logLevels = ["trace", "debug", "info", "warn", "error", "fatal", "silent"] as const;

/** A day: the longest interval that makes sense, and far below the 2^31 ms a timer can hold. */
const daySecs = 86_400;
const gib = 1_073_741_824;
const maxWorkers = 256;
const maxMetricsAgents = 100;
const maxClaims = 8;

/** The declaration. Units are in the names; sizes are bytes of UTF-8. */
export const settings = {
  HOST: host("0.0.0.0", "Address to listen on."),
  PORT: integer(8080, 0, 65_535, "Port to listen on; 0 takes a free one."),
  WORKERS: {
    default: "1",
    help:
      "Threads that serve the port, each a whole proxy: a number, or `auto` for one on each core that the process may use. More than 1 on Linux only; see docs/run.md.",
    parse(text: string) {
      const cores = Deno.build.os === "linux" ? Math.min(maxWorkers, navigator.hardwareConcurrency) : 1;
      if (text.toLowerCase() === "auto") return cores;
      const workers = Number(text);
      if (!/^\d+$/.test(text) || workers < 1 || workers > maxWorkers) {
        return new Broken(`must be an integer from 1 to ${maxWorkers}, or auto`);
      }
      return workers === 1 || Deno.build.os === "linux" ? workers : new Broken("must be 1 on anything but Linux");
    },
  },
  WORKER_MAX_HEAP_MB: mebibytes(
    0,
    0,
    1_048_576,
    "With more than one worker: one whose heap is larger, in MiB, is replaced by a new one, whose sessions leave in quiet moments; 0 for never.",
  ),
  WORKER_MAX_UNOPENED: integer(
    0,
    0,
    1_000_000,
    "With more than one worker: one that has so many upgrades that never opened, each of which may hold a descriptor, is replaced likewise; 0 for never.",
  ),
  ADMIN_PORT: integer(
    0,
    0,
    65_535,
    "Port for operators: a page that shows what goes on, and `/metrics`, which clients cannot see any more; `/health` and `/ready` are on both. 0 for none. See docs/run.md.",
  ),
  ADMIN_HOST: host("127.0.0.1", "Address that `ADMIN_PORT` is listened to on."),
  ADMIN_PASSWORD: secret(
    minPasswordBytes,
    `What the page of \`ADMIN_PORT\` asks for, with any user name, ${minPasswordBytes} bytes or more; without it the page is served on a loopback address only.`,
  ),
  ADMIN_PASSWORD_FILE: secretFile("ADMIN_PASSWORD"),
  METRICS_AGENTS: {
    default: undefined,
    help:
      "Agents that have metrics of their own, comma-separated: each adds three series. All others are counted in the sums only.",
    parse(text: string) {
      const agents = [...new Set(text.split(",").map((agent) => agent.trim()).filter((agent) => agent !== ""))];
      if (agents.length <= maxMetricsAgents && agents.every(isId)) return agents;
      return new Broken(
        `must be at most ${maxMetricsAgents} agents of 1 to ${maxIdChars} characters, separated by commas`,
      );
    },
  },
  REDIS_URL: {
    default: "redis://127.0.0.1:6379",
    help:
      "Redis to use: `redis://[user:password@]host[:port][/db]`, `rediss://` for TLS, `redis+unix:///path?db=N` for a socket, `redis+sentinel://host,host?sentinel_master_name=NAME`, or `redis+cluster://host,host`; see docs/redis.md.",
    shown: (text) => text.replace(/[^/]*@/, "").replace(/(sentinel_password=)[^&]*/, "$1…"),
    parse: (text: string) => orBroken(() => parseRedisUrl(text), true),
  },
  REDIS_PASSWORD_FILE: {
    default: undefined,
    help:
      "File that holds the password for Redis, in place of the one in `REDIS_URL`; a line break at its end is dropped.",
    parse: readSecret,
  },
  REDIS_CA_FILE: pemFile(
    "CERTIFICATE",
    "PEM file of the authority that signed Redis's certificate, with `rediss`; unset for the public ones.",
  ),
  REDIS_CERT_FILE: pemFile("CERTIFICATE", "PEM file of the proxy's own certificate, for a Redis that asks for one."),
  REDIS_KEY_FILE: pemFile("PRIVATE KEY", "PEM file of the key that belongs to `REDIS_CERT_FILE`."),
  REDIS_OUTAGE_GRACE_SECS: seconds(
    10,
    0,
    daySecs,
    "Sockets stay open while Redis is gone for less than this, and are closed with 1013 after it.",
  ),
  LOG_MAX_MESSAGES: integer(4096, 1, 1_000_000, "Messages that a session's log keeps, about; see docs/resume.md."),
  LOG_TTL_SECS: seconds(
    3600,
    16,
    30 * daySecs,
    "How long a session's log is kept after its last message, and after the last resuming client has left; and an inbox that no consumer group reads after its last entry.",
  ),
  LOG_MAX_MESSAGE_BYTES: integer(1_048_576, 1, 67_108_864, "Largest message that goes into a log, in bytes."),
  INBOX: boolean(
    false,
    "Write all that happens to an agent's sessions into the stream `agent:{agent_id}:inbox`; see docs/backends.md.",
  ),
  INBOX_CLAIMS: {
    default: "sub",
    help:
      "With `INBOX=true`, the claims of a client's token that backends read with each `connected` and each posted message, comma-separated; `-` for none. A kilobyte of them at most.",
    parse(text: string) {
      if (text === "-") return [];
      const names = [...new Set(text.split(",").map((name) => name.trim()))];
      if (names.length <= maxClaims && names.every((name) => /^[\x21-\x7e]{1,128}$/.test(name))) return names;
      return new Broken(`must be - or at most ${maxClaims} names of claims, separated by commas`);
    },
  },
  INBOX_ADDRESS: boolean(
    false,
    "With `INBOX=true`, tell backends a client's address likewise: that of its connection, unless `TRUSTED_PROXIES` know better.",
  ),
  INBOX_MAX_ENTRIES: integer(100_000, 1, 100_000_000, "Entries that an inbox keeps, about."),
  VACATED_GRACE_SECS: seconds(
    30,
    0,
    daySecs,
    "With `INBOX=true`, how long a session must have had no socket on any proxy until backends read that it is vacated.",
  ),
  SESSION_SOCKETS: oneOf(
    "all",
    ["all", "last"],
    "Sockets that one session may have: all that connect, or the last one only, which closes the others with 4409.",
  ),
  REDIS_GAP: oneOf(
    "notify",
    ["notify", "close", "ignore"],
    "What a client is told when messages may have been lost with the connection to Redis: an in-band notice, a close with 1012, or nothing.",
  ),
  JWT_SECRET: {
    ...signingSecret(
      "Required while `JWT_ALGORITHM` has HS256: secret shared with the backends that make tokens, 32 bytes or more; make one with `openssl rand -hex 32`.",
    ),
    required: (env: Environment) => {
      const algorithms = parseAlgorithms(env["JWT_ALGORITHM"] || "HS256");
      return algorithms instanceof Broken || algorithms.includes("HS256");
    },
  },
  JWT_SECRET_PREVIOUS: signingSecret("Former secret, still accepted while a rotation is under way."),
  JWT_SECRET_FILE: secretFile("JWT_SECRET"),
  JWT_SECRET_PREVIOUS_FILE: secretFile("JWT_SECRET_PREVIOUS"),
  JWT_LEEWAY_SECS: seconds(
    5,
    0,
    3600,
    "How far clocks may differ: a token is valid for this long before its `nbf` and after its `exp`.",
  ),
  JWT_ALGORITHM: {
    default: "HS256",
    help:
      "What may sign tokens, comma-separated: `HS256`, and with public keys `RS256`, `PS256`, `ES256`, `EdDSA`; see docs/security.md.",
    parse: parseAlgorithms,
  },
  JWT_PUBLIC_KEY_FILE: {
    default: undefined,
    help: "Public keys for these, as PEM (also several) or as a JWK Set; the file is read again when it changes.",
    parse(path: string) {
      const text = readFile(path);
      return text instanceof Broken ? text : { path, text };
    },
  },
  JWKS_URL: {
    default: undefined,
    help: "Where an identity provider has its JWK Set, in place of a file: `https`, or `http` on the loopback.",
    shown: (text) => text.replace(/\?.*/, "?…"),
    parse: (text: string) =>
      isKeyUrl(text)
        ? text
        // Its query may be a secret, as may what stands in front of the host.
        : new Broken(
          "must be an https URL without a user, or http on the loopback (127.0.0.1, [::1], localhost)",
          true,
        ),
  },
  JWKS_REFRESH_SECS: seconds(
    300,
    1,
    daySecs,
    "How often it is read; at once when a token names a key it did not have.",
  ),
  JWT_ISSUER: text("The issuer that tokens must have as `iss`; unset for any."),
  JWT_AUDIENCE: {
    default: undefined,
    help: "Audiences, comma-separated, of which tokens must have one in `aud`; unset for any.",
    parse(text: string) {
      const names = text.split(",").map((name) => name.trim());
      return names.every((name) => name !== "") ? names : new Broken("must be a list, separated by commas");
    },
  },
  JWT_SESSION_CLAIM: {
    ...text("The claim that says which session a token allows; another one than `session_id` may also be a list."),
    default: "session_id",
  },
  JWT_SESSION_MATCH: oneOf(
    "exact",
    ["exact", "prefix"],
    "Whether the session is what the claim says, or may also begin with it and a `.` or `:`, such as `SUB:anything`; see docs/security.md.",
  ),
  WS_ENGINE: oneOf("deno", ["deno", "ws"], "WebSocket engine: `deno` is native, `ws` is npm's; see docs/engines.md."),
  WS_PING_INTERVAL_SECS: seconds(30, 1, daySecs, "A quiet client is pinged after this long."),
  WS_PING_TIMEOUT_SECS: seconds(
    10,
    1,
    daySecs,
    "A client that does not answer a ping within this is cut off: a dead one is gone within interval plus timeout.",
  ),
  SHUTDOWN_GRACE_PERIOD_SECS: seconds(30, 0, daySecs, "Longest time a stop may take."),
  HANDSHAKE_TIMEOUT_SECS: seconds(
    5,
    1,
    3600,
    "Longest wait for Redis to confirm a subscription before a 504, and for its word, after a start, whether clients can resume, before a 503; with `WS_ENGINE=ws` also for a request's head before a 408.",
  ),
  KEEP_ALIVE_TIMEOUT_SECS: seconds(
    75,
    1,
    3600,
    "With `WS_ENGINE=ws`, how long an idle HTTP connection is kept for its next request. Longer than a balancer keeps its own, which is 60 seconds for most.",
  ),
  MAX_MESSAGE_SIZE_BYTES: integer(1_048_576, 1, 67_108_864, "Largest message a client may send, in UTF-8 bytes."),
  MAX_BUFFER_SIZE_BYTES: integer(
    1_048_576,
    1,
    gib,
    "Unsent bytes for one client, and a quarter as much beside them in a burst, before it counts as too slow; also unpublished bytes from one client.",
  ),
  MAX_MESSAGES_PER_SEC: integer(
    0,
    0,
    1_000_000,
    "Messages a client may send a second, on average and at once; 0 for no limit.",
  ),
  MAX_CONNECTIONS: integer(0, 0, 10_000_000, "Most connections at once; 0 for no limit."),
  MAX_CONNECTS_PER_SEC: integer(0, 0, 1_000_000, "New connections a second, on average and at once; 0 for no limit."),
  MAX_CONNECTIONS_PER_SESSION: integer(
    0,
    0,
    1_000_000,
    "Most connections of one session at once, on this proxy; 0 for no limit. With `SESSION_SOCKETS=last` at least 2, as the new one is there before the old one ends.",
  ),
  MAX_CONNECTIONS_PER_ADDRESS: integer(
    0,
    0,
    10_000_000,
    "Most connections from one address at once, on this proxy; 0 for no limit. A /64 of IPv6 counts as one address. Behind a balancer it needs `TRUSTED_PROXIES`.",
  ),
  MAX_CONNECTS_PER_ADDRESS_PER_SEC: integer(
    0,
    0,
    1_000_000,
    "New connections a second from one address, on average and at once; 0 for no limit. What is posted is no connection.",
  ),
  TRUSTED_PROXIES: {
    default: undefined,
    help:
      "Addresses and networks of the balancers in front, comma-separated, IPv4 or IPv6, such as `10.0.0.0/8,fd00::/8`: what they say of where a client is counts as its address. Without it that is the other end of the connection, which may be a balancer that all share.",
    parse: (text: string) => orBroken(() => new Networks(text)),
  },
  FORWARDED_HEADER: oneOf(
    "x-forwarded-for",
    ["x-forwarded-for", "forwarded"],
    "The header that `TRUSTED_PROXIES` write: `forwarded` is that of RFC 7239. The other one is not read, as they pass it on as any client has sent it.",
  ),
  VALIDATE_JSON: boolean(true, "Refuse text frames from clients that are not JSON."),
  ALLOWED_ORIGINS: {
    default: "*",
    help:
      "Origins of pages and apps that may connect, comma-separated: `https://app.example`, `https://*.example.com` for its subdomains, `capacitor://localhost`, `null`; `*` for any. Clients that send no Origin are not browsers.",
    parse: (text: string) => text === "*" ? undefined : orBroken(() => new Origins(text)),
  },
  AUTH_COOKIE: {
    default: undefined,
    help:
      "Also take the token from the cookie of this name, from pages of `ALLOWED_ORIGINS`, which must be set to origins; see docs/security.md.",
    parse: (text: string) =>
      /^[!#$%&'*+.^_`|~\w-]+$/.test(text) ? text : new Broken("must be the name of a cookie, without spaces"),
  },
  ALLOW_QUERY_TOKEN: boolean(false, "Also take the token from `?token=`. URLs end up in logs: avoid it."),
  OTEL_DENO: {
    default: "false",
    help:
      "Deno's own switch: true exports traces by OTLP, to where `OTEL_EXPORTER_OTLP_ENDPOINT` says; see docs/run.md.",
    parse: (text: string) => /^(true|false)$/.test(text) ? text === "true" : new Broken("must be true or false"),
  },
  LOG_LEVEL: {
    default: "info",
    help:
      "Least level logged: trace, debug, info, warn, error, fatal or silent. A filter such as `info,wsproxy=debug` is understood, and `RUST_LOG` wins when both are set.",
    parse(text: string) {
      const value = text.toLowerCase();
      return logLevels.find((level) => level === value) ?? (/[,=]/.test(value) ? levelOfFilter(value) : undefined) ??
        new Broken(`must be one of ${logLevels.join(", ")}, or a filter such as info,wsproxy=debug`);
    },
  },
  LOG_FORMAT: oneOf(
    "auto",
    ["auto", "json", "text"],
    "One JSON object a line, or text for people; `auto` is text on a terminal and JSON elsewhere.",
  ),
} satisfies Record<string, AnySetting>;

/** Names read besides the settings: those of the Rust service that mean something else here. */
export const foreignNames = ["RUST_LOG", "PUBSUB_POOL_SIZE"] as const;

/** Every name that wsproxy reads. */
export const environmentNames: readonly string[] = [...Object.keys(settings), ...foreignNames];

/** What a program is started with. */
export type Environment = Readonly<Record<string, string | undefined>>;

type Settings = typeof settings;

/** What a setting's text becomes; undefined when it is not given, where it has no default. */
type ValueOf<S extends AnySetting> =
  | Exclude<ReturnType<S["parse"]>, Broken>
  | (S extends { default: string } ? never : undefined);

/** The value of each setting. */
export type Values = { readonly [Name in keyof Settings]: ValueOf<Settings[Name]> };

/** A setting's text: given, or its default. */
function textOf(name: string, setting: AnySetting, env: Environment): string | undefined {
  const rustLevel = name === "LOG_LEVEL" ? levelOfFilter(env["RUST_LOG"] ?? "") : undefined;
  return rustLevel || env[name] || setting.default;
}

/**
 * An environment in which secrets stand themselves, and not the files that hold them; those that cannot be read, or hold
 * what is given already, are left for {@linkcode parseSettings} to tell.
 */
export function withSecrets(env: Environment): Environment {
  const given = { ...env };
  for (const [name, { holds }] of Object.entries<AnySetting>(settings)) {
    const path = env[name];
    if (!holds || !path || env[holds]) continue;
    const text = readSecret(path);
    if (text instanceof Broken) continue;
    given[holds] = text;
    given[name] = undefined;
  }
  return given;
}

/** The values of an environment: complete, unless there are problems. */
export interface Parsed {
  readonly values: Values;
  /** A sentence for each setting that is wrong, or missing. */
  readonly problems: readonly string[];
  /** The names of those that are wrong, which have no value. */
  readonly broken: ReadonlySet<string>;
}

/** Parses each setting by itself. */
export function parseSettings(env: Environment): Parsed {
  const problems: string[] = [];
  const broken = new Set<string>();
  const values: Record<string, unknown> = {};
  const given = withSecrets(env);
  for (const [name, setting] of Object.entries<AnySetting>(settings)) {
    const text = textOf(name, setting, given);
    if (text === undefined) {
      // A required setting is a secret so far, and openssl makes one.
      if (setting.required?.(env) && !given[`${name}_FILE`]) {
        problems.push(
          `${name} is required and must be ${minSecretBytes} bytes or more: make one with "openssl rand -hex 32"`,
        );
      }
      continue;
    }
    const value = setting.parse(text);
    if (setting.holds && given[setting.holds]) problems.push(`${setting.holds} and ${name} must not be given together`);
    else if (value instanceof Broken) {
      broken.add(name);
      problems.push(`${name} ${value.rule}${value.secret ? "" : `: current value is ${JSON.stringify(text)}`}`);
    } else values[name] = value;
  }
  return { values: values as Values, problems, broken };
}

/** Every setting that has a value, as text: without secrets, and without credentials. */
export function showSettings(env: Environment): Record<string, string> {
  const shown: Record<string, string> = {};
  for (const [name, setting] of Object.entries<AnySetting>(settings)) {
    const text = textOf(name, setting, env);
    if (text !== undefined) shown[name] = setting.shown?.(text) ?? text;
  }
  return shown;
}

/**
 * The level in a filter as the Rust service reads it: the directive for wsproxy, else the one for everything.
 * Directives for other modules, and words that are no level, are ignored as there.
 */
function levelOfFilter(filter: string): typeof logLevels[number] | undefined {
  const levelOf = (word: string) => word === "off" ? "silent" : logLevels.find((level) => level === word);
  let general: typeof logLevels[number] | undefined;
  for (const directive of filter.toLowerCase().split(",")) {
    const [target = "", word] = directive.trim().split("=");
    if (word === undefined) general = levelOf(target) ?? general;
    else if (target === "wsproxy" && levelOf(word)) return levelOf(word);
  }
  return general;
}
