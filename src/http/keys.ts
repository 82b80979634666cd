/**
 * The public keys in force: read at the start and again and again, from a file or from an identity provider, and at
 * once for a token that names a key which is not among them. What cannot be read or used changes nothing, and is told.
 */

import { Buffer } from "node:buffer";
import { backoffMs } from "../backoff.ts";
import type { PublicKeySettings } from "../config.ts";
import { after } from "../deadline.ts";
import {
  maxKeysBytes,
  parsePublicKeys,
  type PublicAlgorithm,
  type PublicKey,
  type PublicKeys,
} from "../public_keys.ts";
import { Refusal } from "../replies.ts";
import type { Told } from "../told.ts";
import { type CheckSignature, decodeToken, maxTokenChars, signatureCheck } from "./signature.ts";
import { Turns } from "./turns.ts";

/** Where keys are read from. */
export interface KeySource {
  /** The setting that names it. */
  readonly setting: PublicKeySettings["source"]["setting"];
  /** What it holds now; rejects with a reason that holds nothing secret. Bounded in size and time. */
  readonly read: (signal: AbortSignal) => Promise<string>;
  /** How often it is read. */
  readonly everyMs: number;
  /** How often at most it is read for the sake of keys that tokens name. */
  readonly soughtEveryMs: number;
}

/** How long an identity provider may take for its whole answer. */
const fetchTimeoutMs = 5000;
/** How often a key that a token names is looked for, and a file is read. */
const soughtEveryMs = 30_000;
const fileEveryMs = 5000;
const fileSoughtEveryMs = 1000;
/** Delays after a failure. */
const firstRetryMs = 1000;
const maxRetryMs = 30_000;
/** Part of an interval by which readers are spread: the workers of many proxies. */
const spread = 0.1;

/** A file, which is read as a whole: a mounted Secret is replaced by another file, which no watch of the old one sees. */
export const keyFile = (path: string): KeySource => ({
  setting: "JWT_PUBLIC_KEY_FILE",
  read: (signal) => Deno.readTextFile(path, { signal }),
  everyMs: fileEveryMs,
  soughtEveryMs: fileSoughtEveryMs,
});

/** A JWK Set of an identity provider. */
export const keyUrl = (url: string, everyMs: number, timeoutMs?: number): KeySource => ({
  setting: "JWKS_URL",
  read: (signal) => fetchKeys(url, signal, timeoutMs),
  everyMs,
  soughtEveryMs,
});

/**
 * The text at a URL. No redirect is followed: the URL is what the operator trusts.
 * @throws {Error} with a reason, when it is no 200, takes too long, or is too large.
 */
export async function fetchKeys(url: string, signal?: AbortSignal, timeoutMs = fetchTimeoutMs): Promise<string> {
  const late = AbortSignal.timeout(timeoutMs);
  const { protocol, hostname, port } = new URL(url);
  const client = Deno.createHttpClient({
    // No connection is kept: minutes go by until the next time.
    poolMaxIdlePerHost: 0,
    // Without TLS the answer must not come from the proxy that HTTP_PROXY or ALL_PROXY names, by way of a network.
    ...protocol === "http:" ? { proxy: { transport: "tcp", hostname, port: Number(port || 80) } } : {},
  });
  try {
    const response = await fetch(url, {
      client,
      redirect: "manual",
      signal: signal ? AbortSignal.any([signal, late]) : late,
      headers: { Accept: "application/jwk-set+json, application/json" },
    });
    if (response.status !== 200) {
      await response.body?.cancel();
      throw new Error(`it answers with status ${response.status}`);
    }
    return await readBounded(response.body);
  } catch (error) {
    if (late.aborted) throw new Error(`no whole answer within ${timeoutMs} ms`);
    const { cause, message } = error as Error;
    throw new Error(withoutPlaces(cause instanceof Error ? cause.message : message));
  } finally {
    client.close();
  }
}

/**
 * What fetch says, without the URL, which it spells in another way than the setting, and whose query may be a secret;
 * and without the port of our side, which would make each failure a new one.
 */
const withoutPlaces = (message: string): string =>
  message.replaceAll(/https?:\/\/\S*?(?=\)?:?(\s|$))/gi, "the URL").replace(/ from \S+:\d+ for /, " for ");

async function readBounded(body: ReadableStream<Uint8Array> | null): Promise<string> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of body ?? []) {
    bytes += chunk.length;
    // Leaving the loop cancels the body.
    if (bytes > maxKeysBytes) throw new Error(`it answers with more than ${maxKeysBytes} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString();
}

/** A key's name is remembered in order to be looked for; a longer one is no name of ours. */
const maxKidChars = 256;
/** Names of keys that are remembered. */
const maxRemembered = 1000;

/** What a proxy tells of its keys, and counts. */
export interface KeysListener {
  readonly tell: (told: Told) => void;
  readonly onRead: (result: "changed" | "same" | "failed") => void;
}

/** The keys of one proxy. */
export class Keys {
  readonly #source: KeySource;
  readonly #algorithms: readonly PublicAlgorithm[];
  readonly #listener: KeysListener;
  readonly #stop = new AbortController();
  readonly #first = Promise.withResolvers<void>();
  readonly #turns = new Turns();
  #set: KeySet | undefined;
  /** Names that tokens had, and no key; and those of them that a set read since did not have either. */
  readonly #sought = new Set<string>();
  readonly #absent = new Set<string>();
  #soughtAtMs = -Infinity;
  #failures = 0;
  #failure: string | undefined;
  #reading: Promise<void> | undefined;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** Begins to read, unless it has the `first` keys, and goes on until it is closed. */
  constructor(
    source: KeySource,
    algorithms: readonly PublicAlgorithm[],
    listener: KeysListener,
    first?: PublicKeys,
  ) {
    this.#source = source;
    this.#algorithms = algorithms;
    this.#listener = listener;
    if (first) {
      this.#take(first);
      this.#readLater();
    } else void this.#read();
  }

  /** Resolves when there are keys. */
  get available(): Promise<void> {
    return this.#first.promise;
  }

  /** The setting whose keys have not come yet; undefined when they have. */
  get missing(): string | undefined {
    return this.#set === undefined ? this.#source.setting : undefined;
  }

  /**
   * What to wait for before a token is verified: that its key has been looked for, as there is none of its name. Never
   * rejects; resolves for few tokens at a time, as many may wait. Undefined when there is nothing to wait for.
   */
  awaits(token: string): Promise<void> | undefined {
    const kid = this.#set && unverifiedKid(token, this.#algorithms);
    if (kid === undefined || kid.length > maxKidChars || this.#set?.has(kid)) return undefined;
    if (this.#reading === undefined) {
      const nowMs = performance.now();
      if (nowMs - this.#soughtAtMs < this.#source.soughtEveryMs) return undefined;
      this.#soughtAtMs = nowMs;
    }
    if (this.#sought.size < maxRemembered) this.#sought.add(kid);
    return this.#inTurn(this.#read());
  }

  async #inTurn(read: Promise<void>): Promise<void> {
    await read;
    await this.#turns.take();
  }

  /**
   * What checks a signature of an algorithm by the key of a name, or by any key.
   * @throws {Refusal} when no key fits.
   */
  checksFor(algorithm: PublicAlgorithm, kid: string | undefined): readonly CheckSignature[] {
    const set = this.#set;
    if (set === undefined) throw new Refusal("keysUnavailable");
    const checks = set.checksFor(algorithm, kid);
    if (checks.length > 0) return checks;
    // Whether there is such a key by now is not known while it may not be looked for.
    const isKnown = kid === undefined || kid.length > maxKidChars || set.has(kid) || this.#absent.has(kid);
    throw new Refusal(isKnown ? "unknownKey" : "keysUnavailable");
  }

  /** Reads no more. */
  async close(): Promise<void> {
    this.#stop.abort();
    clearTimeout(this.#timer);
    await this.#reading;
  }

  /** Reads now, or takes part in the reading that is under way. Never rejects. */
  #read(): Promise<void> {
    return this.#reading ??= this.#readNow().finally(() => {
      this.#reading = undefined;
      this.#readLater();
    });
  }

  async #readNow(): Promise<void> {
    clearTimeout(this.#timer);
    const { signal } = this.#stop;
    try {
      const text = await this.#source.read(signal);
      this.#take(parsePublicKeys(text, this.#algorithms));
    } catch (error) {
      if (!signal.aborted) this.#fail((error as Error).message);
    }
  }

  #readLater(): void {
    if (this.#stop.signal.aborted) return;
    const { everyMs } = this.#source;
    const delayMs = this.#failures === 0
      ? everyMs * (1 - spread * Math.random())
      : backoffMs(this.#failures - 1, firstRetryMs, Math.min(everyMs, maxRetryMs));
    this.#timer = after(delayMs, () => void this.#read());
  }

  #take({ keys, skipped }: PublicKeys): void {
    const isNew = this.#set === undefined || !this.#set.holds(keys);
    this.#listener.onRead(isNew ? "changed" : "same");
    if (isNew) this.#set = new KeySet(keys);
    if (isNew || this.#failure !== undefined) {
      const names = keys.map(({ kid, algorithms }) => `${kid?.slice(0, 64) ?? "(no kid)"} ${algorithms.join(" ")}`);
      this.#tell("info", "public keys are in force", { keys: names, skipped });
    }
    this.#failure = undefined;
    this.#failures = 0;
    for (const kid of this.#sought) {
      if (this.#set!.has(kid)) continue;
      if (this.#absent.size >= maxRemembered) this.#absent.clear();
      this.#absent.add(kid);
    }
    this.#sought.clear();
    this.#first.resolve();
  }

  #fail(reason: string): void {
    this.#listener.onRead("failed");
    this.#failures++;
    this.#sought.clear();
    if (reason === this.#failure) return;
    this.#failure = reason;
    const consequence = this.#set ? "those read before stay in force" : "their tokens are refused until they are";
    this.#tell("warn", `public keys cannot be read: ${consequence}`, { reason });
  }

  #tell(level: Told["level"], msg: string, fields: Told["fields"]): void {
    const { setting } = this.#source;
    this.#listener.tell({ level, msg, fields: { setting, ...fields }, sockets: undefined, counted: undefined });
  }
}

/** Keys, by what they are for. */
export class KeySet {
  readonly #keys: readonly PublicKey[];
  readonly #kids: ReadonlySet<string | undefined>;
  readonly #checks: readonly (PublicKey & { readonly check: ReadonlyMap<PublicAlgorithm, CheckSignature> })[];

  constructor(keys: readonly PublicKey[]) {
    this.#keys = keys;
    this.#kids = new Set(keys.map(({ kid }) => kid));
    this.#checks = keys.map((key) => ({
      ...key,
      check: new Map(key.algorithms.map((algorithm) => [algorithm, signatureCheck(algorithm, key.pem)])),
    }));
  }

  /** Whether a key has this name. */
  has(kid: string): boolean {
    return this.#kids.has(kid) || this.#keys.some(({ anyKid }) => anyKid);
  }

  /** Whether these are its keys. */
  holds(keys: readonly PublicKey[]): boolean {
    return JSON.stringify(keys) === JSON.stringify(this.#keys);
  }

  /** What checks a signature of an algorithm by the key of a name, or by any key; empty when no key fits. */
  checksFor(algorithm: PublicAlgorithm, kid: string | undefined): CheckSignature[] {
    return this.#checks.flatMap((key) => {
      const check = key.anyKid || kid === undefined || kid === key.kid ? key.check.get(algorithm) : undefined;
      return check ? [check] : [];
    });
  }
}

/** The name of a public key in a token's header; undefined where it names none, or no such key is wanted. */
function unverifiedKid(token: string, algorithms: readonly string[]): string | undefined {
  if (token.length > maxTokenChars) return undefined;
  try {
    const { alg, kid } = decodeToken(token).header;
    return algorithms.includes(alg as string) && typeof kid === "string" ? kid : undefined;
  } catch {
    return undefined; // the verifier says what is wrong with it
  }
}
