/**
 * The worker of clients/js in Node 20, 22 and 24 and in Bun, all of which npm has, over each library: killed in the middle
 * of an answer, and taken over.
 *
 *     deno task test:file tests/clients/worker_runtimes.ts
 */

import assert from "node:assert/strict";
import { renderLibrary } from "../../src/redis/log_library.ts";
import { librarySettings } from "../harness/python.ts";
import { RedisServer } from "../harness/redis.ts";
import { workerRuntimes } from "../harness/runtimes.ts";

const root = new URL("../../", import.meta.url).pathname;
const { modules, runtimes } = await workerRuntimes();

for (const [runtime, command] of Object.entries(runtimes)) {
  for (const library of ["ioredis", "redis"]) {
    Deno.test(`[${runtime}, npm ${library}] A worker is killed in the middle of an answer, and another one goes on`, async () => {
      await using redis = await RedisServer.start();
      const control = redis.client();
      await control.call("FUNCTION", "LOAD", renderLibrary(librarySettings));
      await control.xadd("agent:support:inbox", "*", "type", "message", "session", "s1", "data", '"question"');
      const work = (mode: string) =>
        new Deno.Command(command, {
          args: [`${root}tests/clients/worker_program.js`, modules, library, String(redis.port), mode],
          stdin: "null",
          stdout: "null",
          stderr: "inherit",
        }).output();
      assert.equal((await work("dies")).signal, "SIGKILL");
      assert.equal((await work("lives")).code, 0);
      const log = await control.xrange("session:s1:down", "-", "+");
      const words = [0, 1, 2, 3, 4].map((n) => `"word ${n}"`);
      const start = '{"type":"start"}';
      assert.deepEqual(log.map(([, fields]) => fields[1]), [
        start,
        ...words.slice(0, 3),
        start,
        ...words.slice(3),
        '{"type":"end"}',
      ]);
    });
  }
}
