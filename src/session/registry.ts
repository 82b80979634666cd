/** All sessions of a proxy: how many there are, and the ends that concern them all, a drain and an outage. */

import { within } from "../deadline.ts";
import type { Buffer } from "node:buffer";
import type { Server } from "../redis/link.ts";
import { type Close, closes } from "../replies.ts";
import type { SessionReport, SocketReport } from "../report.ts";
import { Busiest } from "./busiest.ts";
import type { Session } from "./session.ts";

/** A moment without a message either way, in which a session is closed without tearing an answer apart. */
const quietMomentMs = 1000;
/** Sessions are closed at most so many at a time, when that is fast enough: 200 a second. */
const closesPerStep = 10;
const closeStepMs = 50;
/** Sessions that an outage or a command ends are closed within about a quarter of this. */
const spreadMs = 10_000;
/** Sessions that one message is delivered to, or that are told of the clock, in one turn of the event loop. */
const sessionsPerTurn = 500;

/** The sessions. */
export class Registry {
  readonly #sessions = new Set<Session>();
  readonly #busiest = new Busiest();
  #draining = false;
  #emptied: PromiseWithResolvers<void> | undefined;
  /** By the server that is gone. */
  readonly #stopOutage = new Map<Server, () => void>();

  /** Sessions, from the moment a request passed the ladder until nothing is left of it. */
  get size(): number {
    return this.#sessions.size;
  }

  /** Bytes that sockets have not taken yet. */
  get bufferedBytes(): number {
    let bytes = 0;
    for (const session of this.#sessions) bytes += session.bufferedBytes;
    return bytes;
  }

  /** No client is admitted any more. */
  get draining(): boolean {
    return this.#draining;
  }

  /** Takes in a session that has passed the ladder. */
  add(session: Session): void {
    this.#sessions.add(session);
  }

  /** Nothing is left of a session. */
  delete(session: Session): void {
    this.#sessions.delete(session);
    if (this.#sessions.size > 0) return;
    this.#emptied?.resolve();
    this.#emptied = undefined;
  }

  /**
   * Admits no client any more, closes sessions with 1001, and resolves when they are gone, or `graceMs` milliseconds
   * have passed. A session is closed in a quiet moment, or after half of the grace; many are not closed at once.
   */
  async drain(graceMs: number): Promise<void> {
    this.#draining = true;
    const startMs = performance.now();
    // The other half has room for closing all of them in turn, and for their answers.
    const patientMs = graceMs / 2;
    // One that has its 101 but is not open yet is waited for: it could not be told to leave.
    const quiet = (session: Session) =>
      session.isOpen && (session.quietMs >= quietMomentMs || performance.now() - startMs > patientMs);
    const stopSpread = this.#closeSpread((session) => session.end(closes.goingAway), quiet, graceMs);
    await this.#whenEmpty(graceMs);
    stopSpread();
  }

  /**
   * Closes sessions with 1001, each in a quiet moment and not many at once, also those that are admitted meanwhile.
   * Resolves when there are none, or `patienceMs` milliseconds have passed.
   */
  async thinOut(patienceMs: number): Promise<void> {
    const step = () => {
      let room = closesPerStep;
      for (const session of this.#sessions) {
        if (!session.isOpen || session.quietMs < quietMomentMs) continue;
        session.end(closes.goingAway);
        if (--room === 0) break;
      }
    };
    step();
    const timer = setInterval(step, closeStepMs);
    await this.#whenEmpty(patienceMs);
    clearInterval(timer);
  }

  async #whenEmpty(ms: number): Promise<void> {
    if (this.#sessions.size === 0) return;
    this.#emptied ??= Promise.withResolvers();
    await within(ms, this.#emptied.promise);
  }

  /**
   * A server of Redis is gone for longer than the grace: sessions that use it are closed with 1013, spread out, until it
   * has recovered.
   */
  outage(server: Server): void {
    const concerned = [...this.#sessions].filter((session) => session.uses(server));
    const stop = this.#closeSpread((session) => session.forsake(), (it) => it.uses(server), spreadMs, concerned);
    this.#stopOutage.set(server, stop);
  }

  /** It carries messages again, or no session uses it any more: sessions that the outage has not ended yet stay. */
  recovered(server: Server): void {
    this.#stopOutage.get(server)?.();
    this.#stopOutage.delete(server);
  }

  /** The sessions that move the most bytes. */
  busiest(): readonly SessionReport[] {
    return this.#busiest.look(this.#sessions);
  }

  /** The open sockets of one session. */
  sockets(sessionId: string): SocketReport[] {
    return [...this.#sessions].filter((session) => session.isOpen && session.sessionId === sessionId)
      .map((session) => session.report());
  }

  /** Ends the sessions that are concerned, spread out, and says how many there are. */
  end(close: Close, concerns: (session: Session) => boolean): number {
    const chosen = [...this.#sessions].filter((session) => !session.isOver && concerns(session));
    if (chosen.length > 0) this.#closeSpread((session) => session.end(close), () => true, spreadMs, chosen);
    return chosen.length;
  }

  /** Delivers one message to the sessions that are concerned, and says how many there are. */
  deliver(message: Buffer, concerns: (session: Session) => boolean): number {
    const chosen = [...this.#sessions].filter((session) => session.isOpen && concerns(session));
    inTurns(chosen, (session) => session.deliver(message));
    return chosen.length;
  }

  /** The wall clock has been set by so much, or has gone on alone. */
  clockJumped(jumpMs: number): void {
    inTurns([...this.#sessions], (session) => session.clockJumped(jumpMs));
  }

  /**
   * Ends every session that is `due`, not too many in the same instant, so that their clients do not come back as one:
   * at least so fast that all of them can be done within a quarter of `withinMs`. Returns what stops it.
   */
  #closeSpread(
    end: (session: Session) => void,
    due: (session: Session) => boolean,
    withinMs: number,
    sessions: Iterable<Session> = this.#sessions,
  ): () => void {
    const left = new Set(sessions);
    const steps = Math.max(1, withinMs / 4 / closeStepMs);
    const perStep = Math.max(closesPerStep, Math.ceil(left.size / steps));
    let timer: ReturnType<typeof setTimeout> | undefined;
    const step = () => {
      let room = perStep;
      for (const session of left) {
        if (room === 0) break;
        if (!session.isOver && !due(session)) continue;
        left.delete(session);
        if (session.isOver) continue;
        room--;
        end(session);
      }
      if (left.size > 0) timer = setTimeout(step, closeStepMs);
    };
    step();
    return () => {
      clearTimeout(timer);
      left.clear();
    };
  }
}

/** Does something to many sessions, some hundred in each turn of the event loop. */
function inTurns(sessions: readonly Session[], act: (session: Session) => void, at = 0): void {
  for (const session of sessions.slice(at, at + sessionsPerTurn)) act(session);
  const next = at + sessionsPerTurn;
  if (next < sessions.length) setTimeout(() => inTurns(sessions, act, next), 0);
}
