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

/** Where a Redis server is, and who we are there. */
export type RedisAddress = (TcpAddress | { readonly path: string }) & {
  readonly username?: string;
  readonly password?: string;
  /** The number of the database. */
  readonly db: number;
  readonly tls: boolean;
};

const defaultPort = 6379;

/**
 * The address in a URL: `redis://[user:password@]host[:port][/db][?family=4|6]`, `rediss://` for TLS, or
 * `redis+unix://[user:password@]/path[?db=N]`.
 * @throws {Error} whose message is a rule that begins with "must" and holds nothing of the URL.
 */
export function parseRedisUrl(text: string): RedisAddress {
  const [, scheme = "", rest = ""] = /^([a-z+]+):\/\/(.*)$/s.exec(text) ?? [];
  if (!["redis", "rediss", "redis+unix"].includes(scheme)) {
    throw new Error("must be a redis://, rediss:// or redis+unix:// URL");
  }
  const authorityEnd = rest.search(/[/?#]/);
  const authority = authorityEnd < 0 ? rest : rest.slice(0, authorityEnd);
  const at = authority.lastIndexOf("@");
  const credentials = at < 0 ? {} : parseCredentials(authority.slice(0, at));
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
    return { path: decode(url.pathname, "path"), ...credentials, db, tls: false };
  }
  const family = onlyParameter(url, "family") ?? "0";
  if (!/^[046]$/.test(family)) throw new Error("must have a family of 4 or 6, if any");
  if (url.hostname === "") throw new Error("must name a host");
  const port = url.port === "" ? defaultPort : Number(url.port);
  if (port === 0) throw new Error("must have a port from 1 to 65535");
  // An IPv6 address stands in brackets in a URL only.
  const host = decode(url.hostname.replace(/^\[(.*)\]$/, "$1"), "host");
  const version = family === "0" ? {} : { family: Number(family) };
  return { host, port, ...version, ...credentials, db: parseDb(url.pathname.slice(1)), tls: scheme === "rediss" };
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
