/** A TCP relay whose connections can be frozen one by one. */

import { writeAll } from "./wire.ts";

interface Relayed {
  readonly ends: Deno.TcpConn[];
  seen: string;
  thaw: PromiseWithResolvers<void> | undefined;
}

/** A TCP relay in front of a server, whose connections can be frozen one by one: the half-open ones of real life. */
export class Relay implements Disposable {
  readonly #listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly #connections: Relayed[] = [];
  readonly url = `redis://127.0.0.1:${this.#listener.addr.port}`;

  constructor(port: number) {
    (async () => {
      for await (const client of this.#listener) {
        const server = await Deno.connect({ hostname: "127.0.0.1", port });
        const connection: Relayed = { ends: [client, server], seen: "", thaw: undefined };
        this.#connections.push(connection);
        this.#pump(connection, client, server);
        this.#pump(connection, server, client);
      }
    })();
  }

  /** Freezes the newest connection that has sent a text: from now on nothing crosses it, either way. */
  freeze(text: string): void {
    const connection = this.#connections.findLast(({ seen }) => seen.includes(text));
    if (connection === undefined) throw new Error(`no connection has sent ${text}`);
    connection.thaw = Promise.withResolvers<void>();
  }

  async #pump(connection: Relayed, from: Deno.TcpConn, to: Deno.TcpConn): Promise<void> {
    const chunk = new Uint8Array(65_536);
    try {
      while (true) {
        const count = await from.read(chunk);
        await connection.thaw?.promise;
        if (count === null) break;
        if (connection.seen.length < 4096) connection.seen += new TextDecoder().decode(chunk.subarray(0, count));
        await writeAll(to, chunk.subarray(0, count));
      }
    } catch {
      // Either end broke: the other one learns it below.
    }
    for (const end of connection.ends.splice(0)) end.close();
  }

  [Symbol.dispose](): void {
    this.#listener.close();
    for (const { ends, thaw } of this.#connections) {
      thaw?.resolve();
      for (const end of ends.splice(0)) end.close();
    }
  }
}
