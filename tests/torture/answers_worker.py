"""A worker of tests/torture/answers.ts in Python: REDIS_URL, and LEASE_MS."""

import asyncio
import json
import os
import random
import signal
import uuid

import redis.asyncio as redis
from wsproxy_client.worker import Question, Worker


async def handle(question: Question) -> None:
    asked = json.loads(question.data)
    if "words" not in asked:
        return
    by = uuid.uuid4().hex

    def say(kind: str, **more: int) -> str:
        return json.dumps({"kind": kind, "q": asked["q"], "by": by, **more})

    answer = await question.begin(say("start"))
    for at in range(len(await answer.so_far()), asked["words"]):
        await answer.send(say("word", at=at))
        await asyncio.sleep(random.random() * 0.04)
    await answer.end(say("end"))


def interrupts(entry: dict[str, str]) -> str | None:
    if entry["type"] != "message":
        return None
    asked = json.loads(entry["data"])
    return json.dumps({"kind": "stopped", "q": asked["q"]}) if asked.get("stop") else None


def failed(question: Question, _reason: str) -> str:
    return json.dumps({"kind": "failed", "q": json.loads(question.data)["q"]})


async def main() -> None:
    client = redis.Redis.from_url(os.environ["REDIS_URL"])
    lease_ms = int(os.environ["LEASE_MS"])
    worker = Worker(client, "agent", handle, interrupts=interrupts, failed=failed, lease_ms=lease_ms)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()


asyncio.run(main())
