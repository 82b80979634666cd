/** Agent and session ids. */

/** The most characters (code points) of an id. */
export const maxIdChars = 128;

/** Whether a text, percent-decoded, is an agent's or a session's id: 1 to 128 characters, none of them a control one. */
export function isId(text: string): boolean {
  const chars = text.length <= maxIdChars ? text.length : [...text].length;
  return chars >= 1 && chars <= maxIdChars && !/\p{Cc}/u.test(text);
}
