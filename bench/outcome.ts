/**
 * What the load generator is told, and what it tells. Both are JSON: the order goes to its standard input, events come
 * from its standard output, one a line. Types only, so that the generator can be plain JavaScript for Node.
 */

/** Messages in one direction. */
export interface Flow {
  /** Messages a second, all sessions together, sent on time whatever comes back; undefined for as fast as they go. */
  readonly perSecond?: number;
  /** Without `perSecond`: messages sent and not yet received, all sessions together. */
  readonly window?: number;
  /** Size of a message, 53 or more. */
  readonly bytes: number;
  /** Share of the sessions that stream at a time; the share moves on every half second. All of them when undefined. */
  readonly active?: number;
}

/** What one scenario does to a server. Sessions are opened first; flows run for `warmupMs` and then `measureMs`. */
export interface Load {
  readonly sessions: number;
  /** Opened before the memory is first read, so that what is measured is the cost of one more. Part of `sessions`. */
  readonly warmSessions?: number;
  /** Handshakes under way at a time. */
  readonly connecting: number;
  /** Quiet time before each reading of the memory. */
  readonly settleMs: number;
  readonly warmupMs: number;
  readonly measureMs: number;
  readonly down?: Flow;
  readonly up?: Flow;
  /** Sessions, the last ones, that do not read. */
  readonly slow?: number;
  /** Sessions, the last ones, that break their connections all at once and reconnect at once, every `everyMs`. */
  readonly storm?: { readonly sessions: number; readonly everyMs: number };
  /** Messages downstream that go to a name without a subscriber: to see that the accounting finds them. */
  readonly drop?: number;
  /** Time between two points of the series. */
  readonly sampleMs: number;
}

/** An order to the load generator. */
export interface Order {
  readonly load: Load;
  readonly port: number;
  readonly redisPort: number;
  readonly serverPid: number;
  readonly redisPid: number;
  readonly secret: string;
}

/** A histogram's buckets that are not empty: index and count, one after the other. Values are microseconds. */
export type Buckets = readonly number[];

/** What happened to the messages of one direction, counted one by one. */
export interface Account {
  readonly sent: number;
  readonly received: number;
  /** Sent to an open session and never received. */
  readonly lost: number;
  readonly duplicated: number;
  readonly reordered: number;
  /** Received by another session than the one meant. */
  readonly misrouted: number;
  /** Sent while the session was not connected, or on its way when the session broke the connection. */
  readonly away: number;
  /** Sent to sessions that do not read; what these received is not looked at. */
  readonly toSlow: number;
}

/** CPU time in microseconds. */
export interface Cpu {
  readonly server: number;
  readonly load: number;
  readonly redis: number;
}

/** One direction in the measured time. */
export interface FlowOutcome {
  readonly account: Account;
  /** Received in the measured time. */
  readonly messages: number;
  readonly perSecond: number;
  /** From the moment a message was due to its arrival. */
  readonly latency: Buckets;
}

/** A point of the series. Rates are of the time since the point before. */
export interface Sample {
  readonly atMs: number;
  readonly connections: number;
  readonly downPerSecond: number;
  readonly upPerSecond: number;
  readonly serverBytes: number;
  /** Of both directions together, in microseconds; absent when nothing came. */
  readonly p50Us?: number;
  readonly p99Us?: number;
}

/** What the generator found. */
export interface Outcome {
  readonly connect: {
    readonly opened: number;
    /** By HTTP status. */
    readonly refused: Readonly<Record<string, number>>;
    /** By error code. */
    readonly failed: Readonly<Record<string, number>>;
    readonly tookMs: number;
    /** From connect() to the last byte of the 101. */
    readonly latency: Buckets;
    readonly cpu: Cpu;
  };
  readonly memory: {
    /** With `warmSessions` open. */
    readonly baseBytes: number;
    /** With `sessions` open. */
    readonly openBytes: number;
    readonly perConnectionBytes: number;
    readonly peakBytes: number;
  };
  readonly measuredMs: number;
  /** Of the measured time. */
  readonly cpu: Cpu;
  readonly down?: FlowOutcome;
  readonly up?: FlowOutcome;
  /** How late the generator itself was, which every latency includes. */
  readonly lag: Buckets;
  /** Connections ended by the server, by close code; 1006 is without a close frame. */
  readonly closes: Readonly<Record<string, number>>;
  /** Reconnects of the storm, which are not in `connect`. */
  readonly reconnect?: { readonly opened: number; readonly failed: number; readonly latency: Buckets };
  /** Text frames that are not ours, such as in-band errors; and the first of them. */
  readonly foreign: { readonly count: number; readonly first?: string };
  readonly series: readonly Sample[];
}

/** One line of the generator's output. */
export type Event = { readonly progress: string } | { readonly outcome: Outcome };
