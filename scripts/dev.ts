/**
 * `deno task dev`: a whole wsproxy on this machine, until Ctrl-C.
 *
 * It uses the Redis at `REDIS_URL`, or starts one of its own; makes a `JWT_SECRET` where there is none; runs
 * the start task with both; and prints one line that connects a client and one that publishes to it. Whatever it
 * started ends with it, and it ends, with exit code 1, when something that it started does.
 */

import { reachableHost } from "../src/cli/healthcheck.ts";
import { settings } from "../src/settings.ts";
import {
  Failure,
  freePort,
  type Interrupt,
  runUntilInterrupted,
  startProxy,
  startRedis,
  waitUntilHealthy,
} from "./processes.ts";
import { mintToken } from "../src/cli/token.ts";

const sessionId = "demo";
const tokenTtlSecs = 86_400;

/**
 * A port to listen on: the one that `PORT` names, or the default, or a free one where that is taken.
 * @throws {Failure} when `PORT` is taken, or `hostname` is beyond this task's permissions.
 */
function choosePort(hostname: string, given: string | undefined): number {
  const wanted = settings.PORT.parse(given ?? settings.PORT.default);
  if (typeof wanted !== "number") throw new Failure(`PORT ${wanted.rule}: current value is "${given}"`);
  try {
    return freePort(hostname, wanted);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) {
      throw new Failure(`HOST must be 127.0.0.1, localhost, ::1, 0.0.0.0 or :: here: current value is "${hostname}"`);
    }
    if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    if (given) throw new Failure(`PORT must be free: something listens on ${given}`);
    return freePort(hostname, 0);
  }
}

/** The redis-cli options that reach a Redis. A URL with a password is named, not shown. */
function redisCliOptions(redisUrl: string): string {
  const { username, password } = new URL(redisUrl);
  return username || password ? '-u "$REDIS_URL"' : `-u '${redisUrl}'`;
}

/** Runs everything until it is interrupted. Throws when something ends by itself. */
async function run(interrupt: Interrupt): Promise<void> {
  const host = Deno.env.get("HOST") || "127.0.0.1";
  const port = choosePort(host, Deno.env.get("PORT") || undefined);
  const givenRedisUrl = Deno.env.get("REDIS_URL");
  const redisPort = freePort("127.0.0.1", 0);
  const secret = Deno.env.get("JWT_SECRET") || crypto.randomUUID() + crypto.randomUUID();

  await using redis = givenRedisUrl ? undefined : await startRedis(redisPort);
  await using proxy = startProxy({
    HOST: host,
    PORT: String(port),
    REDIS_URL: givenRedisUrl || `redis://127.0.0.1:${redisPort}`,
    JWT_SECRET: secret,
    LOG_FORMAT: Deno.env.get("LOG_FORMAT") || "text",
  });
  interrupt.onSecond = () => proxy.terminate();

  const visibleHost = reachableHost(host);
  const ends = [redis, proxy].flatMap((child) => child ? [child.ended] : []);
  const healthy = waitUntilHealthy(`http://${visibleHost}:${port}`);
  const first = await Promise.race([healthy, interrupt.received.then(() => "interrupted"), ...ends]);
  if (first === "interrupted") return;
  if (first !== undefined) throw new Failure(first);

  const token = mintToken(secret, { sessionId, ttlSecs: tokenTtlSecs });
  const cli = givenRedisUrl ? redisCliOptions(givenRedisUrl) : `-p ${redisPort}`;
  console.log(`
Connect a client, in another terminal:
  ./dev client ws://${visibleHost}:${port}/agent/ws/${sessionId} ${token}
Publish to it, in a third:
  redis-cli ${cli} publish session:${sessionId}:down '"hello"'
Ctrl-C ends all of it.
`);
  const end = await Promise.race([interrupt.received, ...ends]);
  if (end !== undefined) throw new Failure(end);
}

await runUntilInterrupted(run);
