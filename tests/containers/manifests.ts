/** The Kubernetes manifests, and what the Helm chart renders, against its schemas. */

import assert from "node:assert/strict";
import { type Checkout, project } from "./checkout.ts";
import { everything, renderYaml } from "../harness/helm.ts";
import { docker, present, succeed } from "./shell.ts";

const hasPython = await present("python3", ["-m", "venv", "--help"], "schemas by local Python; a container has to do");
const hasHelm = await present("helm", ["version"], "the Helm chart's rendering against schemas");

/** kubernetes-validate carries the schemas; strict, so that a misspelt field is an error. */
export async function checkManifests(checkout: Checkout): Promise<void> {
  if (hasHelm) {
    // Its schema is the Prometheus operator's.
    const metrics = { ...everything.metrics, serviceMonitor: { enabled: false } };
    const values = { "helm.yaml": { existingSecret: "wsproxy" }, "helm-everything.yaml": { ...everything, metrics } };
    for (const [name, given] of Object.entries(values)) {
      await Deno.writeTextFile(`${checkout.path}/deploy/kubernetes/${name}`, await renderYaml(given));
    }
  }
  const tool = "kubernetes-validate==1.37.0";
  const names = [...Deno.readDirSync(`${checkout.path}/deploy/kubernetes`)].map(({ name }) => name);
  assert(names.length >= 4);
  const files = names.map((name) => `deploy/kubernetes/${name}`);
  const install = "python3 -m venv $0 && $0/bin/pip install --quiet --disable-pip-version-check";
  const script = `${install} ${tool} && exec $0/bin/kubernetes-validate --strict "$@"`;
  if (hasPython) {
    await succeed("sh", ["-c", script, `${checkout.path}/venv`, ...files], { cwd: checkout.path });
    return;
  }
  const dockerfile = `FROM python:3-slim\nCOPY deploy/kubernetes /deploy/kubernetes\nWORKDIR /\n`;
  await Deno.writeTextFile(`${checkout.path}/check.Dockerfile`, dockerfile);
  await Deno.writeTextFile(`${checkout.path}/check.Dockerfile.dockerignore`, "");
  const tag = `${project}-manifests`;
  await docker("build", "--quiet", "--tag", tag, "--file", `${checkout.path}/check.Dockerfile`, checkout.path);
  await docker("run", "--rm", tag, "sh", "-c", script, "/tmp/venv", ...files);
  await docker("image", "rm", "--force", tag);
}
