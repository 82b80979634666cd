"""A worker of agents of AG-UI, to be killed: `ag_ui_program.py REDIS_URL NAME`. It tells word for word which it is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import redis.asyncio as redis
from wsproxy_client.ag_ui import AgUiWorker
from wsproxy_client.chat import Chunk, Send

URL, NAME = sys.argv[1:]


async def answer(send: Send) -> AsyncIterator[Chunk]:
    yield {"type": "TEXT_MESSAGE_START", "messageId": send.request_id, "role": "assistant"}
    for n in range(40):
        yield {"type": "TEXT_MESSAGE_CONTENT", "messageId": send.request_id, "delta": f"{NAME}-{n} "}
        await asyncio.sleep(0.05)
    yield {"type": "TEXT_MESSAGE_END", "messageId": send.request_id}


async def main() -> None:
    worker = AgUiWorker(redis.Redis.from_url(URL), "agent", answer, lease_ms=1000)
    print("ready", flush=True)
    await worker.run()


asyncio.run(main())
