/** One client of ioredis, made so that whether it serves is for us to say, and ended for good. */

import { Redis, type RedisOptions } from "ioredis";
import { within } from "../deadline.ts";
import { isReply } from "./errors.ts";
import type { RedisIdentity, TcpAddress } from "../redis_url.ts";

/** From the first packet to the last answer of what a connection is proved with. */
export const handshakeTimeoutMs = 2000;

/** Options for one server, by which nothing but what is asked of it is sent. */
export function redisOptions(
  address: Partial<TcpAddress> & Pick<RedisIdentity, "tls" | "certificates"> & { readonly path?: string },
): RedisOptions {
  const { host, port, family = 0, path, tls, certificates } = address;
  return {
    ...path === undefined ? { host: host!, port: port!, family } : { path },
    ...tls ? { tls: { ...certificates } } : {},
    connectTimeout: handshakeTimeoutMs,
    // We disconnect only when nothing is on its way, or when nothing will ever come back.
    disconnectTimeout: 0,
    // Whether a connection is ready is found out in connection.ts; these would each add a state of ioredis's own.
    enableReadyCheck: false,
    disableClientInfo: true,
    enableOfflineQueue: false,
    autoResendUnfulfilledCommands: false,
    autoResubscribe: false,
    retryStrategy: () => null,
  };
}

/**
 * Asks one server something over a connection of its own, and leaves it, at once when `signal` says that the answer is
 * not needed any more.
 * @throws What kept it from an answer within `timeoutMs` milliseconds, or what it answered when that is an error.
 */
export async function askServer<T>(
  address: (TcpAddress | { readonly path: string }) & Omit<RedisIdentity, "db">,
  timeoutMs: number,
  ask: (redis: Redis) => Promise<T>,
  signal?: AbortSignal,
): Promise<T> {
  signal?.throwIfAborted();
  const redis = new Redis(redisOptions(address));
  const ended = Promise.withResolvers<never>();
  ended.promise.catch(() => {});
  redis.on("error", (error) => ended.reject(error));
  redis.on("close", () => ended.reject(new Error("the server hung up")));
  signal?.addEventListener("abort", () => ended.reject(signal.reason), { once: true });
  const ready = new Promise<void>((resolve) => redis.once("ready", resolve));
  const answer = ready.then(async () => {
    const { username, password } = address;
    if (password !== undefined) await logIn(redis, username, password);
    return await ask(redis);
  });
  try {
    return await within(timeoutMs, Promise.race([answer, ended.promise]), () => {
      throw new Error(`no answer within ${timeoutMs} ms`);
    });
  } finally {
    answer.catch(() => {});
    await disconnect(redis);
  }
}

/** Logs in. A password for a Redis that wants none does no harm. */
export async function logIn(redis: Redis, username: string | undefined, password: string): Promise<void> {
  try {
    await (username === undefined ? redis.auth(password) : redis.auth(username, password));
  } catch (error) {
    if (!isReply(error) || !/without any password configured|no password is set/.test(error.message)) throw error;
  }
}

/** Ends a connection for good; resolves when its socket is closed, or could long be. */
export async function disconnect(redis: Redis): Promise<void> {
  if (redis.status === "end") return;
  const ended = new Promise<void>((resolve) => redis.once("end", resolve));
  redis.disconnect();
  await within(handshakeTimeoutMs, ended);
}
