"""A real Redis with the functions of a proxy, and an inbox: LIBRARY is a file with the functions, as a proxy loads them."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import unittest
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio as redis
from wsproxy_client.worker import Worker

W = TypeVar("W", bound=Worker)

INBOX = "agent:agent:inbox"
PATIENCE_SECS = 20


def log_of(session: str) -> str:
    return f"session:{session}:down"


async def eventually(what: str, check: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(PATIENCE_SECS * 200):
        if await check():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{what}: not within {PATIENCE_SECS} s")


class RedisCase(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as spare:
            self.port = spare.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        await self.start_redis()
        # redis-py's types depend on what is decoded, and do not know it.
        self.control: Any = redis.Redis(port=self.port, decode_responses=True)
        await self.load()
        self.workers: list[tuple[Worker, asyncio.Task[None], redis.Redis]] = []

    async def start_redis(self) -> None:
        arguments = ["--port", str(self.port), "--dir", self.folder.name, "--appendonly", "yes", "--appendfsync", "no"]
        self.server = await asyncio.create_subprocess_exec(
            "redis-server", *arguments, stdout=asyncio.subprocess.DEVNULL
        )
        probe = redis.Redis(port=self.port)

        async def there() -> bool:
            try:
                return bool(await probe.ping())
            except redis.RedisError:
                return False

        await eventually("Redis is there", there)
        await probe.aclose()

    async def load(self) -> None:
        with open(os.environ["LIBRARY"]) as library:
            await self.control.execute_command("FUNCTION", "LOAD", "REPLACE", library.read())

    async def asyncTearDown(self) -> None:
        try:
            for worker, running, _ in self.workers:
                worker.stop()
                # After a failure one may still have a long grace.
                running.cancel()
            for _, running, client in self.workers:
                await asyncio.wait_for(asyncio.wait({running}), PATIENCE_SECS)
                await client.aclose()
            await self.control.aclose()
        finally:
            # A server that is left over keeps the output open, and who reads it waiting.
            self.server.kill()
            await self.server.wait()
            self.folder.cleanup()

    def start(self, make: Callable[[redis.Redis], W]) -> W:
        """Runs a worker until the end of the test."""
        client = redis.Redis(port=self.port)
        worker = make(client)
        self.workers.append((worker, asyncio.create_task(worker.run()), client))
        return worker

    async def enter(self, kind: str, session: str, **fields: str) -> str:
        return str(await self.control.xadd(INBOX, {"type": kind, "session": session, "connection": "c-1", "at": "1", **fields}))

    async def ask(self, session: str, data: str, **fields: str) -> str:
        return await self.enter("message", session, data=data, **fields)

    async def said(self, session: str) -> list[str]:
        return [fields["d"] for _, fields in await self.control.xrange(log_of(session))]

    async def says(self, session: str, expected: list[str]) -> None:
        async def check() -> bool:
            now = await self.said(session)
            self.assertEqual(now, expected[: len(now)])
            return now == expected

        await eventually(f"{session}: {expected}", check)

    async def idle(self) -> None:
        async def check() -> bool:
            names = ("lanes", "questions", "events", "tries")
            left = await self.control.exists(*(f"worker:{{{INBOX}}}:answers:{name}" for name in names))
            pending = await self.control.xpending(INBOX, "answers")
            return bool(left == 0 and pending["pending"] == 0)

        await eventually("nothing is left to do", check)
