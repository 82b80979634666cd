/** The model that all agents of tests/torture/chat.ts share: what it says depends on the question alone. */

import { createUIMessageStream, type UIMessage } from "ai";
import { pause } from "./parts.ts";

/** A part of an answer, and the words that it comes in. */
interface Piece {
  readonly type: "text" | "reasoning" | "tool";
  readonly words: readonly string[];
}

const textOf = (message: UIMessage) => message.parts.map((part) => part.type === "text" ? part.text : "").join("");

/** The steps of the answer to a question. A question is any text; its first word's digits say of what kind the answer is. */
function stepsOf(question: string): Piece[][] {
  const number = [...question].reduce((sum, char) => (sum * 31 + char.charCodeAt(0)) >>> 0, 7);
  const words = (what: string, count: number) => Array.from({ length: count }, (_, i) => `${question}:${what}${i}`);
  const text: Piece = { type: "text", words: words("w", 4 + number % 25) };
  switch (number % 4) {
    case 0:
      return [[{ type: "reasoning", words: words("r", 3 + number % 7) }, text]];
    case 1:
      return [[{ type: "tool", words: words("t", 1) }], [text]];
    default:
      return [[text]];
  }
}

/** What the parts of the answer to a question are, as {@linkcode partsOf} tells them. */
export const partsExpected = (question: string): string[] =>
  stepsOf(question).flatMap((step) => [
    "step-start",
    ...step.map(({ type, words }) => `${type} ${words.map((word) => `${word} `).join("")}`),
  ]);

/** The parts of a message. */
export const partsOf = ({ parts }: UIMessage): string[] =>
  parts.map((part) =>
    part.type === "text" || part.type === "reasoning"
      ? `${part.type} ${part.text}`
      : part.type === "dynamic-tool"
      ? `tool ${part.state === "output-available" ? `${part.output} ` : ""}`
      : part.type
  );

export { textOf };

/** Answers the last of some messages, until it is aborted; `onEnd` is told of the message, unless its stream was left. */
export function answerOf(
  messages: readonly UIMessage[],
  id: string | undefined,
  signal: AbortSignal,
  onEnd: (message: UIMessage) => Promise<void>,
) {
  const question = textOf(messages.at(-1)!);
  return createUIMessageStream({
    originalMessages: [...messages],
    ...(id !== undefined && { generateId: () => id }),
    async execute({ writer }) {
      writer.write({ type: "start" });
      for (const [i, step] of stepsOf(question).entries()) {
        writer.write({ type: "start-step" });
        for (const [j, { type, words }] of step.entries()) {
          const id = `${i}-${j}`;
          if (type === "tool") {
            const call = { toolCallId: `call-${question}`, toolName: "look", dynamic: true, providerExecuted: true };
            writer.write({ type: "tool-input-available", ...call, input: {} });
            await pause(50);
            writer.write({ type: "tool-output-available", ...call, output: words[0]! });
            continue;
          }
          writer.write({ type: `${type}-start`, id });
          for (const word of words) {
            await pause(10 + 40 * Math.random());
            if (signal.aborted) return writer.write({ type: "abort" });
            writer.write({ type: `${type}-delta`, id, delta: `${word} ` });
          }
          writer.write({ type: `${type}-end`, id });
        }
        writer.write({ type: "finish-step" });
      }
      writer.write({ type: "finish" });
    },
    onEnd: ({ responseMessage, isCancelled }) => isCancelled ? undefined : onEnd(responseMessage),
  });
}

/** Calls the history, which is in the process of the torture, and is there at all times. */
export async function history<T>(call: Record<string, unknown>): Promise<T> {
  const response = await fetch(Deno.env.get("HISTORY_URL")!, { method: "POST", body: JSON.stringify(call) });
  if (!response.ok) throw new Error(`the history: ${await response.text()}`);
  return await response.json() as T;
}
