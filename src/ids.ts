/** Ids: of agents and sessions, and of messages. */

/** The most characters (code points) of an id. */
export const maxIdChars = 128;

/** Whether a text, percent-decoded, is an agent's or a session's id: 1 to 128 characters, none of them a control one. */
export function isId(text: string): boolean {
  const chars = text.length <= maxIdChars ? text.length : [...text].length;
  return chars >= 1 && chars <= maxIdChars && !/\p{Cc}/u.test(text);
}

/** The longest id of a message. */
export const maxMessageIdChars = 64;

/** Whether a text is the id of a message, which its client has chosen. */
export const isMessageId = (text: string): boolean => text.length <= maxMessageIdChars && /^[A-Za-z0-9_-]+$/.test(text);
