/**
 * Where the master is, as its sentinels say. All of them are asked each time, and the one that most of them name counts:
 * a sentinel may be cut off with a former master, or know of no failover yet. Whether it is a master is asked of the
 * server itself.
 */

import type { RedisIdentity, SentinelAddress, TcpAddress } from "../redis_url.ts";
import { askServer } from "./client.ts";
import { reasonOf, Unavailable } from "./errors.ts";

/** How long a sentinel may take to answer. */
const timeoutMs = 1000;

/** What sentinels are asked with. */
export type Sentinels = SentinelAddress & Pick<RedisIdentity, "tls" | "certificates">;

/**
 * The master's address.
 * @throws {Unavailable} when no sentinel knows it, with what they say.
 */
export async function findMaster(sentinels: Sentinels): Promise<TcpAddress> {
  const answers = await Promise.allSettled(sentinels.sentinels.map((sentinel) => ask(sentinel, sentinels)));
  const votes = new Map<string, { master: TcpAddress; count: number }>();
  const reasons = new Set<string>();
  for (const answer of answers) {
    if (answer.status === "rejected") reasons.add(reasonOf(answer.reason));
    else if (answer.value === undefined) reasons.add(`it knows no master ${JSON.stringify(sentinels.masterName)}`);
    else {
      const master = answer.value;
      const name = `${master.host}:${master.port}`;
      votes.set(name, { master, count: (votes.get(name)?.count ?? 0) + 1 });
    }
  }
  // Of as many votes the first one counts, in the order of the URL.
  const [most] = [...votes.values()].sort((a, b) => b.count - a.count);
  if (most) return most.master;
  throw new Unavailable(`none of ${answers.length} sentinels names the master: ${[...reasons].join("; ")}`);
}

async function ask(sentinel: TcpAddress, { masterName, tls, certificates, ...who }: Sentinels) {
  const { sentinelUsername: username, sentinelPassword: password } = who;
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
  );
  return named === null ? undefined : { host: named[0], port: Number(named[1]) };
}
