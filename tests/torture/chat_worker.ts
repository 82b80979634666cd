/** A worker of tests/torture/chat.ts: REDIS_URL, HISTORY_URL, LEASE_MS. */

import type { UIMessage } from "ai";
import { Redis } from "ioredis";
import { ChatWorker } from "../../clients/js/chat.js";
import { Cancelled } from "../../clients/js/backend.js";
import { answerOf, history } from "./chat_model.ts";

const redis = new Redis(Deno.env.get("REDIS_URL")!, { maxRetriesPerRequest: null }).on("error", () => {});
const worker = new ChatWorker({
  ...{ redis, agent: "agent", leaseMs: Number(Deno.env.get("LEASE_MS")), graceMs: 1000, maxDeliveries: 100 },
  async onQuestion({ messages, chatId: chat, answerId }) {
    await history({ op: "question", chat, message: messages.at(-1)!, answerId });
  },
  answer(send) {
    const message = send.messages.at(-1)!;
    const { chatId: chat, answerId } = send;
    return answerOf(
      send.messages,
      answerId,
      send.abortSignal,
      async (answer: UIMessage) => {
        // What another worker says now is not to be overwritten.
        await send.position();
        await history({ op: "answer", chat, question: message.id, answer });
      },
    );
  },
  onError(error, what) {
    if (!(error instanceof Cancelled)) console.error(`${what}: ${error}`);
  },
});
Deno.addSignalListener("SIGTERM", () => worker.stop());
await worker.run();
Deno.exit(0);
