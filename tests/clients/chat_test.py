"""The worker of a chat on a real Redis, with agents that are a few lines of this file."""

from __future__ import annotations

import asyncio
import json
import unittest
from collections.abc import AsyncIterator, Callable
from typing import Any

from redis_case import INBOX, PATIENCE_SECS, RedisCase, eventually
from wsproxy_client.chat import ChatError, ChatWorker, Chunk, Send

Frame = dict[str, Any]
SECRET = "sk-a-key-of-the-provider"


def user(text: str) -> Frame:
    return {"id": f"id of {text}", "role": "user", "parts": [{"type": "text", "text": text}]}


def asked(send: Send) -> str:
    return str(send.messages[-1]["parts"][0]["text"])


async def words(*texts: str) -> AsyncIterator[Chunk]:
    yield {"type": "text-start", "id": "1"}
    for text in texts:
        yield {"type": "text-delta", "id": "1", "delta": text}
    yield {"type": "text-end", "id": "1"}


class ChatCase(RedisCase):
    def work(self, answer: Callable[[Send], AsyncIterator[Chunk]], **options: Any) -> ChatWorker:
        options = {"lease_ms": 60_000, "grace_ms": 0, "coalesce_ms": 1, **options}
        return self.start(lambda client: ChatWorker(client, "agent", answer, **options))

    async def send(self, request: str, text: str = "why", session: str = "s1", **fields: object) -> None:
        frame = {"type": "send", "requestId": request, "id": "chat", "trigger": "submit-message", "messages": [user(text)]}
        await self.ask(session, json.dumps({**frame, **fields}))

    async def abort(self, request: str, session: str = "s1") -> None:
        await self.ask(session, json.dumps({"type": "abort", "requestId": request}))

    async def frames(self, request: str, session: str = "s1") -> list[Frame]:
        """What was said of a request, since its answer began the last time."""
        frames = [json.loads(text) for text in await self.said(session)]
        found: list[Frame] = []
        for frame in frames:
            if frame["requestId"] == request:
                found = [frame] if frame["type"] == "start" else [*found, frame]
        return found

    async def shows(self, request: str, text: str, session: str = "s1") -> None:
        async def check() -> bool:
            return text in text_of(await self.frames(request, session))

        await eventually(f"{request} shows {text}", check)

    async def ended(self, request: str, session: str = "s1") -> list[Frame]:
        """Its frames, once the last one is there: the chunks are numbered without holes."""

        async def check() -> bool:
            return [frame["type"] for frame in await self.frames(request, session)][-1:] in (["end"], ["error"], ["no-active"])

        await eventually(f"{request} has ended", check)
        frames = await self.frames(request, session)
        numbers = [frame["sequence"] for frame in frames if frame["type"] == "chunk"]
        self.assertEqual(numbers, list(range(len(numbers))))
        return frames


def chunks_of(frames: list[Frame]) -> list[Frame]:
    return [frame["chunk"] for frame in frames if frame["type"] == "chunk"]


def text_of(frames: list[Frame]) -> str:
    return "".join(chunk["delta"] for chunk in chunks_of(frames) if chunk["type"] == "text-delta")


class ChatTest(ChatCase):
    async def test_an_answer_is_begun_numbered_and_ended(self) -> None:
        self.work(lambda send: words(f"you asked {asked(send)}"))
        await self.send("r1")
        first = {"type": "chunk", "requestId": "r1"}
        self.assertEqual(
            await self.ended("r1"),
            [
                {"type": "start", "requestId": "r1", "id": "chat"},
                {**first, "sequence": 0, "chunk": {"type": "start", "messageId": "r1"}},
                {**first, "sequence": 1, "chunk": {"type": "text-start", "id": "1"}},
                {**first, "sequence": 2, "chunk": {"type": "text-delta", "id": "1", "delta": "you asked why"}},
                {**first, "sequence": 3, "chunk": {"type": "text-end", "id": "1"}},
                {"type": "end", "requestId": "r1"},
            ],
        )
        await self.idle()

    async def test_a_question_is_known_before_its_answer_begins_and_may_be_refused(self) -> None:
        seen: list[tuple[str, list[str]]] = []

        async def on_question(send: Send) -> None:
            seen.append((asked(send), await self.said("s1")))
            if asked(send) == "what":
                raise ChatError("Not that.")

        self.work(lambda send: words("because"), on_question=on_question)
        await self.send("r1")
        await self.ended("r1")
        self.assertEqual(seen, [("why", [])])
        await self.send("r2", "what")
        refused = {"type": "error", "requestId": "r2", "errorText": "Not that."}
        self.assertEqual(await self.ended("r2"), [{"type": "start", "requestId": "r2", "id": "chat"}, refused])
        await self.idle()

    async def test_an_answer_that_goes_on_keeps_the_messages_id(self) -> None:
        async def answer(send: Send) -> AsyncIterator[Chunk]:
            yield {"type": "start", "messageId": "the library's", "messageMetadata": {"by": "it"}}
            yield {"type": "finish"}

        self.work(answer)
        await self.send("r1", messages=[{"id": "m1", "role": "assistant", "parts": []}])
        frames = await self.ended("r1")
        self.assertEqual(chunks_of(frames)[0], {"type": "start", "messageId": "m1", "messageMetadata": {"by": "it"}})

    async def test_deltas_of_one_part_are_joined_and_nothing_else(self) -> None:
        parts: list[Frame] = [
            {"type": "text-delta", "id": "1", "delta": "a"},
            {"type": "text-delta", "id": "1", "delta": "b", "providerMetadata": {"p": {}}},
            {"type": "text-delta", "id": "1", "delta": "c"},
            {"type": "text-delta", "id": "2", "delta": "d"},
            {"type": "reasoning-delta", "id": "2", "delta": "e"},
            {"type": "tool-input-delta", "toolCallId": "2", "inputTextDelta": "{"},
            {"type": "data-x", "id": "2", "data": "f"},
            {"type": "data-x", "id": "2", "data": "f"},
        ]
        joined: list[Frame] = [
            {"type": "text-delta", "id": "3", "delta": "half \ud83d\ude00"},
            {"type": "reasoning-delta", "id": "3", "delta": "gh"},
            {"type": "tool-input-delta", "toolCallId": "3", "inputTextDelta": "}}"},
        ]

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            for part in parts:
                yield part
            yield {"type": "text-delta", "id": "3", "delta": "half \ud83d"}
            yield {"type": "text-delta", "id": "3", "delta": "\ude00"}
            for text in "gh":
                yield {"type": "reasoning-delta", "id": "3", "delta": text}
            for _ in range(2):
                yield {"type": "tool-input-delta", "toolCallId": "3", "inputTextDelta": "}"}

        # What comes within this time after the first chunk goes together.
        self.work(answer, coalesce_ms=200)
        await self.send("r1")
        chunks = chunks_of(await self.ended("r1"))
        self.assertEqual(chunks, json.loads(json.dumps([{"type": "start", "messageId": "r1"}, *parts, *joined])))

    async def test_no_joined_chunk_is_too_large_for_the_log(self) -> None:
        self.work(lambda _: words(*("x" * 10_000 for _ in range(200))), coalesce_ms=200)
        await self.send("r1")
        frames = await self.ended("r1")
        self.assertEqual(len(text_of(frames)), 2_000_000)
        self.assertLess(len(frames), 100)

    async def test_what_is_no_question_harms_no_other(self) -> None:
        self.work(lambda send: words(asked(send)))
        for data in ("{", "7", "null", "[]", "{}", '{"type":"send"}', '{"type":7,"requestId":"r"}', "[" * 100_000):
            await self.ask("s1", data)
        await self.ask("s1", '{"type":"unknown","requestId":"r"}')
        odd: list[object] = [None, {}, [], [7], [{"id": "m1"}], [{"role": "user"}]]
        for n, messages in enumerate(odd):
            await self.send(f"odd{n}", messages=messages)
        await self.ask("s1", '{"type":"resume","requestId":"r0","id":"chat"}')
        await self.send("r1")
        self.assertEqual(text_of(await self.ended("r1")), "why")
        self.assertEqual(await self.frames("r0"), [{"type": "no-active", "requestId": "r0"}])
        for n in range(len(odd)):
            told = {"type": "error", "requestId": f"odd{n}", "errorText": "The question was not understood."}
            self.assertEqual((await self.frames(f"odd{n}"))[1:], [told])
        self.assertEqual(await self.frames("r"), [])
        await self.idle()
        self.assertEqual(await self.control.exists(f"{INBOX}:failed"), 0)

    async def test_an_agent_that_fails_before_it_shows_anything_is_asked_three_times(self) -> None:
        tries = 0

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            nonlocal tries
            tries += 1
            yield {"type": "start-step"}
            if asked(send) == "never" or send.question.deliveries < 3:
                raise ValueError(SECRET)
            yield {"type": "finish-step"}

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.work(answer)
            await self.send("r1", "never")
            frames = await self.ended("r1")
            self.assertEqual(frames[-1], {"type": "error", "requestId": "r1", "errorText": "The answer failed."})
            self.assertEqual(tries, 3)
            await self.send("r2", "at last")
            self.assertEqual((await self.ended("r2"))[-1]["type"], "end")
        self.assertNotIn(SECRET, "".join(await self.said("s1")))

    async def test_an_agent_that_fails_in_the_middle_leaves_what_was_shown(self) -> None:
        tries = 0

        async def answer(_: Send) -> AsyncIterator[Chunk]:
            nonlocal tries
            tries += 1
            async for chunk in words("one"):
                yield chunk
            raise ValueError(SECRET)

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.work(answer, error_text="Ask again.")
            await self.send("r1")
            frames = await self.ended("r1")
        self.assertEqual(text_of(frames), "one")
        self.assertEqual(frames[-1], {"type": "error", "requestId": "r1", "errorText": "Ask again."})
        await self.idle()
        self.assertEqual(tries, 1)
        self.assertNotIn(SECRET, "".join(await self.said("s1")))

    async def test_what_is_for_the_user_is_told_at_once(self) -> None:
        async def answer(send: Send) -> AsyncIterator[Chunk]:
            if asked(send) == "raise":
                raise ChatError("You have used up today's questions.")
            yield {"type": "error", "errorText": "The library's text."}

        self.work(answer)
        await self.send("r1", "raise")
        await self.send("r2")
        self.assertEqual((await self.ended("r1"))[-1]["errorText"], "You have used up today's questions.")
        self.assertEqual((await self.ended("r2"))[-1]["errorText"], "The library's text.")

    async def test_an_abort_ends_the_request_it_names_whoever_reads_it(self) -> None:
        cancelled: list[str] = []

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            yield {"type": "text-delta", "id": "1", "delta": asked(send)}
            if asked(send) == "long":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    cancelled.append(send.request_id)
                    raise

        # Each takes one question at most, so that the abort is read by the other one as well.
        for _ in range(2):
            self.work(answer, concurrency=1)
        for request in ("r1", "r2"):
            await self.send(request, "long")
        await self.send("r3", "other tab")
        await self.shows("r1", "long")
        await self.send("other", "long", session="s2")
        await self.shows("other", "long", "s2")
        await self.abort("r2")
        await self.abort("r1")
        for request, kinds in (("r1", ["start", "text-delta", "abort"]), ("r2", ["start", "abort"])):
            frames = await self.ended(request)
            self.assertEqual([chunk["type"] for chunk in chunks_of(frames)], kinds)
            self.assertEqual(frames[-1]["type"], "end")
        self.assertEqual(text_of(await self.ended("r3")), "other tab")
        await self.abort("other", session="s2")
        await self.ended("other", "s2")
        # One that has ended, or never was, is nobody's.
        for request in ("r1", "unknown"):
            await self.abort(request)
        await self.idle()
        self.assertEqual(cancelled, ["r1", "other"])
        self.assertEqual(await self.frames("unknown"), [])

    async def test_a_stream_that_ends_itself_at_an_abort_may_say_so(self) -> None:
        async def answer(send: Send) -> AsyncIterator[Chunk]:
            stop = asyncio.Event()
            send.cancel = stop.set
            yield {"type": "text-start", "id": "1"}
            await stop.wait()
            yield {"type": "text-end", "id": "1"}
            yield {"type": "abort", "reason": "its own"}

        self.work(answer)
        await self.send("r1")

        async def begun() -> bool:
            return len(chunks_of(await self.frames("r1"))) == 2

        await eventually("it has begun", begun)
        await self.abort("r1")
        chunks = chunks_of(await self.ended("r1"))
        self.assertEqual(chunks[-2:], [{"type": "text-end", "id": "1"}, {"type": "abort", "reason": "its own"}])

    async def test_a_worker_that_takes_over_begins_anew_and_the_other_one_stops(self) -> None:
        stopped = asyncio.Event()

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            yield {"type": "text-delta", "id": "1", "delta": f"try {send.question.deliveries}"}
            if send.question.deliveries == 1:
                try:
                    await asyncio.sleep(3600)
                finally:
                    stopped.set()

        self.work(answer)
        await self.send("r1")
        await self.shows("r1", "try 1")
        # As if it had been frozen for longer than its lease.
        (entry,) = [entry for entry, _ in await self.control.xrange(INBOX)]
        await self.control.hset(f"worker:{{{INBOX}}}:answers:lanes", "m s1", f"- {entry}")
        await self.control.zadd(f"worker:{{{INBOX}}}:answers:questions", {"m s1": 0})
        self.work(answer)
        self.assertEqual(text_of(await self.ended("r1")), "try 2")
        await asyncio.wait_for(stopped.wait(), PATIENCE_SECS)
        await self.idle()
        self.assertEqual([json.loads(text)["type"] for text in await self.said("s1")].count("start"), 2)

    async def test_a_chunk_that_the_log_refuses_is_an_error_in_the_end(self) -> None:
        async def answer(send: Send) -> AsyncIterator[Chunk]:
            async for chunk in words(asked(send), "x" * (2_000_000 if asked(send) == "too much" else 1)):
                yield chunk

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.work(answer)
            await self.send("r1", "too much")
            await self.send("r2", "enough")
            frames = await self.ended("r1")
            self.assertEqual(frames[-1], {"type": "error", "requestId": "r1", "errorText": "The answer failed."})
            self.assertEqual(text_of(await self.ended("r2")), "enoughx")
        await self.idle()

    async def test_the_position_is_that_of_what_was_yielded(self) -> None:
        positions: list[str] = []

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            for text in ("one", "two"):
                yield {"type": "text-delta", "id": "1", "delta": text}
            positions.append(await send.position())

        self.work(answer)
        await self.send("r1")
        await self.ended("r1")
        (position,) = positions
        left = [fields["d"] for _, fields in await self.control.xrange("session:s1:down", f"({position}")]
        self.assertEqual(left, ['{"type":"end","requestId":"r1"}'])


if __name__ == "__main__":
    unittest.main()
