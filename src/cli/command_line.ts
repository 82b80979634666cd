/** The commands besides `start`, each loaded when it is called. */

import project from "../../deno.json" with { type: "json" };
import { tokenUsage, UsageError } from "./usage.ts";

const usage = `usage: wsproxy [start]                serve, with settings from the environment
       wsproxy check-config           check settings, Redis, and the rights there; exit with 0 or 1
       ${tokenUsage}
       wsproxy healthcheck [<url>]    exit with 0 when messages flow
       wsproxy --version | --help`;

/** Carries out a command; returns its exit code. */
export async function runCommand(command: string, args: string[]): Promise<number> {
  try {
    switch (command) {
      case "token":
        return await (await import("./token.ts")).token(args);
      case "check-config":
        return await (await import("./check_config.ts")).checkConfig(args);
      case "healthcheck":
        return await (await import("./healthcheck.ts")).healthcheck(args);
      case "--version":
        console.log(project.version);
        return 0;
      case "--help":
        console.log(usage);
        return 0;
      case "start":
        throw new UsageError(`start takes no arguments: settings come from the environment\n${usage}`);
      default:
        throw new UsageError(`there is no command ${JSON.stringify(command)}\n${usage}`);
    }
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    console.error(error.message);
    return 1;
  }
}
