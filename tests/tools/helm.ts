/**
 * The Helm chart: what it renders, what it refuses, and that it says the same as deploy/kubernetes/. Needs Helm. The
 * schemas of what it renders are checked by test:containers.
 */

import assert from "node:assert/strict";
import { settings } from "../../src/settings.ts";
import { chart, everything, type Manifest, parseManifests, renderYaml, runHelm } from "../harness/helm.ts";

const root = new URL("../../", import.meta.url);
const read = (path: string) => Deno.readTextFileSync(new URL(path, root));

const secret = { existingSecret: "wsproxy" };
const render = async (given: unknown, release?: string) => parseManifests(await renderYaml(given, release));

/** The one object of a kind, and of a name if there are several. */
function the(kind: string, manifests: readonly Manifest[], name?: string): Manifest {
  const found = manifests.filter((object) => object.kind === kind && (!name || object.metadata.name === name));
  assert.equal(found.length, 1, `${found.length} of ${kind} ${name ?? ""}`);
  return found[0];
}

const containerOf = (deployment: Manifest): Manifest => deployment.spec.template.spec.containers[0];
const envOf = (deployment: Manifest): Record<string, Manifest> =>
  Object.fromEntries(containerOf(deployment).env.map(({ name, ...value }: Manifest) => [name, value.value ?? value]));

/** The labels have what a selector asks for. */
function assertSelects(selector: Record<string, string>, labels: Record<string, string>): void {
  assert(Object.keys(selector).length > 0, "a selector that is empty selects everything");
  for (const [name, value] of Object.entries(selector)) assert.equal(labels[name], value, name);
}

async function assertRefused(given: unknown, message: RegExp): Promise<void> {
  await assert.rejects(() => renderYaml(given), message);
}

Deno.test("helm lint --strict finds nothing", async () => {
  for (const given of [secret, everything]) {
    const { success, stdout, stderr } = await runHelm(["lint", "--strict", chart], given);
    assert(success && /1 chart\(s\) linted, 0 chart\(s\) failed/.test(stdout), stdout + stderr);
    assert.doesNotMatch(stdout + stderr, /WARNING|ERROR|Fail:/);
  }
});

Deno.test("A secret that a file holds is not in the environment as well", async () => {
  const names = ["JWT_SECRET", "JWT_SECRET_PREVIOUS", "ADMIN_PASSWORD"];
  const metrics = { adminPort: 9090 };
  const both = envOf(the("Deployment", await render({ ...secret, metrics })));
  for (const name of names) assert(name in both, name);
  const files = Object.fromEntries(names.map((name) => [`${name}_FILE`, `/run/secrets/${name}`]));
  const env = envOf(the("Deployment", await render({ ...secret, metrics, env: files })));
  for (const name of names) assert(!(name in env) && env[`${name}_FILE`] === files[`${name}_FILE`], name);
});

Deno.test("By default the chart says the same as deploy/kubernetes/", async () => {
  const added = ["helm.sh/chart", "app.kubernetes.io/instance", "app.kubernetes.io/version"];
  added.push("app.kubernetes.io/managed-by");
  /** Without the labels that Helm adds, and with what Kubernetes fills in. */
  const plain = (manifests: Manifest[]): Record<string, Manifest> => {
    const text = JSON.stringify(manifests, (name, value) => added.includes(name) ? undefined : value);
    const byKind: Record<string, Manifest> = {};
    for (const object of JSON.parse(text)) {
      assert(!(object.kind in byKind), object.kind);
      byKind[object.kind] = object;
    }
    byKind["Service"].spec.type ??= "ClusterIP";
    const container = containerOf(byKind["Deployment"]);
    container.imagePullPolicy ??= "IfNotPresent";
    container.env.sort((a: Manifest, b: Manifest) => a.name < b.name ? -1 : 1);
    return byKind;
  };
  const folder = new URL("deploy/kubernetes/", root);
  const byHand = [...Deno.readDirSync(folder)].flatMap(({ name }) => parseManifests(read(`deploy/kubernetes/${name}`)));
  const twin = plain(byHand);
  assert.equal(Object.keys(twin).length, 4);
  assert.deepEqual(plain(await render({ ...secret, networkPolicy: { enabled: true } })), twin);
  delete twin["NetworkPolicy"];
  assert.deepEqual(plain(await render(secret)), twin);
});

Deno.test("A misspelt value is refused with its name, and so is an env that is no setting", async () => {
  await assertRefused({ ...secret, replicaCuont: 2 }, /replicaCuont/);
  await assertRefused({ ...secret, image: { tga: "1" } }, /image.*tga/);
  await assertRefused({ ...secret, env: { MAX_CONECTIONS: "1" } }, /env.*MAX_CONECTIONS/);
  await assertRefused({ ...secret, env: { SHUTDOWN_GRACE_PERIOD_SECS: "30s" } }, /SHUTDOWN_GRACE_PERIOD_SECS/);
  await assertRefused({ ...secret, metrics: { adminPort: 8080 } }, /metrics\.adminPort must be another port than 8080/);
});

Deno.test("Without a secret, with half of one and with two of them rendering stops with a sentence", async () => {
  const sentence = new RegExp(
    "A secret is missing: set existingSecret to the name of a Secret with JWT_SECRET and REDIS_URL, " +
      "or set secret\\.jwtSecret and secret\\.redisUrl\n",
  );
  await assertRefused({}, sentence);
  await assertRefused({ secret: { jwtSecret: "a".repeat(32) } }, sentence);
  await assertRefused({ secret: { redisUrl: "redis://redis" } }, sentence);
  await assertRefused({ ...secret, secret: everything.secret }, /exclude each other/);
  const shortPassword = { secret: { ...everything.secret, adminPassword: "hunter2" } };
  await assertRefused(shortPassword, /secret\.adminPassword must be 12 bytes or more/);
  const short = { secret: { ...everything.secret, jwtSecret: "hidden" } };
  await assertRefused(short, /secret\.jwtSecret must be 32 bytes or more/);
  await assert.rejects(() => renderYaml(short), (error: Error) => !error.message.includes("hidden"));
});

Deno.test("An ingress does not publish /metrics", async () => {
  const ingress = (path: string) => ({ enabled: true, hosts: [{ host: "chat.example", paths: [{ path }] }] });
  for (const path of ["/", "/metrics", "/metrics/"]) {
    await assertRefused({ ...secret, ingress: ingress(path) }, /would publish \/metrics/);
  }
  await assertRefused({ ...secret, ingress: { enabled: true } }, /ingress\.hosts must name a host/);
  const { spec } = the("Ingress", await render({ ...secret, ingress: ingress("/my-agent/") }));
  assert.equal(spec.rules[0].http.paths[0].pathType, "Prefix");
  assert.equal(the("Ingress", await render(everything)).spec.rules[0].http.paths[0].path, "/");
});

Deno.test("The time that a pod gets to end follows from preStop and the grace", async () => {
  const endsWithin = async (given: object) =>
    the("Deployment", await render({ ...secret, ...given })).spec.template.spec.terminationGracePeriodSeconds;
  assert.equal(await endsWithin({}), 5 + 30 + 10);
  assert.equal(await endsWithin({ env: { SHUTDOWN_GRACE_PERIOD_SECS: 600 }, preStopSeconds: 20 }), 20 + 600 + 10);
  assert.equal(await endsWithin({ env: { SHUTDOWN_GRACE_PERIOD_SECS: 0 }, preStopSeconds: 0 }), 10);
  const byDefault = Number(settings.SHUTDOWN_GRACE_PERIOD_SECS.default);
  assert.equal(await endsWithin({ env: { SHUTDOWN_GRACE_PERIOD_SECS: null } }), 5 + byDefault + 10);
  const deployment = the("Deployment", await render({ ...secret, preStopSeconds: 0 }));
  assert.equal(containerOf(deployment).lifecycle, undefined);
});

Deno.test("A change of a secret value rolls the pods, and other values do not", async () => {
  const annotationsOf = async (given: unknown) =>
    the("Deployment", await render(given)).spec.template.metadata.annotations;
  const before = (await annotationsOf({ secret: everything.secret }))["checksum/secret"];
  assert.match(before, /^[0-9a-f]{64}$/);
  for (const name of ["jwtSecret", "jwtSecretPrevious", "redisUrl", "adminPassword"]) {
    const changed = { secret: { ...everything.secret, [name]: "c".repeat(40) } };
    assert.notEqual((await annotationsOf(changed))["checksum/secret"], before, name);
  }
  assert.equal((await annotationsOf({ secret: everything.secret, replicaCount: 5 }))["checksum/secret"], before);
  assert(!("checksum/secret" in await annotationsOf(secret)));
});

Deno.test("With everything enabled, what refers to something finds it", async () => {
  const manifests = await render(everything, "other");
  assert.equal(manifests.length, 10);
  const deployment = the("Deployment", manifests);
  const { metadata: { labels, annotations }, spec: pod } = deployment.spec.template;
  const container = containerOf(deployment);
  const ports: Record<string, number> = Object.fromEntries(
    container.ports.map(({ name, containerPort }: Manifest) => [name, containerPort]),
  );
  assert.deepEqual(ports, { http: 8080, admin: 9090 });
  for (const object of manifests) {
    assert.equal(object.metadata.labels["app.kubernetes.io/managed-by"], "Helm");
    assert(object.metadata.name.startsWith("chat-proxy") || object.kind === "ServiceAccount", object.metadata.name);
  }

  // Pods and who selects them.
  assertSelects(deployment.spec.selector.matchLabels, labels);
  assertSelects(the("PodDisruptionBudget", manifests).spec.selector.matchLabels, labels);
  assertSelects(the("NetworkPolicy", manifests).spec.podSelector.matchLabels, labels);
  assertSelects(pod.topologySpreadConstraints[0].labelSelector.matchLabels, labels);
  assert.equal(labels["example/team"], "chat");
  assert.deepEqual(Object.keys(annotations), ["checksum/secret", "example/note"], "no scrape besides the monitor's");

  const services = manifests.filter(({ kind }) => kind === "Service");
  for (const service of services) {
    assertSelects(service.spec.selector, labels);
    for (const { targetPort } of service.spec.ports) assert(targetPort in ports, targetPort);
  }
  const clients = the("Service", manifests, deployment.metadata.name);
  assert.deepEqual(clients.spec.ports, [{ name: "http", port: 8000, targetPort: "http" }]);
  assert.equal(clients.spec.type, "LoadBalancer");
  const operators = the("Service", manifests, "chat-proxy-admin");
  assert.equal(operators.spec.type, "ClusterIP", "not published");

  // Who refers to Services.
  const ingress = the("Ingress", manifests);
  for (const { backend } of ingress.spec.rules[0].http.paths) {
    assert.deepEqual(backend, { service: { name: clients.metadata.name, port: { name: "http" } } });
  }
  const monitor = the("ServiceMonitor", manifests);
  const watched = services.filter(({ spec }) =>
    spec.ports.some(({ name }: Manifest) => name === monitor.spec.endpoints[0].port)
  );
  assert.deepEqual(watched, [operators]);
  assertSelects(monitor.spec.selector.matchLabels, operators.metadata.labels);
  assert.deepEqual(monitor.spec.namespaceSelector.matchNames, ["chat"]);
  assert.deepEqual([monitor.metadata.namespace, monitor.metadata.labels.release], ["monitoring", "prometheus"]);

  // Who refers to the Deployment, and what it refers to.
  const { scaleTargetRef, behavior } = the("HorizontalPodAutoscaler", manifests).spec;
  assert.deepEqual(scaleTargetRef, { apiVersion: "apps/v1", kind: "Deployment", name: deployment.metadata.name });
  assert.equal(behavior.scaleDown.policies[0].value, 1);
  assert.equal(deployment.spec.replicas, undefined, "an upgrade would undo what the autoscaler did");
  assert.equal(pod.serviceAccountName, the("ServiceAccount", manifests).metadata.name);
  const { data, metadata } = the("Secret", manifests);
  const env = envOf(deployment);
  for (const name of ["JWT_SECRET", "JWT_SECRET_PREVIOUS", "REDIS_URL", "ADMIN_PASSWORD"]) {
    assert.equal(env[name].valueFrom.secretKeyRef.name, metadata.name);
    assert.equal(env[name].valueFrom.secretKeyRef.key, name);
  }
  const { jwtSecret, jwtSecretPrevious, redisUrl, adminPassword } = everything.secret;
  const values = Object.fromEntries(Object.entries(data).map(([name, text]) => [name, atob(String(text))]));
  assert.deepEqual(values, {
    JWT_SECRET: jwtSecret,
    JWT_SECRET_PREVIOUS: jwtSecretPrevious,
    REDIS_URL: redisUrl,
    ADMIN_PASSWORD: adminPassword,
  });

  // Values that got where they belong.
  assert.equal(container.image, "registry.example/team/wsproxy:1.2.3");
  assert.equal(env["MAX_MESSAGE_SIZE_BYTES"], "2097152", "and not 2.097152e+06");
  assert.deepEqual([env["INBOX"], env["RUST_LOG"], env["MAX_CONNECTIONS"]], ["true", "info", "10000"]);
  assert.deepEqual([env["ADMIN_PORT"], env["ADMIN_HOST"]], ["9090", "0.0.0.0"]);
  assert.deepEqual(container.livenessProbe.httpGet, { path: "/metrics", port: "admin" });
  assert.deepEqual(container.readinessProbe.httpGet, { path: "/ready", port: "http" });
  assert.equal(pod.securityContext.runAsUser, 1_000_680_000);
  assert.deepEqual(pod.affinity, everything.affinity);
  for (const name of ["imagePullSecrets", "nodeSelector", "tolerations", "volumes"] as const) {
    assert.deepEqual(pod[name], everything[name]);
  }
  assert.deepEqual(container.volumeMounts, everything.volumeMounts);
  const [fromIngress, fromPrometheus] = the("NetworkPolicy", manifests).spec.ingress;
  assert.deepEqual([fromIngress.ports[0].port, fromPrometheus.ports[0].port], [8080, 9090]);
});

Deno.test("Without adminPort a ServiceMonitor watches the clients' Service", async () => {
  const manifests = await render({ ...secret, metrics: { serviceMonitor: { enabled: true } } }, "other");
  const service = the("Service", manifests, "other-wsproxy");
  const { endpoints, selector } = the("ServiceMonitor", manifests).spec;
  assert.equal(endpoints[0].port, service.spec.ports[0].name);
  assertSelects(selector.matchLabels, service.metadata.labels);
  assert.equal(the("Deployment", manifests).spec.template.metadata.annotations, undefined);
});

Deno.test("docs/deploy.md installs and upgrades the chart with commands that work", async () => {
  const commands = [...read("docs/deploy.md").matchAll(/helm (install|upgrade) (wsproxy [^`\n]*)/g)];
  assert.deepEqual(commands.map((match) => match[1]), ["install", "upgrade"]);
  for (const [, , text] of commands) {
    const args = text!.replace(" --wait", "").replace(" -f wsproxy.yaml", " --set existingSecret=wsproxy").split(" ");
    const { success, stdout, stderr } = await runHelm(["template", ...args]);
    assert(success, stderr);
    assert.equal(the("Deployment", parseManifests(stdout)).metadata.name, "wsproxy");
  }
});
