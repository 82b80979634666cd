"""A worker of tests/torture/answers.ts in Python: LEASE_MS, and REDIS_URL as the proxy takes it."""

import asyncio
import json
import os
import random
import signal
import uuid

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.sentinel import Sentinel
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


def client_for(url: str) -> Redis | RedisCluster:
    """The client that a program would make."""
    scheme, _, rest = url.partition("://")
    pairs = [server.split(":") for server in rest.partition("?")[0].split(",")]
    servers = [(host, int(port)) for host, port in pairs]
    if scheme == "redis+sentinel":
        return Sentinel(servers).master_for("mymaster")
    if scheme == "redis+cluster":
        return RedisCluster(startup_nodes=[ClusterNode(*server) for server in servers])
    return Redis.from_url(url)


async def main() -> None:
    client = client_for(os.environ["REDIS_URL"])
    lease_ms = int(os.environ["LEASE_MS"])
    worker = Worker(client, "agent", handle, interrupts=interrupts, failed=failed, lease_ms=lease_ms)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()


asyncio.run(main())
