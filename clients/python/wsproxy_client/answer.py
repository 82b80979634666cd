"""A question, and the one writer of its answer."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from .backend import down_channel, text_of
from .queue import Cancel, Cancelled, Commands, fields_of, persist

#: Clocks of two masters of a Cluster may differ by so much.
_SKEW_MS = 10_000
_PAGE_SIZE = 500
#: Pieces that may wait to be sent before a writer has to.
_MAX_WAITING = 256

#: Makes one message of pieces, or some.
Join = Callable[[list[str]], "str | list[str]"]


class Answered(Exception):
    """The answer is in the log already: the worker before this one was killed when it had sent the end."""


def is_fenced(error: ResponseError) -> bool:
    """Whether another epoch is in force."""
    return str(error).startswith("FENCED ")


@dataclass(frozen=True)
class Written:
    """What was written about a question."""

    payload: str
    attempt: str
    what: str


class Log:
    """The log of the question's session, as its writer sees it."""

    def __init__(self, commands: Commands, session: str, cancel: Cancel) -> None:
        self.key = down_channel(session)
        self.cancel = cancel
        self.commands = commands

    async def call(self, *words: str | int) -> Any:
        """What Redis answers, however long that takes."""
        return await persist(self.cancel, lambda: self.commands.call(*words))

    async def begin(self, payload: str, nonce: str, epoch: int) -> tuple[str, int]:
        """Opens the epoch after the one in force; returns the position, and the epoch."""
        position, _, opened = await self.call("FCALL", "wsproxy_begin", 1, self.key, payload, nonce, epoch)
        return text_of(position), int(opened)

    async def open(
        self, payload: str, entry: str, attempt: str, what: str, confirm: Callable[[], Awaitable[None]]
    ) -> tuple[str, int]:
        """Opens an epoch, unless what it is for was done already, or is another worker's now.

        The worker that takes it away begins an epoch as well, so what was found out in one epoch holds when the next
        one opens right after it.
        """
        done = what if what == "interrupts" else "end"
        while True:
            epoch = await self.epoch()
            if any(written.what == done for written in await self.about(entry)):
                raise Answered
            await confirm()
            try:
                return await self.begin(payload, f"{entry}/{attempt}/{what}", epoch)
            except ResponseError as error:
                if not is_fenced(error):
                    raise

    async def epoch(self) -> int:
        """The one in force."""
        last = await self.call("XREVRANGE", self.key, "+", "-", "COUNT", 1)
        return int(fields_of(last[0][1]).get("e", "0")) if last else 0

    async def about(self, entry: str) -> list[Written]:
        """What was written about an entry of the inbox, in order: all have a nonce of three words."""
        found: list[Written] = []
        start = str(max(0, int(entry.split("-")[0]) - _SKEW_MS))
        while True:
            page = await self.call("XRANGE", self.key, start, "+", "COUNT", _PAGE_SIZE)
            for position, words in page:
                fields = fields_of(words)
                of, attempt, what = (*fields.get("k", "").split("/"), "", "")[:3]
                if of == entry:
                    found.append(Written(fields["d"], attempt, what))
                start = f"({text_of(position)}"
            if len(page) < _PAGE_SIZE:
                return found


class Question:
    """A client's question, which one worker has."""

    def __init__(
        self,
        entry: str,
        fields: dict[str, str],
        claims: str,
        deliveries: int,
        log: Log,
        confirm: Callable[[], Awaitable[None]],
        join: Join | None,
        coalesce_ms: float,
    ) -> None:
        #: The inbox's own id of it.
        self.entry = entry
        #: The client's id of it, or the inbox's.
        self.id = fields.get("id", entry)
        self.session = fields.get("session", "")
        self.connection = fields.get("connection", "")
        #: What the client has sent, as it is.
        self.data = fields.get("data", "")
        #: Of the token, as INBOX_CLAIMS names them.
        self.claims: dict[str, Any] = json.loads(claims) if claims else {}
        #: How often it was given to a worker, this time included.
        self.deliveries = deliveries
        self.answer: Answer | None = None
        self._attempt = uuid.uuid4().hex[:12]
        self._log = log
        self._confirm = confirm
        self._join = join
        self._coalesce = coalesce_ms / 1000

    async def begin(self, payload: str, join: Join | None = None) -> Answer:
        """Sends the first message of the answer, after which only this writer may send one.

        ``join`` is for this answer, in place of the worker's.
        """
        if self.answer:
            raise RuntimeError("an answer begins once")
        begun = await self.open(payload, "begin")
        log = Log(self._log.commands, self.session, Cancel(self._log.cancel))
        self.answer = Answer(log, self.entry, self._attempt, begun, join or self._join, self._coalesce)
        return self.answer

    async def open(self, payload: str, what: str) -> tuple[str, int]:
        """Opens an epoch for its answer."""
        return await self._log.open(payload, self.entry, self._attempt, what, self._confirm)


class Answer:
    """The one writer of an answer."""

    def __init__(
        self, log: Log, entry: str, attempt: str, begun: tuple[str, int], join: Join | None, coalesce: float
    ) -> None:
        #: Where in the log the last message is that was sent: to be stored with what was said.
        self.position, self._epoch = begun
        #: Set when there is no use in going on: a stop, a newer question, another worker.
        self.cancelled = log.cancel.event
        #: Another epoch has begun.
        self.fenced = False
        #: The log was lost, and its epochs with it: the question is to be answered again.
        self.lost = False
        self._log = log
        self._entry = entry
        self._attempt = attempt
        self._join = join
        self._coalesce = coalesce
        self._count = 0
        self._ended = False
        self._pieces: list[str] = []
        self._pump: asyncio.Task[None] | None = None

    async def send(self, piece: str) -> None:
        """Sends a piece; with ``join``, together with others that come soon. Raises ``Cancelled`` when it is not to be."""
        if self._ended:
            raise RuntimeError("the answer has ended")
        self._log.cancel.check()
        self._pieces.append(piece)
        if self._pump is None:
            self._pump = asyncio.create_task(self._send())
        if self._join is None or len(self._pieces) > _MAX_WAITING:
            await asyncio.shield(self._pump)
        self._log.cancel.check()

    async def end(self, payload: str) -> None:
        """Sends the last message, after which no writer sends one more."""
        if self._ended:
            raise RuntimeError("the answer has ended")
        self._ended = True
        await self.settled()
        nonce = f"{self._entry}/{self._attempt}/end"
        self.position, _ = await self._checked(lambda: self._log.begin(payload, nonce, self._epoch))

    async def so_far(self) -> list[str]:
        """What workers before this one have sent of this answer, in order."""
        written = await self._log.about(self._entry)
        return [each.payload for each in written if each.attempt != self._attempt and each.what.isdigit()]

    async def settled(self) -> None:
        """All pieces are in the log."""
        while self._pump is not None:
            await asyncio.shield(self._pump)
        self._log.cancel.check()

    async def _send(self) -> None:
        try:
            while self._pieces:
                waiting = len(self._pieces) if self._join else 1
                pieces, self._pieces = self._pieces[:waiting], self._pieces[waiting:]
                joined = self._join(pieces) if self._join else pieces
                for payload in [joined] if isinstance(joined, str) else joined:
                    await self._write(payload)
                # What comes meanwhile goes as one message.
                if self._join and not self._ended:
                    await asyncio.sleep(self._coalesce)
        except Exception as error:
            self._log.cancel.set(error)
        finally:
            self._pump = None

    async def _write(self, payload: str) -> None:
        nonce = f"{self._entry}/{self._attempt}/{self._count}"
        self._count += 1
        words = ("FCALL", "wsproxy_send", 1, self._log.key, payload, nonce, self._epoch)
        self.position = text_of((await self._checked(lambda: self._log.call(*words)))[0])

    async def _checked(self, call: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await call()
        except ResponseError as error:
            if not is_fenced(error):
                raise
            in_force = re.search(r"in force is (\d+)", str(error))
            self.lost = in_force is not None and int(in_force[1]) < self._epoch
            self.fenced = not self.lost
            cancelled = Cancelled("the log was lost" if self.lost else "another epoch has begun")
            self._log.cancel.set(cancelled)
            raise cancelled from None
