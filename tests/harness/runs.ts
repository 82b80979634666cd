/** Runs as a backend writes them into the log of the session s1, in events of AG-UI. */

import type { Redis } from "ioredis";

const down = "session:s1:down";

/** The one writer of a run. */
export class RunWriter {
  private constructor(readonly control: Redis, readonly runId: string, readonly epoch: number) {}

  /** Begins a run, also one that another writer has begun, which is fenced then. */
  static async begin(control: Redis, runId: string): Promise<RunWriter> {
    const payload = JSON.stringify({ type: "RUN_STARTED", threadId: "t", runId });
    const [, , epoch] = await control.call("FCALL", "wsproxy_begin", 1, down, payload, crypto.randomUUID()) as number[];
    return new RunWriter(control, runId, epoch!);
  }

  async say(...events: Record<string, unknown>[]): Promise<void> {
    for (const event of events) {
      const words = ["wsproxy_send", 1, down, JSON.stringify(event), crypto.randomUUID(), this.epoch];
      await this.control.call("FCALL", ...words);
    }
  }

  end(): Promise<void> {
    return this.say({ type: "RUN_FINISHED", threadId: "t", runId: this.runId });
  }
}

export const open = (messageId: string) => ({ type: "TEXT_MESSAGE_START", messageId, role: "assistant" });
export const words = (messageId: string, text: string) =>
  text.split(" ").map((word) => ({ type: "TEXT_MESSAGE_CONTENT", messageId, delta: `${word} ` }));
export const close = (messageId: string) => ({ type: "TEXT_MESSAGE_END", messageId });
