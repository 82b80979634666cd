/**
 * What a Next.js application does with npm resumable-stream, as the AI SDK's documentation ("Chatbot Resume Streams") has
 * it, behind Deno.serve: REDIS_URL, HISTORY_URL. It prints its port.
 */

import { createUIMessageStreamResponse, generateId, UI_MESSAGE_STREAM_HEADERS, type UIMessage } from "ai";
import { Redis } from "ioredis";
import { createResumableStreamContext } from "resumable-stream/ioredis";
import { answerOf, history } from "./chat_model.ts";

interface Stored {
  messages: UIMessage[];
  activeStreamId: string | null;
  stopped: string[];
}

const running = new Set<Promise<unknown>>();
const after = (promise: Promise<unknown>) => {
  running.add(promise);
  promise.catch(() => {}).finally(() => running.delete(promise));
};
const client = () => new Redis(Deno.env.get("REDIS_URL")!).on("error", () => {});
const context = createResumableStreamContext({ waitUntil: after, publisher: client(), subscriber: client() });
const readChat = (id: string) => history<Stored>({ op: "read", id });
const saveChat = (chat: Record<string, unknown>) => history({ op: "save", ...chat });

async function post(request: Request): Promise<Response> {
  const { message, id, trigger, messageId } = await request.json();
  let { messages } = await readChat(id);
  const at = messages.findIndex((each) => each.id === message.id);
  messages = at < 0 ? [...messages, message] : messages.slice(0, at + 1);
  void trigger, messageId;
  await saveChat({ id, messages, activeStreamId: null });
  const streamId = generateId();
  const stop = new AbortController();
  const poll = setInterval(async () => {
    const { stopped } = await readChat(id);
    if (stopped.includes(streamId)) stop.abort();
  }, 100);
  const stream = answerOf(messages, generateId(), stop.signal, async (answer) => {
    clearInterval(poll);
    await saveChat({ id, messages: [...messages, answer], activeStreamId: null });
  });
  return createUIMessageStreamResponse({
    stream,
    async consumeSseStream({ stream }) {
      await context.createNewResumableStream(streamId, () => stream);
      await saveChat({ id, activeStreamId: streamId });
    },
  });
}

async function resume(id: string): Promise<Response> {
  const { activeStreamId } = await readChat(id);
  if (activeStreamId === null) return new Response(null, { status: 204 });
  const stream = await context.resumeExistingStream(activeStreamId);
  return new Response(stream?.pipeThrough(new TextEncoderStream()) ?? null, {
    status: stream ? 200 : 204,
    headers: UI_MESSAGE_STREAM_HEADERS,
  });
}

async function stop(id: string): Promise<Response> {
  const { activeStreamId } = await readChat(id);
  if (activeStreamId !== null) await history({ op: "stop", id, activeStreamId });
  return Response.json({ success: true });
}

const leave = new AbortController();
const server = Deno.serve({
  ...{ hostname: "127.0.0.1", port: 0, signal: leave.signal },
  onListen: ({ port }) => console.log(port),
}, (request) => {
  const [, , , id = "", what] = new URL(request.url).pathname.split("/");
  if (what === "stop") return stop(id);
  return request.method === "POST" ? post(request) : resume(id);
});
globalThis.addEventListener("unhandledrejection", (event) => event.preventDefault());
Deno.addSignalListener("SIGTERM", async () => {
  const done = Promise.allSettled(running);
  await Promise.race([done, new Promise((resolve) => setTimeout(resolve, 1000))]);
  leave.abort();
  await Promise.race([server.finished, new Promise((resolve) => setTimeout(resolve, 100))]);
  Deno.exit(0);
});
