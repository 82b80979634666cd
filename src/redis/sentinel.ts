/**
 * Where the master is, as its sentinels say. All of them are asked each time, and the address that most of them name
 * counts: a sentinel may be cut off together with a former master, or not know of a failover yet. Whether the server
 * there is a master, it is asked itself.
 */

import { settled } from "../deadline.ts";
import type { RedisIdentity, SentinelAddress, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { reasonOf, Unavailable } from "./errors.ts";

/** How long a sentinel may take to answer. */
const timeoutMs = 750;

/** What sentinels are asked with. */
export type Sentinels = SentinelAddress & Pick<RedisIdentity, "tls" | "certificates">;

/**
 * The master's address; several, in the order of the URL, when as many sentinels name each of them. A sentinel that
 * does not answer is not waited for once more than half of all agree: it often dies with the master's machine.
 * @throws {Unavailable} when no sentinel knows it, with what they say.
 */
export async function findMasters(sentinels: Sentinels): Promise<readonly TcpAddress[]> {
  const enough = new AbortController();
  const questions = sentinels.sentinels.map((sentinel) => ask(sentinel, sentinels, enough.signal));
  const { values, errors } = await settled(questions, (named) => mostNamed(named).votes * 2 > questions.length);
  enough.abort();
  await Promise.allSettled(questions);
  const { masters } = mostNamed(values);
  if (masters.length > 0) return masters;
  const reasons = new Set(errors.map(reasonOf));
  throw new Unavailable(`none of ${questions.length} sentinels names the master: ${[...reasons].join("; ")}`);
}

/** The addresses with the most votes. */
function mostNamed(named: readonly TcpAddress[]): { masters: readonly TcpAddress[]; votes: number } {
  const ballots = [...Map.groupBy(named, ({ host, port }) => `${host}:${port}`).values()];
  const votes = Math.max(0, ...ballots.map((ballot) => ballot.length));
  return { masters: ballots.filter((ballot) => ballot.length === votes).map(([master]) => master!), votes };
}

/** The master's address, as one sentinel says. */
async function ask(sentinel: TcpAddress, sentinels: Sentinels, signal: AbortSignal): Promise<TcpAddress> {
  const { masterName, tls, certificates, sentinelUsername: username, sentinelPassword: password } = sentinels;
  const address = {
    ...sentinel,
    tls,
    ...certificates ? { certificates } : {},
    ...username === undefined ? {} : { username },
    ...password === undefined ? {} : { password },
  };
  const named = await askServer(
    address,
    timeoutMs,
    (redis) => redis.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", masterName) as Promise<[string, string] | null>,
    signal,
  );
  if (named === null) throw new Unavailable(`it knows no master ${JSON.stringify(masterName)}`);
  return { host: named[0], port: Number(named[1]) };
}
