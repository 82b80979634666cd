/** How a connection is made, and whom it tells. */
export interface Options {
  /** Of the session: `wss://host/{agent_id}/ws/{session_id}`. */
  url: string | URL;
  /** A token that is valid now; asked for at each connect and before its end. */
  token: () => string | Promise<string>;
  /** A message, with its position if it was logged. */
  onMessage: (text: string, position: string | undefined) => void;
  /** Messages are missing for good: reload the state. */
  onGap?: (reason: string) => void;
  /** All that was missed has come; store the position. */
  onLive?: (position: string | undefined) => void;
  /** `closed` is for good. */
  onState?: (state: "connecting" | "open" | "closed", close?: { code: number; reason: string }) => void;
  /** So many of what was sent reached no backend. */
  onUnheard?: (messages: number) => void;
  /** The proxy's in-band complaints, and what went wrong here. */
  onError?: (error: unknown) => void;
  /** The last position handled before, or "0" for the log's beginning, which is the default. */
  position?: string;
  /** Whether Server-Sent Events may be tried; true by default. */
  sse?: boolean;
  /** For a Node without one of its own. */
  WebSocket?: typeof WebSocket;
}

/** A session's connection, kept until it is closed. */
export class Connection {
  /** Connects. */
  constructor(options: Options);
  /** The last position handled: store it to resume after a reload. */
  position: string;
  /** Messages can be sent now. */
  readonly open: boolean;
  /** Sends a message; false when it cannot be sent now. */
  send(text: string): boolean;
  /** Leaves for good. */
  close(): void;
}
