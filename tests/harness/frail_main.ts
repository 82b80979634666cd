/** As main.ts starts workers, but for workers that a test can harm, and are asked for a sign of life more often. */

import { readConfig, readEnvironment } from "../../src/config.ts";
import { createLog } from "../../src/log.ts";
import { Workers } from "../../src/workers.ts";

const env = { ...readEnvironment(), HARM_FILE: Deno.env.get("HARM_FILE") };
const config = readConfig(env);
const script = new URL("./frail_worker.ts", import.meta.url);
const workers = await Workers.start(config, env, createLog(config.logging), { script, beatMs: 200 });
await workers.finished.catch(() => Deno.exit(1));
