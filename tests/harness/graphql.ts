/** A GraphQL server that no socket reaches: it hears of its clients, and answers them, by the channels of a session. */

import { buildSchema } from "graphql";
import { makeServer } from "graphql-ws";
import { downChannel, upChannel } from "../../src/redis/link.ts";
import type { RedisServer } from "./redis.ts";

const schema = buildSchema("type Query { none: Int } type Subscription { counted(to: Int!): Int, told: String }");

/** What each subscription that listens is told, until the end. */
export class Told {
  #next = Promise.withResolvers<string>();
  #ended = false;
  tell(text: string): void {
    this.#next.resolve(text);
    this.#next = Promise.withResolvers();
  }
  end(): void {
    this.#ended = true;
    this.tell("");
  }
  async *listen() {
    while (!this.#ended) yield { told: await this.#next.promise };
  }
}

/** A GraphQL server of one session, which hears of it by the up channel only. */
export async function serveGraphql(redis: RedisServer, session: string, told: Told): Promise<void> {
  const control = redis.client();
  const down = downChannel(session);
  const server = makeServer({
    schema,
    connectionInitWaitTimeout: 0,
    roots: {
      subscription: {
        async *counted({ to }: { to: number }) {
          for (let n = 0; n < to; n++) yield { counted: n };
        },
        told: () => told.listen(),
      },
    },
  });
  let hear: ((text: string) => Promise<void>) | undefined;
  const ear = redis.client();
  ear.on("message", (_channel, text: string) => {
    if (JSON.parse(text).type === "connection_init") {
      server.opened({
        protocol: "graphql-transport-ws",
        send: async (text) => void await control.call("FCALL", "wsproxy_send", 1, down, text),
        close: async (code = 1000, reason = "") =>
          void await control.call("FCALL", "wsproxy_close", 1, down, code, reason),
        onMessage: (listener) => hear = listener,
      }, {});
    }
    void hear?.(text);
  });
  await ear.subscribe(upChannel(session));
}
