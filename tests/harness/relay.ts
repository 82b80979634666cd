/** A TCP relay in front of a server: it freezes connections, cuts them at any byte, or hangs up at once. */

import { writeAll } from "./wire.ts";

/** How many bytes a connection may carry until it is cut. */
export interface Budget {
  /** From the client. */
  readonly up?: number;
  /** From the server. */
  readonly down?: number;
}

interface Relayed {
  readonly ends: Deno.Conn[];
  seen: string;
  thaw: PromiseWithResolvers<void> | undefined;
  /** End the pauses between two pieces, while there are any. */
  readonly hurry: Set<() => void>;
}

/** The half-open, torn and refused connections of real life. */
export class Relay implements Disposable {
  readonly #listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  readonly #connections = new Set<Relayed>();
  readonly port = this.#listener.addr.port;
  readonly url = `redis://127.0.0.1:${this.port}`;
  /** Connections accepted so far. */
  accepted = 0;
  /** Every connection is accepted, and hung up on. */
  hangsUp = false;
  /** How long each piece takes on its way, either way, in milliseconds. */
  delayMs = 0;
  /** Bytes a second that each connection may carry from the server, about. */
  bytesPerSec = Infinity;
  /** What the next connections may carry, one budget each; the others have no limit. */
  budgets: Budget[] = [];

  /** `target` is the server's port, or says what it is for a client; another one counts for the next connections. */
  constructor(public target: number | ((client: Deno.Conn) => number | Promise<number>)) {
    (async () => {
      for await (const client of this.#listener) void this.#accept(client);
    })();
  }

  async #accept(client: Deno.Conn): Promise<void> {
    this.accepted++;
    if (this.hangsUp) return client.close();
    const { up = Infinity, down = Infinity } = this.budgets.shift() ?? {};
    const connection: Relayed = { ends: [client], seen: "", thaw: undefined, hurry: new Set() };
    this.#connections.add(connection);
    try {
      const port = typeof this.target === "number" ? this.target : await this.target(client);
      const server = await Deno.connect({ hostname: "127.0.0.1", port });
      if (connection.ends.length === 0) return server.close();
      connection.ends.push(server);
      await Promise.race([
        this.#pump(connection, client, server, up),
        this.#pump(connection, server, client, down, () => this.bytesPerSec),
      ]);
    } catch {
      // The server is away.
    }
    this.#end(connection);
  }

  /** Whether a connection that there is now has sent a text. */
  hasSent(text: string): boolean {
    return [...this.#connections].some(({ seen }) => seen.includes(text));
  }

  /** Freezes the newest connection that has sent a text: from now on nothing crosses it, either way. */
  freeze(text: string): void {
    const connection = [...this.#connections].findLast(({ seen }) => seen.includes(text));
    if (connection === undefined) throw new Error(`no connection has sent ${text}`);
    connection.thaw = Promise.withResolvers<void>();
  }

  /** Freezes all connections that there are. */
  freezeAll(): void {
    for (const connection of this.#connections) connection.thaw = Promise.withResolvers<void>();
  }

  /** Lets all go on that are frozen. */
  thawAll(): void {
    for (const connection of this.#connections) {
      connection.thaw?.resolve();
      connection.thaw = undefined;
    }
  }

  /** Cuts those that are frozen, as a kernel does in the end. */
  cutFrozen(): void {
    for (const connection of this.#connections) if (connection.thaw) this.#end(connection);
  }

  /** Cuts all connections that there are. */
  cut(): void {
    for (const connection of this.#connections) this.#end(connection);
  }

  /** Carries bytes one way until an end closes, or the budget is used up. */
  async #pump(
    connection: Relayed,
    from: Deno.Conn,
    to: Deno.Conn,
    budget: number,
    bytesPerSec = () => Infinity,
  ): Promise<void> {
    const chunk = new Uint8Array(65_536);
    let left = budget;
    try {
      while (left > 0) {
        const count = await from.read(chunk);
        await connection.thaw?.promise;
        if (this.delayMs > 0) await this.#pace(connection, this.delayMs);
        if (count === null) break;
        if (connection.seen.length < 4096) connection.seen += new TextDecoder().decode(chunk.subarray(0, count));
        await writeAll(to, chunk.subarray(0, Math.min(count, left)));
        left -= count;
        const pauseMs = count / bytesPerSec() * 1000;
        if (pauseMs > 0) await this.#pace(connection, pauseMs);
      }
    } catch {
      // Either end broke.
    }
  }

  async #pace(connection: Relayed, pauseMs: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, pauseMs);
    connection.hurry.add(resolve);
    await promise;
    connection.hurry.delete(resolve);
    clearTimeout(timer);
  }

  #end(connection: Relayed): void {
    this.#connections.delete(connection);
    connection.thaw?.resolve();
    for (const hurry of connection.hurry) hurry();
    for (const end of connection.ends.splice(0)) end.close();
  }

  [Symbol.dispose](): void {
    this.#listener.close();
    this.cut();
  }
}
