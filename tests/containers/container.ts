/** Single containers, and clients of what they publish. */

import { mint } from "../harness/token.ts";
import { image, secret } from "./checkout.ts";
import { docker, eventually, run } from "./shell.ts";

/** A container of the image alone, hardened as compose does it, removed at the end. */
export class Lone implements AsyncDisposable {
  private constructor(readonly id: string) {}

  static async start(env: Record<string, string>, ...args: string[]): Promise<Lone> {
    const names = Object.entries(env).flatMap(([name, value]) => ["--env", `${name}=${value}`]);
    const hard = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"];
    return new Lone(await docker("run", "--detach", ...hard, ...names, ...args, image));
  }

  async logs(): Promise<string> {
    const { stdout, stderr } = await run("docker", ["logs", this.id]);
    return `${stdout}\n${stderr}`;
  }

  /** Its command line, once wsproxy itself runs. */
  async command(): Promise<string> {
    let command = "";
    await eventually("deno runs", async () => {
      command = await processes(this.id);
      return /^deno run .*main\.ts/m.test(command);
    });
    return command;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await run("docker", ["rm", "--force", "--volumes", this.id]);
  }
}

/** Command lines of a container's processes, one a line. */
export async function processes(container: string): Promise<string> {
  const { stdout } = await run("docker", ["top", container, "-o", "pid,args"]);
  return stdout.split("\n").slice(1).map((line) => line.trim().replace(/^\d+ +/, "")).join("\n");
}

export async function inspect(container: string): Promise<Inspection> {
  return JSON.parse(await docker("inspect", container))[0];
}

/** The part of `docker inspect` that is looked at. */
export interface Inspection {
  Image: string;
  RestartCount: number;
  State: {
    Status: string;
    ExitCode: number;
    StartedAt: string;
    Health?: { Status: string; Log: { Output: string }[] };
  };
  Config: { User: string; StopTimeout?: number; Labels: Record<string, string> };
  HostConfig: {
    ReadonlyRootfs: boolean;
    CapDrop: string[];
    SecurityOpt: string[];
    Memory: number;
    NanoCpus: number;
    PidsLimit: number;
    RestartPolicy: { Name: string };
    PortBindings: Record<string, unknown>;
  };
}

export async function ask(port: number, path: string): Promise<{ status: number; body: string }> {
  const answer = await fetch(`http://127.0.0.1:${port}${path}`, { signal: AbortSignal.timeout(5000) });
  return { status: answer.status, body: await answer.text() };
}

/** A client's socket through the published port, and the code it closes with. */
export async function openSocket(
  port: number,
  session: string,
): Promise<{ closed: Promise<number>; next: Promise<string> }> {
  const socket = new WebSocket(`ws://127.0.0.1:${port}/agent/ws/${session}`, [
    "bearer",
    await mint(session, {}, secret),
  ]);
  const closed = new Promise<number>((resolve) => socket.onclose = ({ code }) => resolve(code));
  const next = new Promise<string>((resolve) => socket.onmessage = ({ data }) => resolve(data));
  await new Promise<void>((resolve, reject) => {
    socket.onopen = () => resolve();
    socket.onerror = () => reject(new Error("refused"));
  });
  return { closed, next };
}
