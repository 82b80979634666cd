/** Handshakes as spans, as a receiver of OTLP gets them from a proxy, and the trace that goes on in an inbox. */

import assert from "node:assert/strict";
import { Client } from "../harness/client.ts";
import { entriesOf } from "../harness/entries.ts";
import { onEachEngine, ProxyProcess } from "../harness/proxy.ts";
import { disconnect, RedisServer } from "../harness/redis.ts";
import { mint } from "../harness/token.ts";
import { eventually } from "../harness/wait.ts";
import { handshake, request } from "../harness/wire.ts";

/** A span in OTLP's JSON, as far as it is looked at. */
interface SentSpan {
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly name: string;
  readonly kind: number;
  readonly attributes: readonly { key: string; value: { stringValue?: string } }[];
  readonly events?: readonly { name: string }[];
  readonly status?: { code?: number };
}

/** Receives OTLP over HTTP. */
class Receiver implements AsyncDisposable {
  readonly #server: Deno.HttpServer<Deno.NetAddr>;
  readonly spans: SentSpan[] = [];
  /** All that was sent, whatever it was about. */
  text = "";

  constructor() {
    this.#server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
      const text = await request.text();
      this.text += text;
      if (new URL(request.url).pathname === "/v1/traces") {
        for (const { scopeSpans } of JSON.parse(text).resourceSpans) {
          for (const { spans } of scopeSpans) this.spans.push(...spans);
        }
      }
      return Response.json({});
    });
  }

  get env() {
    return {
      OTEL_DENO: "true",
      OTEL_EXPORTER_OTLP_ENDPOINT: `http://127.0.0.1:${this.#server.addr.port}`,
      OTEL_EXPORTER_OTLP_PROTOCOL: "http/json",
      OTEL_BSP_SCHEDULE_DELAY: "100",
    };
  }

  /** The spans of handshakes for a session, when there are so many. */
  async of(session: string, count = 1): Promise<SentSpan[]> {
    const mine = () => this.spans.filter((span) => attributes(span)["session.id"] === session);
    await eventually(`${count} spans of ${session}`, () => mine().length === count);
    return mine();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#server.shutdown();
  }
}

const attributes = (span: SentSpan): Record<string, string | undefined> =>
  Object.fromEntries(span.attributes.map(({ key, value }) => [key, value.stringValue]));

const traceId = "0af7651916cd43dd8448eb211c80319c";
const traceparent = `00-${traceId}-b7ad6b7169203331-01`;

onEachEngine("With OTEL_DENO a handshake is a span, and the inbox goes on with its trace", async (engine) => {
  for (const WORKERS of ["1", "2"]) {
    await using receiver = new Receiver();
    await using redis = await RedisServer.start();
    await using proxy = await ProxyProcess.start(redis, {
      ...engine,
      ...receiver.env,
      WORKERS,
      INBOX: "true",
      REDIS_OUTAGE_GRACE_SECS: "0",
    });
    const tokens = await Promise.all(["s:1", "s2", "s3"].map((id) => mint(id)));
    const client = await Client.connect(proxy.port, "s:1", { token: tokens[0]!, headers: { traceparent } });
    const [span] = await receiver.of("s:1") as [SentSpan];
    assert.equal(span.name, "GET /{agent_id}/ws/{session_id}");
    assert.equal(span.kind, 2, "a server's");
    assert.equal(span.traceId, traceId);
    assert.equal(span.parentSpanId, "b7ad6b7169203331");
    const { "http.request.method": method, "http.route": route, "wsproxy.agent.id": agent, ...more } = attributes(span);
    assert.deepEqual([method, route, agent], ["GET", "/{agent_id}/ws/{session_id}", "agent"]);
    assert.equal(more["http.response.status_code"], "101");
    assert.deepEqual(span.events?.map(({ name }) => name), ["wsproxy.token_verified", "wsproxy.subscribed"]);
    assert.notEqual(span.status?.code, 2);

    // Without a parent, or with one that is none, it begins a trace.
    const second = await Client.connect(proxy.port, "s2", { token: tokens[1]!, headers: { traceparent: "00-0-0-01" } });
    const [own] = await receiver.of("s2") as [SentSpan];
    assert.notEqual(own.traceId, traceId);
    assert(!own.parentSpanId);
    const control = redis.client();
    assert.deepEqual((await entriesOf(control)).map(({ traceparent }) => traceparent), [
      `00-${traceId}-${span.spanId}-01`,
      `00-${own.traceId}-${own.spanId}-01`,
    ]);

    // What is refused is the client's own matter, and what we cannot do is an error.
    const path = "/agent/ws/s3";
    const wrong = await handshake("another");
    assert.equal((await request(proxy.port, path, { headers: wrong })).status, 403);
    const [refused] = await receiver.of("s3") as [SentSpan];
    assert.equal(attributes(refused)["wsproxy.refusal"], "wrongSession");
    assert.equal(attributes(refused)["http.response.status_code"], "403");
    assert.notEqual(refused.status?.code, 2);
    assert(!refused.events?.length);
    for (const one of [client, second]) await one.close();
    await disconnect(control);
    await redis.kill();
    await eventually("Redis is missed", async () => (await request(proxy.port, "/health")).status === 503);
    assert.equal((await request(proxy.port, path, { headers: await handshake("s3") })).status, 503);
    const [, failed] = await receiver.of("s3", 2) as [SentSpan, SentSpan];
    assert.equal(attributes(failed)["wsproxy.refusal"], "redisUnavailable");
    assert.equal(attributes(failed)["error.type"], "503");
    assert.equal(failed.status?.code, 2);
    for (const token of [...tokens, wrong["Authorization"]!.slice(7)]) assert(!receiver.text.includes(token));
  }
});

onEachEngine("A token that a client puts into its address is cut, with Deno's limit for attributes", async (engine) => {
  await using receiver = new Receiver();
  await using redis = await RedisServer.start();
  const env = { ...engine, ...receiver.env, OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT: "64" };
  await using proxy = await ProxyProcess.start(redis, env);
  const token = await mint("s1");
  for (const kind of ["ws", "sse"]) {
    const headers = { ...kind === "ws" ? await handshake("s1") : {}, Authorization: "" };
    assert.equal((await request(proxy.port, `/agent/${kind}/s1?token=${token}`, { headers })).status, 401);
  }
  await receiver.of("s1", 2);
  assert(!receiver.text.includes(token));
  assert(!receiver.text.includes(token.slice(-20)));
});
