/** Standard output that is read too slowly, not at all, or no more: messages flow, and what was dropped is counted. */

import assert from "node:assert/strict";
import { sparePort } from "../scripts/spare_port.ts";
import { LogOutput } from "../src/log.ts";
import { Client } from "./harness/client.ts";
import { ProxyProcess, testEnv } from "./harness/proxy.ts";
import { lines, shell } from "./harness/process.ts";
import { RedisServer } from "./harness/redis.ts";
import { eventually, soon } from "./harness/wait.ts";
import { request } from "./harness/wire.ts";

/** A pipe that nothing reads until the test does. */
class StuckPipe implements AsyncDisposable {
  readonly path: string;
  readonly #folder: string;
  /** Open for both, so that neither end is ever missing. */
  readonly #file: Deno.FsFile;

  constructor() {
    this.#folder = Deno.makeTempDirSync();
    this.path = `${this.#folder}/pipe`;
    shell(`mkfifo ${this.path}`);
    this.#file = Deno.openSync(this.path, { read: true, write: true });
  }

  /** For a process that is to write into it. */
  get under(): readonly string[] {
    return ["sh", "-c", `exec "$@" > ${this.path}`, "sh"];
  }

  read(): ReturnType<typeof lines> {
    return lines(this.#file.readable);
  }

  /** A write into it finds it broken. */
  close(): void {
    this.#file.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      this.close();
    } catch (error) {
      if (!(error instanceof Deno.errors.BadResource)) throw error; // it has been closed already
    }
    await Deno.remove(this.#folder, { recursive: true });
  }
}

const pipeBytes = 65_536;

Deno.test("Lines wait for a reader within a bound; those beyond it are dropped, counted, and told of once", async () => {
  await using pipe = new StuckPipe();
  using writer = await Deno.open(pipe.path, { write: true });
  const maxBytes = 10_000;
  const told: number[] = [];
  const output: LogOutput = new LogOutput({
    writer,
    maxBytes,
    onFlow(dropped) {
      told.push(dropped);
      output.write(`dropped ${dropped}\n`);
    },
  });
  const size = 100;
  // Bytes are counted, not characters.
  const line = (n: number) => `${n} `.padEnd(size - 1 - 20, "x") + "ü".repeat(10) + "\n";
  const flushed = () => soon(new Promise<void>((resolve) => output.flush(resolve)), "all is written");
  let count = 0;
  // Half of what the pipe takes.
  while (count * size < pipeBytes / 2) {
    output.write(line(count++));
    if (count % 50 === 0) await flushed();
  }
  await flushed();
  assert.equal(output.dropped, 0);
  // More than it takes, and than may wait.
  while (output.dropped === 0) {
    output.write(line(count++));
    await new Promise((resolve) => setTimeout(resolve, 0));
  }
  const kept = count - 1;
  assert(kept * size < pipeBytes + maxBytes);
  for (let n = 0; n < 76; n++) output.write(line(count++));
  assert.equal(output.dropped, 77);
  assert.deepEqual(told, []);

  const reader = pipe.read();
  const next = () => soon(reader.until(() => true), "a line");
  for (let n = 0; n < kept; n++) assert.equal(await next(), line(n).trimEnd());
  assert.equal(await next(), "dropped 77");
  assert.deepEqual(told, [77]);
  output.write("goes on\n");
  assert.equal(await next(), "goes on");
  await flushed();
});

Deno.test("Output that fails is counted, and asked again with the next line", async () => {
  let broken = true;
  const written: string[] = [];
  const output: LogOutput = new LogOutput({
    writer: {
      write(bytes) {
        if (broken) return Promise.reject(new Deno.errors.BrokenPipe());
        written.push(new TextDecoder().decode(bytes));
        return Promise.resolve(bytes.length);
      },
    },
    maxBytes: 1000,
    format: (line) => `pretty ${line}`,
    onFlow: (dropped) => output.write(`dropped ${dropped}\n`),
  });
  const flushed = () => new Promise<void>((resolve) => output.flush(resolve));
  for (const line of ["1\n", "2\n"]) output.write(line);
  await flushed();
  assert.equal(output.dropped, 2);
  broken = false;
  output.write("3\n");
  await flushed();
  assert.deepEqual(written, ["pretty 3\n", "pretty dropped 2\n"]);
});

for (const WORKERS of ["1", "2"]) {
  Deno.test(`Standard output that is not read stops no message, with WORKERS=${WORKERS}`, async () => {
    await using redis = await RedisServer.start();
    await using pipe = new StuckPipe();
    const port = sparePort();
    const env = testEnv(redis, { WORKERS, PORT: String(port), LOG_LEVEL: "debug" });
    await using proxy = ProxyProcess.spawn(env, [], undefined, pipe.under);
    await eventually(
      "healthy",
      async () => (await request(port, "/health").catch(() => ({ body: "" }))).body.includes('"healthy"'),
    );
    const control = redis.client();
    // Long names make long lines: 1,700 bytes a client are one and a half of what the pipe holds.
    const name = (n: number) => `${n}-${"龜".repeat(120)}`;
    const rounds = 60;
    for (let n = 0; n < rounds; n++) {
      await using client = await Client.connect(port, name(n), { agent: "兔".repeat(128) });
      assert.equal(await control.publish(`session:${name(n)}:down`, "word"), 1);
      assert.equal(await client.next(), "word");
    }
    await using client = await Client.connect(port, "last");
    const { body } = await request(port, "/metrics");
    assert.match(body, /^wsproxy_log_lines_dropped_total 0$/m);
    proxy.signal("SIGTERM");
    assert.equal((await client.ended()).code, 1001);
    assert.equal((await proxy.exit()).code, 0);
  });
}

Deno.test("Standard output that is closed ends nothing, and its lines are counted", async () => {
  await using redis = await RedisServer.start();
  const port = sparePort();
  const env = testEnv(redis, { PORT: String(port), LOG_LEVEL: "debug" });
  await using pipe = new StuckPipe();
  await using _proxy = ProxyProcess.spawn(env, [], undefined, pipe.under);
  await eventually(
    "healthy",
    async () => (await request(port, "/health").catch(() => ({ body: "" }))).body.includes('"healthy"'),
  );
  pipe.close();
  await (await Client.connect(port, "s1")).close();
  await eventually("lines are counted", async () => {
    const { body } = await request(port, "/metrics");
    return Number(/^wsproxy_log_lines_dropped_total (\d+)$/m.exec(body)?.[1]) > 0;
  });
});
