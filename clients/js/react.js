// @ts-check
/**
 * A session in a React component: `const { state, submit } = useSession({ url, token, onMessage })`.
 *
 * @module
 */

import { useCallback, useEffect, useRef, useState } from "react";
import { Connection, UnsentError } from "./wsproxy.js";

/**
 * What a component knows of its session.
 * @typedef {object} Session
 * @property {"connecting" | "open" | "closed"} state
 * @property {import("./wsproxy.js").Close | undefined} close why the last connection ended
 * @property {(text: string) => boolean} send see {@linkcode Connection.send}
 * @property {(text: string, options?: { id?: string | undefined }) => Promise<import("./wsproxy.js").Receipt>} submit see
 * {@linkcode Connection.submit}
 */

/**
 * Connects while the component is mounted. Callbacks and the token function may be new ones at each render: the latest
 * are called. Another url is another session; a component that is mounted again for the same url, as by StrictMode, goes
 * on where it was.
 * @param {import("./wsproxy.js").Options} options
 * @returns {Session}
 */
export function useSession(options) {
  const latest = useRef(options);
  /** @type {import("react").RefObject<Connection | undefined>} */
  const connection = useRef(undefined);
  /** @type {import("react").RefObject<{ url: string, position: string } | undefined>} */
  const reached = useRef(undefined);
  const [state, setState] = useState(
    /** @returns {{ state: Session["state"], close: Session["close"] }} */
    () => ({ state: "connecting", close: undefined }),
  );
  useEffect(() => {
    latest.current = options;
  });
  const url = String(options.url);
  const { sse, timeoutMs, silenceMs, maxPending, WebSocket, fetch } = options;
  useEffect(() => {
    const { position, historyLoaded } = latest.current;
    const from = reached.current?.url === url ? { position: reached.current.position } : { position, historyLoaded };
    const made = new Connection({
      ...{ url, sse, timeoutMs, silenceMs, maxPending, WebSocket, fetch },
      ...from,
      token: () => latest.current.token(),
      onMessage: (text, position) => latest.current.onMessage(text, position),
      onPosition(position) {
        reached.current = { url, position };
        latest.current.onPosition?.(position);
      },
      onGap: (reason) => latest.current.onGap?.(reason),
      onLive: (position) => latest.current.onLive?.(position),
      onUnheard: (messages) => latest.current.onUnheard?.(messages),
      onError(error) {
        if (latest.current.onError) latest.current.onError(error);
        else console.error("wsproxy:", error);
      },
      onState(state, close) {
        // The component that is unmounted is told nothing more.
        if (connection.current !== made) return;
        setState({ state, close });
        latest.current.onState?.(state, close);
      },
    });
    connection.current = made;
    return () => {
      connection.current = undefined;
      made.close();
    };
  }, [url, sse, timeoutMs, silenceMs, maxPending, WebSocket, fetch]);
  const send = useCallback((/** @type {string} */ text) => connection.current?.send(text) ?? false, []);
  const submit = useCallback(
    /** @type {Session["submit"]} */
    (text, options) =>
      connection.current?.submit(text, options) ?? Promise.reject(new UnsentError("closed", options?.id ?? "")),
    [],
  );
  return { ...state, send, submit };
}
