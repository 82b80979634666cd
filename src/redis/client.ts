/** One client of ioredis, made so that whether it serves is for us to say, and ended for good. */

import type { Redis, RedisOptions } from "ioredis";
import { within } from "../deadline.ts";
import type { RedisAddress, TcpAddress } from "../redis_url.ts";

/** From the first packet to the last answer of what a connection is proved with. */
export const handshakeTimeoutMs = 2000;

/** Options for one server, by which nothing but what is asked of it is sent. */
export function redisOptions(
  address: Partial<TcpAddress> & Pick<RedisAddress, "tls" | "certificates"> & { readonly path?: string },
): RedisOptions {
  const { host, port, family = 0, path, tls, certificates } = address;
  return {
    ...path === undefined ? { host: host!, port: port!, family } : { path },
    ...tls ? { tls: { ...certificates } } : {},
    connectTimeout: handshakeTimeoutMs,
    // We disconnect only when nothing is on its way, or when nothing will ever come back.
    disconnectTimeout: 0,
    // Whether a connection is ready is found out by #shakeHands; these would each add a state of ioredis's own.
    enableReadyCheck: false,
    disableClientInfo: true,
    enableOfflineQueue: false,
    autoResendUnfulfilledCommands: false,
    autoResubscribe: false,
    retryStrategy: () => null,
  };
}

/** Ends a connection for good; resolves when its socket is closed, or could long be. */
export async function disconnect(redis: Redis): Promise<void> {
  if (redis.status === "end") return;
  const ended = new Promise<void>((resolve) => redis.once("end", resolve));
  redis.disconnect();
  await within(handshakeTimeoutMs, ended);
}
