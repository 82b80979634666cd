/** What an engine is: something that listens, hands requests to the server, and carries its sessions' sockets. */

/** What an engine is started with. */
export interface EngineOptions {
  readonly hostname: string;
  /** 0 takes a free one. */
  readonly port: number;
  readonly pingIntervalSecs: number;
  readonly pingTimeoutSecs: number;
}

/** A listening engine. */
export interface Engine {
  readonly hostname: string;
  readonly port: number;
  /** Resolves when it listens no more, whatever the reason. */
  readonly finished: Promise<void>;
  /** Stops listening, and waits for what is open: sessions must be closed before. */
  close(): Promise<void>;
}
