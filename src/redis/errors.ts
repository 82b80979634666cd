/** What Redis cannot do for a session, and how it says no. */

import { ReplyError } from "ioredis";

/** Redis cannot be used now. */
export class Unavailable extends Error {
  override readonly name = "Unavailable";
}

/** Redis did not confirm a subscription in time. */
export class SubscribeTimeout extends Error {
  override readonly name = "SubscribeTimeout";
}

/** Redis will not show or keep a session's log, for a reason that does not pass by itself. */
export class LogRefused extends Error {
  override readonly name = "LogRefused";
}

/** An error that Redis itself has answered: the connection works, and the command was not carried out. */
export function isReply(error: unknown): error is Error {
  return error instanceof ReplyError;
}

/**
 * Whether Redis refused for a reason that passes: a script that runs too long, a data set that loads, a demotion. The
 * same command will be taken later, by this server or by the one that follows it.
 */
export function isTransient(error: unknown): boolean {
  return isReply(error) && /^(BUSY|LOADING|MASTERDOWN|READONLY)\b/.test(error.message);
}

/** Whether the command may have been carried out, or will be when it is sent again: an error that no reply is, or one that passes. */
export function isPassing(error: unknown): boolean {
  return !isReply(error) || isTransient(error) || isRedirected(error);
}

/** Whether a server of a Cluster says that a slot is not its own, is about to move, or is served by no server. */
export function isRedirected(error: unknown): boolean {
  return isReply(error) && /^(MOVED|ASK|TRYAGAIN|CLUSTERDOWN)\b/.test(error.message);
}

/** Whether Redis does not know a command, or does not let us use it: asking again brings nothing. */
export function isRefused(error: unknown): boolean {
  return isReply(error) && (/^NOPERM\b/.test(error.message) ||
    /^ERR\b.*(unknown|unsupported|not supported|not allowed)/i.test(error.message) &&
      !/transaction/.test(error.message));
}

/**
 * Whether Redis refused something of a session's log for a reason that stays until an operator or a backend does
 * something: a right that is missing, a function that is gone, a key of another type. What a function may not do, each
 * version of Redis says with other words.
 */
export function isLasting(error: unknown): error is Error {
  return isRefused(error) || isReply(error) &&
      /^WRONGTYPE\b|^ERR (function not found|acl failure in script|the user executing the script can't)/i
        .test(error.message);
}

/** For what does no harm when Redis does not know or permit it. */
export function refusedOrThrow(error: unknown): void {
  if (!isRefused(error)) throw error;
}

/** For what does no harm whatever error Redis answers it with. */
export function repliedOrThrow(error: unknown): void {
  if (!isReply(error)) throw error;
}

/** What ioredis says of a reply that belongs to no command, with the reply. */
const unasked = /^Command queue state error\. .*? Last (?:error: (.*)|reply: .*)$/s;

/**
 * An error's text for logs: ioredis names addresses and codes in it, never credentials. Redis repeats the arguments of a
 * command that it does not know, which may be a password or a message, and ioredis a reply that it did not await. An
 * error of that kind is Redis's reason to hang up, such as too many clients.
 */
export function reasonOf(error: unknown): string {
  if (error instanceof AggregateError && error.errors.length > 0) return error.errors.map(reasonOf).join("; ");
  let text = error instanceof Error ? error.message : String(error);
  const [isUnasked, sent] = unasked.exec(text) ?? [];
  if (isUnasked !== undefined) text = sent ?? "Redis sent a reply that no command had asked for";
  return text.replace(/,? *with args beginning with:.*/s, "");
}
