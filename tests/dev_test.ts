/** What ./dev does by itself, without Deno. */

import assert from "node:assert/strict";

const root = new URL("../", import.meta.url).pathname;

/** A folder with nothing but ./dev and what it makes .env from, until the end of its scope. */
class Checkout implements Disposable {
  readonly #folder = Deno.makeTempDirSync();

  constructor(env?: string) {
    for (const name of ["dev", ".env.example", "docker-compose.yml"]) {
      Deno.copyFileSync(root + name, `${this.#folder}/${name}`);
    }
    if (env !== undefined) Deno.writeTextFileSync(`${this.#folder}/.env`, env, { mode: 0o640 });
  }

  init(...args: string[]): { code: number; told: string } {
    const { code, stderr, stdout } = this.#run("./dev", "init", ...args);
    assert.equal(stdout, "");
    return { code, told: stderr };
  }

  get env(): string {
    return Deno.readTextFileSync(`${this.#folder}/.env`);
  }

  get mode(): number {
    return Deno.statSync(`${this.#folder}/.env`).mode! & 0o777;
  }

  get files(): string[] {
    return [...Deno.readDirSync(this.#folder)].map(({ name }) => name).sort();
  }

  /** What Deno and what a shell reads from .env under a name. */
  reads(name: string): string[] {
    return [
      this.#run(Deno.execPath(), "eval", "--env-file", `console.log(Deno.env.get("${name}"))`),
      this.#run("sh", "-c", `set -a; . ./.env; set +a; echo "$${name}"`),
    ].map(({ stdout }) => stdout.trim());
  }

  #run(command: string, ...args: string[]) {
    const output = new Deno.Command(command, { args, cwd: this.#folder }).outputSync();
    const text = (bytes: Uint8Array<ArrayBuffer>) => new TextDecoder().decode(bytes);
    return { code: output.code, stdout: text(output.stdout), stderr: text(output.stderr) };
  }

  [Symbol.dispose](): void {
    Deno.removeSync(this.#folder, { recursive: true });
  }
}

const linesOf = (env: string, name: string) => env.split("\n").filter((line) => line.includes(`${name}=`));

Deno.test("./dev init makes a .env with a secret of its own and what it is given, and keeps it from then on", () => {
  using checkout = new Checkout();
  assert.deepEqual(checkout.init("REDIS_URL=redis://127.0.0.1:6390", "REDIS_PASSWORD=one"), { code: 0, told: "" });
  assert.equal(checkout.mode, 0o600);
  const { env } = checkout;
  const [line, ...others] = linesOf(env, "JWT_SECRET");
  assert.match(line!, /^JWT_SECRET=[0-9a-f]{64}$/);
  assert.deepEqual(others, []);
  assert.deepEqual(linesOf(env, "REDIS_URL"), ["REDIS_URL=redis://127.0.0.1:6390"]);
  assert.match(env, /^#PORT=8080$/m);
  assert.deepEqual(linesOf(env, "REDIS_PASSWORD"), ["REDIS_PASSWORD=one"]);
  for (const name of ["JWT_SECRET", "REDIS_URL"]) {
    const [byDeno, byShell] = checkout.reads(name);
    assert.equal(byDeno, byShell);
    assert(byDeno);
  }
  for (const args of [[], ["REDIS_URL=redis://127.0.0.1:6390"]]) {
    assert.equal(checkout.init(...args).code, 0);
    assert.equal(checkout.env, env);
  }
  assert.deepEqual(checkout.files, [".env", ".env.example", "dev", "docker-compose.yml"]);
});

Deno.test("./dev init completes a .env that is there, and changes nothing that it sets", () => {
  for (
    const [before, after] of [
      ["PORT=9000", /^PORT=9000\nJWT_SECRET=[0-9a-f]{64}\n$/],
      ["JWT_SECRET=\nPORT=9000\n", /^JWT_SECRET=[0-9a-f]{64}\nPORT=9000\n$/],
      ["export JWT_SECRET='mine # and $HOME'\n", /^export JWT_SECRET='mine # and \$HOME'\n$/],
    ] as const
  ) {
    using checkout = new Checkout(before);
    assert.deepEqual(checkout.init(), { code: 0, told: "./dev: .env is there, and what it sets is kept\n" });
    assert.match(checkout.env, after);
    assert.equal(checkout.mode, 0o640);
  }
});

Deno.test("./dev init refuses what would be read in two ways, and what is no setting", () => {
  for (
    const [env, args, told] of [
      ["JWT_SECRET=a\nPORT=1\nJWT_SECRET=b\n", [], /JWT_SECRET stands in \.env 2 times: keep one of the lines/],
      ["REDIS_URL=redis://a\n", ["REDIS_URL=redis://b"], /REDIS_URL has another value in \.env, which is kept/],
      ["", ["REDIS_URL=redis://:a#b@c"], /REDIS_URL: this value has characters that \.env needs single quotes for/],
      ["", ["ALLOWED_ORIGINS="], /ALLOWED_ORIGINS: this value/],
      ["", ["REDIS_ULR=redis://b"], /there is no setting REDIS_ULR/],
      ["", ["6390"], /usage: \.\/dev init/],
    ] as const
  ) {
    using checkout = new Checkout(env);
    const result = checkout.init(...args);
    assert.equal(result.code, 1);
    assert.match(result.told, told);
    assert.equal(linesOf(checkout.env, "REDIS_URL").length, linesOf(env, "REDIS_URL").length);
  }
});
