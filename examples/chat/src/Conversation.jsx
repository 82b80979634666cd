import { useChat } from "@ai-sdk/react";
import { memo, useEffect, useRef, useState, useSyncExternalStore } from "react";
import Markdown from "react-markdown";
import { useFollowing } from "./following.js";

const name = "Chat";

const textOf = (message) => message.parts.map((part) => (part.type === "text" ? part.text : "")).join("");

/** A chat from its first question on: what was said, how it goes on, and where the next question is written. */
export function Conversation({ chat, connection, earlier }) {
  const { messages, sendMessage, regenerate, stop, status } = useChat({ chat, throttle: 50 });
  const { state, looking } = useSyncExternalStore(connection.subscribe, connection.get);
  const { following, follow } = useFollowing();
  const answering = status === "submitted" || status === "streaming";
  const last = messages.at(-1);

  const ask = (text) => {
    sendMessage({ text });
    follow();
  };

  return (
    <>
      <title>{messages.length > 0 ? `${textOf(messages[0]).slice(0, 60)} – ${name}` : name}</title>
      <header>
        <h1>{name}</h1>
        {messages.length > 0 && <a href="/">New chat</a>}
      </header>
      <main>
        {messages.length === 0 && <Start earlier={earlier} />}
        {messages.map((message) => <Message key={message.id} message={message} />)}
        {last && (
          <Ending
            isAnswer={last.role === "assistant"}
            isComing={answering || looking}
            hasFailed={status === "error"}
            onAskAgain={() => regenerate()}
          />
        )}
      </main>
      <footer>
        {!following && <button type="button" className="latest" onClick={follow}>Go to the end</button>}
        <Composer answering={answering} onAsk={ask} onStop={stop} />
        <p className="state" role="status">{wordsFor(state, answering)}</p>
      </footer>
      <Announcement answering={answering} message={last} />
    </>
  );
}

function wordsFor(state, answering) {
  if (state === "open") return answering ? "Answering…" : "";
  if (state === "closed") return "Disconnected. Load the page again to go on.";
  return navigator.onLine ? "Reconnecting…" : "You are offline. What you ask is sent when you are back.";
}

function Start({ earlier }) {
  return (
    <section className="start">
      <h2>What would you like to know?</h2>
      {earlier.length > 0 && (
        <nav aria-labelledby="earlier">
          <h3 id="earlier">Earlier chats</h3>
          <ul>
            {earlier.map(({ id, title }) => (
              <li key={id}>
                <a href={`/c/${id}`}>{title}</a>
              </li>
            ))}
          </ul>
        </nav>
      )}
    </section>
  );
}

/** A message that grows is another object, so that the others need not be rendered with it. */
const Message = memo(function Message({ message }) {
  const isUser = message.role === "user";
  return (
    <article className={message.role}>
      <h2 className="unseen">{isUser ? "You" : "Answer"}</h2>
      {isUser ? textOf(message) : <Markdown>{textOf(message)}</Markdown>}
    </article>
  );
});

/** What stands below the last message. */
function Ending({ isAnswer, isComing, hasFailed, onAskAgain }) {
  if (isComing) return isAnswer ? null : <p className="waiting" />;
  if (isAnswer && !hasFailed) {
    return <button type="button" className="quiet" onClick={onAskAgain}>Answer again</button>;
  }
  return (
    <div className="failure" role="alert">
      <p>{isAnswer ? "The answer broke off." : "The answer did not come."}</p>
      <button type="button" onClick={onAskAgain}>Ask again</button>
    </div>
  );
}

/** Enter asks, Shift and Enter break the line. What is written stays while an answer comes. */
function Composer({ answering, onAsk, onStop }) {
  const [text, setText] = useState("");
  const field = useRef(null);
  useEffect(() => field.current.focus({ preventScroll: true }), []);

  const submit = (event) => {
    event.preventDefault();
    if (answering || text.trim() === "") return;
    onAsk(text.trim());
    setText("");
  };
  const onKeyDown = (event) => {
    // Enter also ends what an input method composes.
    if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) submit(event);
    if (event.key === "Escape" && answering) onStop();
  };

  return (
    <form onSubmit={submit}>
      <textarea
        ref={field}
        rows={1}
        value={text}
        placeholder="Ask something"
        aria-label="Your question"
        enterKeyHint="send"
        onChange={(event) => setText(event.target.value)}
        onKeyDown={onKeyDown}
      />
      {answering
        ? <button key="stop" type="button" onClick={onStop}>Stop</button>
        : <button key="ask" type="submit" disabled={text.trim() === ""}>Ask</button>}
    </form>
  );
}

/** Reads an answer to a screen reader once it is whole: word by word it would not be understood. */
function Announcement({ answering, message }) {
  const [text, setText] = useState("");
  const before = useRef(answering);
  useEffect(() => {
    if (before.current && !answering && message?.role === "assistant") setText(textOf(message));
    if (answering) setText("");
    before.current = answering;
  }, [answering, message]);
  return <div className="unseen" aria-live="polite">{text}</div>;
}
