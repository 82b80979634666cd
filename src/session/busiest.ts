/** Which sessions move the most bytes: known only while an operator looks. */

import type { SessionReport } from "../report.ts";
import type { Session } from "./session.ts";

/** Sessions in one report. */
const maxSessions = 100;
/** A look so soon after another one shows the same: a rate needs a while. */
const minApartMs = 500;

/** Looks, and compares with the look before. */
export class Busiest {
  #atMs = -Infinity;
  /** What each session had moved then, in bytes and characters; holds no session that has gone. */
  #moved = new WeakMap<Session, number>();
  #report: readonly SessionReport[] = [];

  /** The busiest first, at `nowMs` milliseconds of `performance.now()`. */
  look(sessions: Iterable<Session>, nowMs = performance.now()): readonly SessionReport[] {
    const apartMs = nowMs - this.#atMs;
    if (apartMs < minApartMs) return this.#report;
    const before = this.#moved;
    this.#atMs = nowMs;
    this.#moved = new WeakMap();
    const bySession = new Map<string, SessionReport>();
    for (const session of sessions) {
      if (!session.isOpen) continue;
      const { agent, opened_ms, down_bytes, up_chars, unsent_bytes } = session.report();
      const moved = down_bytes + up_chars;
      this.#moved.set(session, moved);
      const then = before.get(session);
      const overMs = then === undefined ? Math.max(minApartMs, Date.now() - opened_ms) : apartMs;
      const perSec = (moved - (then ?? 0)) / overMs * 1000;
      const one = { session: session.sessionId, agent, sockets: 1, opened_ms, down_bytes, up_chars, unsent_bytes };
      bySession.set(one.session, together(bySession.get(one.session), { ...one, per_sec: perSec }));
    }
    return this.#report = busiestOf([...bySession.values()]);
  }
}

/** What two parts of one session are together. */
function together(one: SessionReport | undefined, other: SessionReport): SessionReport {
  if (one === undefined) return other;
  return {
    session: one.session,
    agent: one.opened_ms <= other.opened_ms ? one.agent : other.agent,
    sockets: one.sockets + other.sockets,
    opened_ms: Math.min(one.opened_ms, other.opened_ms),
    down_bytes: one.down_bytes + other.down_bytes,
    up_chars: one.up_chars + other.up_chars,
    unsent_bytes: one.unsent_bytes + other.unsent_bytes,
    per_sec: one.per_sec + other.per_sec,
  };
}

/** Several proxies' reports as one: a session may have sockets on each. */
export function mergeBusiest(reports: readonly (readonly SessionReport[])[]): SessionReport[] {
  const bySession = new Map<string, SessionReport>();
  for (const one of reports.flat()) bySession.set(one.session, together(bySession.get(one.session), one));
  return busiestOf([...bySession.values()]);
}

const busiestOf = (sessions: SessionReport[]) =>
  sessions
    .sort((a, b) => b.per_sec - a.per_sec || b.down_bytes + b.up_chars - a.down_bytes - a.up_chars)
    .slice(0, maxSessions);
