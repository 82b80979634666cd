/** The Python package's own tests, those of its client with each Python that there is: a part of `deno task test:python`. */

import { clientsVenv, findPython, pythons, run, runOnRedis, websocketsFor } from "../harness/python.ts";
import { testFrozenMaster, testMovedServer } from "../torture/moved_master.ts";

const root = new URL("../../", import.meta.url).pathname;
const bin = await clientsVenv();

for (const [what, file] of [["The worker", "worker_test.py"], ["A chat's worker", "chat_test.py"]]) {
  Deno.test(`${what} keeps what ${file} says`, () => runOnRedis(bin, file!));
}

Deno.test("The store of examples/chat keeps what example_store_test.py says", async () => {
  const path = `PYTHONPATH=${root}examples/chat/backend`;
  await run("env", path, `${bin}/python`, "-X", "dev", `${root}tests/clients/example_store_test.py`);
});

Deno.test("A worker in Python leaves a server that is a replica now, or frozen", () =>
  testMovedServer({ python: `${bin}/python` }));

Deno.test("In a Cluster a worker in Python finds the master that has taken a frozen one's place", () =>
  testFrozenMaster({ python: `${bin}/python` }));

Deno.test("The client keeps what client_test.py says, with each Python that there is", async () => {
  // All at once, as they wait most of the time.
  await Promise.all(pythons.map(async (each) => {
    const python = await findPython(each.version);
    if (python === undefined) return console.log(`left out: there is no Python ${each.version} on this machine`);
    const path = `PYTHONPATH=${root}clients/python:${await websocketsFor(each)}`;
    await run("env", path, python, `${root}tests/clients/client_test.py`).catch((cause) => {
      throw new Error(`Python ${each.version}, websockets ${each.websockets}`, { cause });
    });
  }));
});
