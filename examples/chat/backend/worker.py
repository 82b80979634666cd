"""Answers what is asked in the chats. Any number of workers may run: one that dies is replaced by another."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

from pydantic import ValidationError
from pydantic_ai import AgentRunResult, RunCancelled
from pydantic_ai.ui.vercel_ai import VercelAIAdapter
from pydantic_ai.ui.vercel_ai.request_types import UIMessage
from redis.asyncio import Redis

from agent import agent
from store import Message, Store
from wsproxy_client.chat import ChatError, ChatWorker, Chunk, Send
from wsproxy_client.pydantic_ai import chunks

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
store = Store(os.environ.get("DATABASE", "chat.sqlite"))


async def ask(send: Send) -> None:
    """Keeps the question before its answer begins, so that other tabs find it."""
    try:
        question = UIMessage.model_validate(send.messages[-1])
    except ValidationError as error:
        raise ChatError("The question was not understood.") from error
    if question.role != "user":
        raise ChatError("Only a question can be answered.")
    store.ask(send.question.session, json_of(question), send.question.entry)


def json_of(message: UIMessage) -> Message:
    return message.model_dump(mode="json", by_alias=True, exclude_none=True)


async def answer(send: Send) -> AsyncIterator[Chunk]:
    """Answers the question, which is the last message of the history."""
    chat = send.question.session
    position = await send.position()
    store.begin(chat, position)
    history, _ = store.history(chat)

    async def keep(result: AgentRunResult | RunCancelled) -> None:
        dumped = VercelAIAdapter.dump_messages(result.new_messages(), sdk_version=7)
        parts = [part for message in dumped if message.role == "assistant" for part in message.parts]
        if parts:
            said = json_of(UIMessage(id=send.answer_id, role="assistant", parts=parts))
            store.answer(chat, said, send.question.entry, position)

    asked = VercelAIAdapter.load_messages([UIMessage.model_validate(message) for message in history])
    async for chunk in chunks(agent, send, asked, on_complete=keep, on_cancel=keep):
        yield chunk


async def main() -> None:
    worker = ChatWorker(Redis.from_url(REDIS_URL), "chat", answer, on_question=ask, lease_ms=5000)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()


if __name__ == "__main__":
    asyncio.run(main())
