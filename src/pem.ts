/**
 * Keys and certificates. PEM files are read strictly: what reads them later, at each connection, skips what it does not
 * understand, or ends the process, so a file that is damaged has to be found out at the start.
 */

import { Buffer } from "node:buffer";
import { createPrivateKey, createPublicKey, X509Certificate } from "node:crypto";

/** What a file is to hold. */
export type PemKind = "CERTIFICATE" | "PRIVATE KEY";

/** A block of a file, with its BEGIN and END. */
export interface Block {
  /** As in `PUBLIC KEY`. */
  readonly label: string;
  /** Where it begins, counted from 1. */
  readonly line: number;
  /** The block alone, with its first line and its last. */
  readonly text: string;
}

/**
 * What is wrong with a PEM file that must hold certificates, or a private key, as a sentence that begins with "must" and
 * holds nothing of the file but the number of a line; undefined when every block can be used.
 */
export function faultOfPem(kind: PemKind, text: string): string | undefined {
  const blocks = parseBlocks(text);
  if (typeof blocks === "string") return blocks;
  const wanted = blocks.filter(({ label }) => label.endsWith(kind));
  if (wanted.length === 0) return `must hold a ${kind} as PEM`;
  for (const block of wanted) {
    const fault = kind === "CERTIFICATE" ? faultOfCertificate(block) : faultOfKey(block);
    if (fault !== undefined) {
      return `must hold ${kind}s that can be used: the block that begins in line ${block.line} ${fault}`;
    }
  }
}

/** What keeps a key from being used with certificates, of which the first is its own. Each file is whole by itself. */
export function faultOfPair(cert: string, key: string): string | undefined {
  if (!new X509Certificate(cert).checkPrivateKey(createPrivateKey(key))) return "must be the key of REDIS_CERT_FILE";
  try {
    Deno.createHttpClient({ cert, key }).close();
  } catch (error) {
    return `must be a key that TLS can use with REDIS_CERT_FILE: ${(error as Error).message}`;
  }
}

/** All blocks, or what is wrong with one of them. Text around blocks is a comment. */
export function parseBlocks(text: string): Block[] | string {
  const blocks: Block[] = [];
  let open: { label: string; line: number; body: string[] } | undefined;
  for (const [i, untrimmed] of text.split("\n").entries()) {
    const line = untrimmed.trim();
    const [, edge, label] = /^-----(BEGIN|END) ([A-Z0-9 ]+)-----$/.exec(line) ?? [];
    const at = `line ${i + 1}`;
    if (edge === undefined && /-{5}\s*[A-Z]|[A-Z]\s*-{5}/.test(line)) {
      return `must have each BEGIN and END on a line of its own, between five hyphens: ${at} is another one`;
    }
    if (edge === "BEGIN") {
      if (open) return `must hold whole PEM blocks: the one that begins in line ${open.line} has no END`;
      open = { label: label!, line: i + 1, body: [] };
    } else if (edge === "END") {
      if (open === undefined) return `must hold whole PEM blocks: the one that ends in ${at} has no BEGIN`;
      if (open.label !== label) {
        return `must hold whole PEM blocks: the one that begins in line ${open.line} ends as another`;
      }
      const { body, ...block } = open;
      blocks.push({ ...block, text: `-----BEGIN ${label}-----\n${body.join("\n")}\n-----END ${label}-----\n` });
      open = undefined;
    } else open?.body.push(line);
  }
  return open ? `must hold whole PEM blocks: the one that begins in line ${open.line} has no END` : blocks;
}

function faultOfCertificate({ label, text }: Block): string | undefined {
  if (label !== "CERTIFICATE") return `is a ${label}, which TLS here does not read`;
  try {
    new X509Certificate(text);
    // It has another parser, and is what connections are made with.
    Deno.createHttpClient({ caCerts: [text] }).close();
  } catch {
    return "is damaged";
  }
}

function faultOfKey({ label, text }: Block): string | undefined {
  if (label === "ENCRYPTED PRIVATE KEY" || /^Proc-Type:.*ENCRYPTED/m.test(text)) return "is locked with a password";
  try {
    createPrivateKey(text);
  } catch {
    return "is damaged";
  }
}

/**
 * Whether a text is a key of an asymmetric kind, public or private, a certificate, or a set of keys, as it is published:
 * PEM, JWK, JWKS, a line of OpenSSH, or any of these or DER in Base64, which is also how an identity provider shows a
 * public key; or DER in hexadecimal digits.
 */
export function isAsymmetricKey(text: string): boolean {
  const decoded = Buffer.from(text, "base64");
  return [text, decoded.toString()].some((form) =>
    form.includes("-----BEGIN ") || /^(ssh-|ecdsa-)\S+ AAAA/.test(form) || isJwk(form)
  ) || [decoded, Buffer.from(text.replaceAll(/[\s:]/g, ""), "hex")].some(isKeyInDer);
}

function isJwk(text: string): boolean {
  if (!/^\s*[[{]/.test(text)) return false;
  try {
    const value = [JSON.parse(text)].flat()[0];
    return "kty" in value || "keys" in value;
  } catch {
    return false; // some other text that begins with a brace
  }
}

/** What reads each form of DER that holds a public key. */
const readers: readonly ((key: Buffer<ArrayBuffer>) => unknown)[] = [
  (key) => createPublicKey({ key, format: "der", type: "spki" }),
  (key) => createPublicKey({ key, format: "der", type: "pkcs1" }),
  (key) => new X509Certificate(key),
];

function isKeyInDer(key: Buffer<ArrayBuffer>): boolean {
  if (key[0] !== 0x30) return false;
  return readers.some((read) => {
    try {
      read(key);
      return true;
    } catch {
      return false; // random bytes
    }
  });
}
