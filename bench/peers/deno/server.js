// What the platform itself costs: the least that a user could write by hand for Deno, with `Deno.serve`,
// `Deno.upgradeWebSocket` and ioredis. It does what peers/bun does on the path that is measured, and lacks what it lacks.
import process from "node:process";
import { Redis } from "ioredis";
import { verify } from "../verify.js";

const { PORT, REDIS_URL, JWT_SECRET } = process.env;
const maxBytes = 1024 * 1024;
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

function leave(name, client) {
  const channel = channels.get(name);
  channel.clients.delete(client);
  if (--channel.users > 0) return;
  channels.delete(name);
  subscriber.unsubscribe(name);
}

Deno.serve({ port: Number(PORT), hostname: "127.0.0.1", onListen() {} }, async (request) => {
  let name;
  try {
    const session = decodeURIComponent(/^\/[^/]+\/ws\/([^/?]+)$/.exec(new URL(request.url).pathname)[1]);
    verify(JWT_SECRET, request.headers.get("authorization").slice("Bearer ".length), session);
    name = `session:${session}:down`;
    const up = `session:${session}:up`;
    const channel = channels.get(name) ?? { clients: new Set(), users: 0 };
    channels.set(name, channel);
    channel.users++;
    await subscriber.subscribe(name);
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.onopen = () => channel.clients.add(socket);
    socket.onclose = () => leave(name, socket);
    socket.onmessage = ({ data: text }) => {
      if (typeof text !== "string") return socket.close(1003);
      try {
        JSON.parse(text);
      } catch {
        return socket.send('{"error":"Invalid JSON format"}');
      }
      publisher.publish(up, text).catch(() => socket.close(1013));
    };
    return response;
  } catch {
    return new Response(null, { status: 403 });
  }
});
process.on("SIGTERM", () => process.exit(0));
