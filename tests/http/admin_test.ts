/** What the page of ADMIN_PORT asks for, and who may ask. tests/browser/admin.ts has the page itself. */

import assert from "node:assert/strict";
import { sparePort } from "../../scripts/spare_port.ts";
import type { SessionReport, SocketReport } from "../../src/report.ts";
import { Busiest } from "../../src/session/busiest.ts";
import type { Session } from "../../src/session/session.ts";
import { Client } from "../harness/client.ts";
import { type Env, onEachEngine, ProxyProcess } from "../harness/proxy.ts";
import { RedisServer } from "../harness/redis.ts";
import { eventually, soon } from "../harness/wait.ts";
import { handshake, request, type RequestOptions } from "../harness/wire.ts";

/** A proxy with a port for operators. */
async function startWithAdmin(redis: RedisServer, env: Env) {
  const port = sparePort();
  const proxy = await ProxyProcess.start(redis, { ADMIN_PORT: String(port), ...env });
  const ask = (path: string, options: RequestOptions = {}) => request(port, path, options);
  const read = async (path: string) => JSON.parse((await ask(path)).body);
  return { proxy, ask, read, [Symbol.asyncDispose]: () => proxy[Symbol.asyncDispose]() };
}

onEachEngine("A session that an operator ends while it connects is refused at once", async (engine) => {
  await using redis = await RedisServer.start();
  await using admin = await startWithAdmin(redis, engine);
  const { proxy, ask } = admin;
  redis.signal("SIGSTOP");
  const refused = request(proxy.port, "/agent/ws/s1", { headers: await handshake("s1") });
  await eventually("it is ended", async () => (await ask("/sessions/s1", { method: "DELETE" })).status === 200);
  assert.match((await refused).body, /closed by an operator/);
  assert.equal((await refused).status, 403);
  redis.signal("SIGCONT");
});

onEachEngine("Operators see the busiest sessions and their sockets, and end one", async (engine) => {
  for (const WORKERS of ["1", "2"]) {
    await using redis = await RedisServer.start();
    await using admin = await startWithAdmin(redis, { ...engine, WORKERS });
    const { proxy, ask, read } = admin;
    assert.deepEqual((await read("/sessions")).sessions, []);
    const startedMs = Date.now();
    const id = "tenant:1/ü 7";
    // So many sockets that every worker has one.
    const loud = await Promise.all(Array.from({ length: 20 }, () => Client.connect(proxy.port, id)));
    const expiresSecs = Math.floor(Date.now() / 1000) + 600;
    const quiet = await Client.connect(proxy.port, "quiet", {
      agent: "other",
      resume: "0",
      claims: { exp: expiresSecs },
    });
    const control = redis.client();
    const [position] = await control.fcall("wsproxy_send", 1, "session:quiet:down", "12345") as [string];
    await control.publish(`session:${id}:down`, "x".repeat(1000));
    for (const client of loud) {
      await client.next();
      client.send('"abc"');
    }
    await eventually(
      "all is counted",
      async () => /^wsproxy_messages_up_total 20$/m.test((await ask("/metrics")).body),
    );
    let sessions: SessionReport[] = [];
    // What had moved at a look is no rate of the next one, and a slow machine may come to look again.
    let isRated = false;
    await eventually("all is seen", async () => {
      ({ sessions } = await read("/sessions"));
      const [first, second] = sessions;
      isRated ||= second !== undefined && first!.per_sec > second.per_sec && second.per_sec > 0;
      return sessions.length === 2 && sessions[0]!.up_chars === 100 && sessions[1]!.down_bytes > 5;
    });
    assert.deepEqual(sessions.map(({ session }) => session), [id, "quiet"]);
    const [first] = sessions as [SessionReport, SessionReport];
    assert.equal(first.sockets, 20);
    assert.equal(first.down_bytes, 20_000);
    assert.equal(first.agent, "agent");
    assert.equal(first.unsent_bytes, 0);
    assert(isRated);
    assert(first.opened_ms >= startedMs && first.opened_ms <= Date.now());
    const detail = await read(`/sessions/${encodeURIComponent(id)}`);
    assert.equal(detail.session, id);
    assert.equal(new Set(detail.sockets.map(({ connection }: SocketReport) => connection)).size, 20);
    const [socket] = (await read("/sessions/quiet")).sockets as SocketReport[];
    assert.equal(socket!.agent, "other");
    assert.equal(socket!.position, position);
    assert.equal(socket!.expires_ms, expiresSecs * 1000);
    assert.equal(detail.sockets[0].expires_ms, null);
    assert.equal(detail.sockets[0].position, null);

    assert.equal((await ask("/sessions/nobody")).status, 404);
    assert.equal((await ask("/sessions/nobody", { method: "DELETE" })).status, 404);
    assert.equal((await ask("/sessions/%ff")).status, 400);
    const told = proxy.log.until((line) => line.includes("ended by an operator"));
    const ended = await ask(`/sessions/${encodeURIComponent(id)}`, { method: "DELETE" });
    assert.deepEqual(JSON.parse(ended.body), { session: id, sockets: 20 });
    for (const client of loud) {
      assert.deepEqual(await client.ended(), { code: 4403, reason: "closed by an operator" });
    }
    assert.equal(JSON.parse(await told).session, id);
    await eventually("one is left", async () => (await read("/sessions")).sessions.length === 1);
    assert.equal(quiet.socket.readyState, WebSocket.OPEN);
    await quiet.close();
    assert.equal((await request(proxy.port, "/sessions")).status, 404);
    assert.equal((await request(proxy.port, "/")).status, 404);
  }
});

Deno.test("The page is for operators on this machine, and for no other page in their browser", async () => {
  await using redis = await RedisServer.start();
  await using admin = await startWithAdmin(redis, {});
  const { proxy, ask } = admin;
  const client = await Client.connect(proxy.port, "s1");
  const paths = ["/", "/page.js", "/page.css", "/sessions", "/sessions/s1"];
  for (const path of paths) {
    for (const Host of ["127.0.0.1:9090", "localhost", "LOCALHOST:9090", "[::1]:9090", "wsproxy:9090", "a.localhost"]) {
      assert.equal((await ask(path, { headers: { Host } })).status, 200, Host);
    }
    for (const Host of ["evil.example", "127.0.0.1.evil.example:9090", "localhost.evil", "10.evil"]) {
      assert.equal((await ask(path, { headers: { Host } })).status, 403, Host);
    }
    assert.equal((await ask(path, { method: "POST" })).status, 405);
    // No preflight is answered, so no other page may send DELETE, and none may read what comes.
    const headers = { Origin: "https://evil.example", "Access-Control-Request-Method": "DELETE" };
    assert.equal((await ask(path, { method: "OPTIONS", headers })).status, 405);
    const answer = await ask(path, { method: "HEAD", headers: { Origin: "https://evil.example" } });
    assert.equal(answer.status, 200);
    assert.equal(answer.headers.get("access-control-allow-origin"), null);
    assert.match(answer.headers.get("content-security-policy")!, /^default-src 'none'; .*frame-ancestors 'none'$/);
    assert.equal(answer.headers.get("cache-control"), "no-store");
    assert.equal(answer.headers.get("x-content-type-options"), "nosniff");
  }
  const evil = await ask("/sessions/s1", { method: "DELETE", headers: { Host: "evil.example" } });
  assert.equal(evil.status, 403);
  // What scrapes and probes goes on by any name.
  for (const path of ["/metrics", "/health", "/ready"]) {
    assert.equal((await ask(path, { headers: { Host: "wsproxy.monitoring.svc" } })).status, 200);
  }
  assert.equal(client.socket.readyState, WebSocket.OPEN);
  await client.close();
});

Deno.test("Where others may reach it, the page needs ADMIN_PASSWORD, and says so", async () => {
  await using redis = await RedisServer.start();
  const paths = ["/", "/page.js", "/sessions", "/sessions/s1"];
  {
    await using admin = await startWithAdmin(redis, { ADMIN_HOST: "0.0.0.0" });
    for (const path of paths) {
      const { status, body } = await admin.ask(path);
      assert.equal(status, 403);
      assert.match(body, /set ADMIN_PASSWORD/);
    }
    assert.equal((await admin.ask("/metrics")).status, 200);
  }
  const ADMIN_PASSWORD = "päss:word of some length";
  const basic = (text: string) => ({
    Authorization: `Basic ${btoa(String.fromCharCode(...new TextEncoder().encode(text)))}`,
  });
  for (const ADMIN_HOST of ["0.0.0.0", "127.0.0.1"]) {
    await using admin = await startWithAdmin(redis, { ADMIN_HOST, ADMIN_PASSWORD });
    const { proxy, ask } = admin;
    const client = await Client.connect(proxy.port, "s1");
    for (const path of paths) {
      const refused = await ask(path);
      assert.equal(refused.status, 401);
      assert.equal(refused.headers.get("www-authenticate"), 'Basic realm="wsproxy"');
      for (
        const wrong of path === "/" ? ["", "me:", `me:${ADMIN_PASSWORD} `, ADMIN_PASSWORD.slice(1), "me:wrong"] : []
      ) {
        assert.equal((await ask(path, { headers: basic(wrong) })).status, 401, wrong);
      }
      for (const Authorization of path === "/sessions" ? ["Basic", "Basic !", `Bearer ${ADMIN_PASSWORD}`] : []) {
        assert.equal((await ask(path, { headers: { Authorization } })).status, 401);
      }
      assert.equal((await ask(path, { headers: basic(`anybody:${ADMIN_PASSWORD}`) })).status, 200);
    }
    assert.equal((await ask("/sessions/s1", { method: "DELETE" })).status, 401);
    assert.equal(client.socket.readyState, WebSocket.OPEN);
    const ended = await ask("/sessions/s1", { method: "DELETE", headers: basic(`:${ADMIN_PASSWORD}`) });
    assert.equal(ended.status, 200);
    assert.equal((await client.ended()).code, 4403);
    assert.equal((await ask("/metrics")).status, 200);
    proxy.signal("SIGTERM");
    await proxy.exit();
    const log = await proxy.log.rest();
    assert(!log.includes(ADMIN_PASSWORD) && !log.includes("me:wrong"));
    // Eight wrong passwords: one line, and the sum, here of the end. What has no password is no attempt.
    const told = log.split("\n").filter((line) => line.includes("refused")).map((line) => JSON.parse(line));
    assert.deepEqual(told.map(({ level, status, refusal, more }) => ({ level, status, refusal, more })), [
      { level: "warn", status: 401, refusal: "wrongPassword", more: undefined },
      { level: "warn", status: undefined, refusal: "wrongPassword", more: 7 },
    ]);
  }
});

Deno.test("Passwords cannot be guessed: few are compared, of one address and of all, and operators still come in", async () => {
  await using redis = await RedisServer.start();
  const ADMIN_PASSWORD = "a password of some length";
  await using admin = await startWithAdmin(redis, { ADMIN_PASSWORD, TRUSTED_PROXIES: "127.0.0.1", WORKERS: "2" });
  const from = async (address: string, password: string, lie = "6.6.6.6") => {
    const headers = {
      Authorization: `Basic ${btoa(`:${password}`)}`,
      "X-Forwarded-For": address && `${lie}, ${address}`,
    };
    return (await admin.ask("/sessions", { headers })).status;
  };
  assert.equal(await from("192.0.2.1", ADMIN_PASSWORD), 200);
  for (let n = 0; n < 10; n++) assert.equal(await from("2001:db8::1", "wrong", `6.6.6.${n}`), 401);
  assert.equal(await from("2001:db8::2", "wrong"), 429);
  // It is not even looked at.
  assert.equal(await from("2001:db8::3", ADMIN_PASSWORD), 429);
  assert.equal(await from("", ADMIN_PASSWORD), 200);
  assert.equal((await admin.ask("/sessions", {})).status, 401);
  let tried = 10;
  for (let n = 0; await from(`198.51.100.${n}`, "wrong") === 401; n++) tried++;
  // One more each 600 ms.
  assert(tried >= 100 && tried < 150, String(tried));
  // A turn may have come since: it is one, and not more.
  const others = [await from("203.0.113.1", "wrong"), await from("203.0.113.2", "wrong")];
  assert(others.includes(429), others.join());
  for (const operator of ["192.0.2.1", ""]) assert.equal(await from(operator, ADMIN_PASSWORD), 200);
  // An operator who errs may try as often as anywhere else.
  assert.equal(await from("192.0.2.1", "wrong"), 401);
});

Deno.test("Every act of an operator is one line, with who and from where, and no secret", async () => {
  for (const WORKERS of ["1", "2"]) {
    await using redis = await RedisServer.start();
    const ADMIN_PASSWORD = "a password of some length";
    const env = { ADMIN_PASSWORD, WORKERS, INBOX: "true", TRUSTED_PROXIES: "127.0.0.1" };
    await using admin = await startWithAdmin(redis, env);
    const { proxy, ask } = admin;
    const end = async (session: string, user: string) => {
      const Authorization = `Basic ${btoa(`${user}:${ADMIN_PASSWORD}`)}`;
      return await ask(`/sessions/${session}`, {
        method: "DELETE",
        headers: { Authorization, "X-Forwarded-For": "192.0.2.1" },
      });
    };
    const clients = await Promise.all(Array.from({ length: 10 }, () => Client.connect(proxy.port, "s1")));
    assert.equal((await end("s1", "ann")).status, 200);
    for (const client of clients) await client.ended();
    assert.equal((await end("nobody", ADMIN_PASSWORD)).status, 404);
    const control = redis.client();
    const lines: string[] = [];
    const tells = async (message: string) => {
      const told = proxy.log.until((line) => lines.push(line) > 0 && line.includes('"audit":"control"'));
      await control.publish("wsproxy:control", message);
      await soon(told, "the command is told");
    };
    await tells('{"command":"broadcast","payload":"a payload"}');
    await tells('{"command":"close","agent_id":"agent","reason":"a reason"}');
    await tells('{"command":"a payload"}');
    proxy.signal("SIGTERM");
    await proxy.exit();
    const log = [...lines, await proxy.log.rest()].join("\n");
    assert.doesNotMatch(log, /a payload|a reason|a password/);
    const audited = log.split("\n").filter((line) => line.includes('"audit"')).map((line) => JSON.parse(line));
    assert.deepEqual(
      audited.map(({ audit, command, session, sockets, user, address }) => ({
        audit,
        command,
        session,
        sockets,
        user,
        address,
      })),
      [
        { audit: "admin", command: undefined, session: "s1", sockets: 10, user: "ann", address: "192.0.2.1" },
        { audit: "admin", command: undefined, session: "nobody", sockets: 0, user: undefined, address: "192.0.2.1" },
        { audit: "control", command: "broadcast", session: undefined, sockets: 0, user: undefined, address: undefined },
        { audit: "control", command: "close", session: undefined, sockets: 0, user: undefined, address: undefined },
        {
          audit: "control",
          command: "unknown",
          session: undefined,
          sockets: undefined,
          user: undefined,
          address: undefined,
        },
      ],
    );
  }
});

Deno.test("The busiest are those that move most now, and not those that once did", () => {
  const openedAtMs = Date.now() - 3_600_000;
  const session = (sessionId: string, moved: number) => {
    const report = () => ({
      agent: "agent",
      opened_ms: openedAtMs,
      down_bytes: one.moved,
      up_chars: 0,
      unsent_bytes: 0,
    });
    const one = { sessionId, moved, isOpen: true, report };
    return one;
  };
  const old = session("old", 1e9);
  const fresh = session("fresh", 0);
  const others = Array.from({ length: 200 }, (_, n) => session(`other${n}`, 1));
  const busiest = new Busiest();
  const look = (nowMs: number) => busiest.look([old, fresh, ...others] as unknown as Session[], nowMs);
  const first = look(1000);
  assert.equal(first.length, 100);
  assert.equal(first[0]!.session, "old");
  // Over the hour since it opened, and the moment since this test began.
  assert.ok(first[0]!.per_sec <= 1e9 / 3600 && first[0]!.per_sec > 1e9 / 3660, String(first[0]!.per_sec));
  fresh.moved = 5000;
  // Two looks that are close together show the same.
  assert.equal(look(1100), first);
  const second = look(3500);
  assert.deepEqual(second.slice(0, 2).map(({ session, per_sec }) => [session, per_sec]), [["fresh", 2000], ["old", 0]]);
});
