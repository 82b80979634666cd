/** The Helm chart as it is written. What it renders is tested by tests/tools/helm.ts, which needs Helm. */

import assert from "node:assert/strict";
import { Ajv, type ErrorObject } from "ajv";
import { parse } from "yaml";
import { chartSettings } from "../scripts/docs.ts";
import { foreignNames, settings } from "../src/settings.ts";
import { chart, everything, type Manifest } from "./harness/helm.ts";

const root = new URL("../", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, root));

const values: Manifest = parse(Deno.readTextFileSync(`${chart}values.yaml`));
const schema: Manifest = JSON.parse(Deno.readTextFileSync(`${chart}values.schema.json`));
const templates = [...Deno.readDirSync(`${chart}templates`)].map(({ name }) => ({
  name,
  text: Deno.readTextFileSync(`${chart}templates/${name}`),
}));

/** What the schema says about values, one line a fault; each names the value. */
function faultsOf(given: unknown): string[] {
  // With allowUnionTypes, as `env` takes numbers as well as text.
  const ajv = new Ajv({ strict: true, allowUnionTypes: true, allErrors: true });
  const check = ajv.compile(schema);
  if (check(given)) return [];
  return check.errors!.map(({ instancePath, message, params }: ErrorObject) =>
    `${instancePath} ${message} ${JSON.stringify(params)}`
  );
}

Deno.test("The chart's values.yaml conforms to its schema, and so does everything enabled", () => {
  assert.deepEqual(faultsOf(values), []);
  assert.deepEqual(faultsOf(everything), []);
});

Deno.test("Every value that the schema knows is explained in values.yaml, and templates use no other", () => {
  const forUmbrellas = ["global", "enabled"];
  (function compare(node: Manifest, given: Manifest, path: string) {
    for (const [name, child] of Object.entries<Manifest>(node.properties ?? {})) {
      if (path === "" && forUmbrellas.includes(name)) continue;
      assert(name in given, `${path}${name}`);
      if (name !== "env") compare(child, given[name], `${path}${name}.`);
    }
  })(schema, values, "");
  const used = templates.flatMap(({ text }) => [...text.matchAll(/\.Values\.([\w.]+)/g)].map((match) => match[1]!));
  assert(used.length > 50);
  for (const path of used) {
    const [first, second] = path.split(".");
    if (first === "env" && second !== undefined) assert(second in settings, path);
    else {
      assert.notEqual(path.split(".").reduce((at: Manifest, name) => at?.[name], values), undefined, path);
    }
  }
});

Deno.test("A misspelt value is an error wherever the names are the chart's own", () => {
  let seen = 0;
  (function walk(node: Manifest, path: string) {
    if (node.properties) {
      seen++;
      assert.equal(node.additionalProperties, false, path);
    }
    for (const [name, child] of Object.entries<Manifest>(node)) {
      if (typeof child === "object") walk(child, `${path}/${name}`);
    }
  })(schema, "");
  assert(seen >= 10);
  assert.match(faultsOf({ ...values, replicaCuont: 1 })[0]!, /replicaCuont/);
});

Deno.test("Every name in the chart's environment is a setting of wsproxy", () => {
  const inTemplates = templates.flatMap(({ text }) =>
    [...text.matchAll(/name: ([A-Z][A-Z_]+)\b/g)].map((match) => match[1]!)
  );
  assert(inTemplates.length >= 5);
  const owned: readonly string[] = chartSettings;
  for (const name of inTemplates) assert(owned.includes(name) && name in settings, name);
  for (const name of [...Object.keys(values.env), ...Object.keys(schema.properties.env.properties)]) {
    assert(name in settings && !owned.includes(name), name);
  }
  for (const name of owned) assert.match(faultsOf({ ...values, env: { [name]: "1" } })[0]!, new RegExp(name));
  for (const { name } of everything.extraEnv) assert(foreignNames.some((other) => other === name));
});

Deno.test("The chart's appVersion is the program's version", () => {
  const { appVersion } = parse(Deno.readTextFileSync(`${chart}Chart.yaml`));
  assert.equal(appVersion, JSON.parse(read("deno.json")).version);
});
