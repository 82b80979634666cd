/**
 * A worker for any runtime, for worker_runtimes.ts: it answers each question with five words, and goes on where a worker
 * before it stopped. Words: the folder of node_modules, the library, the port of Redis, and `dies` for one that kills
 * itself after three words.
 */

import { createRequire } from "node:module";
import process from "node:process";
import { Worker } from "../../clients/js/backend.js";

const [modules, library, port, mode] = process.argv.slice(2);
const url = `redis://127.0.0.1:${port}`;
const { Redis, createClient } = createRequire(`${modules}/`)(library);
const redis = library === "ioredis" ? new Redis(url, { maxRetriesPerRequest: null }) : createClient({ url });
redis.on("error", () => {});

const worker = new Worker({
  redis,
  agent: "support",
  leaseMs: 1000,
  async handle(question) {
    const answer = await question.begin('{"type":"start"}');
    for (let n = (await answer.soFar()).length; n < 5; n++) {
      await answer.send(`"word ${n}"`);
      // What is sent alone is in the log by now.
      if (n === 2 && mode === "dies") process.kill(process.pid, "SIGKILL");
    }
    await answer.end('{"type":"end"}');
    worker.stop();
  },
});
await worker.run();
process.exit(0);
