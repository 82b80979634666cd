/** What single steps of the path cost inside Deno: `deno bench --allow-net=127.0.0.1 --allow-env bench/steps_bench.ts`. */

import { jwtVerify, SignJWT } from "jose";
import { Counter, Registry } from "prom-client";
import { createVerifier } from "../src/http/token.ts";

const text = JSON.stringify({ s: "000123", n: "00000042", t: "0001234567", d: "x".repeat(11) });
const counter = new Counter({ name: "steps", help: "Steps.", registers: [new Registry()] });
const secret = "s".repeat(32);
const algorithm = { name: "HMAC", hash: "SHA-256" };
const bytes = new TextEncoder().encode(secret);
const key = await crypto.subtle.importKey("raw", bytes, algorithm, false, ["sign", "verify"]);
const claims = { session_id: "s-1", iat: 1 };
const target = { agentId: "agent", sessionId: "s-1" };
const verify = createVerifier({ secrets: [secret] });
const token = await new SignJWT(claims).setProtectedHeader({ alg: "HS256" }).sign(key);
const socket = await openSocket();

async function openSocket(): Promise<WebSocket> {
  const { promise, resolve } = Promise.withResolvers<WebSocket>();
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, (request) => {
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.onopen = () => resolve(socket);
    return response;
  });
  new WebSocket(`ws://127.0.0.1:${server.addr.port}`);
  return await promise;
}

Deno.bench("JSON.parse of 64 bytes", () => {
  JSON.parse(text);
});
Deno.bench("Date.now()", () => {
  Date.now();
});
Deno.bench("a counter's inc()", () => {
  counter.inc();
});
Deno.bench("bufferedAmount of an open socket", () => {
  void socket.bufferedAmount;
});
Deno.bench("a token verified", () => {
  verify(token, target);
});
Deno.bench("a token verified by jose, in another thread", async () => {
  await jwtVerify(token, key, { algorithms: ["HS256"] });
});
