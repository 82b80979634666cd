/** A server of WebSockets in a few lines, for what no proxy does on demand. */

/** What it does besides. */
interface Served {
  /** What is selected. */
  readonly protocol?: string;
  /** Answers posts. */
  readonly post?: (request: Request) => Response | Promise<Response>;
}

const refuse = () => new Response(null, { status: 405 });

/** Takes any WebSocket until the end of its scope. */
export class WsServer implements AsyncDisposable {
  readonly #server: Deno.HttpServer<Deno.NetAddr>;
  readonly #sockets = new Set<WebSocket>();
  /** Sockets so far. */
  accepted = 0;

  private constructor(onOpen: (socket: WebSocket) => void, { protocol = "", post = refuse }: Served) {
    const listen = { hostname: "127.0.0.1", port: 0, onListen() {} };
    this.#server = Deno.serve(listen, (request: Request) => {
      if (request.method === "POST") return post(request);
      if (request.headers.get("upgrade") === null) return new Response("no stream", { status: 404 });
      this.accepted++;
      const { socket, response } = Deno.upgradeWebSocket(request, { protocol });
      this.#sockets.add(socket);
      socket.onopen = () => onOpen(socket);
      socket.onerror = () => {};
      socket.onclose = () => this.#sockets.delete(socket);
      return response;
    });
  }

  /** `onOpen` has each socket that opens. */
  static start(onOpen: (socket: WebSocket) => void, served: Served = {}): WsServer {
    return new WsServer(onOpen, served);
  }

  get port(): number {
    return this.#server.addr.port;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.close();
    await this.#server.shutdown();
  }
}
