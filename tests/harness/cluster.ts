/** A Redis Cluster, all real, on spare ports. */

import type { Redis } from "ioredis";
import { sparePort } from "../../scripts/spare_port.ts";
import { slotCount, slotOf } from "../../src/redis/slot.ts";
import { RedisServer } from "./redis.ts";
import { eventually } from "./wait.ts";
import { onSparePort } from "./wire.ts";

/** A server of a Cluster. */
export interface ClusterNode {
  readonly server: RedisServer;
  readonly control: Redis;
  readonly id: string;
  readonly busPort: number;
  /** For TLS, where it has one; servers send each other keys there. */
  readonly tlsPort: number | undefined;
}

/** What a slot's name in a test is: the first session whose down channel is in some slots. */
export function sessionIn(willDo: (slot: number) => boolean, prefix = "s"): string {
  for (let n = 0;; n++) if (willDo(slotOf(`session:${prefix}${n}:down`))) return `${prefix}${n}`;
}

/** The servers of one Cluster. */
export class TestCluster implements AsyncDisposable {
  readonly nodes: ClusterNode[] = [];
  readonly #args: readonly string[];

  private constructor(args: readonly string[]) {
    this.#args = args;
  }

  /** Starts masters with equal shares of the slots, and so many replicas for each; "spare" is a port of each one's own. */
  static async start(masters: number, replicas = 0, ...args: string[]): Promise<TestCluster> {
    const cluster = new TestCluster(args);
    const nodes = await Promise.all(Array.from({ length: masters * (1 + replicas) }, () => cluster.#startNode()));
    cluster.nodes.push(...nodes);
    for (const [i, { control }] of nodes.entries()) {
      await control.call("CLUSTER", "SET-CONFIG-EPOCH", i + 1);
      if (i >= masters) continue;
      const first = Math.ceil(slotCount * i / masters);
      await control.call("CLUSTER", "ADDSLOTSRANGE", first, Math.ceil(slotCount * (i + 1) / masters) - 1);
    }
    for (const node of nodes.slice(1)) await cluster.#meet(node);
    await cluster.agreed();
    for (const [i, { control }] of nodes.slice(masters).entries()) {
      await control.call("CLUSTER", "REPLICATE", nodes[i % masters]!.id);
    }
    await cluster.agreed();
    await eventually("the replicas are in step", async () => {
      const infos = await Promise.all(nodes.slice(masters).map(({ control }) => control.info("replication")));
      return infos.every((info) => info.includes("master_link_status:up"));
    });
    return cluster;
  }

  #startNode(): Promise<ClusterNode> {
    return onSparePort(async (busPort) => {
      const server = await RedisServer.start(
        ...["--cluster-enabled", "yes", "--cluster-port", String(busPort), "--cluster-node-timeout", "1000"],
        ...["--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0"],
        ...["--cluster-allow-replica-migration", "no"],
        ...this.#args.map((arg) => arg === "spare" ? String(sparePort()) : arg),
      );
      const control = server.client();
      const [, tlsPort] = await control.config("GET", "tls-port") as [string, string];
      const id = String(await control.call("CLUSTER", "MYID"));
      return { server, control, busPort, id, tlsPort: Number(tlsPort) || undefined };
    });
  }

  async #meet({ server, busPort }: ClusterNode): Promise<void> {
    await this.nodes[0]!.control.call("CLUSTER", "MEET", "127.0.0.1", server.port, busPort);
  }

  /** Waits until all servers that answer know all, and serve. */
  async agreed(): Promise<void> {
    await eventually("the servers agree", async () => {
      const answers = await Promise.all(this.nodes.map(async ({ control }) => {
        const info = String(await control.call("CLUSTER", "INFO"));
        const slots = await control.call("CLUSTER", "SLOTS") as unknown[][];
        const table = JSON.stringify(slots.map(([first, last, master]) => [first, last, (master as unknown[])[1]]));
        const ok = info.includes("cluster_state:ok") && info.includes(`cluster_known_nodes:${this.nodes.length}\r\n`);
        return ok ? table : "";
      }));
      return answers[0] !== "" && answers.every((answer) => answer === answers[0]);
    });
  }

  /** One more master, without slots; with functions, as `redis-cli --cluster add-node` brings them. */
  async add(): Promise<ClusterNode> {
    const node = await this.#startNode();
    this.nodes.push(node);
    const functions = await this.nodes[0]!.control.callBuffer("FUNCTION", "DUMP") as never;
    await node.control.call("FUNCTION", "RESTORE", functions);
    await this.#meet(node);
    await this.agreed();
    return node;
  }

  get url(): string {
    return `redis+cluster://${this.nodes.map(({ server }) => `127.0.0.1:${server.port}`).join(",")}`;
  }

  /** The slots of a master, as it says. */
  async slotsOf({ control, id }: ClusterNode): Promise<Set<number>> {
    const lines = String(await control.call("CLUSTER", "NODES")).split("\n");
    const words = lines.find((line) => line.startsWith(id))!.split(" ").slice(8);
    const slots = new Set<number>();
    for (const word of words.filter((word) => !word.startsWith("["))) {
      const [first, last = first] = word.split("-").map(Number);
      for (let slot = first!; slot <= last!; slot++) slots.add(slot);
    }
    return slots;
  }

  /** The master that serves a name, as most servers that answer say. */
  async ownerOf(name: string): Promise<ClusterNode> {
    const slot = slotOf(name);
    const votes = new Map<number, number>();
    for (const { server, control } of this.nodes) {
      if (!server.isRunning) continue;
      const ranges = await control.call("CLUSTER", "SLOTS") as [number, number, [string, number]][];
      const port = ranges.find(([first, last]) => first <= slot && slot <= last)?.[2][1];
      if (port !== undefined) votes.set(port, (votes.get(port) ?? 0) + 1);
    }
    const [most] = [...votes].sort(([, a], [, b]) => b - a);
    return this.nodes.find(({ server }) => server.port === most![0])!;
  }

  /** Sends a command to the server of a name, until one does. */
  async call(name: string, command: string, ...args: (string | number)[]): Promise<unknown> {
    let answer: unknown;
    await eventually(`${command} is taken`, async () => {
      const { server, control } = await this.ownerOf(name);
      if (!server.isRunning) return false;
      try {
        answer = await control.call(command, ...args);
        return true;
      } catch (error) {
        if (/^(MOVED|CLUSTERDOWN|READONLY)/.test((error as Error).message)) return false;
        throw error;
      }
    });
    return answer;
  }

  /** SPUBLISH; returns how many have received it. */
  async publish(channel: string, text: string): Promise<number> {
    return Number(await this.call(channel, "SPUBLISH", channel, text));
  }

  /** `wsproxy_send` to a session; returns the position. */
  async send(session: string, payload: string): Promise<string> {
    const down = `session:${session}:down`;
    const [position] = await this.call(down, "FCALL", "wsproxy_send", 1, down, payload) as [string];
    return position;
  }

  /** Makes a replica the master of what its master has, such as a name. */
  async failOver(replica: ClusterNode, name: string): Promise<void> {
    await eventually("it is in step", async () => {
      return (await replica.control.info("replication")).includes("master_link_status:up");
    });
    let askedAtMs = -Infinity;
    await eventually("it is the master", async () => {
      if (await this.ownerOf(name) === replica) return true;
      // The first one after the replica's start comes to nothing, and a second one starts the first anew.
      if (performance.now() - askedAtMs > 1000) {
        askedAtMs = performance.now();
        await replica.control.call("CLUSTER", "FAILOVER").catch((error) => {
          // It is the master since the last request, and the others, whose votes count here, hear it a moment later.
          if (!(error as Error).message.includes("send CLUSTER FAILOVER to a replica")) throw error;
        });
      }
      return false;
    });
  }

  /** Begins to move a slot; its keys go one by one, or by {@linkcode TestCluster.finishMove}. */
  async beginMove(slot: number, from: ClusterNode, to: ClusterNode): Promise<void> {
    await to.control.call("CLUSTER", "SETSLOT", slot, "IMPORTING", from.id);
    await from.control.call("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id);
  }

  /** Moves a slot's keys. */
  async moveKeys(slot: number, from: ClusterNode, to: ClusterNode): Promise<void> {
    while (true) {
      const keys = await from.control.call("CLUSTER", "GETKEYSINSLOT", slot, 100) as string[];
      if (keys.length === 0) return;
      await from.control.call("MIGRATE", "127.0.0.1", to.tlsPort ?? to.server.port, "", 0, 5000, "KEYS", ...keys);
    }
  }

  /** The slot is the other server's. */
  async finishMove(slot: number, from: ClusterNode, to: ClusterNode): Promise<void> {
    await this.moveKeys(slot, from, to);
    await to.control.call("CLUSTER", "SETSLOT", slot, "NODE", to.id);
    await from.control.call("CLUSTER", "SETSLOT", slot, "NODE", to.id);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { server } of this.nodes) await server[Symbol.asyncDispose]();
  }
}
