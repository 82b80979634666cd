import { Chat } from "@ai-sdk/react";
import { SessionChatTransport } from "wsproxy-client/ai";

/** How long to wait for a backend that is away. */
const retryMs = 2000;

/** Asks the backend of this page. */
async function api(method, path = "") {
  const response = await fetch(`/api/chats${path}`, { method });
  if (!response.ok) throw Object.assign(new Error(`${path}: ${response.status}`), { status: response.status });
  return await response.json();
}

/** The chat that the address names, or a new one; its connection; and the user's chats, to begin with. */
export async function openChat() {
  let [, id] = /^\/c\/(\w+)$/.exec(location.pathname) ?? [];
  if (id === undefined) {
    ({ id } = await api("POST"));
    history.replaceState(null, "", `/c/${id}`);
  }
  const { url, messages, position } = await api("GET", `/${id}`);
  const earlier = messages.length === 0 ? await api("GET") : [];

  const connection = new Connection();
  const transport = new SessionChatTransport({
    url,
    token: async () => (await api("POST", `/${id}/token`)).token,
    position,
    historyLoaded: true,
    onState: (state) => connection.set({ state }),
    onAnswer: catchUp,
    // An empty chat may have been dropped while its page slept.
    onError: (error) => error.status === 404 ? location.reload() : console.error(error),
  });
  const chat = new Chat({ id, messages, transport });

  /** Another tab has asked, or something was said while this page was away. */
  async function catchUp() {
    let said;
    while (!(said = await api("GET", `/${id}`).catch(() => undefined))) {
      await new Promise((resolve) => setTimeout(resolve, retryMs));
    }
    // The user has asked meanwhile, and the page is told again after that.
    if (chat.status === "submitted" || chat.status === "streaming") return;
    chat.messages = said.messages;
    await resume();
  }

  /** Shows the answer that is under way, if there is one. */
  async function resume() {
    connection.set({ looking: true });
    await chat.resumeStream();
    connection.set({ looking: false });
  }

  resume();
  return { chat, connection, earlier };
}

/** What the page shows of its connection; the page is told of each change. */
class Connection {
  /** `state` is `connecting`, `open` or `closed`; `looking`: for an answer that is under way. */
  now = { state: "connecting", looking: true };
  #listeners = new Set();

  set(change) {
    this.now = { ...this.now, ...change };
    for (const listener of this.#listeners) listener();
  }

  subscribe = (listener) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  get = () => this.now;
}
