// @ts-check
/** Clients that break and come back, again and again while messages are sent. */

/** @import { Crowd } from "./crowd.js" */
/** @import { Direction } from "./direction.js" */
/** @import { Sender } from "./sender.js" */

/**
 * Breaks and reopens the last sessions of a crowd until the sender stops.
 * @param {Crowd} crowd @param {Sender} sender @param {Direction | undefined} down
 * @param {{ sessions: number, everyMs: number }} storm
 */
export async function storm(crowd, sender, down, { sessions, everyMs }) {
  const first = crowd.clients.length - sessions;
  while (sender.sending) {
    const startMs = performance.now();
    const reopened = [];
    for (let session = first; session < crowd.clients.length; session++) {
      if (crowd.cut(session)) down?.ledger.cut(session);
      reopened.push(crowd.reopen(session));
      // At once, but not so that our own messages are late for it.
      if (session % 8 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    await Promise.all(reopened);
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, everyMs - (performance.now() - startMs))));
  }
}
