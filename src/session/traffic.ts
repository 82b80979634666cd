/**
 * What sessions have relayed, for operators: of each agent that they want to see by itself, and of all others together.
 * It is counted for each message, so these are plain numbers.
 */

/** What the sessions of one agent, or of several, have relayed. */
export interface Tally {
  /** Sockets that are open. */
  open: number;
  /** Messages taken for clients' sockets. */
  down: number;
  /** Of these, the ones that came with a position in a session's log. */
  logged: number;
  /** Messages accepted from clients. */
  up: number;
}

/** The tallies of a proxy. */
export class Traffic {
  readonly #others = emptyTally();
  readonly #agents: ReadonlyMap<string, Tally>;

  /** `agents` are those with a tally of their own. */
  constructor(agents: readonly string[]) {
    this.#agents = new Map(agents.map((agentId) => [agentId, emptyTally()]));
  }

  /** Where an agent's sessions count. */
  of(agentId: string): Tally {
    return this.#agents.get(agentId) ?? this.#others;
  }

  /** The sum of all. */
  total(count: keyof Tally): number {
    return [...this.#agents.values()].reduce((sum, tally) => sum + tally[count], this.#others[count]);
  }

  /** By agent, of those that have a tally of their own. */
  byAgent(count: keyof Tally): ReadonlyMap<string, number> {
    return new Map([...this.#agents].map(([agentId, tally]) => [agentId, tally[count]]));
  }
}

const emptyTally = (): Tally => ({ open: 0, down: 0, logged: 0, up: 0 });
