/** A connection to Redis that is cut at any byte of any of its moments. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import { Deadlines } from "../../src/deadline.ts";
import { createLog } from "../../src/log.ts";
import { Bridge } from "../../src/redis/bridge.ts";
import { downChannel, type Endpoint, upChannel } from "../../src/redis/link.ts";
import { parseRedisUrl } from "../../src/redis_url.ts";
import { certify } from "../harness/certificate.ts";
import { Client } from "../harness/client.ts";
import { ProxyProcess } from "../harness/proxy.ts";
import { Listener, RedisServer } from "../harness/redis.ts";
import { type Budget, Relay } from "../harness/relay.ts";
import { eventually } from "../harness/wait.ts";

const numbers = (count: number) => Array.from({ length: count }, (_, i) => String(i));

/** A session that counts what it is told, straight on a bridge. */
class Probe implements Endpoint {
  readonly agentId = "agent";
  readonly traceparent = "";
  readonly claims = "";
  readonly address = "";
  readonly heard: string[] = [];
  readonly backlog = "none";
  gaps = 0;
  deliver(message: { toString(): string }): "taken" {
    this.heard.push(message.toString());
    return "taken";
  }
  gap(): void {
    this.gaps++;
  }
  rejected(): void {
    throw new Error("Redis rejected nothing");
  }
  lost(): void {}
  unheard(): void {}
  fail(error: unknown): void {
    throw error;
  }
}

/** Bytes a connection sends and gets until it serves, about; a cut beyond them comes while it does. */
const handshakeBytes = 260;

Deno.test("At whatever byte a connection to Redis is cut, the bridge comes back whole: 300 cuts", async () => {
  await using redis = await RedisServer.start();
  const control = redis.client();
  const cutters = numbers(10);
  const rounds = 12;
  let cuts = 0;

  async function torment(session: string): Promise<void> {
    using relay = new Relay(redis.port);
    const bridge = new Bridge({
      address: parseRedisUrl(relay.url),
      log: createLog({ level: "silent", format: "json" }),
      outageGraceMs: 3_600_000,
      maxPendingCost: 1_000_000,
      sessionLogs: { maxMessages: 100, ttlMs: 60_000, maxMessageBytes: 1000 },
      onOutage() {},
      onRecovery() {},
    });
    const probe = new Probe();
    const link = bridge.link(session, probe);
    const backend = await Listener.to(redis, upChannel(session));
    await eventually("it flows", () => bridge.available);
    await link.attach(20_000, new Deadlines());
    for (let round = 0; round < rounds; round++) {
      // Each byte of the handshake has its turn in one of the cutters, and so has what comes after it.
      const at = Math.floor(Math.random() * handshakeBytes);
      const budgets: Budget[] = [{ up: at }, { down: at }, { down: Math.floor(at / 8) }];
      relay.budgets = budgets.slice(round % 2);
      cuts += relay.budgets.length;
      const { gaps } = probe;
      relay.cut();
      await eventually("every cut was made", () => relay.budgets.length === 0);
      await eventually("it flows", async () => {
        try {
          await bridge.probe(1000);
          return true;
        } catch {
          return false;
        }
      });
      // What is left of a budget may still cut the connection that carries a message.
      await eventually("it is heard", async () => {
        await control.publish(downChannel(session), `${round}`);
        return probe.heard.at(-1) === `${round}`;
      });
      assert(probe.gaps > gaps, "told of the gap before anything newer");
      await eventually("the client is heard", () => {
        link.publish(`up ${round}`);
        return backend.takeAll().includes(`up ${round}`);
      });
    }
    link.detach();
    await bridge.close(1000);
  }

  await Promise.all(cutters.map(torment));
  assert.equal(cuts, cutters.length * rounds * 2.5);
});

Deno.test("A connection with TLS is proved, cut at any byte of its handshake or after it, and made again", async () => {
  const directory = await Deno.makeTempDir();
  const [key, certificate] = [`${directory}/key.pem`, `${directory}/certificate.pem`];
  const { keyPem, certificatePem } = await certify("localhost");
  await Deno.writeTextFile(key, keyPem);
  await Deno.writeTextFile(certificate, certificatePem);
  const tlsPort = sparePort();
  const tls = [
    "--tls-port",
    String(tlsPort),
    "--tls-cert-file",
    certificate,
    "--tls-key-file",
    key,
    "--tls-auth-clients",
    "no",
  ];
  await using redis = await RedisServer.start(...tls);
  using relay = new Relay(tlsPort);
  const url = `rediss://localhost:${relay.port}`;
  await using proxy = await ProxyProcess.start(url, { DENO_CERT: certificate, REDIS_OUTAGE_GRACE_SECS: "3600" });
  await using client = await Client.connect(proxy.port, "s1");
  const backend = await Listener.to(redis, upChannel("s1"));
  const control = redis.client();
  for (let round = 0; round < 8; round++) {
    relay.budgets = [1, 2, 3].map(() => ({ down: Math.floor(Math.random() * 3500) }));
    relay.cut();
    await eventually("every cut was made", () => relay.budgets.length === 0);
    await eventually("healthy", () => proxy.isHealthy());
    await eventually("it is heard", async () => {
      await control.publish(downChannel("s1"), `${round}`);
      return client.arrived().includes(`${round}`);
    });
    await eventually("the client is heard", () => {
      client.send(`"up ${round}"`);
      return backend.takeAll().includes(`"up ${round}"`);
    });
  }
});
