"""The worker of wsproxy_client on a real Redis: LIBRARY is a file with the functions, as a proxy loads them."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import unittest
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio as redis
from wsproxy_client.worker import Answer, Cancelled, Question, Worker

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


async def three_words(question: Question) -> None:
    answer = await question.begin(f"start {question.data}")
    for i in range(3):
        await answer.send(f"{question.data} {i}")
    await answer.end(f"end {question.data}")


def whole(data: str) -> list[str]:
    return [f"start {data}", *(f"{data} {i}" for i in range(3)), f"end {data}"]


def stops(entry: dict[str, str]) -> str | None:
    if entry["type"] == "vacated":
        return "vacated"
    return "stopped" if entry.get("data", "").startswith("stop") else None


class WorkerTest(unittest.IsolatedAsyncioTestCase):
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
        arguments = ["--port", str(self.port), "--dir", self.folder.name, "--appendonly", "yes", "--appendfsync", "always"]
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
        for worker, _, _ in self.workers:
            worker.stop()
        for _, running, client in self.workers:
            await asyncio.wait_for(asyncio.wait({running}), PATIENCE_SECS)
            await client.aclose()
        await self.control.aclose()
        self.server.kill()
        await self.server.wait()
        self.folder.cleanup()

    def work(self, handle: Callable[[Question], Awaitable[object]] = three_words, **options: Any) -> Worker:
        client = redis.Redis(port=self.port)
        worker = Worker(client, "agent", handle, **{"lease_ms": 60_000, "grace_ms": 0, **options})
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

    async def test_each_question_is_answered_once_and_those_of_a_session_in_order(self) -> None:
        for concurrency in (16, 16, 1):
            self.work(concurrency=concurrency)
        for i in range(50):
            await self.ask(f"s{i % 10}", f"q{i}", id=f"id{i}")
            await self.ask(f"s{i % 10}", f"q{i}", id=f"id{i}")
        for session in range(10):
            expected = [text for n in range(5) for text in whole(f"q{session + 10 * n}")]
            await self.says(f"s{session}", expected)
        await self.idle()

    async def test_a_question_has_its_claims_and_events_come_in_order(self) -> None:
        seen: list[object] = []

        async def handle(question: Question) -> None:
            seen.append((question.id, question.session, question.data, question.claims, question.deliveries))

        self.work(handle, on_event=lambda event: seen.append((event["type"], event["session"])))

        async def saw(count: int) -> None:
            async def check() -> bool:
                return len(seen) == count

            await eventually(f"{count} seen", check)

        await self.enter("connected", "s 1", claims='{"sub":"me"}')
        await saw(1)
        await self.ask("s 1", "no JSON {", id="client-1")
        await saw(2)
        await self.enter("disconnected", "s 1", code="1006")
        await self.enter("vacated", "s 1")
        await saw(4)
        question = ("client-1", "s 1", "no JSON {", {"sub": "me"}, 1)
        self.assertEqual(
            seen, [("connected", "s 1"), question, ("disconnected", "s 1"), ("vacated", "s 1")]
        )
        await self.idle()

    async def test_a_worker_that_was_taken_for_dead_writes_no_word_more(self) -> None:
        frozen: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        thaw = asyncio.Event()
        refused: list[BaseException] = []

        async def freeze(question: Question) -> None:
            answer = await question.begin("start")
            await answer.send("one")
            await answer.send("two")
            frozen.set_result(answer)
            await thaw.wait()
            try:
                await answer.send("three")
            except Cancelled as error:
                refused.append(error)

        async def go_on(question: Question) -> None:
            answer = await question.begin("again")
            for text in [str(question.deliveries), *await answer.so_far()]:
                await answer.send(text)
            await answer.end("end")

        async def handle(question: Question) -> None:
            await (freeze if question.deliveries == 1 else go_on)(question)

        self.work(handle)
        await self.ask("s1", "q")
        former = await frozen
        # Another one may take it now, as if this one had been frozen for longer than its lease; it may be itself.
        (entry,) = [entry for entry, _ in await self.control.xrange(INBOX)]
        await self.control.hset(f"worker:{{{INBOX}}}:answers:lanes", "m s1", f"- {entry}")
        await self.control.zadd(f"worker:{{{INBOX}}}:answers:questions", {"m s1": 0})
        self.work(handle)
        expected = ["start", "one", "two", "again", "2", "one", "two", "end"]
        await self.says("s1", expected)
        await asyncio.wait_for(former.cancelled.wait(), PATIENCE_SECS)
        thaw.set()

        async def is_refused() -> bool:
            return len(refused) == 1

        await eventually("refused", is_refused)
        await self.idle()
        self.assertEqual(await self.said("s1"), expected)

    async def test_a_stop_ends_the_answer_and_what_waited_before_it(self) -> None:
        async def handle(question: Question) -> None:
            if question.data == "stop":
                return
            if question.data != "long":
                return await three_words(question)
            answer = await question.begin("start long")
            await answer.cancelled.wait()
            await answer.send("a word too many")

        for _ in range(2):
            self.work(handle, interrupts=stops, concurrency=1)
        for session in ("s1", "s2"):
            await self.ask(session, "long")
            await self.says(session, ["start long"])
            await self.ask(session, "waits")
        await self.ask("s1", "stop")
        await self.ask("s1", "next")
        await self.says("s1", ["start long", "stopped", *whole("next")])
        await self.ask("s2", "stop and again")
        await self.says("s2", ["start long", "stopped", *whole("stop and again")])
        await self.ask("s2", "long")
        await self.says("s2", ["start long", "stopped", *whole("stop and again"), "start long"])
        await self.enter("vacated", "s2")
        await self.says("s2", ["start long", "stopped", *whole("stop and again"), "start long", "vacated"])
        await self.ask("s1", "stop")
        await self.idle()
        self.assertEqual(await self.said("s1"), ["start long", "stopped", *whole("next")])

    async def test_a_question_that_fails_three_times_is_set_aside(self) -> None:
        async def handle(question: Question) -> None:
            if question.data == "large":
                answer = await question.begin("start")
                await answer.send("x" * 2_000_000)
            if question.data == "{":
                raise ValueError("no JSON")
            await three_words(question)

        with self.assertLogs("wsproxy_client.worker", "ERROR") as logs:
            self.work(handle, interrupts=lambda _: None)
            entry = await self.ask("s1", "{", id="bad")
            await self.ask("s1", "good")
            await self.ask("s2", "large", id="large")
            await self.says("s1", ['{"type":"failed","id":"bad"}', *whole("good")])
            await self.says("s2", ["start"] * 3 + ['{"type":"failed","id":"large"}'])
            await self.idle()
        self.assertEqual(len(logs.records), 6)
        (kept,) = [fields for _, fields in await self.control.xrange(f"{INBOX}:failed") if fields["id"] == "bad"]
        self.assertEqual((kept["entry"], kept["data"]), (entry, "{"))

    async def test_a_worker_that_is_stopped_or_cancelled_hands_over(self) -> None:
        begun = asyncio.Event()

        async def stuck(question: Question) -> None:
            answer = await question.begin("start")
            await answer.send("one")
            begun.set()
            await asyncio.sleep(3600)

        deliveries: list[int] = []

        async def last(question: Question) -> None:
            deliveries.append(question.deliveries)
            await three_words(question)

        await self.ask("s1", "q")
        self.work(stuck).stop()
        self.work(stuck)
        await begun.wait()
        begun.clear()
        self.workers[-1][1].cancel()
        self.work(stuck)
        await begun.wait()
        self.workers[-1][0].stop()
        self.work(last)
        await self.says("s1", ["start", "one", "start", "one", *whole("q")])
        self.assertEqual(deliveries, [1])
        await self.idle()

    async def test_pieces_that_come_soon_go_as_one_message(self) -> None:
        texts = [f"{i} " for i in range(2000)]

        async def handle(question: Question) -> None:
            answer = await question.begin("")
            for text in texts:
                await answer.send(text)
            await answer.end("end")

        self.work(handle, join="".join)
        await self.ask("s1", "q")

        async def ended() -> bool:
            return (await self.said("s1"))[-1:] == ["end"]

        await eventually("ended", ended)
        said = await self.said("s1")
        self.assertEqual("".join(said[:-1]), "".join(texts))
        self.assertLess(len(said), 500)

    async def test_redis_is_killed_and_loses_everything(self) -> None:
        self.server.kill()
        await self.server.wait()
        logging.disable(logging.WARNING)
        self.addCleanup(logging.disable, logging.NOTSET)
        # What was taken when Redis was killed comes again after the lease.
        self.work(lease_ms=2000)
        await asyncio.sleep(0.1)
        await self.start_redis()
        expected: list[str] = []
        for round in range(2):
            await self.ask("s1", f"q{round}")
            expected += whole(f"q{round}")
            await self.says("s1", expected)
            self.server.kill()
            await self.server.wait()
            await self.start_redis()
        await self.control.flushall()
        await self.ask("s1", "anew")
        await self.says("s1", whole("anew"))
        await self.control.execute_command("FUNCTION", "FLUSH")
        await self.ask("s1", "no functions")
        await asyncio.sleep(0.1)
        await self.load()
        await self.says("s1", [*whole("anew"), *whole("no functions")])
        await self.idle()


if __name__ == "__main__":
    unittest.main()
