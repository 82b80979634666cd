/** What makes a request a session's: the opening handshake, the ids, the subprotocol, and where the token is. */

import { isId } from "../ids.ts";
import { currently, Refusal, refusals } from "../replies.ts";
import { parsePosition, type Position } from "../redis/log_entry.ts";
import type { Request } from "./exchange.ts";

/** The subprotocol that carries a token. */
export const bearerProtocol = "bearer";
/** The subprotocol of clients that resume from the log. */
export const resumeProtocol = "wsproxy.resume.v1";

/** Where a request goes: its Host, a path as sent, and what follows its "?", if anything does. */
export interface Route {
  readonly host: string | undefined;
  readonly path: string;
  readonly query: string | undefined;
}

/** A host and maybe a port (RFC 3986, section 3.2): nothing else belongs into Host or a target's authority. */
const authority = /^(\[[0-9a-f:.]+\]|[a-z0-9._~%!$&'()*+,;=-]+)(:\d{0,5})?$/i;

/**
 * The Host of a request, and the path and query of its target (RFC 9112, section 3.2).
 * @throws {Refusal} when the target or Host is malformed: engines put Host in front of the path, and whatever follows
 * a "/" or a "?" in it would choose the route.
 */
export function routeOf(request: Request): Route {
  const host = request.header("host");
  if (host && !authority.test(host)) {
    throw new Refusal("badTarget", `Host must be a host and a port: ${currently(host)}`);
  }
  if (request.httpVersion === "1.1") checkHost(host);
  const [matched, named, path = "/", query] = /^(?:https?:\/\/([^/?]*))?(\/[^?]*)?(?:\?(.*))?$/i.exec(request.target) ??
    [];
  if (matched === undefined || (named !== undefined && !authority.test(named)) || !/^[!-~]*$/.test(request.target)) {
    throw new Refusal("badTarget");
  }
  return { host, path, query };
}

/**
 * Checks that there is a Host (RFC 9112, section 3.2).
 * @throws {Refusal} when there is none.
 */
export function checkHost(host: string | undefined): void {
  if (host === undefined) throw new Refusal("badTarget", "Host is missing");
}

/** Whether a request has a body, also one that is still on its way (RFC 9112, section 6.3). */
export function hasBody(request: Request): boolean {
  return request.header("transfer-encoding") !== undefined || (request.header("content-length") ?? "0") !== "0";
}

/** Whether a request asks for an upgrade to WebSocket (RFC 9110, section 7.8). */
export function isHandshake(request: Request): boolean {
  const hasToken = (name: string, token: string) =>
    request.header(name)?.toLowerCase().split(",").some((item) => item.trim() === token) ?? false;
  return hasToken("upgrade", "websocket") && hasToken("connection", "upgrade");
}

/**
 * Checks that a request is a WebSocket's opening handshake (RFC 6455, section 4.2.1).
 * @throws {Refusal} when it is not.
 */
export function checkUpgrade(request: Request): void {
  if (!isHandshake(request)) throw new Refusal("notUpgrade");
  if (hasBody(request)) throw malformed("it must have no body");
  // Sixteen bytes in base64 are 22 characters and the padding.
  const key = request.header("sec-websocket-key");
  if (key === undefined || !/^[A-Za-z0-9+/]{22}==$/.test(key)) {
    throw malformed(`Sec-WebSocket-Key must be 16 bytes in base64: ${currently(key)}`);
  }
  // It may hold a token, so its value is not named.
  const protocols = request.header("sec-websocket-protocol");
  if (protocols !== undefined && !/^[!#$%&'*+.^_`|~\w-]+([ \t]*,[ \t]*[!#$%&'*+.^_`|~\w-]+)*$/.test(protocols)) {
    throw malformed("Sec-WebSocket-Protocol must be a list of tokens");
  }
  const version = request.header("sec-websocket-version");
  if (version !== "13") throw new Refusal("badVersion", `${refusals.badVersion.reason}: ${currently(version)}`);
}

const malformed = (fault: string) => new Refusal("badHandshake", `${refusals.badHandshake.reason}: ${fault}`);

/**
 * Percent-decodes a path segment into an id (RFC 3986, section 2.1).
 * @throws {Refusal} when it is none.
 */
export function decodeId(segment: string): string {
  let id: string;
  try {
    id = decodeURIComponent(segment);
  } catch {
    throw badId(segment);
  }
  if (!isId(id)) throw badId(segment);
  return id;
}

const badId = (segment: string) => new Refusal("badId", `${refusals.badId.reason}: ${currently(segment)}`);

/** The items of a `Sec-WebSocket-Protocol` list, which may come with or without spaces after its commas. */
export function protocolsOf(list: string | undefined): string[] {
  return list === undefined ? [] : list.split(",").map((item) => item.trim());
}

/** The subprotocol to select of those offered, if any. */
export function selectProtocol(offered: readonly string[], resumable: boolean): string | undefined {
  if (resumable && offered.includes(resumeProtocol)) return resumeProtocol;
  return offered.includes(bearerProtocol) ? bearerProtocol : undefined;
}

/**
 * The last position that a resuming client has handled, or the log's beginning.
 * @throws {Refusal} when it is malformed.
 */
export function resumeFrom(text = "0"): Position {
  const position = parsePosition(text);
  if (position === undefined) {
    throw new Refusal("badResume", `${refusals.badResume.reason}: ${currently(text)}`);
  }
  return position;
}

/**
 * Whether that position is one of a history which the client has loaded: `from=history`.
 * @throws {Refusal} for any other `from`.
 */
export function isFromHistory(text: string | undefined): boolean {
  if (text === undefined || text === "history") return text !== undefined;
  throw new Refusal("badResume", `from must be history: ${currently(text)}`);
}

/**
 * The first token the request carries: `Authorization: Bearer` (RFC 6750), the subprotocol list `bearer, <jwt>` for
 * browsers, then `?token=`. Undefined when there is none. `query` is what follows "?", where that may carry one.
 * @throws {Refusal} when there is more than one Authorization (RFC 6750, section 3.1).
 */
export function findToken(
  authorization: string | undefined,
  protocols: readonly string[],
  query: URLSearchParams | undefined,
): string | undefined {
  // Engines join several with a comma, which credentials of ours do not have.
  if (authorization?.includes(",") && /(^|,) *bearer /i.test(authorization)) throw new Refusal("twoAuthorizations");
  const header = authorization && /^bearer +(\S+) *$/i.exec(authorization)?.[1];
  if (header) return header;
  const at = protocols.indexOf(bearerProtocol);
  if (at >= 0 && protocols[at + 1]) return protocols[at + 1];
  return query?.get("token") || undefined;
}

/**
 * The value of a cookie (RFC 6265, section 5.4); undefined when there is none.
 * @throws {Refusal} when there is more than one: another page below the same domain may have set one of them.
 */
export function findCookie(header: string | undefined, name: string): string | undefined {
  const found = (header ?? "").split(";").flatMap((pair) => {
    const at = pair.indexOf("=");
    return at >= 0 && pair.slice(0, at).trim() === name ? [pair.slice(at + 1).trim()] : [];
  });
  if (found.length > 1) throw new Refusal("twoCookies");
  return found[0] || undefined;
}
