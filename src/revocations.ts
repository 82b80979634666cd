/**
 * Tokens that are valid by themselves, and were revoked: by the time before which they were issued. What is known of an
 * agent's tokens, or of all tokens, is the newest command about them. A revocation that was taken back is remembered as
 * well, so that a proxy that has not heard of that does not bring it back.
 */

/** The agent whose tokens are revoked; undefined for those of all agents. */
export type AgentId = string | undefined;

/** What is known of an agent's tokens. */
export interface Revocation {
  /** Those issued before this time, in seconds since the epoch, are revoked; 0 for none of them. */
  readonly beforeSecs: number;
  /** When a proxy heard the command, in milliseconds since the epoch; 0 when that is not known. */
  readonly atMs: number;
  /** Redis has it. */
  kept: boolean;
}

/** All that a proxy knows of them. */
export class Revocations {
  readonly #leewayMs: number;
  readonly #known = new Map<AgentId, Revocation>();
  /** Hears of each agent whose revocations have become other ones, because Redis has told so. */
  onLearnt: (agentId: AgentId, revocation: Revocation) => void = () => {};

  /** `leewayMs` is how far clocks may differ. */
  constructor(leewayMs = 0) {
    this.#leewayMs = leewayMs;
  }

  /** A command has been heard: tokens are revoked up to a time, or with 0 none of them any more. */
  hear(agentId: AgentId, beforeSecs: number): void {
    // An older time does not take back a newer one.
    const newestSecs = beforeSecs === 0 ? 0 : Math.max(beforeSecs, this.#known.get(agentId)?.beforeSecs ?? 0);
    this.#known.set(agentId, { beforeSecs: newestSecs, atMs: Date.now(), kept: false });
  }

  /** Redis says something, and it counts unless this proxy knows better. */
  learn(agentId: AgentId, learnt: Revocation): void {
    const known = this.#known.get(agentId);
    if (known !== undefined && !isNews(learnt, known)) return;
    this.#known.set(agentId, learnt);
    if (learnt.beforeSecs !== (known?.beforeSecs ?? 0)) this.onLearnt(agentId, learnt);
  }

  /** What is known, by agent. */
  get known(): ReadonlyMap<AgentId, Revocation> {
    return this.#known;
  }

  /** Whether an agent's token is revoked that was issued at a time in seconds. */
  covers(agentId: string, issuedAtSecs: number): boolean {
    if (this.#known.size === 0) return false;
    return [agentId, undefined].some((id) => this.isOlder(issuedAtSecs, this.#known.get(id)?.beforeSecs ?? 0));
  }

  /**
   * Whether a token that says when it was issued is older than a revocation. Tokens are not issued in the future: one
   * that says so is older than any revocation, or it would escape them all.
   */
  isOlder(issuedAtSecs: number, beforeSecs: number): boolean {
    if (beforeSecs === 0) return false;
    return issuedAtSecs < beforeSecs || issuedAtSecs * 1000 > Date.now() + this.#leewayMs;
  }
}

/** Whether what Redis says is newer than what is known here: where that is not certain, tokens stay revoked. */
function isNews(learnt: Revocation, known: Revocation): boolean {
  if (!known.kept) return false;
  if (learnt.beforeSecs > 0) return learnt.beforeSecs > known.beforeSecs;
  return learnt.atMs > known.atMs;
}
