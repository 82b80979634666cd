// The peer: what a user would write by hand instead of running wsproxy, with the libraries that wsproxy uses too. It
// does the same work on the path that is measured: it verifies the token, subscribes before it accepts, passes
// messages on both ways, validates the JSON of those that go up, and drops a client that does not read.
import { createServer } from "node:http";
import { Redis } from "ioredis";
import { jwtVerify } from "jose";
import { WebSocketServer } from "ws";

const { PORT, REDIS_URL, JWT_SECRET } = process.env;
const maxBytes = 1024 * 1024;
const key = await crypto.subtle.importKey("raw", Buffer.from(JWT_SECRET), { name: "HMAC", hash: "SHA-256" }, false, [
  "verify",
]);
const publisher = new Redis(REDIS_URL, { enableAutoPipelining: true });
const subscriber = new Redis(REDIS_URL);
/** By channel: the open clients, and how many are open or on their way. */
const channels = new Map();
subscriber.on("message", (name, text) => {
  for (const client of channels.get(name)?.clients ?? []) {
    if (client.bufferedAmount > maxBytes) client.close(1008, "too slow");
    else client.send(text);
  }
});

const upgrader = new WebSocketServer({ noServer: true, maxPayload: maxBytes, perMessageDeflate: false });
const server = createServer((_request, response) => response.end("ok"));
server.on("upgrade", async (request, socket, head) => {
  socket.on("error", () => {});
  try {
    const session = decodeURIComponent(/^\/[^/]+\/ws\/([^/]+)$/.exec(request.url)[1]);
    const token = request.headers.authorization.slice("Bearer ".length);
    const { payload } = await jwtVerify(token, key, { algorithms: ["HS256"] });
    if (payload.session_id !== session) throw new Error("the token is not for this session");
    const name = `session:${session}:down`;
    const channel = channels.get(name) ?? { clients: new Set(), users: 0 };
    channels.set(name, channel);
    channel.users++;
    socket.once("close", () => {
      if (--channel.users > 0) return;
      channels.delete(name);
      subscriber.unsubscribe(name);
    });
    await subscriber.subscribe(name);
    upgrader.handleUpgrade(request, socket, head, (client) => {
      channel.clients.add(client);
      client.on("close", () => channel.clients.delete(client));
      client.on("error", () => {});
      client.on("message", (data, isBinary) => {
        if (isBinary) return client.close(1003);
        const text = data.toString();
        try {
          JSON.parse(text);
        } catch {
          return client.send('{"error":"Invalid JSON format"}');
        }
        publisher.publish(`session:${session}:up`, text).catch(() => client.close(1013));
      });
    });
  } catch {
    socket.end("HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
  }
});
server.listen({ port: Number(PORT), host: "127.0.0.1", backlog: 4096 });
process.on("SIGTERM", () => process.exit(0));
