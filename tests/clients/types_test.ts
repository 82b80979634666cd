/** What of clients/js is seen by TypeScript, and what a package of it holds. */

import assert from "node:assert/strict";
import { faultsOfUser } from "../../scripts/client_types.ts";

Deno.test("A TypeScript program with exactOptionalPropertyTypes may give what it has, as it has it", () => {
  const program = `
    import WebSocketOfNpm from "ws";
    import { Connection, type Options, type Receipt, UnsentError } from "./wsproxy.js";
    import { gapCode, ResumingWebSocket } from "./websocket.js";
    import { type Session, useSession } from "./react.js";
    import { SessionChatTransport } from "./ai.js";
    import { SessionConnection } from "./tanstack.js";
    import { SessionStreamTransport } from "./langgraph.js";
    declare const position: string | undefined;
    const options: Options = {
      url: "wss://localhost/agent/ws/s1",
      token: async () => "",
      onMessage(text, position) {
        const length: number = text.length + (position?.length ?? 0);
      },
      onState: (state, close) => state === "closed" && close?.code === gapCode,
      position,
      historyLoaded: position === undefined ? undefined : true,
    };
    const connection = new Connection({ ...options, WebSocket: WebSocketOfNpm });
    new Connection({ ...options, token: () => "", onMessage: async () => {}, WebSocket, fetch });
    const sent: Promise<Receipt> = connection.submit("{}", { id: position });
    sent.catch((error: unknown) => error instanceof UnsentError && error.reason === "full");
    const Resuming: typeof WebSocket = ResumingWebSocket.with({ token: () => "", position });
    new Resuming("wss://localhost").onmessage = ({ data }) => data;
    const session: Session = useSession(options);
    const { onMessage: _, ...rest } = options;
    const onAnswer = (chatId: string | undefined) => chatId?.length;
    new SessionChatTransport({ ...rest, onAnswer, messages: "all", webSocket: WebSocketOfNpm }).close();
    new SessionStreamTransport(rest).close();
    new SessionConnection({ ...rest, history: (threadId: string) => ({ messages: [] }) }).close();
  `;
  assert.deepEqual(faultsOfUser(program), []);
  const wrong = 'import { Connection } from "./wsproxy.js"; new Connection({ url: "", token: 1, onMessage() {} });';
  assert.match(faultsOfUser(wrong).join(), /'number' is not assignable/);
});

Deno.test("A TypeScript program sees what a handler may use of a question and its answer, and nothing else of them", () => {
  const program = `
    import { ChatError, ChatWorker, type Send } from "./chat.js";
    import { type Answer, Answered, Cancelled, type Entry, type Options, type Question, Worker } from "./backend.js";
    declare const redis: { duplicate(): { connect(): Promise<void> }, call: "any client library" };
    const options: Options = {
      redis,
      agent: "support",
      join: (pieces: string[]) => pieces.join(""),
      coalesceMs: 25,
      interrupts: ({ type, data = "" }: Entry) => type === "vacated" ? data : undefined,
      failed: ({ id }, reason) => id + reason,
      async handle(question: Question) {
        const { claims, data, deliveries, entry, id, session, connection } = question;
        const texts: string[] = [data, entry, id, session, connection];
        const [count, role]: [number, unknown] = [deliveries, claims["role"]];
        const answer: Answer = await question.begin(texts.join());
        const signal: AbortSignal = answer.cancelled;
        try {
          await answer.send((await answer.soFar()).join());
          await answer.end(answer.position);
        } catch (error) {
          if (error instanceof Cancelled || error instanceof Answered) return [count, role, signal];
        }
      },
    };
    new ChatWorker({
      redis,
      agent: "support",
      async *answer(send: Send) {
        if (send.abortSignal.aborted) throw new ChatError(await send.position());
        yield { type: "text-delta", id: send.answerId, delta: send.chatId };
      },
    });
    const worker = new Worker(options);
    const done: Promise<void> = worker.run();
    worker.stop();
  `;
  assert.deepEqual(faultsOfUser(program), []);
  const wrong = `
    import type { Answer, Question } from "./backend.js";
    import { isFenced, Log } from "./answer.js";
    declare const answer: Answer, question: Question;
    question.answer; question.open; question.id = "";
    answer.fenced; answer.lost; answer.settled; answer.position = ""; answer.send(1);
  `;
  assert.deepEqual(faultsOfUser(wrong).map((fault) => fault.replace(/^user\.ts:\d+: /, "")), [
    "Module '\"./answer.js\"' has no exported member 'isFenced'.",
    "Module '\"./answer.js\"' has no exported member 'Log'.",
    "Property 'answer' does not exist on type 'Question'.",
    "Property 'open' does not exist on type 'Question'.",
    "Cannot assign to 'id' because it is a read-only property.",
    "Property 'fenced' does not exist on type 'Answer'.",
    "Property 'lost' does not exist on type 'Answer'.",
    "Property 'settled' does not exist on type 'Answer'.",
    "Cannot assign to 'position' because it is a read-only property.",
    "Argument of type 'number' is not assignable to parameter of type 'string'.",
  ]);
});

Deno.test("A package of clients/js holds its modules, their types and nothing else", async () => {
  const { exports, files } = JSON.parse(
    Deno.readTextFileSync(new URL("../../clients/js/package.json", import.meta.url)),
  );
  assert.deepEqual(files, ["*.js", "*.d.ts"]);
  const modules = Object.values<{ types: string; default: string }>(exports).flatMap((each) => Object.values(each));
  const { stdout } = await new Deno.Command("npm", {
    args: ["pack", "--dry-run", "--json", "--offline", "--loglevel=error"],
    cwd: new URL("../../clients/js", import.meta.url),
    env: { npm_config_update_notifier: "false" },
  }).output();
  const [packed] = JSON.parse(new TextDecoder().decode(stdout));
  const paths = packed.files.map(({ path }: { path: string }) => `./${path}`);
  const others = [
    "./answer.js",
    "./answer.d.ts",
    "./queue.js",
    "./runs.js",
    "./runs.d.ts",
    "./README.md",
    "./package.json",
  ];
  assert.deepEqual(paths.sort(), [...modules, ...others].sort());
});
