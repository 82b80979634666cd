/**
 * The messages: JSON of a fixed size with fixed places for the session's index, the message's number in its session
 * and the microsecond at which it was due, so that they are written and read without building or parsing anything.
 */

import { Buffer } from "node:buffer";

const template = '{"s":"000000","n":"00000000","t":"0000000000","d":""}';
const sessionAt = 6;
const numberAt = 19;
const timeAt = 34;
const dataAt = template.length - 2;
const zero = 48;

/** Bytes from the start that hold all that is read. */
export const headBytes = template.length - 2;

/** A message without its numbers. @param {number} bytes */
export function blank(bytes) {
  return Buffer.from(template.slice(0, dataAt) + "x".repeat(bytes - template.length) + template.slice(dataAt));
}

/** @param {Buffer} buffer @param {number} at @param {number} width @param {number} value */
function put(buffer, at, width, value) {
  let rest = value | 0;
  for (let i = at + width - 1; i >= at; i--) {
    const tenth = (rest / 10) | 0;
    buffer[i] = zero + rest - tenth * 10;
    rest = tenth;
  }
}

/** Writes decimal digits, as in a session's name. */
export const putDigits = put;

/** Writes the numbers of the message that begins at `at`. @param {Buffer} buffer @param {number} at @param {number} session @param {number} number @param {number} dueUs */
export function fill(buffer, at, session, number, dueUs) {
  put(buffer, at + sessionAt, 6, session);
  put(buffer, at + numberAt, 8, number);
  put(buffer, at + timeAt, 10, dueUs);
}

/** @param {Buffer} buffer @param {number} at @param {number} width */
function get(buffer, at, width) {
  let value = 0;
  for (let i = at; i < at + width; i++) value = value * 10 + buffer[i] - zero;
  return value;
}

/** Whether what begins at `at` is one of our messages. @param {Buffer} buffer @param {number} at */
export function isOurs(buffer, at) {
  return buffer[at + 2] === 115 && buffer[at] === 123 && buffer[at + 5] === 34;
}

/** @param {Buffer} buffer @param {number} at */
export const sessionOf = (buffer, at) => get(buffer, at + sessionAt, 6);
/** @param {Buffer} buffer @param {number} at */
export const numberOf = (buffer, at) => get(buffer, at + numberAt, 8);
/** @param {Buffer} buffer @param {number} at */
export const dueUsOf = (buffer, at) => get(buffer, at + timeAt, 10);
/** The smallest message. */
export const minBytes = template.length;
