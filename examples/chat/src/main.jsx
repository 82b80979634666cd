import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { openChat } from "./chat.js";
import { Conversation } from "./Conversation.jsx";
import "./style.css";

const root = createRoot(document.getElementById("root"));
try {
  const opened = await openChat();
  root.render(
    <StrictMode>
      <Conversation {...opened} />
    </StrictMode>,
  );
} catch (error) {
  console.error(error);
  root.render(
    <main className="start" role="alert">
      <h2>{error.status === 404 ? "There is no such chat." : "The chat cannot be loaded now."}</h2>
      <a href={error.status === 404 ? "/" : ""}>{error.status === 404 ? "Begin a new one" : "Try again"}</a>
    </main>,
  );
}
