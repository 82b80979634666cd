/**
 * What a message costs the process besides its payload while it is held, in bytes. There is no one number, as it is held
 * as something else in each place. Measured by `bench/held.ts`, with Deno 2.9.6:
 *
 * | held                          | takes                  | counted as |
 * | ----------------------------- | ---------------------- | ---------- |
 * | in an outbox                  | 72 of V8's heap        | 64         |
 * | by a publisher                | 135 of V8's heap       | 256        |
 * | in a transport, engine `ws`   | 354 of V8's heap       | 1024       |
 * | in a transport, engine `deno` | 1070 of Deno's own     | 1024       |
 *
 * Were it the transport's everywhere, one read of small messages from Redis would be more than an outbox may hold, and
 * clients that read would be closed; were it the outbox's, a client that does not read could take many times its share.
 */

/** In a transport, of whichever engine; and beside a log that is being read, as all of that is sent at once. */
export const transportOverheadBytes = 1024;
/** Until Redis has taken it. */
export const pendingOverheadBytes = 256;
/** In an outbox, until it is in a transport. */
export const outboxOverheadBytes = 64;
