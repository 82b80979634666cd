// The fastest peer: what a user could write by hand for Bun, with Bun's own server and its own Redis client. It does
// what peers/node-ws does on the path that is measured.
// @ts-ignore: Deno does not know this module.
import { RedisClient } from "bun";
import { verify } from "../verify.js";

const { PORT, REDIS_URL, JWT_SECRET } = process.env;
const maxBytes = 1024 * 1024;
const publisher = new RedisClient(REDIS_URL);
const subscriber = new RedisClient(REDIS_URL);
/** By channel: the open clients, and how many are open or on their way. */
const channels = new Map();

function deliver(text, name) {
  for (const client of channels.get(name)?.clients ?? []) {
    if (client.getBufferedAmount() > maxBytes) client.close(1008, "too slow");
    else client.sendText(text);
  }
}

function leave(name, client) {
  const channel = channels.get(name);
  channel.clients.delete(client);
  if (--channel.users > 0) return;
  channels.delete(name);
  subscriber.unsubscribe(name);
}

Bun.serve({
  port: Number(PORT),
  hostname: "127.0.0.1",
  async fetch(request, server) {
    let name;
    try {
      const session = decodeURIComponent(/^\/[^/]+\/ws\/([^/?]+)$/.exec(new URL(request.url).pathname)[1]);
      verify(JWT_SECRET, request.headers.get("authorization").slice("Bearer ".length), session);
      name = `session:${session}:down`;
      const channel = channels.get(name) ?? { clients: new Set(), users: 0 };
      channels.set(name, channel);
      channel.users++;
      await subscriber.subscribe(name, deliver);
      if (server.upgrade(request, { data: { name, up: `session:${session}:up` } })) return;
      leave(name);
    } catch {
      return new Response(null, { status: 403 });
    }
  },
  websocket: {
    maxPayloadLength: maxBytes,
    perMessageDeflate: false,
    open: (client) => void channels.get(client.data.name).clients.add(client),
    close: (client) => leave(client.data.name, client),
    message(client, text) {
      if (typeof text !== "string") return client.close(1003);
      try {
        JSON.parse(text);
      } catch {
        return client.send('{"error":"Invalid JSON format"}');
      }
      publisher.publish(client.data.up, text).catch(() => client.close(1013));
    },
  },
});
process.on("SIGTERM", () => process.exit(0));
