/**
 * The page of `ADMIN_PORT`, and what it asks for: the busiest sessions, one session's sockets, and their end. What the
 * page shows besides these it reads from `/metrics` and `/health`, as any other program does.
 *
 * Which requests may ask is checked here. On a loopback address only the operator's machine can, but so could a page of
 * another site in the operator's browser: such a page may not send DELETE (Fetch Standard, section 3.2.2), and one
 * whose name has been pointed at this address shows by its Host. Anywhere else a password is asked for (RFC 7617), and
 * cannot be guessed: few wrong ones are compared, of one address and of all.
 */

import { createHash, timingSafeEqual } from "node:crypto";
import { Buffer } from "node:buffer";
import { isLoopback } from "../ip.ts";
import type { Log } from "../log.ts";
import { Rates } from "../rate_limit.ts";
import { Refusal } from "../replies.ts";
import type { Ask } from "../report.ts";
import { mergeBusiest } from "../session/busiest.ts";
import script from "./admin/page.js" with { type: "text" };
import style from "./admin/page.css" with { type: "text" };
import page from "./admin/page.html" with { type: "text" };
import { clientAddress, type ForwardingSettings } from "./client_address.ts";
import { type Request, type Respond, respondJson } from "./exchange.ts";
import { decodeId } from "./handshake.ts";

/** Where the page is served, and what it asks. */
export interface AdminContext {
  /** The address of `ADMIN_PORT`. */
  readonly hostname: string;
  /** Undefined where none is needed. */
  readonly password: string | undefined;
  /** What each proxy of this port answers. */
  readonly ask: Ask;
  readonly log: Log;
  /** Which proxies say where operators are. */
  readonly forwarding: ForwardingSettings;
}

/** Who asks, for the audit. */
interface Asker {
  readonly address: string;
  /** The user name that was given with the password; undefined for none, or where it may be a secret. */
  readonly user: string | undefined;
}

/** Wrong passwords that are compared, of one address and of all. */
const triesOfAddress = 10;
const triesOfAll = 100;
const triesWindowMs = 60_000;
/** Addresses whose password was right: strangers' tries must not keep their operators out. */
const maxTrusted = 100;
/** Longest user name that is logged. */
const maxUserChars = 64;

const security: Readonly<Record<string, string>> = {
  "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Cache-Control": "no-store",
};

const assets: Readonly<Record<string, { readonly type: string; readonly body: string } | undefined>> = {
  __proto__: null as never,
  "/": { type: "text/html", body: page },
  "/page.css": { type: "text/css", body: style },
  "/page.js": { type: "text/javascript", body: script },
};

/** Answers operators' browsers. */
export class Admin {
  readonly #context: AdminContext;
  readonly #isOpen: boolean;
  readonly #tries = new Rates(triesOfAddress, triesWindowMs);
  readonly #allTries = new Rates(triesOfAll, triesWindowMs);
  readonly #trusted = new Set<string>();

  constructor(context: AdminContext) {
    this.#context = context;
    this.#isOpen = isLoopback(context.hostname);
  }

  /** The answer to a path; undefined when it is none of ours. @throws {Refusal} when the request may not ask. */
  answer(request: Request, path: string): Promise<Respond> | Respond | undefined {
    const asset = assets[path];
    const [, list, segment] = /^\/sessions(\/?)(.*)$/.exec(path) ?? [];
    if (asset === undefined && list === undefined) return undefined;
    const isSession = list === "/";
    checkMethod(request, isSession);
    const asker = this.#checkOperator(request);
    if (asset !== undefined) return secured({ "Content-Type": `${asset.type}; charset=utf-8` }, asset.body);
    return isSession ? this.#session(request, decodeId(segment!), asker) : this.#busiest();
  }

  async #busiest(): Promise<Respond> {
    const sessions = mergeBusiest(await this.#context.ask({ kind: "busiest" }));
    return json({ now_ms: Date.now(), sessions });
  }

  async #session(request: Request, sessionId: string, asker: Asker): Promise<Respond> {
    if (request.method === "DELETE") return await this.#end(sessionId, asker);
    const sockets = (await this.#context.ask({ kind: "session", sessionId })).flat();
    if (sockets.length === 0) throw new Refusal("noSuchSession");
    return json({ now_ms: Date.now(), session: sessionId, sockets });
  }

  async #end(sessionId: string, asker: Asker): Promise<Respond> {
    const ended = await this.#context.ask({ kind: "end", sessionId });
    const sockets = ended.reduce((sum, each) => sum + each, 0);
    const msg = sockets > 0 ? "session ended by an operator" : "session that an operator would end has no socket";
    this.#context.log.info({ audit: "admin", session: sessionId, sockets, ...asker }, msg);
    if (sockets === 0) throw new Refusal("noSuchSession");
    return json({ session: sessionId, sockets });
  }

  /** @throws {Refusal} when the request may not ask. */
  #checkOperator(request: Request): Asker {
    const { hostname, password, forwarding } = this.#context;
    // A name with a dot can be registered by any stranger, and pointed at any address.
    const host = request.header("host")?.replace(/:\d*$/, "").toLowerCase() ?? "";
    const ours = !host.includes(".") || /^[\d.]+$/.test(host) || host.endsWith(".localhost") || host === hostname;
    if (!ours) throw new Refusal("foreignHost");
    const address = clientAddress(request, forwarding);
    if (address === undefined) throw new Refusal("clientGone");
    let user: string | undefined;
    if (password !== undefined) {
      const credentials = request.header("authorization");
      if (credentials === undefined) throw new Refusal("noPassword");
      user = this.#signIn(credentials, password, address.site);
    } else if (!this.#isOpen) throw new Refusal("adminNeedsPassword");
    return { address: String(address), user };
  }

  /** The user name of Basic credentials, which may be any. @throws {Refusal} when they have not the password. */
  #signIn(authorization: string, password: string, site: string): string | undefined {
    const mayTry = this.#tries.has(site) && (this.#trusted.has(site) || this.#allTries.has(""));
    if (!mayTry) throw new Refusal("tooManyTries");
    const encoded = /^basic +([A-Za-z0-9+/=]+) *$/i.exec(authorization)?.[1];
    const [, user = "", given] = /^([^:]*):(.*)$/s.exec(Buffer.from(encoded ?? "", "base64").toString()) ?? [];
    if (!isEqual(given ?? "", password)) {
      this.#tries.take(site);
      this.#allTries.take("");
      throw new Refusal("wrongPassword");
    }
    if (this.#trusted.size < maxTrusted) this.#trusted.add(site);
    return user === "" || isEqual(user, password) ? undefined : user.slice(0, maxUserChars);
  }
}

/** Whether two texts are the same; that takes as long wherever they differ. */
function isEqual(one: string, other: string): boolean {
  const digest = (text: string) => createHash("sha256").update(text).digest();
  return timingSafeEqual(digest(one), digest(other));
}

function checkMethod({ method }: Request, isSession: boolean): void {
  if (method === "GET" || method === "HEAD" || (isSession && method === "DELETE")) return;
  throw new Refusal(isSession ? "notGetHeadOrDelete" : "notGetOrHead");
}

function json(value: unknown): Respond {
  const { headers, body } = respondJson(200, value);
  return secured(headers, body);
}

const secured = (headers: Respond["headers"], body: string): Respond => ({
  kind: "respond",
  status: 200,
  headers: { ...headers, ...security },
  body,
});
