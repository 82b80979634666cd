/** Tokens that are valid by themselves, and were revoked: by the time before which they were issued. */

/** Whose tokens are revoked, and up to when. */
export class Revocations {
  readonly #beforeSecs = new Map<string, number>();
  /** Hears of each one that Redis has told of first. */
  onLearnt: (agentId: string, beforeSecs: number) => void = () => {};

  /** Tokens of an agent, or of all by "*", issued before a time in seconds. False when that was known. */
  add(agentId: string, beforeSecs: number): boolean {
    if (!(beforeSecs > (this.#beforeSecs.get(agentId) ?? -Infinity))) return false;
    this.#beforeSecs.set(agentId, beforeSecs);
    return true;
  }

  /** Redis has told of one; see {@linkcode Revocations.add}. */
  learn(agentId: string, beforeSecs: number): void {
    if (this.add(agentId, beforeSecs)) this.onLearnt(agentId, beforeSecs);
  }

  /** Whether an agent's token is revoked that was issued at a time in seconds. */
  covers(agentId: string, issuedAtSecs: number): boolean {
    if (this.#beforeSecs.size === 0) return false;
    return [agentId, "*"].some((id) => issuedAtSecs < (this.#beforeSecs.get(id) ?? -Infinity));
  }
}
