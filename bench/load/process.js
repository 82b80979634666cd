// @ts-check
/** What the kernel says of a process: CPU time and resident memory, from /proc. Linux only. */

import { readFileSync } from "node:fs";

/** The kernel's clock tick, which is 100 a second on every Linux that Node runs on. */
const tickUs = 10_000;

/** User and system time of all threads so far, in microseconds, exact to 10 ms. @param {number} pid */
export function cpuUs(pid) {
  const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
  // The name, in parentheses, may hold anything: fields are counted from behind it.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[11]) + Number(fields[12])) * tickUs;
}

/** Resident memory in bytes. @param {number} pid */
export function residentBytes(pid) {
  return Number(/^VmRSS:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/status`, "latin1"))?.[1]) * 1024;
}

/** How many files this process may open. */
export function maxOpenFiles() {
  return Number(/^Max open files\s+(\d+)/m.exec(readFileSync("/proc/self/limits", "latin1"))?.[1]);
}
