"""A worker of a chat, to be killed: `chat_program.py REDIS_URL NAME`. It tells word for word which it is."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

import redis.asyncio as redis
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from wsproxy_client.chat import ChatWorker, Chunk, Send
from wsproxy_client.pydantic_ai import chunks

URL, NAME = sys.argv[1:]
WORDS = 40
WORD_SECS = 0.05


async def model(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
    for n in range(WORDS):
        yield f"{NAME}-{n} "
        await asyncio.sleep(WORD_SECS)


async def answer(send: Send) -> AsyncIterator[Chunk]:
    print(f"answers {send.request_id}", flush=True)
    try:
        async for chunk in chunks(Agent(FunctionModel(stream_function=model)), send):
            yield chunk
    finally:
        print(f"leaves {send.request_id}", flush=True)


async def main() -> None:
    worker = ChatWorker(redis.Redis.from_url(URL), "agent", answer, lease_ms=1000)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    print("ready", flush=True)
    await worker.run()


asyncio.run(main())
