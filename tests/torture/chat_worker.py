"""A worker of tests/torture/chat.ts in Python, which says what chat_model.ts says: REDIS_URL, HISTORY_URL, LEASE_MS."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from redis.asyncio import Redis
from chat_model import steps_of
from wsproxy_client.chat import ChatWorker, Chunk, Send

open_url = build_opener(ProxyHandler({})).open


async def history(**call: Any) -> None:
    request = Request(os.environ["HISTORY_URL"], json.dumps(call).encode())
    await asyncio.to_thread(lambda: open_url(request).read())


async def ask(send: Send) -> None:
    await history(op="question", chat=send.chat_id, message=send.messages[-1], answerId=send.answer_id)


async def answer(send: Send) -> AsyncIterator[Chunk]:
    question = send.text
    parts: list[dict[str, Any]] = []
    send.cancel = lambda: None  # It ends by itself.
    for i, step in enumerate(steps_of(question)):
        parts.append({"type": "step-start"})
        yield {"type": "start-step"}
        for j, (kind, words) in enumerate(step):
            part = f"{i}-{j}"
            if kind == "tool":
                call = {"toolCallId": f"call-{question}", "toolName": "look", "dynamic": True, "providerExecuted": True}
                yield {"type": "tool-input-available", **call, "input": {}}
                await asyncio.sleep(0.05)
                yield {"type": "tool-output-available", **call, "output": words[0]}
                done = {"state": "output-available", "input": {}, "output": words[0], "providerExecuted": True}
                parts.append({"type": "dynamic-tool", "toolName": "look", "toolCallId": call["toolCallId"], **done})
                continue
            yield {"type": f"{kind}-start", "id": part}
            parts.append({"type": kind, "text": "", "state": "done"})
            for word in words:
                await asyncio.sleep(0.01 + 0.04 * random.random())
                if send.aborted.is_set():
                    yield {"type": "abort"}
                    await keep(send, parts)
                    return
                parts[-1]["text"] += f"{word} "
                yield {"type": f"{kind}-delta", "id": part, "delta": f"{word} "}
            yield {"type": f"{kind}-end", "id": part}
        yield {"type": "finish-step"}
    yield {"type": "finish"}
    await keep(send, parts)


async def keep(send: Send, parts: list[dict[str, Any]]) -> None:
    await send.position()  # What another worker says now is not to be overwritten.
    message = {"id": send.answer_id, "role": "assistant", "parts": parts}
    await history(op="answer", chat=send.chat_id, question=send.messages[-1]["id"], answer=message)


async def main() -> None:
    lease_ms = int(os.environ["LEASE_MS"])
    worker = ChatWorker(
        Redis.from_url(os.environ["REDIS_URL"]), "agent", answer,
        on_question=ask, lease_ms=lease_ms, grace_ms=1000, max_deliveries=100,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()


asyncio.run(main())
