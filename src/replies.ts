/**
 * Everything wsproxy can say no with: the HTTP refusals before the 101 and the WebSocket closes after it.
 * The tables of docs/reference.md are generated from here (`deno task docs`).
 */

import { Buffer } from "node:buffer";

/** One row of the refusal table. */
export interface RefusalRow {
  /** The HTTP status. */
  readonly status: number;
  /** The body, unless a {@linkcode Refusal} names more. */
  readonly reason: string;
  /** For docs/reference.md. */
  readonly when: string;
  /** What a page is told with `refusal=close`; undefined for what is a status all the same. */
  readonly closeCode?: number;
  /** The client has shown no token that was signed with our secret. */
  readonly isOfStranger?: true;
  /** Headers that go with the status. */
  readonly headers?: Readonly<Record<string, string>>;
}

/** The refusal table, in the order of the checks: the first row that applies to a request is its answer. */
export const refusals = {
  badTarget: {
    status: 400,
    reason: "malformed request target",
    when: "a missing `Host`, or a `Host` or target that is malformed or not percent-encoded",
  },
  unknownPath: { status: 404, reason: "no such path", when: "unknown path" },
  notGet: { status: 405, reason: "only GET is served", when: "not GET", headers: { Allow: "GET" } },
  notGetOrHead: {
    status: 405,
    reason: "only GET and HEAD are served",
    when: "neither GET nor HEAD, for `/health`, `/ready`, `/metrics` and the page of `ADMIN_PORT`",
    headers: { Allow: "GET, HEAD" },
  },
  notGetOrPost: {
    status: 405,
    reason: "only GET and POST are served",
    when: "neither GET nor POST, for a stream",
    headers: { Allow: "GET, POST" },
  },
  notGetHeadOrDelete: {
    status: 405,
    reason: "only GET, HEAD and DELETE are served",
    when: "on `ADMIN_PORT`: none of GET, HEAD and DELETE, for a session",
    headers: { Allow: "GET, HEAD, DELETE" },
  },
  foreignHost: {
    status: 403,
    reason: "Host must be an IP address, localhost, or a name without a dot",
    when:
      "on `ADMIN_PORT`: the page or a session, while `Host` is neither an IP address nor `ADMIN_HOST` nor a name without a dot",
  },
  adminNeedsPassword: {
    status: 403,
    reason: "set ADMIN_PASSWORD, or let ADMIN_HOST be 127.0.0.1",
    when: "on `ADMIN_PORT`: the page or a session, while others may reach it and there is no `ADMIN_PASSWORD`",
  },
  noPassword: {
    status: 401,
    reason: "the password is ADMIN_PASSWORD",
    when: "on `ADMIN_PORT`: no password",
    headers: { "WWW-Authenticate": 'Basic realm="wsproxy"' },
  },
  tooManyTries: {
    status: 429,
    reason: "too many wrong passwords: try again in a minute",
    when: "on `ADMIN_PORT`: a password after 10 wrong ones from its address within a minute, or 100 from all addresses",
  },
  wrongPassword: {
    status: 401,
    reason: "wrong password: it is ADMIN_PASSWORD",
    when: "on `ADMIN_PORT`: another password than `ADMIN_PASSWORD`; the log has a line of it every ten seconds at most",
    headers: { "WWW-Authenticate": 'Basic realm="wsproxy"' },
  },
  notUpgrade: {
    status: 426,
    reason: "this path speaks WebSocket only",
    when: "not an upgrade request",
    headers: { Upgrade: "websocket", Connection: "Upgrade" },
  },
  handshakeForStream: {
    status: 400,
    reason: "a stream is no WebSocket: ask for it without Upgrade",
    when: "a WebSocket handshake, for a stream",
  },
  badHandshake: {
    status: 400,
    reason: "malformed WebSocket handshake",
    when: "malformed WebSocket handshake; the body names the header",
  },
  badVersion: {
    status: 400,
    reason: "Sec-WebSocket-Version must be 13",
    when: "a WebSocket version other than 13 (RFC 6455, section 4.2.2)",
    headers: { "Sec-WebSocket-Version": "13" },
  },
  badId: {
    status: 400,
    reason: "agent and session ids must be 1 to 128 characters, percent-encoded, without control characters",
    when: "bad agent or session id",
  },
  noSuchSession: {
    status: 404,
    reason: "the session has no socket here",
    when: "on `ADMIN_PORT`: a session that has no socket on this proxy",
  },
  badResume: {
    status: 400,
    reason: "resume must be a position like 1767225600000-42, or 0",
    when: "a malformed `resume` of a resuming client, or another `from` than `history`",
  },
  twoAuthorizations: {
    status: 400,
    reason: "Authorization must be sent once",
    when: "more than one `Authorization`, and a bearer token in one of them",
  },
  twoCookies: {
    status: 400,
    reason: "the cookie of AUTH_COOKIE must be sent once",
    when: "no other token, and more than one cookie of the name `AUTH_COOKIE`",
  },
  noToken: {
    status: 401,
    closeCode: 4401,
    isOfStranger: true,
    reason: "a bearer token is required",
    when: "no token",
    headers: { "WWW-Authenticate": "Bearer" },
  },
  cookieWithoutOrigin: {
    status: 403,
    reason: "a cookie is taken with an Origin only",
    when:
      "a token from a cookie, and neither an `Origin` nor `Sec-Fetch-Site: same-origin` on a host of `ALLOWED_ORIGINS`",
  },
  wrongOrigin: { status: 403, reason: "Origin is not in ALLOWED_ORIGINS", when: "origin not in `ALLOWED_ORIGINS`" },
  tokenTooLong: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token is too long",
    when: "a token of more than 8192 characters",
  },
  tokenMalformed: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token is malformed",
    when: "a token that is no JWT, or has a claim of another type",
  },
  tokenUnsigned: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token is not signed",
    when: "a token without a signature",
  },
  wrongAlgorithm: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token's algorithm is not HS256",
    when: "a token signed with another algorithm than those of `JWT_ALGORITHM`",
  },
  keysUnavailable: {
    status: 503,
    closeCode: 4503,
    isOfStranger: true,
    reason: "the keys of tokens cannot be read now",
    when: "a token of `JWKS_URL` before its keys have been read, or with a `kid` that may not be looked for yet",
  },
  unknownKey: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "no key fits the token",
    when: "a token whose `kid` and algorithm none of the public keys has",
  },
  wrongSignature: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token's signature does not match",
    when: "a token signed with another secret or key",
  },
  wrongIssuer: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token is of another issuer",
    when: "a token whose `iss` is not `JWT_ISSUER`",
  },
  wrongAudience: {
    status: 403,
    closeCode: 4401,
    isOfStranger: true,
    reason: "the token is for another audience",
    when: "a token whose `aud` has none of `JWT_AUDIENCE`",
  },
  wrongSession: {
    status: 403,
    closeCode: 4403,
    reason: "the token is not for this session",
    when: "a token whose `session_id`, or `JWT_SESSION_CLAIM`, does not allow the path's",
  },
  wrongAgent: {
    status: 403,
    closeCode: 4403,
    reason: "the token is not for this agent",
    when: "a token whose `agent_id` is not the path's",
  },
  tokenRevoked: {
    status: 403,
    // As an open socket is closed: a newer token is as good as any.
    closeCode: 4401,
    reason: "the token has been revoked",
    when: "a token that was issued before a time set by `wsproxy:control`",
  },
  tokenNotYetValid: {
    status: 403,
    closeCode: 4401,
    reason: "the token is not valid yet",
    when: "a token whose `nbf` is to come",
  },
  tokenExpired: {
    status: 403,
    closeCode: 4401,
    reason: "the token has expired",
    when: "a token whose `exp` has passed",
  },
  draining: { status: 503, closeCode: 4503, reason: "the server is draining", when: "the server is draining" },
  tooManyOfSession: {
    status: 429,
    closeCode: 4429,
    reason: "too many connections of this session",
    when: "`MAX_CONNECTIONS_PER_SESSION` of the session are open",
  },
  tooManyOfAddress: {
    status: 429,
    closeCode: 4429,
    reason: "too many connections from this address",
    when: "`MAX_CONNECTIONS_PER_ADDRESS` from the client's address are open",
  },
  tooManyConnectsOfAddress: {
    status: 429,
    closeCode: 4429,
    reason: "too many new connections from this address",
    when: "more than `MAX_CONNECTS_PER_ADDRESS_PER_SEC` new connections from the client's address",
  },
  tooManyConnections: {
    status: 503,
    closeCode: 4429,
    reason: "too many connections",
    when: "`MAX_CONNECTIONS` are open",
  },
  tooManyConnects: {
    status: 503,
    closeCode: 4429,
    reason: "too many new connections",
    when: "more than `MAX_CONNECTS_PER_SEC` new connections",
  },
  redisUnavailable: { status: 503, closeCode: 4503, reason: "Redis is unavailable", when: "Redis is unavailable" },
  subscribeTimeout: {
    status: 504,
    closeCode: 4504,
    reason: "Redis did not confirm the subscription in time",
    when: "SUBSCRIBE not confirmed within `HANDSHAKE_TIMEOUT_SECS`",
  },
  clientGone: {
    status: 400,
    reason: "the client has gone",
    when: "the client has left meanwhile, and sees no answer",
  },
  endedMeanwhile: {
    status: 403,
    closeCode: 4403,
    reason: "the session was closed while it connected",
    when: "a backend or an operator closed the session while it connected",
  },
  failedMeanwhile: {
    status: 503,
    closeCode: 4503,
    reason: "the session ended while it connected",
    when: "too many messages came for the client before it could be answered, or a bug of ours",
  },
  badMessageId: {
    status: 400,
    reason: "Idempotency-Key must be 1 to 64 characters of [A-Za-z0-9_-]",
    when: "a malformed `Idempotency-Key` of a posted message",
  },
  postedTooFast: {
    status: 429,
    reason: "client too fast",
    when: "more than `MAX_MESSAGES_PER_SEC` posted to a session",
  },
  bodyTooLarge: {
    status: 413,
    reason: "message too large",
    when: "a posted message over `MAX_MESSAGE_SIZE_BYTES`",
  },
  notUtf8: { status: 400, reason: "a message must be UTF-8", when: "a posted message that is not UTF-8" },
  notJson: {
    status: 400,
    reason: "Invalid JSON format",
    when: "a posted message that is not JSON, while `VALIDATE_JSON` is on",
  },
  notPublished: {
    status: 503,
    reason: "the message was not published",
    when: "a posted message that Redis did not take",
  },
} as const satisfies Record<string, RefusalRow>;

/** The name of a refusal: the label of its metric, and the code in its log line. */
export type RefusalName = keyof typeof refusals;

/** The same request may be taken later: its refusal says when to try again. */
export const isForLater = ({ status }: RefusalRow): boolean => status === 429 || status === 503;

/** Longest `Retry-After`, in seconds; the shortest is 1. Spread, so that clients do not return as one. */
const maxRetryAfterSecs = 5;

/**
 * A request that gets an HTTP status instead of a WebSocket. Thrown by the rungs of the ladder, answered by the server.
 */
export class Refusal extends Error {
  override readonly name = "Refusal";
  /** Headers that its request calls for. */
  also: Readonly<Record<string, string>> = {};
  /** Its row in the table. */
  readonly row: RefusalRow;

  /** `reason` replaces the row's own text where it can name the header and its value. It must hold nothing secret. */
  constructor(readonly refusal: RefusalName, reason?: string) {
    super(reason ?? refusals[refusal].reason);
    this.row = refusals[refusal];
  }

  /** The close that a page can read instead, if there is one. */
  get close(): { readonly code: number; readonly reason: string } | undefined {
    const { closeCode: code } = this.row;
    if (code === undefined) return undefined;
    const retryAfter = this.headers()["Retry-After"];
    const chars = [...retryAfter === undefined ? "" : `retry_after_secs=${retryAfter}; `, ...this.message];
    while (Buffer.byteLength(chars.join("")) > maxCloseReasonBytes) chars.pop();
    return { code, reason: chars.join("") };
  }

  /** The headers to answer with, `Retry-After` included where the row calls for it. */
  headers(): Record<string, string> {
    const headers: Record<string, string> = {
      "Content-Type": "text/plain; charset=utf-8",
      ...this.row.headers,
      ...this.also,
    };
    if (isForLater(this.row)) headers["Retry-After"] = String(1 + Math.floor(Math.random() * maxRetryAfterSecs));
    return headers;
  }
}

/** What a control frame has room for beside the code (RFC 6455, section 5.5). */
const maxCloseReasonBytes = 123;

/** How a reason ends that names a value: with as much of it as an answer and a log line should hold. */
export const currently = (value: string | undefined): string =>
  value === undefined ? "it is missing" : `current value is ${JSON.stringify(value.slice(0, maxValueChars))}`;

const maxValueChars = 64;

/** One row of the close table: RFC 6455 section 7.4 codes, and some of the private range from 4000. */
export interface Close {
  /** The close code. */
  readonly code: number;
  /** At most 123 bytes: a longer reason does not fit a control frame (RFC 6455, section 5.5). */
  readonly reason: string;
  /** For docs/reference.md. */
  readonly when: string;
  /** What the client should do, for docs/reference.md. */
  readonly advice: string;
  /** What the client sends before it sees the close is still published, as far as the engine reads it. */
  readonly hears?: true;
  /** What a client is refused with that has no socket yet when this happens; `endedMeanwhile` unless it says so. */
  readonly refusedAs?: RefusalName;
}

/** The close table. */
export const closes = {
  goingAway: {
    code: 1001,
    reason: "server is going away",
    when: "the server drains or stops",
    advice: "reconnect, with jitter",
    hears: true,
    refusedAs: "draining",
  },
  malformedFrame: {
    code: 1002,
    reason: "malformed frame",
    when: "a frame that breaks the protocol (1007 for bad UTF-8; the native engine just breaks the connection)",
    advice: "stop",
  },
  binaryFrame: { code: 1003, reason: "only text frames are accepted", when: "binary frame", advice: "stop" },
  tooSlow: {
    code: 1008,
    reason: "client too slow",
    when: "more than `MAX_BUFFER_SIZE_BYTES` wait, and the client takes nothing or too little",
    advice: "reconnect",
    hears: true,
    refusedAs: "failedMeanwhile",
  },
  tooFast: {
    code: 1008,
    reason: "client too fast",
    when: "more than `MAX_MESSAGES_PER_SEC` from the client",
    advice: "reconnect",
  },
  tooBig: {
    code: 1009,
    reason: "message too large",
    when: "message over `MAX_MESSAGE_SIZE_BYTES`",
    advice: "stop",
  },
  internalError: {
    code: 1011,
    reason: "internal error",
    when: "a bug of ours",
    advice: "reconnect",
    refusedAs: "failedMeanwhile",
  },
  openedTooLate: {
    code: 1011,
    reason: "opened too late",
    when: "the socket was not open within 5 seconds of its admission",
    advice: "reconnect",
    refusedAs: "failedMeanwhile",
  },
  gap: {
    code: 1012,
    reason: "messages may have been lost",
    when: "a break in the connection to Redis may have lost messages, while `REDIS_GAP` is `close`",
    advice: "reconnect, and ask the backend what was missed",
    hears: true,
    refusedAs: "redisUnavailable",
  },
  redisGone: {
    code: 1013,
    reason: "Redis is unavailable",
    when: "Redis is gone for longer than `REDIS_OUTAGE_GRACE_SECS`",
    advice: "reconnect with backoff; what was sent during the outage was not published",
    refusedAs: "redisUnavailable",
  },
  logUnreadable: {
    code: 1013,
    reason: "the session's log cannot be read",
    when: "Redis refuses a resuming client's log, or has not shown it for longer than `REDIS_OUTAGE_GRACE_SECS`",
    advice: "reconnect with backoff, from the same position",
    hears: true,
  },
  upstreamFull: {
    code: 1013,
    reason: "message could not be queued for Redis",
    when: "the client's queue for Redis is full",
    advice: "reconnect with backoff; the last message was not published",
  },
  upstreamRefused: {
    code: 1013,
    reason: "Redis refused a message",
    when: "Redis refused to publish a message of the client",
    advice: "reconnect with backoff; the message was not published",
  },
  tokenExpired: {
    code: 4401,
    reason: "token expired",
    when: "the token's `exp` has passed",
    advice: "get a token, reconnect",
    refusedAs: "tokenExpired",
  },
  tokenRevoked: {
    code: 4401,
    reason: "token revoked",
    when: "the token was issued before a time set by `wsproxy:control`",
    advice: "get a token, reconnect",
    refusedAs: "tokenRevoked",
  },
  closedForGood: {
    code: 4403,
    reason: "closed by the backend",
    when: "a backend closed it for good; it may choose 1000, or a code from 3000 to 4999, instead",
    advice: "stop, unless the backend's code says something else",
  },
  endedByOperator: {
    code: 4403,
    reason: "closed by an operator",
    when: "an operator ended the session, on the page of `ADMIN_PORT`",
    advice: "stop",
  },
  replaced: {
    code: 4409,
    reason: "replaced by a newer connection",
    when: "a newer socket of the session has opened, while `SESSION_SOCKETS` is `last`",
    advice: "stop",
  },
} as const satisfies Record<string, Close>;

/** Codes that have a label of their own in metrics: ours, and those of RFC 6455 and its registry. */
const labelled = new Set<number>([
  ...Object.values(closes).map(({ code }) => code),
  ...Array.from({ length: 16 }, (_, n) => 1000 + n),
]);

/** A code as the label of a metric. Clients and backends may choose among 2,000 others, which share one. */
export const closeLabel = (code: number): string => labelled.has(code) ? String(code) : "other";
