/** The Helm chart as Helm renders it. No cluster is needed. */

import { parseAllDocuments } from "yaml";

const root = new URL("../../", import.meta.url);

/** The chart's folder. */
export const chart = new URL("deploy/helm/wsproxy/", root).pathname;

// A Helm that was not built by its own Makefile takes itself for one of Kubernetes 1.20.
const kubernetes = ["--kube-version", "1.30.0"];

/** Runs a command of Helm's that takes a chart, in the project's folder; `values` is what `-f` would read. */
export async function runHelm(args: readonly string[], values: unknown = {}) {
  const child = new Deno.Command("helm", {
    args: [...args, ...kubernetes, "--values", "-"],
    cwd: root,
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(JSON.stringify(values)));
  await writer.close();
  const { success, stdout, stderr } = await child.output();
  return { success, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
}

/** The manifests of a release as YAML; throws what Helm says when it refuses. */
export async function renderYaml(values: unknown, release = "wsproxy"): Promise<string> {
  const { success, stdout, stderr } = await runHelm(["template", release, chart, "--namespace", "chat"], values);
  if (!success) throw new Error(stderr);
  return stdout;
}

/** One object of Kubernetes, which these tests look into as they like. */
// deno-lint-ignore no-explicit-any
export type Manifest = any;

/** Every document of a text; throws on YAML that is none, and on a key that is there twice. */
export function parseManifests(text: string): Manifest[] {
  return parseAllDocuments(text).flatMap((document) => {
    if (document.errors.length > 0) throw document.errors[0];
    return document.contents === null ? [] : [document.toJS()];
  });
}

/** Values with which every template renders something, and every value differs from its default. */
export const everything = {
  image: { registry: "registry.example", repository: "team/wsproxy", tag: "1.2.3", pullPolicy: "Always" },
  imagePullSecrets: [{ name: "pull" }],
  nameOverride: "proxy",
  fullnameOverride: "chat-proxy",
  env: { SHUTDOWN_GRACE_PERIOD_SECS: 60, MAX_MESSAGE_SIZE_BYTES: 2_097_152, INBOX: true, ALLOWED_ORIGINS: "*" },
  extraEnv: [{ name: "RUST_LOG", value: "info" }],
  secret: {
    jwtSecret: "a".repeat(32),
    jwtSecretPrevious: "b".repeat(32),
    redisUrl: "rediss://:p%40ss@redis:6379",
    adminPassword: "correct horse",
  },
  serviceAccount: { create: true, name: "proxy-account", annotations: { "example/role": "none" } },
  podAnnotations: { "example/note": "1" },
  podLabels: { "example/team": "chat" },
  podSecurityContext: { runAsNonRoot: true, runAsUser: 1_000_680_000 },
  securityContext: { readOnlyRootFilesystem: true },
  preStopSeconds: 8,
  service: { type: "LoadBalancer", port: 8000, annotations: { "example/balancer": "internal" } },
  ingress: {
    enabled: true,
    className: "nginx",
    annotations: { "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600" },
    hosts: [{ host: "chat.example", paths: [{ path: "/" }, { path: "/a/", pathType: "Exact" }] }],
    tls: [{ hosts: ["chat.example"], secretName: "chat-tls" }],
  },
  resources: { requests: { cpu: "500m" } },
  autoscaling: { enabled: true, minReplicas: 4, maxReplicas: 8, targetCPUUtilizationPercentage: 60 },
  podDisruptionBudget: { enabled: true, maxUnavailable: "25%" },
  metrics: {
    adminPort: 9090,
    serviceMonitor: { enabled: true, interval: "15s", labels: { release: "prometheus" }, namespace: "monitoring" },
  },
  networkPolicy: { enabled: true, redisPorts: [6379, 26379] },
  volumes: [{ name: "ca", secret: { secretName: "redis-ca" } }],
  volumeMounts: [{ name: "ca", mountPath: "/ca", readOnly: true }],
  nodeSelector: { "kubernetes.io/os": "linux" },
  tolerations: [{ key: "chat", operator: "Exists" }],
  affinity: { nodeAffinity: {} },
  topologySpreadConstraints: [
    { maxSkew: 1, topologyKey: "topology.kubernetes.io/zone", whenUnsatisfiable: "ScheduleAnyway" },
  ],
};
