/** `REDIS_URL`, parsed by rules of our own, so that what is wrong with it is said before anything listens. */

/** A host and a port. */
export interface TcpAddress {
  /** A name or an IP address, an IPv6 one without brackets. */
  readonly host: string;
  /** From 1 to 65535. */
  readonly port: number;
  /** 4 or 6 for addresses of that IP version only; undefined for any. */
  readonly family?: number;
}

/** The sentinels that know where a master is, and the credentials for them. */
export interface SentinelAddress {
  /** All that are known; each is asked. */
  readonly sentinels: readonly TcpAddress[];
  /** What the sentinels call the master. */
  readonly masterName: string;
  /** Undefined for the default user. */
  readonly sentinelUsername?: string;
  /** Undefined when they want none. */
  readonly sentinelPassword?: string;
}

/** Servers of a Cluster that know all others. */
export interface ClusterAddress {
  /** One of them that answers is enough. */
  readonly nodes: readonly TcpAddress[];
}

/** PEM texts for TLS. */
export interface Certificates {
  /** A certificate authority that is trusted besides the public ones. */
  readonly ca?: string;
  /** The proxy's own certificate, for servers that ask for one; both or neither. */
  readonly cert?: string;
  /** The key of `cert`. */
  readonly key?: string;
}

/** As which user the proxy talks to a Redis server, and how. */
export interface RedisIdentity {
  /** Undefined for the default user. */
  readonly username?: string;
  /** Undefined when Redis wants none. */
  readonly password?: string;
  /** The number of the database. */
  readonly db: number;
  /** Everything goes through TLS. */
  readonly tls: boolean;
  /** Undefined for those that the system trusts. */
  readonly certificates?: Certificates;
}

/** Where one Redis server is, and which user the proxy is there. */
export type ServerAddress = (TcpAddress | { readonly path: string } | SentinelAddress) & RedisIdentity;

/** Where Redis is, and the credentials for it. */
export type RedisAddress = ServerAddress | ClusterAddress & RedisIdentity;

const schemes = [
  ...["redis", "rediss", "redis+unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"],
];
const defaultPort = 6379;
const defaultSentinelPort = 26_379;

/**
 * The address in a URL: `redis://[user:password@]host[:port][/db][?family=4|6]`, `rediss://` for TLS,
 * `redis+unix://[user:password@]/path[?db=N]`, or
 * `redis+sentinel://[user:password@]host[:port],host[:port][/db]?sentinel_master_name=NAME` with the sentinels' own
 * `sentinel_user` and `sentinel_password` as further parameters, or
 * `redis+cluster://[user:password@]host[:port],host[:port]` for a Cluster; `rediss+sentinel://` and `rediss+cluster://`
 * for TLS to all of them.
 * @throws {Error} whose message is a rule that begins with "must" and holds nothing of the URL.
 */
export function parseRedisUrl(text: string): RedisAddress {
  const [, scheme = "", rest = ""] = /^([a-z+]+):\/\/(.*)$/s.exec(text) ?? [];
  if (!schemes.includes(scheme)) {
    throw new Error(`must begin with ${schemes.slice(0, -1).join("://, ")}:// or ${schemes.at(-1)}://`);
  }
  const authorityEnd = rest.search(/[/?#]/);
  const authority = authorityEnd < 0 ? rest : rest.slice(0, authorityEnd);
  const at = authority.lastIndexOf("@");
  const credentials = at < 0 ? {} : parseCredentials(authority.slice(0, at));
  const tail = authorityEnd < 0 ? "" : rest.slice(authorityEnd);
  const hosts = authority.slice(at + 1);
  const tls = scheme.startsWith("rediss");
  if (scheme.endsWith("+sentinel")) return { ...parseSentinels(hosts, tail), ...credentials, tls };
  if (scheme.endsWith("+cluster")) return { ...parseNodes(hosts, tail), ...credentials, tls };
  // Without the credentials, which a URL may not have in front of an empty host.
  const bare = `${scheme}://${rest.slice(at + 1)}`;
  const url = URL.canParse(bare) ? new URL(bare) : undefined;
  if (url === undefined) throw new Error("must have a host and a port from 1 to 65535");
  if (url.hash !== "") throw new Error("must have no # (in a password write it as %23)");
  if (scheme === "redis+unix") {
    if (url.host !== "" || url.pathname.length < 2) {
      throw new Error("must have a path and no host, as redis+unix:///run/redis.sock");
    }
    const db = parseDb(onlyParameter(url, "db") ?? "");
    return { path: decode(url.pathname, "path"), ...credentials, db, tls };
  }
  const family = onlyParameter(url, "family") ?? "0";
  if (!/^[046]$/.test(family)) throw new Error("must have a family of 4 or 6, if any");
  const version = family === "0" ? {} : { family: Number(family) };
  const db = parseDb(url.pathname.slice(1));
  return { ...hostAndPort(url, defaultPort), ...version, ...credentials, db, tls };
}

/** A list of hosts is not a URL that `URL` parses, so each is parsed as one. */
function parseHosts(hosts: string, otherwise: number): TcpAddress[] {
  return hosts.split(",").map((host) => {
    const text = `redis://${host}`;
    const url = URL.canParse(text) ? new URL(text) : undefined;
    if (url === undefined) throw new Error("must have hosts with ports from 1 to 65535, separated by commas");
    return hostAndPort(url, otherwise);
  });
}

/** What follows a list of hosts. */
function parseTail(tail: string): URL {
  const url = new URL(`redis://hosts${tail}`);
  if (url.hash !== "") throw new Error("must have no # (in a password write it as %23)");
  return url;
}

function parseNodes(hosts: string, tail: string): ClusterAddress & { db: number } {
  const url = parseTail(tail);
  if (url.search !== "") throw new Error("must have no query parameters");
  if (parseDb(url.pathname.slice(1)) !== 0) throw new Error("must have no database but 0: a Cluster has no other");
  return { nodes: parseHosts(hosts, defaultPort), db: 0 };
}

function parseSentinels(hosts: string, tail: string): SentinelAddress & { db: number } {
  const sentinels = parseHosts(hosts, defaultSentinelPort);
  const url = parseTail(tail);
  const given = url.searchParams;
  const known = ["sentinel_master_name", "sentinel_user", "sentinel_password"];
  if ([...given.keys()].some((name) => !known.includes(name))) {
    throw new Error(`must have no query parameters but ${known.join(", ")}`);
  }
  const masterName = given.get("sentinel_master_name");
  if (!masterName) throw new Error("must say what the sentinels call the master: ?sentinel_master_name=NAME");
  const sentinelUsername = given.get("sentinel_user");
  const sentinelPassword = given.get("sentinel_password");
  return {
    sentinels,
    masterName,
    ...sentinelUsername ? { sentinelUsername } : {},
    ...sentinelPassword ? { sentinelPassword } : {},
    db: parseDb(url.pathname.slice(1)),
  };
}

function hostAndPort(url: URL, otherwise: number): TcpAddress {
  if (url.hostname === "") throw new Error("must name a host");
  const port = url.port === "" ? otherwise : Number(url.port);
  if (port === 0) throw new Error("must have a port from 1 to 65535");
  // An IPv6 address stands in brackets in a URL only.
  return { host: decode(url.hostname.replace(/^\[(.*)\]$/, "$1"), "host"), port };
}

function parseCredentials(text: string): { username?: string; password?: string } {
  const colon = text.indexOf(":");
  const username = decode(colon < 0 ? text : text.slice(0, colon), "user name");
  const password = colon < 0 ? undefined : decode(text.slice(colon + 1), "password");
  return { ...username === "" ? {} : { username }, ...password === undefined ? {} : { password } };
}

function decode(text: string, what: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw new Error(`must have its ${what} percent-encoded: write % as %25`);
  }
}

function parseDb(text: string): number {
  if (!/^\d{0,6}$/.test(text)) throw new Error("must end with the number of a database, if with anything: /0");
  return Number(text);
}

/** The value of the only query parameter that means something; all others are mistakes. */
function onlyParameter(url: URL, name: string): string | undefined {
  for (const given of url.searchParams.keys()) {
    if (given !== name) throw new Error(`must have no query parameters but ${name}`);
  }
  return url.searchParams.get(name) ?? undefined;
}
