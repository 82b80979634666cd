/** An entry of the inbox, by its fields: `type`, `session`, `connection`, `at`, and what docs/backends.md says. */
export type Entry = Record<string, string>;

/** What a worker needs, and whom it tells. */
export interface Options {
  /** A connected client of ioredis or node-redis, of one server or a Cluster. A connection that blocks is made from it. */
  redis: RedisClient;
  /** Whose inbox. */
  agent: string;
  /** Answers a question, which is done when it returns. One that throws is given the question again. */
  handle: (question: Question) => unknown;
  /** Is told of `connected`, `disconnected`, `vacated`, in the order of each session. */
  onEvent?: (event: Entry) => unknown;
  /**
   * What to send when an entry (a stop, a question that replaces others, a `vacated`) ends what came before it in its
   * session; undefined when it does not. A message then takes its turn like any other.
   */
  interrupts?: (entry: Entry) => string | undefined;
  /** What to send when a question is given up. */
  failed?: (question: Question, reason: string) => string;
  /** Makes one message of the pieces that came within `coalesceMs`. Without it each piece is a message. */
  join?: (pieces: string[]) => string;
  /** By default 25. */
  coalesceMs?: number;
  /** The consumer group, which these workers have for themselves: "answers". */
  group?: string;
  /** Questions that are answered at once: 16. */
  concurrency?: number;
  /** A worker that was not heard of for so long is dead: 10,000. */
  leaseMs?: number;
  /** A question that was given so often, and never answered, is set aside: 3. */
  maxDeliveries?: number;
  /** What answers that are under way get when the worker is stopped: 10,000. */
  graceMs?: number;
  /** console.error by default. */
  onError?: (error: unknown, what: string) => void;
}

/** What ioredis and node-redis have. */
export interface RedisClient {
  // deno-lint-ignore no-explicit-any
  duplicate(): any;
}

/** One of any number of workers that share an agent's questions. */
export class Worker {
  /** Nothing is taken yet. */
  constructor(options: Options);
  /** Works until it is stopped, whatever happens to Redis. */
  run(): Promise<void>;
  /** Takes no more: what is under way has `graceMs`, and then goes to other workers. `run` resolves after that. */
  stop(): void;
}

/** A client's message, which one worker has now. */
export class Question {
  private constructor();
  /** The client's id of it, or the inbox's. */
  readonly id: string;
  /** The inbox's id of it. */
  readonly entry: string;
  /** Whose it is. */
  readonly session: string;
  /** The socket it came over; empty for one that was posted. */
  readonly connection: string;
  /** What the client has sent, as it is. */
  readonly data: string;
  /** Those of the token that INBOX_CLAIMS names. */
  readonly claims: Record<string, unknown>;
  /** How often it was given to a worker, this time included. */
  readonly deliveries: number;
  /** Sends the first message of the answer, after which only this writer may send one. */
  begin(payload: string): Promise<Answer>;
}

/** The one writer of an answer. */
export class Answer {
  private constructor();
  /** Aborted when there is no use in going on: a stop, a newer question, another worker. */
  readonly cancelled: AbortSignal;
  /** Where in the log the last message is that was sent: store it with what was said, and a page resumes from it. */
  readonly position: string;
  /** Sends a piece. Rejects with {@linkcode Cancelled} when it is not to be. */
  send(piece: string): Promise<void>;
  /** Sends the last message, after which nobody sends one more. */
  end(payload: string): Promise<void>;
  /** What workers before this one have sent of this answer, in order. */
  soFar(): Promise<string[]>;
}

/** Why an answer goes no further. */
export class Cancelled extends Error {}

/** The answer is in the log already; a handler leaves it to the worker. */
export class Answered extends Error {}
