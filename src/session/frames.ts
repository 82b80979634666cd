/**
 * Every in-band frame of the two dialects, bare and `wsproxy.resume.v1`, is made and told apart here, over a WebSocket
 * and as an event of a stream (HTML Standard, section 9.2). The tables of docs/resume.md and docs/reference.md are
 * generated from here (`deno task docs`).
 */

import { Buffer } from "node:buffer";
import { isMessageId, maxMessageIdChars } from "../ids.ts";
import { formatPosition, type Position } from "../redis/log_entry.ts";

/** Why something is missing: the log had to let it go, or it is another log now. */
export type GapReason = "trimmed" | "lost";

/** The frames of messages to a resuming client, for docs/resume.md. */
export const messageFrames = [
  { frame: "<position>\\n<payload>", meaning: "a logged message: handle it, then store the position" },
  { frame: "\\n<payload>", meaning: "a plain one" },
] as const;

/** What the proxy itself says to clients. The name and the body are what a resuming client gets. */
export const notices = {
  live: { body: "<position>", meaning: "caught up; store the position" },
  gap: {
    body: '{"reason":"trimmed","position":"<position>"}',
    meaning:
      "what is missing is gone (`lost`: it is another log now): store the position, and reload the state; what the log still holds follows",
  },
  unheard: {
    body: '{"messages":N}',
    meaning: "so many of your messages reached no backend, or may not have",
  },
  expiring: {
    body: '{"in_secs":N}',
    meaning:
      "the token runs out in N seconds: told once, 30 seconds before its end, or when half of what it had left is over",
  },
  pong: { body: "<text>", meaning: "the answer to `!ping`" },
  sent: {
    body: '{"id":"…","receivers":N,"entered":true}',
    meaning:
      "so many backends have received your message with this id, or it has been `entered` into the agent's inbox",
  },
  unsent: {
    body: '{"id":"…","reason":"unheard"}',
    meaning: "no backend has your message with this id, as far as is known",
  },
  error: {
    body: "{...}",
    meaning: "what bare clients are told [in-band](reference.md#messages-from-the-proxy-itself)",
  },
} as const satisfies Record<string, { readonly body: string; readonly meaning: string }>;

/** The name of a notice: what stands behind its "!", and what its event is called. */
export type NoticeName = keyof typeof notices;

/** One notice. */
export interface Notice {
  readonly name: NoticeName;
  /** What a resuming client gets. */
  readonly body: string;
  /** The position to go on from, if it tells of one. */
  readonly position?: string;
  /** What a bare client gets; undefined when bare clients are not told. */
  readonly bare?: string;
}

/** All that was logged has been sent. */
export function liveNotice(position: Position): Notice {
  const text = formatPosition(position);
  return { name: "live", body: text, position: text };
}

/** Something of the log is missing up to a position, from which the client can go on without another gap. */
export function gapNotice(reason: GapReason, position: Position): Notice {
  const text = formatPosition(position);
  return { name: "gap", body: `{"reason":"${reason}","position":"${text}"}`, position: text };
}

/** So many of the client's messages have reached no backend, or may not have. */
export const unheardNotice = (messages: number): Notice => ({ name: "unheard", body: `{"messages":${messages}}` });

/** The client's token runs out in so many milliseconds. */
export const expiringNotice = (leftMs: number): Notice => ({
  name: "expiring",
  body: `{"in_secs":${Math.ceil(leftMs / 1000)}}`,
});

/** Mistakes of a client, as it is told of them. A bare client can make those only that are not `commands`. */
export const complaints = {
  invalidJson: {
    json: '{"error":"Invalid JSON format"}',
    when: "a text frame was not JSON, with `VALIDATE_JSON`; it was not published",
  },
  tooLarge: { json: '{"error":"Message too large","max_size":N}', when: "just before a close with 1009" },
  tooLongPing: {
    json: '{"error":"A ping is too long","max_length":64}',
    of: "commands",
    when: "the text of a `!ping` has more than 64 characters",
  },
  malformedId: {
    json: '{"error":"Malformed id"}',
    of: "commands",
    when: "the second line of a `!send` is not 1 to 64 characters of `[A-Za-z0-9_-]`; nothing was published",
  },
  unknownCommand: {
    json: '{"error":"Unknown command"}',
    of: "commands",
    when: "a frame of a resuming client begins with `!`, and with no word that the proxy knows",
  },
  invalidToken: {
    json: '{"error":"Invalid token","reason":"…"}',
    of: "commands",
    when: "the token of a `!token` is not good; the former one stays in force",
  },
} as const satisfies Record<string, { readonly json: string; readonly when: string; readonly of?: "commands" }>;

const errorNotice = (json: string): Notice => ({ name: "error", body: json, bare: json });

/** A text frame is not JSON, while `VALIDATE_JSON` is on. */
export const invalidJson = errorNotice(complaints.invalidJson.json);

/** The announcement of a 1009; `maxBytes` is the limit in UTF-8 bytes. */
export const tooLarge = (maxBytes: number): Notice =>
  errorNotice(complaints.tooLarge.json.replace("N", String(maxBytes)));

/** The answer to a ping. */
export const pongNotice = (text: string): Notice => ({ name: "pong", body: text });

/** What the client gets of a message that it has given an id: some backend has it, or will read it. */
export const sentNotice = (id: string, receivers: number, entered: boolean): Notice => ({
  name: "sent",
  body: JSON.stringify({ id, receivers, entered }),
});

/** Why no backend has a message, as far as is known. */
export type UnsentReason = "unheard" | "unconfirmed" | "refused" | "invalid";

/** A message with an id has reached no backend, or may not have. */
export const unsentNotice = (id: string, reason: UnsentReason): Notice => ({
  name: "unsent",
  body: JSON.stringify({ id, reason }),
});

/** A ping is too long to be answered. */
const tooLongPing = errorNotice(complaints.tooLongPing.json);

/** A message that is to be answered has no id to answer with. */
const malformedId = errorNotice(complaints.malformedId.json);

/** A frame that begins with "!" is none that we know. */
const unknownCommand = errorNotice(complaints.unknownCommand.json);

/** A new token is not taken. `reason` holds nothing secret. */
export const invalidToken = (reason: string): Notice => errorNotice(JSON.stringify({ error: "Invalid token", reason }));

/** What a client without a log is told, while `REDIS_GAP` is `notify`: messages around this point may have been lost. */
export const missedNotice = {
  name: "gap",
  body: "",
  bare: '{"type":"control","command":"gap"}',
} as const satisfies Notice;

/** The frames of a resuming client, for docs/resume.md. */
export const clientFrames = [
  { frame: "anything that does not begin with `!`", meaning: "a message, as from a bare client" },
  {
    frame: "`!token\\n<jwt>`",
    meaning: "a new token for the same session; a bad one gets `!error`, and the old one stays valid",
  },
  {
    frame: "`!ping\\n<text>`",
    meaning:
      "`!pong` comes at once, with the same text of up to 64 characters: the connection lives, whatever Redis does",
  },
  {
    frame: "`!send\\n<id>\\n<payload>`",
    meaning:
      "a message that is answered with `!sent` or `!unsent`; the client chooses the id, 1 to 64 characters of `[A-Za-z0-9_-]`",
  },
] as const;

/** What a `!send` has before its payload, at most: the payload alone is measured. */
export const maxSendHeadBytes = "!send\n".length + maxMessageIdChars + "\n".length;

/** What a client asks of the proxy itself. */
export type Command =
  | { readonly name: "token"; readonly token: string }
  | { readonly name: "ping"; readonly text: string }
  | { readonly name: "send"; readonly id: string; readonly payload: string }
  | { readonly name: "malformed"; readonly complaint: Notice };

/** How a session's client is spoken to, and speaks. */
export interface Dialect {
  /** A message of the log as it was published: its envelope, in which the payload begins at `payloadAt`. */
  published(envelope: Buffer, payloadAt: number): string | Buffer;
  /** A message of the log as it was read from there. */
  logged(position: Position, payload: Buffer): string | Buffer;
  /** A message that is in no log. */
  plain(payload: Buffer): string | Buffer;
  /** Undefined when clients of this dialect are not told. */
  notice(notice: Notice): string | undefined;
  /** What a text frame of the client asks of the proxy; undefined for a message to the backend. */
  command(frame: string): Command | undefined;
}

const takesNoCommand = () => undefined;

/** By what carries the session, and whether its client resumes from the log. */
export const dialects: Readonly<Record<"socket" | "stream", Readonly<Record<"bare" | "resuming", Dialect>>>> = {
  socket: {
    bare: {
      published: (envelope, payloadAt) => envelope.subarray(payloadAt),
      logged: (_position, payload) => payload,
      plain: (payload) => payload,
      notice: ({ bare }) => bare,
      command: takesNoCommand,
    },
    resuming: {
      // The envelope without its first byte, and no copy of it.
      published: (envelope) => envelope.subarray(1),
      logged: (position, payload) => Buffer.concat([Buffer.from(`${formatPosition(position)}\n`), payload]),
      plain: (payload) => Buffer.concat([lineFeed, payload]),
      notice: ({ name, body }) => `!${name}\n${body}`,
      command: (frame) => frame.startsWith("!") ? parseCommand(frame) : undefined,
    },
  },
  stream: {
    bare: {
      published: (envelope, payloadAt) => eventOf(envelope.toString("utf8", payloadAt)),
      logged: (_position, payload) => eventOf(payload.toString()),
      plain: (payload) => eventOf(payload.toString()),
      notice: ({ bare }) => bare === undefined ? undefined : eventOf(bare),
      command: takesNoCommand,
    },
    resuming: {
      published: (envelope, payloadAt) =>
        eventOf(envelope.toString("utf8", payloadAt), envelope.toString("latin1", 1, payloadAt - 1)),
      logged: (position, payload) => eventOf(payload.toString(), formatPosition(position)),
      plain: (payload) => eventOf(payload.toString()),
      notice: ({ name, body, position }) => eventOf(body, position, name),
      command: takesNoCommand,
    },
  },
};

const lineFeed = Buffer.from("\n");

/** Longest text of a ping, in UTF-16 units. */
const maxPingLength = 64;

function parseCommand(frame: string): Command {
  const [head, body] = cutLine(frame);
  switch (head) {
    case "!token":
      return { name: "token", token: cutLine(body)[0] };
    case "!ping":
      return body.length > maxPingLength ? { name: "malformed", complaint: tooLongPing } : { name: "ping", text: body };
    case "!send": {
      const [id, payload] = cutLine(body);
      // Without a second line feed there is no payload, not even an empty one.
      return isMessageId(id) && body.length > id.length
        ? { name: "send", id, payload }
        : { name: "malformed", complaint: malformedId };
    }
    default:
      return { name: "malformed", complaint: unknownCommand };
  }
}

/** The first line of a text, and the rest. */
function cutLine(text: string): [line: string, rest: string] {
  const end = text.indexOf("\n");
  return end < 0 ? [text, ""] : [text.slice(0, end), text.slice(end + 1)];
}

/** The last event of a stream says why it ends. */
export const closeEvent = (code: number, reason: string): string =>
  eventOf(JSON.stringify({ code, reason }), undefined, "close");

/** Keeps a stream alive: a comment. */
export const keepAliveComment = ":\n\n";

/**
 * What a stream begins with: how often comments come, so that a client can tell a silent stream from a dead one, and
 * when an `EventSource` comes back after the stream has broken.
 */
export const streamBeginning = (commentsMs: number, retryMs: number): string =>
  `: comments come every ${Math.ceil(commentsMs / 1000)} s\nretry: ${retryMs}\n\n`;

/** An event. A receiver joins its lines of data again with line feeds. */
function eventOf(data: string, id?: string, name?: string): string {
  const head = `${name === undefined ? "" : `event: ${name}\n`}${id === undefined ? "" : `id: ${id}\n`}`;
  return `${head}${data.split(/\r\n|\r|\n/).map((line) => `data: ${line}\n`).join("")}\n`;
}
