/** The keys of tokens: read, read again, looked for, and kept while they cannot be had. */

import assert from "node:assert/strict";
import { keyFile, Keys, type KeySource, keyUrl } from "../../src/http/keys.ts";
import { createVerifier } from "../../src/http/token.ts";
import { parsePublicKeys, publicAlgorithms } from "../../src/public_keys.ts";
import { Refusal } from "../../src/replies.ts";
import { certify } from "../harness/certificate.ts";
import { createKeyPair, jwks, type KeyPair, KeyServer } from "../harness/key_server.ts";
import { eventually, soon } from "../harness/wait.ts";

const target = { agentId: "agent", sessionId: "s1" };
const [rsa, pss, ec, ed] = await Promise.all([
  createKeyPair("RS256", "rsa"),
  createKeyPair("PS256", "pss"),
  createKeyPair("ES256", "ec"),
  createKeyPair("EdDSA", "ed"),
]);
const another = await createKeyPair("ES256", "another");

/** The keys of a source, and all that is heard of them. */
class Heard implements AsyncDisposable {
  readonly told: string[] = [];
  readonly results: string[] = [];
  readonly keys: Keys;
  readonly #verify;

  constructor(source: KeySource, first?: string) {
    this.keys = new Keys(source, publicAlgorithms, {
      tell: ({ level, msg, fields }) => this.told.push(`${level}: ${msg} ${JSON.stringify(fields)}`),
      onRead: (result) => this.results.push(result),
    }, first === undefined ? undefined : parsePublicKeys(first, publicAlgorithms));
    this.#verify = createVerifier({ secrets: [], publicAlgorithms, keys: this.keys });
  }

  /** What becomes of a token of a pair, once its key has been looked for. */
  async tries(pair: KeyPair, header?: object): Promise<string> {
    const token = await pair.sign("s1", {}, header);
    const known = this.keys.awaits(token);
    if (known) await soon(known, "a key that was looked for");
    try {
      this.#verify(token, target);
      return "taken";
    } catch (error) {
      assert(error instanceof Refusal, String(error));
      return error.refusal;
    }
  }

  /** Waits until so many readings have ended. */
  reads(count: number): Promise<void> {
    return eventually(`${count} readings`, () => this.results.length >= count);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.keys.close();
  }
}

/** Read so seldom that only what is looked for is read. */
const once = (url: string, soughtEveryMs = 0, timeoutMs?: number): KeySource => ({
  ...keyUrl(url, 3_600_000, timeoutMs),
  soughtEveryMs,
});

Deno.test("Tokens of all algorithms are taken by the keys of a JWK Set, each by its own", async () => {
  await using server = new KeyServer("");
  const answer = Promise.withResolvers<Response>();
  server.answer = () => answer.promise;
  await using heard = new Heard(once(server.url));
  assert.equal(heard.keys.missing, "JWKS_URL");
  assert.equal(await heard.tries(rsa), "keysUnavailable");
  answer.resolve(new Response(jwks(rsa, pss, ec, ed)));
  await soon(heard.keys.available, "keys");
  assert.equal(heard.keys.missing, undefined);
  for (const pair of [rsa, pss, ec, ed]) {
    assert.equal(await heard.tries(pair), "taken", pair.alg);
    assert.equal(await heard.tries(pair, { kid: undefined }), "taken", pair.alg);
    const sameKind = pair === rsa ? pss : rsa;
    assert.match(await heard.tries(pair, { kid: sameKind.kid }), /^(unknownKey|wrongSignature)$/, pair.alg);
  }
  assert.deepEqual(heard.told, [
    'info: public keys are in force {"setting":"JWKS_URL","keys":["rsa RS256","pss PS256","ec ES256","ed EdDSA"],"skipped":[]}',
  ]);
});

Deno.test("A key that a token names is looked for at once, and seldom; until then its fate is open", async () => {
  await using server = new KeyServer(jwks(ec));
  await using heard = new Heard(once(server.url, 3_600_000));
  await soon(heard.keys.available, "keys");
  server.serve(jwks(ec, another));
  const [first, second] = await Promise.all([heard.tries(another), heard.tries(another)]);
  assert.deepEqual([first, second, server.asked], ["taken", "taken", 2]);
  assert.equal(await heard.tries(ed), "keysUnavailable");
  assert.equal(server.asked, 2);
});

Deno.test("A key that was looked for in vain is unknown, and one of another algorithm as well", async () => {
  await using server = new KeyServer(jwks(ec));
  await using heard = new Heard(once(server.url, 3_600_000));
  await soon(heard.keys.available, "keys");
  assert.equal(await heard.tries(rsa, { kid: "ec" }), "unknownKey");
  assert.equal(await heard.tries(rsa, { kid: undefined }), "unknownKey");
  assert.equal(await heard.tries(rsa, { kid: "x".repeat(257) }), "unknownKey");
  assert.equal(server.asked, 1);
  assert.equal(await heard.tries(rsa), "unknownKey");
  assert.equal(await heard.tries(rsa), "unknownKey");
  assert.equal(server.asked, 2);
});

Deno.test("Keys are read again and again: a new one is taken, and one that is gone is not", async () => {
  await using server = new KeyServer(jwks(ec));
  await using heard = new Heard({ ...keyUrl(server.url, 20), soughtEveryMs: 3_600_000 });
  await heard.reads(3);
  server.serve(jwks(another));
  await eventually("a change", () => heard.results.filter((result) => result === "changed").length === 2);
  assert.equal(await heard.tries(another), "taken");
  assert.notEqual(await heard.tries(ec), "taken");
  assert(heard.results.includes("same"));
  assert.equal(heard.told.length, 2);
});

/** Whatever a server of keys may do wrong, and how that is told. */
const faults: readonly (readonly [what: string, answer: KeyServer["answer"], reason: RegExp])[] = [
  ["hangs", () => new Promise<never>(() => {}), /no whole answer within 200 ms/],
  [
    "hangs in the middle of its answer",
    () => new Response(new ReadableStream({ start: (body) => body.enqueue(new TextEncoder().encode('{"keys":[')) })),
    /no whole answer within 200 ms/,
  ],
  ["sends 10 MB", () => new Response(" ".repeat(10_000_000)), /it answers with more than 262144 bytes/],
  [
    "sends without an end",
    () => new Response(new ReadableStream({ pull: (body) => body.enqueue(new Uint8Array(65_536)) })),
    /it answers with more than 262144 bytes/,
  ],
  [
    "redirects",
    () => new Response(null, { status: 302, headers: { Location: "http://127.0.0.1:1/elsewhere" } }),
    /it answers with status 302/,
  ],
  ["sends garbage", () => new Response(Uint8Array.of(0xff, 0, 7)), /must hold public keys/],
  ["sends a page", () => new Response("<!doctype html>"), /must hold public keys/],
  ["sends no keys", () => new Response('{"keys":[]}'), /must hold a public key .*it holds none/],
  ["fails", () => new Response("oh no", { status: 500 }), /it answers with status 500/],
];

for (const [what, answer, reason] of faults) {
  Deno.test(`While the server of keys ${what}, the last ones stay in force, and that is told once`, async () => {
    await using server = new KeyServer(jwks(ec));
    await using heard = new Heard(once(server.url, 0, 200));
    await soon(heard.keys.available, "keys");
    server.answer = answer;
    for (const _ of [1, 2]) assert.equal(await heard.tries(another), "keysUnavailable");
    assert.equal(await heard.tries(ec), "taken");
    assert.deepEqual(heard.results, ["changed", "failed", "failed"]);
    assert.equal(heard.told.length, 2);
    assert.match(heard.told[1]!, /^warn: public keys cannot be read: those read before stay in force /);
    assert.match(heard.told[1]!, reason);
    server.serve(jwks(another));
    assert.equal(await heard.tries(another), "taken");
    assert.match(heard.told[2]!, /^info: public keys are in force .*"another ES256"/);
  });
}

Deno.test("A server of keys that is not there yet, or goes away, is asked again until it is back", async () => {
  const { port } = await (async () => {
    await using server = new KeyServer(jwks(ec));
    return server;
  })();
  await using heard = new Heard(keyUrl(`http://127.0.0.1:${port}/?key=hidden`, 50));
  await heard.reads(2);
  assert.deepEqual(heard.results.slice(0, 2), ["failed", "failed"]);
  assert.equal(await heard.tries(ec), "keysUnavailable");
  assert.match(heard.told[0]!, /^warn: public keys cannot be read: their tokens are refused until they are .*refused/);
  {
    await using _server = new KeyServer(jwks(ec), { port });
    await soon(heard.keys.available, "keys");
    assert.equal(await heard.tries(ec), "taken");
  }
  await eventually("a failure", () => heard.results.at(-1) === "failed");
  assert.equal(await heard.tries(ec), "taken");
  await using _server = new KeyServer(jwks(another), { port });
  await eventually("a change", () => heard.results.at(-1) !== "failed");
  assert.equal(await heard.tries(another), "taken");
  assert.doesNotMatch(heard.told.join(), /hidden/);
});

Deno.test("What a URL's query holds is in no log, however the URL is written", async () => {
  // Nothing listens there any more.
  const server = new KeyServer("");
  await server[Symbol.asyncDispose]();
  for (const end of ["?key=hunter2", "/?key=hunter2(3)#hunter2", "/a%7E/../?key=hunter2:"]) {
    await using heard = new Heard(once(`HTTP://LOCALHOST:${server.port}${end}`));
    await heard.reads(1);
    assert.match(heard.told[0]!, /error sending request for url \(the URL\):|refused/i);
    assert.doesNotMatch(heard.told[0]!, /hunter2/);
  }
});

Deno.test("A server that hangs up on each request is told once, from whichever port it was asked", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const serving = (async () => {
    for await (const connection of listener) {
      await connection.write(new TextEncoder().encode("no HTTP\r\n\r\n"));
      connection.close();
    }
  })();
  {
    await using heard = new Heard(keyUrl(`http://127.0.0.1:${listener.addr.port}/?key=hunter2`, 10));
    await heard.reads(3);
    assert.equal(heard.told.length, 1, heard.told.join("\n"));
    assert.doesNotMatch(heard.told[0]!, /hunter2/);
  }
  listener.close();
  await serving;
});

Deno.test("A server of keys must have a certificate that is trusted", async () => {
  const certified = await certify("keys");
  await using server = new KeyServer(jwks(ec), { certified });
  await using heard = new Heard(once(server.url));
  await heard.reads(1);
  assert.deepEqual(heard.results, ["failed"]);
  assert.match(heard.told[0]!, /certificate/i);
});

Deno.test("A file of keys is read again when it changes, also by another name; a bad one is kept out and told", async () => {
  const dir = await Deno.makeTempDir();
  try {
    // As Kubernetes mounts a Secret: a link to a folder, which is replaced at once.
    const publish = async (version: string, text: string) => {
      await Deno.mkdir(`${dir}/${version}`);
      await Deno.writeTextFile(`${dir}/${version}/keys.pem`, text);
      await Deno.symlink(`${dir}/${version}`, `${dir}/next`);
      await Deno.rename(`${dir}/next`, `${dir}/data`);
    };
    await publish("1", ec.pem);
    const path = `${dir}/data/keys.pem`;
    await using heard = new Heard({ ...keyFile(path), everyMs: 20 }, await Deno.readTextFile(path));
    assert.equal(await heard.tries(ec), "taken");
    await publish("2", another.pem);
    await eventually("a change", () => heard.results.filter((result) => result === "changed").length === 2);
    assert.equal(await heard.tries(another), "taken");
    assert.equal(await heard.tries(ec), "wrongSignature");
    await publish("3", rsa.pem.slice(0, 200));
    await eventually("a failure", () => heard.results.includes("failed"));
    assert.equal(await heard.tries(another), "taken");
    assert.match(heard.told.at(-1)!, /^warn: .*stay in force .*must hold whole PEM blocks/);
    await Deno.remove(`${dir}/data`);
    await eventually("another failure", () => /No such file/.test(heard.told.at(-1)!));
    await publish("4", jwks(ed));
    await eventually("a change", () => heard.told.at(-1)!.includes("ed EdDSA"));
    assert.equal(await heard.tries(ed), "taken");
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("What is under way when the keys are closed ends, and nothing is read after it", async () => {
  await using server = new KeyServer(jwks(ec));
  const asked = Promise.withResolvers<void>();
  const release = Promise.withResolvers<Response>();
  const heard = new Heard(once(server.url));
  await soon(heard.keys.available, "keys");
  server.answer = () => {
    asked.resolve();
    return release.promise;
  };
  const outcome = heard.tries(another);
  await soon(asked.promise, "a request");
  await soon(heard.keys.close(), "the end");
  assert.equal(await outcome, "keysUnavailable");
  release.resolve(new Response());
  assert.deepEqual(heard.results, ["changed"]);
});
