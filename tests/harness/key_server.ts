/** Keys of identity providers, and a server that has them: a real one, on the loopback. */

import { exportJWK, exportSPKI, generateKeyPair, type JWK, SignJWT } from "jose";
import type { Certified } from "./certificate.ts";
import type { Claims } from "./token.ts";

/** A key pair of an identity provider. */
export interface KeyPair {
  readonly alg: string;
  readonly kid: string;
  readonly publicKey: Awaited<ReturnType<typeof generateKeyPair>>["publicKey"];
  /** As a JWK Set has it, with `kid`, `alg` and `use`. */
  readonly jwk: JWK;
  readonly pem: string;
  /** A token for a session that it has signed; `iat` is now unless given. */
  sign(sessionId: string, claims?: Claims, header?: object): Promise<string>;
}

/** A new key pair. */
export async function createKeyPair(alg: string, kid: string): Promise<KeyPair> {
  const { publicKey, privateKey } = await generateKeyPair(alg, { extractable: true });
  return {
    ...{ alg, kid, publicKey },
    jwk: { ...await exportJWK(publicKey), kid, alg, use: "sig" },
    pem: `${await exportSPKI(publicKey)}\n`,
    sign: (sessionId, claims = {}, header = {}) =>
      new SignJWT({ session_id: sessionId, iat: Math.floor(Date.now() / 1000), ...claims })
        .setProtectedHeader({ alg, kid, ...header }).sign(privateKey),
  };
}

/** A JWK Set with the public keys of some pairs, as text. */
export const jwks = (...pairs: readonly KeyPair[]): string => JSON.stringify({ keys: pairs.map(({ jwk }) => jwk) });

/** A server of keys. */
export class KeyServer implements AsyncDisposable {
  readonly #end = new AbortController();
  readonly #server: Deno.HttpServer<Deno.NetAddr>;
  readonly url: string;
  /** Requests so far. */
  asked = 0;
  /** What it answers. */
  answer: (request: Request) => Response | Promise<Response>;

  /** On `port`, or a free one; over TLS with a certificate. */
  constructor(text: string, { port = 0, certified = undefined as Certified | undefined } = {}) {
    this.answer = () => new Response(text);
    const tls = certified && { cert: certified.certificatePem, key: certified.keyPem };
    const { signal } = this.#end;
    const options = { hostname: "127.0.0.1", port, signal, onListen() {}, ...tls };
    this.#server = Deno.serve(options, (request) => {
      this.asked++;
      return this.answer(request);
    }) as Deno.HttpServer<Deno.NetAddr>;
    this.url = `${certified ? "https" : "http"}://127.0.0.1:${this.#server.addr.port}/jwks.json`;
  }

  get port(): number {
    return this.#server.addr.port;
  }

  /** It answers with this text from now on. */
  serve(text: string): void {
    this.answer = () => new Response(text);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // It may owe answers that never come.
    this.#end.abort();
    await this.#server.finished;
  }
}
