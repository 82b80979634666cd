/** Chats of pages as they are: the real `Chat` of @ai-sdk/react over clients/js/ai.js, a relay and a proxy. */

import assert from "node:assert/strict";
import { Chat } from "@ai-sdk/react";
import type { UIMessage } from "ai";
import type { Redis } from "ioredis";
import { type ChatOptions, SessionChatTransport } from "../../clients/js/ai.js";
import { Client } from "./client.ts";
import { entriesOf, inboxEnv } from "./entries.ts";
import { type Env, ProxyProcess, TestProxy } from "./proxy.ts";
import { RedisServer } from "./redis.ts";
import { Relay } from "./relay.ts";
import { mint } from "./token.ts";
import { eventually } from "./wait.ts";
import { WsServer } from "./ws_server.ts";

/** What a page has sent. */
export interface Frame {
  type: "send" | "abort";
  requestId: string;
  id?: string;
  trigger?: string;
  messageId?: string;
  messages?: UIMessage[];
  body?: unknown;
}

/** A page, as it was just loaded: what it shows, and the statuses that it went through. */
export interface Page {
  readonly transport: SessionChatTransport;
  readonly chat: Chat<UIMessage>;
  readonly statuses: string[];
}

/** The session s1: a proxy with a relay in front of it, pages, and what they have sent. */
export class ChatSite implements AsyncDisposable {
  readonly control: Redis;
  readonly relay: Relay;
  readonly #pages: SessionChatTransport[] = [];
  private constructor(readonly redis: RedisServer, readonly proxy: TestProxy) {
    this.control = redis.client();
    this.relay = new Relay(proxy.port);
  }

  static async start(env: Env = {}): Promise<ChatSite> {
    const redis = await RedisServer.start();
    const proxy = await TestProxy.start(redis, { ...inboxEnv, ...env });
    await proxy.resumable();
    return new ChatSite(redis, proxy);
  }

  get url(): string {
    return `ws://127.0.0.1:${this.relay.port}/agent/ws/s1`;
  }

  /** Puts pages to another proxy, a process. What it returns kills that: then they come back to the first one. */
  async moveToAnother(): Promise<() => Promise<void>> {
    const other = await ProxyProcess.start(this.redis, inboxEnv);
    await other.resumable();
    this.relay.target = other.port;
    return async () => {
      this.relay.target = this.proxy.port;
      other.signal("SIGKILL");
      await other.exit();
      await other[Symbol.asyncDispose]();
    };
  }

  /** Loads a page, which shows a history. */
  load(options: Partial<ChatOptions> = {}, history: UIMessage[] = [], id = "chat"): Page {
    const transport = new SessionChatTransport({ url: this.url, token: () => mint("s1"), onError() {}, ...options });
    this.#pages.push(transport);
    return { transport, ...chatOf(transport, history, id) };
  }

  /** The frames that pages have sent, once there are so many. */
  async asked(count: number): Promise<Frame[]> {
    const frames = async () =>
      (await entriesOf(this.control)).filter(({ type }) => type === "message").map(({ data }) => JSON.parse(data!));
    await eventually(`${count} frames`, async () => (await frames()).length >= count);
    return await frames();
  }

  /** A bare client of the session. */
  proxyClient(): Promise<Client> {
    return Client.connect(this.proxy.port, "s1");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const page of this.#pages) page.close();
    this.relay[Symbol.dispose]();
    await this.proxy[Symbol.asyncDispose]();
    await this.redis[Symbol.asyncDispose]();
  }
}

/** When a {@linkcode forgetful} proxy confirms a question: before its connection breaks, or on the one after that. */
export type Confirmed = "before" | "after";

/**
 * A proxy whose log loses messages while a connection is broken. It has these frames, which answer a question: right
 * behind the gap; or, where it confirms the question after that, once all of the log has come.
 */
export function forgetful(framesOf: (requestId: string) => readonly object[], confirmed: Confirmed): WsServer {
  let asked: string | undefined;
  return WsServer.start((socket) => {
    const gap = () => socket.send('!gap\n{"reason":"lost"}');
    const confirm = (id: string) => socket.send(`!sent\n${JSON.stringify({ id, receivers: 1, entered: true })}`);
    const answer = (id: string) => {
      for (const [n, frame] of framesOf(id).entries()) socket.send(`2-${n}\n${JSON.stringify(frame)}`);
    };
    const isFirst = asked === undefined;
    if (isFirst) socket.send("!live\n1-0");
    else gap();
    if (!isFirst && confirmed === "before") {
      answer(asked!);
      return socket.send("!live\n2-9");
    }
    socket.onmessage = ({ data }) => {
      const [, id] = /^!send\n(.*)\n/.exec(data) ?? [];
      if (id === undefined) return;
      asked = id;
      if (confirmed === (isFirst ? "before" : "after")) confirm(id);
      if (isFirst) return socket.close(1001, "server is going away");
      // Another read of the client's: what waits for the confirmation has heard of it.
      setTimeout(() => {
        gap();
        socket.send("!live\n1-9");
        answer(id);
      });
    };
  }, { protocol: "wsproxy.resume.v1" });
}

/** A chat over any transport. */
export function chatOf(
  transport: ConstructorParameters<typeof Chat>[0]["transport"],
  history: UIMessage[] = [],
  id = "chat",
) {
  const chat = new Chat<UIMessage>({ id, ...(transport && { transport }), messages: history });
  const statuses: string[] = [];
  chat["~registerStatusCallback"](() => statuses.push(chat.status));
  return { chat, statuses };
}

/** What messages say, without what differs from run to run. */
export const shown = (messages: readonly UIMessage[]) =>
  messages.map(({ role, parts }) =>
    [role, ...parts.map((part) => part.type === "text" ? part.text.trim() : part.type.replace(/^tool-/, "tool "))].join(
      "|",
    )
  );

/** Waits until a chat shows this. */
export const says = (chat: Chat<UIMessage>, ...expected: string[]) =>
  eventually(`${expected}`, () => JSON.stringify(shown(chat.messages)) === JSON.stringify(expected))
    .catch((error) => assert.deepEqual(shown(chat.messages), expected, error));

/** Waits until a chat has this status. */
export const isNow = (chat: Chat<UIMessage>, status: string) => eventually(status, () => chat.status === status);
