/**
 * What is measured. A target is a name, a command and a port: the port, like every other setting, comes to the command
 * in its environment, by the names that wsproxy uses. Another peer is another entry.
 */

import { startWords } from "../scripts/start_flags.ts";

/** A server that speaks wsproxy's contract. */
export interface Target {
  /** As on the command line and in reports. */
  readonly name: string;
  readonly about: string;
  /** Program and arguments; started in `directory`, or in the repository. */
  readonly command: readonly string[];
  readonly directory?: string;
  /** Settings besides PORT, HOST, REDIS_URL and JWT_SECRET, which all targets get. */
  readonly environment?: Readonly<Record<string, string>>;
  /** Measured only when it is named. */
  readonly optional?: true;
  /** Installed from its package.json before the first use. */
  readonly npmInstall?: boolean;
}

/** The command of a checkout's `deno task start`: what users run, without the settings of their `.env`. */
const startCommand = (directory: string) => [
  "deno",
  ...startWords(Deno.readTextFileSync(`${directory}/deno.json`), "--env-file"),
];

const start = startCommand(new URL("..", import.meta.url).pathname);
const here = new URL(".", import.meta.url).pathname;

/** wsproxy's own, so that a peer in Deno differs in nothing else. */
const v8Flags = start.filter((word) => word.startsWith("--v8-flags"));

const bun = `${here}peers/bun/node_modules/.bin/bun`;

/** The targets; the last one is the peer that all others are compared with. */
export const targets: readonly Target[] = [
  { name: "wsproxy", about: "native engine", command: start, environment: { WS_ENGINE: "deno" } },
  { name: "wsproxy-ws", about: "npm ws engine", command: start, environment: { WS_ENGINE: "ws" } },
  {
    name: "wsproxy-2",
    about: "native engine, two workers",
    command: start,
    environment: { WS_ENGINE: "deno", WORKERS: "2" },
    optional: true,
  },
  {
    name: "wsproxy-4",
    about: "native engine, four workers",
    command: start,
    environment: { WS_ENGINE: "deno", WORKERS: "4" },
    optional: true,
  },
  {
    name: "wsproxy-ws-2",
    about: "npm ws engine, two workers",
    command: start,
    environment: { WS_ENGINE: "ws", WORKERS: "2" },
    optional: true,
  },
  {
    name: "wsproxy-inbox",
    about: "native engine, with INBOX=true",
    command: start,
    environment: { WS_ENGINE: "deno", INBOX: "true" },
    optional: true,
  },
  {
    name: "bun",
    about: "hand-written Bun server",
    command: [bun, "server.js"],
    directory: `${here}peers/bun`,
    npmInstall: true,
    optional: true,
  },
  {
    name: "deno",
    about: "hand-written Deno server: what the platform itself costs",
    command: ["deno", "run", "--quiet", "--no-prompt", ...v8Flags, "--allow-net", "--allow-env", "server.js"],
    directory: `${here}peers/deno`,
    optional: true,
  },
  {
    name: "node-ws",
    about: "hand-written Node server",
    command: ["node", "server.js"],
    directory: `${here}peers/node-ws`,
    npmInstall: true,
  },
];

/** The same as a target, of another checkout of wsproxy: a former commit, to be compared with. */
export function formerOf(target: Target, directory: string): Target {
  const path = Deno.realPathSync(directory);
  return { ...target, name: "former", about: directory, command: startCommand(path), directory: path };
}
