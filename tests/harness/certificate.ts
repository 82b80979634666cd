/** Certificates for tests, made with what Deno has: the gate needs no openssl. */

/** A key and its certificate. */
export interface Certified {
  readonly name: string;
  readonly key: CryptoKey;
  /** Both as PEM. */
  readonly keyPem: string;
  readonly certificatePem: string;
}

const algorithm = { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" };
const dayMs = 86_400_000;

/** One element of DER: its tag, the length of its content, and the content. */
function der(tag: number, ...parts: readonly (Uint8Array | readonly number[])[]): Uint8Array<ArrayBuffer> {
  const content = parts.flatMap((part) => [...part]);
  const { length } = content;
  const size = length < 0x80 ? [length] : length < 0x100 ? [0x81, length] : [0x82, length >> 8, length & 0xff];
  return Uint8Array.from([tag, ...size, ...content]);
}

const sequence = (...parts: readonly (Uint8Array | readonly number[])[]) => der(0x30, ...parts);
const ascii = (text: string) => new TextEncoder().encode(text);
const nameOf = (name: string) => sequence(der(0x31, sequence(der(6, [0x55, 4, 3]), der(0x0c, ascii(name)))));
/** A time as UTCTime has it: 261129191452Z. */
const utcTime = (ms: number) => der(0x17, ascii(`${new Date(ms).toISOString().replace(/\D/g, "").slice(2, 14)}Z`));
const sha256WithRsa = sequence(der(6, [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 0x0b]), der(5));

function pem(label: string, bytes: ArrayBuffer | Uint8Array): string {
  const lines = new Uint8Array(bytes).toBase64().match(/.{1,64}/g)!;
  return `-----BEGIN ${label}-----\n${lines.join("\n")}\n-----END ${label}-----\n`;
}

/**
 * A key of 2048 bits with a certificate for localhost and 127.0.0.1, valid from yesterday until the day after tomorrow.
 * `issuer` signs it; without one it signs itself. `authority`: whether it may sign others.
 */
export async function certify(name: string, options: { issuer?: Certified; authority?: boolean } = {}) {
  const { publicKey, privateKey } = await crypto.subtle.generateKey(
    { ...algorithm, modulusLength: 2048, publicExponent: Uint8Array.of(1, 0, 1) },
    true,
    ["sign", "verify"],
  );
  const yes = der(1, [0xff]);
  const basicConstraints = sequence(
    der(6, [0x55, 0x1d, 0x13]),
    yes,
    der(4, sequence(...(options.authority ? [yes] : []))),
  );
  const alternativeNames = sequence(
    der(6, [0x55, 0x1d, 0x11]),
    der(4, sequence(der(0x82, ascii("localhost")), der(0x87, [127, 0, 0, 1]))),
  );
  const body = sequence(
    der(0xa0, der(2, [2])),
    // A positive number of its own.
    der(2, [1, ...crypto.getRandomValues(new Uint8Array(8))]),
    sha256WithRsa,
    nameOf(options.issuer?.name ?? name),
    sequence(utcTime(Date.now() - dayMs), utcTime(Date.now() + 2 * dayMs)),
    nameOf(name),
    new Uint8Array(await crypto.subtle.exportKey("spki", publicKey)),
    der(0xa3, sequence(basicConstraints, alternativeNames)),
  );
  const signature = await crypto.subtle.sign(algorithm, options.issuer?.key ?? privateKey, body);
  return {
    name,
    key: privateKey,
    keyPem: pem("PRIVATE KEY", await crypto.subtle.exportKey("pkcs8", privateKey)),
    certificatePem: pem("CERTIFICATE", sequence(body, sha256WithRsa, der(3, [0], new Uint8Array(signature)))),
  } satisfies Certified;
}
