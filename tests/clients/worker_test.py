"""The worker of wsproxy_client on a real Redis."""

from __future__ import annotations

import asyncio
import itertools
import logging
import unittest
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ReadOnlyError
from redis_case import INBOX, PATIENCE_SECS, RedisCase, eventually, log_of
from wsproxy_client.worker import Answer, Cancelled, Question, Worker


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


class WorkerTest(RedisCase):
    def work(self, handle: Callable[[Question], Awaitable[object]] = three_words, **options: Any) -> Worker:
        return self.start(lambda client: Worker(client, "agent", handle, **{"lease_ms": 60_000, "grace_ms": 0, **options}))

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

    async def test_at_most_one_word_comes_after_a_stop_that_another_worker_reads(self) -> None:
        word_secs = 0.1

        async def handle(question: Question) -> None:
            if question.data == "stop":
                return
            if question.data != "long":
                return await three_words(question)
            answer = await question.begin("start")
            for i in itertools.count():
                await answer.send(f"word {i}")
                await asyncio.sleep(word_secs)

        def interrupts(entry: dict[str, str]) -> str | None:
            return "stopped" if entry["data"] in ("stop", "next") else None

        async def test(interrupt: str) -> None:
            nonlocal word_secs
            word_secs = 0.1
            session = f"is {interrupt}"

            async def writes_on(count: int) -> None:
                async def check() -> bool:
                    return len(await self.said(session)) > count

                await eventually("it writes", check)

            # It does not know a stop itself.
            writer = self.work(handle, grace_ms=60_000)
            await self.ask(session, "long")
            await writes_on(2)
            # It takes nothing more, and writes on.
            writer.stop()
            reader = self.work(handle, interrupts=interrupts)
            await writes_on(len(await self.said(session)))
            # So that a word is as much as a machine which stalls may be late by.
            word_secs = 2.0
            entry = {"type": "message", "session": session, "data": interrupt}
            told, _ = await self.control.pipeline(transaction=True).xlen(log_of(session)).xadd(INBOX, entry).execute()
            await self.idle()
            after = (await self.said(session))[told:]
            words = [text for text in after if text.startswith("word")]
            self.assertLessEqual(len(words), 1)
            self.assertEqual(after[len(words) :], ["stopped", *(whole("next") if interrupt == "next" else [])])
            reader.stop()
            await asyncio.wait({running for _, running, _ in self.workers})

        for interrupt in ("stop", "next"):
            await asyncio.wait_for(test(interrupt), 2 * PATIENCE_SECS)

    async def test_a_worker_keeps_its_question_and_looks_once_at_what_waits(self) -> None:
        looked: list[str] = []
        go = asyncio.Event()

        async def handle(question: Question) -> None:
            answer = await question.begin(f"start {question.data}")
            await go.wait()
            await answer.end(f"end {question.data}")

        async def kept_until_ms() -> float:
            return float(await self.control.zscore(f"worker:{{{INBOX}}}:answers:questions", "m s1"))

        self.work(handle, interrupts=lambda entry: looked.append(entry["data"]))
        await self.ask("s1", "long")
        await self.says("s1", ["start long"])
        await self.ask("s1", "waits")

        async def is_looked_at() -> bool:
            return len(looked) > 0

        await eventually("it was looked at", is_looked_at)
        before_ms = await kept_until_ms()

        async def is_kept() -> bool:
            return await kept_until_ms() > before_ms + 900

        await eventually("it is kept twice", is_kept)
        go.set()
        await self.says("s1", ["start long", "end long", "start waits", "end waits"])
        self.assertEqual(looked, ["waits"])

    async def test_a_worker_that_redis_refuses_for_a_moment_does_not_wait_for_long(self) -> None:
        order: list[str] = []

        def refused(client: Any) -> Any:
            execute = client.execute_command

            async def execute_command(*words: Any) -> Any:
                if "take" in words:
                    order.append("take")
                    if len(order) == 1:
                        asyncio.get_running_loop().call_later(0.5, order.append, "half a second")
                        raise ReadOnlyError("You can't write against a read only replica.")
                return await execute(*words)

            client.execute_command = execute_command
            return client

        self.start(lambda client: Worker(refused(client), "agent", three_words))
        await self.ask("s1", "q")
        await self.says("s1", whole("q"))
        self.assertEqual(order[:2], ["take", "take"])

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
        begun.clear()
        self.workers[-1][0].stop()
        self.work(stuck, grace_ms=60_000)
        await begun.wait()
        self.workers[-1][0].stop()
        # It waits for its handler now.
        await asyncio.sleep(0.1)
        self.workers[-1][1].cancel()
        self.work(last)
        await self.says("s1", ["start", "one", "start", "one", "start", "one", *whole("q")])
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
