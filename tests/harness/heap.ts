/** What a process that runs with `--inspect` has in its heap, its workers' included. */

import { soon } from "./wait.ts";

/** Objects by the name of their class, the bytes of all that lives, and those of array buffers, which lie beside it. */
export interface Heap {
  readonly objects: ReadonlyMap<string, number>;
  readonly bytes: number;
  readonly bufferBytes: number;
}

interface Message {
  readonly id?: number;
  readonly method?: string;
  readonly params?: { readonly sessionId?: string; readonly message?: string; readonly chunk?: string };
  readonly error?: { readonly message: string };
}

/** One isolate: the main one, or a worker's. */
class Isolate {
  readonly #send: (message: object) => void;
  readonly #waiting = new Map<number, PromiseWithResolvers<void>>();
  #chunks: string[] = [];
  #id = 0;

  constructor(send: (message: object) => void) {
    this.#send = send;
  }

  call(method: string, params: object = {}): Promise<void> {
    const waiting = Promise.withResolvers<void>();
    const id = ++this.#id;
    this.#waiting.set(id, waiting);
    this.#send({ id, method, params });
    return soon(waiting.promise, method);
  }

  hear({ id, method, params, error }: Message): void {
    if (method === "HeapProfiler.addHeapSnapshotChunk") this.#chunks.push(params!.chunk!);
    if (id === undefined) return;
    const waiting = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (error) waiting?.reject(new Error(error.message));
    else waiting?.resolve();
  }

  /** What is left after a collection: a snapshot begins with one. */
  async heap(): Promise<Heap> {
    this.#chunks = [];
    await this.call("HeapProfiler.collectGarbage");
    await this.call("HeapProfiler.takeHeapSnapshot", { reportProgress: false });
    const { snapshot, nodes, strings } = JSON.parse(this.#chunks.join(""));
    this.#chunks = [];
    const fields: string[] = snapshot.meta.node_fields;
    const [type, name, size] = ["type", "name", "self_size"].map((field) => fields.indexOf(field));
    const objectType = snapshot.meta.node_types[0].indexOf("object");
    const objects = new Map<string, number>();
    let [bytes, bufferBytes] = [0, 0];
    for (let at = 0; at < nodes.length; at += fields.length) {
      const of = strings[nodes[at + name!]];
      if (of === "system / JSArrayBufferData") bufferBytes += nodes[at + size!];
      else bytes += nodes[at + size!];
      if (nodes[at + type!] !== objectType) continue;
      objects.set(of, (objects.get(of) ?? 0) + 1);
    }
    return { objects, bytes, bufferBytes };
  }
}

/** An inspector's connection to a process. */
export class Inspector implements Disposable {
  readonly #socket: WebSocket;
  readonly #main: Isolate;
  /** By the session of each worker. */
  readonly #workers = new Map<string, Isolate>();

  private constructor(socket: WebSocket) {
    this.#socket = socket;
    this.#main = new Isolate((message) => socket.send(JSON.stringify(message)));
    socket.addEventListener("message", ({ data }) => this.#hear(JSON.parse(data)));
  }

  /** Connects to the port of `--inspect`. */
  static async connect(port: number): Promise<Inspector> {
    const [target] = await (await fetch(`http://127.0.0.1:${port}/json/list`)).json();
    const socket = new WebSocket(target.webSocketDebuggerUrl);
    await soon(new Promise((resolve) => socket.addEventListener("open", resolve, { once: true })), "inspector");
    const inspector = new Inspector(socket);
    await inspector.#main.call("NodeWorker.enable", { waitForDebuggerOnStart: false });
    return inspector;
  }

  #hear(message: Message): void {
    const { method, params } = message;
    const session = params?.sessionId;
    if (session === undefined) return this.#main.hear(message);
    switch (method) {
      case "NodeWorker.attachedToWorker":
        this.#workers.set(
          session,
          new Isolate((message) =>
            void this.#main.call("NodeWorker.sendMessageToWorker", {
              sessionId: session,
              message: JSON.stringify(message),
            }).catch(() => {})
          ),
        );
        return;
      case "NodeWorker.detachedFromWorker":
        this.#workers.delete(session);
        return;
      case "NodeWorker.receivedMessageFromWorker":
        this.#workers.get(session)?.hear(JSON.parse(params!.message!));
    }
  }

  /** Workers that run now. */
  get workers(): number {
    return this.#workers.size;
  }

  /** All isolates' heaps together. */
  async heap(): Promise<Heap> {
    const objects = new Map<string, number>();
    let [bytes, bufferBytes] = [0, 0];
    for (const isolate of [this.#main, ...this.#workers.values()]) {
      const heap = await isolate.heap();
      bytes += heap.bytes;
      bufferBytes += heap.bufferBytes;
      for (const [name, count] of heap.objects) objects.set(name, (objects.get(name) ?? 0) + count);
    }
    return { objects, bytes, bufferBytes };
  }

  [Symbol.dispose](): void {
    this.#socket.close();
  }
}
