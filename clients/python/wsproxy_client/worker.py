"""A backend's worker: one of any number that answer what an agent's clients ask, each question once.

    worker = Worker(redis.asyncio.Redis.from_url(url), "support", handle)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()

It needs redis-py (``pip install wsproxy-client[backend]``), the proxy ``INBOX=true``, and Redis 7 or Valkey.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redis.exceptions import ResponseError

from .answer import Answer, Answered, Join, Log, Question, is_fenced
from .backend import text_of
from .queue import Cancel, Cancelled, Commands, Queue, fields_of, passes, pause_after, persist

__all__ = ["Answer", "Answered", "Cancelled", "Question", "Worker"]

logger = logging.getLogger(__name__)

_READ_COUNT = 100
_EVENT_COUNT = 64
_BELL_SECS = 1.0
_RETRY_SECS = 1.0
_LEAVE_SECS = 2.0
#: A client that has been away for so long may still send a message again.
_REMEMBER_MS = 24 * 3600 * 1000
_LOST_REASON = "the question is another worker's now, or was stopped"

Entry = dict[str, str]


def _told(question: Question, reason: str) -> str:  # noqa: ARG001
    return json.dumps({"type": "failed", "id": question.id}, separators=(",", ":"))


async def _ended(task: asyncio.Task[Any], event: asyncio.Event) -> None:
    """Until a task has ended, or the event is set."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


@dataclass(eq=False)
class _Job:
    """An entry that is held here."""

    lane: str
    token: str
    id: str
    mark: bool
    count: int
    claims: str
    fields: Entry
    behind: list[str]
    #: What was looked at of what waits behind it.
    judged: dict[str, asyncio.Task[None]] = field(default_factory=dict[str, "asyncio.Task[None]"])
    cancel: Cancel = field(default_factory=Cancel)
    lost: bool = False

    def lose(self, why: str) -> None:
        self.lost = True
        self.cancel.set(Cancelled(why))


class Worker:
    """One worker of a group.

    ``handle`` answers a question, which is done when it returns; one that raises is given the question again.
    ``on_event`` is told of ``connected``, ``disconnected``, ``vacated``, in the order of each session. ``interrupts``
    says what to send when an entry (a stop, a question that replaces others, a ``vacated``) ends what came before it in
    its session, and None when it does not; a message then takes its turn like any other. ``failed`` says what to send
    when a question is given up, ``join`` makes one message of the pieces that came within ``coalesce_ms``.
    """

    def __init__(
        self,
        redis: Any,
        agent: str,
        handle: Callable[[Question], Awaitable[object]],
        *,
        on_event: Callable[[Entry], object] | None = None,
        interrupts: Callable[[Entry], str | None] | None = None,
        failed: Callable[[Question, str], str] = _told,
        join: Join | None = None,
        coalesce_ms: float = 25,
        group: str = "answers",
        concurrency: int = 16,
        lease_ms: int = 10_000,
        max_deliveries: int = 3,
        grace_ms: float = 10_000,
    ) -> None:
        self._handle = handle
        self._on_event = on_event
        self._interrupts = interrupts
        self._failed = failed
        self._join = join
        self._coalesce_ms = coalesce_ms
        self._concurrency = concurrency
        self._lease_ms = lease_ms
        self._max_deliveries = max_deliveries
        self._grace = grace_ms / 1000
        self._commands = Commands(redis)
        self._queue = Queue(self._commands, agent, group)
        self._name = uuid.uuid4().hex
        self._takes = 0
        self._jobs: set[_Job] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._handlers: set[asyncio.Task[object]] = set()
        self._stopping = False
        self._gone = Cancel()
        self._wake = asyncio.Event()
        self._ringing: asyncio.Task[None] | None = None
        self._last = "0-0"

    async def run(self) -> None:
        """Works until it is stopped, whatever happens to Redis. Cancelled, it hands over what it has."""
        renewal = asyncio.create_task(self._keep())
        try:
            failures = 0
            while not self._stopping:
                try:
                    if not await self._take():
                        await self._wait()
                    failures = 0
                except Exception as error:
                    if failures == 0:
                        logger.warning("Redis does not let questions be taken: %r", error)
                    await pause_after(failures)
                    failures += 1
            if self._running:
                await asyncio.wait(self._running, timeout=self._grace)
        finally:
            try:
                await self._leave()
            finally:
                self._gone.set(Cancelled("the worker has stopped"))
                for task in [renewal, *self._running, *self._handlers]:
                    task.cancel()
                if self._ringing:
                    self._ringing.cancel()

    def stop(self) -> None:
        """Takes no more: what is under way has ``grace_ms``, and then goes to other workers. ``run`` returns after that."""
        self._stopping = True
        self._wake.set()

    async def _take(self) -> bool:
        """Whether there is more to take at once."""
        self._wake.clear()
        questions = sum(job.lane.startswith("m") for job in self._jobs)
        free = [max(0, self._concurrency - questions), max(0, _EVENT_COUNT - (len(self._jobs) - questions))]
        token = self._token()
        behind, taken, more, last = await self._queue.run(
            "take", token, self._lease_ms, _READ_COUNT, *free, _REMEMBER_MS
        )
        self._last = text_of(last)
        for lane, head, count, claims, words, ids in taken:
            mark, entry = text_of(head).startswith("!"), text_of(head).lstrip("!")
            fields, waiting = fields_of(words), text_of(ids).split()
            job = _Job(text_of(lane), token, entry, mark, int(count), text_of(claims), fields, waiting)
            # Before anything else is taken: it counts already.
            self._jobs.add(job)
            self._track(self._work(job))
        for lane, entry, words in behind:
            held = next((job for job in self._jobs if job.lane == text_of(lane)), None)
            judged = held.judged if held else {}
            self._track(self._judge(text_of(lane), [text_of(entry)], judged, fields_of(words)))
        return int(more) == 1

    def _token(self) -> str:
        self._takes += 1
        return f"{self._name}:{self._takes}"

    def _track(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) and not self._gone.event.is_set():
            logger.error("an entry was left to others", exc_info=error)

    async def _wait(self) -> None:
        """Until something has come into the inbox, something has ended here, or a lease may have run out."""
        if self._ringing is None:
            self._ringing = asyncio.create_task(self._ring())
        await _ended(self._ringing, self._wake)
        if self._ringing.done():
            ringing, self._ringing = self._ringing, None
            ringing.result()

    async def _ring(self) -> None:
        block = int(_BELL_SECS * 1000)
        inbox = self._queue.inbox
        await self._commands.call("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", inbox, self._last, wait=_BELL_SECS)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(min(0.5, self._lease_ms / 3000))
            if not self._jobs:
                continue
            try:
                await self._renew()
            except Exception as error:
                # Epochs keep what we write apart from what another worker writes, if we are taken for dead.
                if not passes(error):
                    logger.exception("questions are not kept")

    async def _renew(self) -> None:
        jobs = list(self._jobs)
        pairs = [word for job in jobs for word in (job.lane, job.token)]
        for job, ids in zip(jobs, await self._queue.run("renew", self._lease_ms, *pairs), strict=True):
            if ids is None:
                job.lose(_LOST_REASON)
            elif job.lane.startswith("m"):
                self._track(self._judge(job.lane, text_of(ids).split(), job.judged))

    async def _work(self, job: _Job) -> None:
        try:
            if job.lane.startswith("e"):
                await self._tell(job)
            elif job.mark:
                await self._announce(job.lane, job.token, job.id, self._verdict(job.fields))
            else:
                await self._judge(job.lane, job.behind, job.judged)
                if not job.lost:
                    await self._answer(job)
        finally:
            self._jobs.discard(job)

    async def _answer(self, job: _Job) -> None:
        question: Question | None = None
        failure: str | None = None

        async def confirm() -> None:
            if not await self._holds(job.lane, job.token, job.cancel):
                job.lose(_LOST_REASON)
            job.cancel.check()

        log = Log(self._commands, job.fields["session"], job.cancel)
        try:
            question = Question(
                job.id, job.fields, job.claims, job.count, log, confirm, self._join, self._coalesce_ms
            )
            if job.count > self._max_deliveries:
                failure = f"its workers have died {self._max_deliveries} times"
            else:
                await self._run_handler(job, question)
        except Exception as error:
            answer = question.answer if question else None
            if job.lost:
                return
            if self._stopping and job.cancel.event.is_set():
                return await self._release(job, 0, counts=False)
            if answer and answer.lost:
                return await self._release(job, 0.1, counts=False)
            if not isinstance(error, Answered) and not (answer and answer.fenced):
                logger.exception("question %s of session %s", job.id, job.fields["session"])
                if job.count < self._max_deliveries:
                    return await self._release(job, _RETRY_SECS * job.count, counts=True)
                failure = repr(error)
        if failure is not None and question is not None:
            await self._give_up(job, question, failure)
        await self._insist("finish", job.lane, job.token)

    async def _run_handler(self, job: _Job, question: Question) -> None:
        async def handle() -> object:
            return await self._handle(question)

        handler = asyncio.create_task(handle())
        self._handlers.add(handler)
        handler.add_done_callback(self._handled)
        await _ended(handler, job.cancel.event)
        # One that is deaf to `cancelled` has lost its answer all the same.
        job.cancel.check()
        if handler.cancelled():
            raise RuntimeError("the handler was cancelled")
        handler.result()
        if question.answer:
            await question.answer.settled()

    def _handled(self, handler: asyncio.Task[object]) -> None:
        self._handlers.discard(handler)
        # What waits for it has seen it.
        if not handler.cancelled():
            handler.exception()

    async def _give_up(self, job: _Job, question: Question, reason: str) -> None:
        """Told in the log, and kept for people to look at."""
        failed = f"{self._queue.inbox}:failed"
        kept = {**job.fields, "entry": job.id, "reason": reason[:1000]}
        words = [word for pair in kept.items() for word in pair]
        await persist(job.cancel, lambda: self._commands.call("XADD", failed, "*", *words))
        with contextlib.suppress(Answered):
            await question.open(self._failed(question, reason), "end")

    async def _tell(self, job: _Job) -> None:
        event = dict(job.fields)
        try:
            payload = self._verdict(event)
            if payload is not None:
                await self._end(event["session"], job.id, payload)
            if self._on_event:
                told = self._on_event(event)
                if inspect.isawaitable(told):
                    await told
        except Exception:
            logger.exception("%s of session %s", event["type"], event["session"])
            if job.count < self._max_deliveries:
                return await self._release(job, _RETRY_SECS * job.count, counts=True)
        await self._insist("finish", job.lane, job.token)

    async def _release(self, job: _Job, delay: float, *, counts: bool) -> None:
        await self._insist("release", job.lane, job.token, int(delay * 1000), int(counts))

    async def _insist(self, what: str, *args: str | int) -> Any:
        """One of the script's acts, however long Redis is away."""
        return await persist(self._gone, lambda: self._queue.run(what, *args))

    async def _holds(self, lane: str, token: str, cancel: Cancel) -> bool:
        """Whether the lane is held still; then its lease begins again."""
        return (await persist(cancel, lambda: self._queue.run("renew", self._lease_ms, lane, token)))[0] is not None

    def _verdict(self, entry: Entry) -> str | None:
        try:
            return self._interrupts(dict(entry)) if self._interrupts else None
        except Exception:
            logger.exception("whether %s of session %s interrupts", entry.get("type"), entry.get("session"))
            return None

    async def _judge(
        self, lane: str, ids: list[str], judged: dict[str, asyncio.Task[None]], known: Entry | None = None
    ) -> None:
        """Looks at what waits in a lane, at each entry once while the lane's job is here.

        Of two that interrupt for one entry, the second would take the lane from the first. ``known`` is the entry itself,
        of one.
        """
        if self._interrupts is None:
            return
        fresh = [each for each in ids if each not in judged]
        if fresh:
            judged |= dict.fromkeys(fresh, asyncio.create_task(self._look(lane, fresh, known)))
        await asyncio.gather(*{judged[each] for each in ids})

    async def _look(self, lane: str, ids: list[str], known: Entry | None) -> None:
        """Looks for what ends an answer: the newest counts."""
        for entry in reversed(ids):
            fields = known or await persist(self._gone, partial(self._queue.entry, entry))
            payload = self._verdict(fields) if fields else None
            if payload is not None:
                return await self._interrupt(lane, entry, payload)

    async def _interrupt(self, lane: str, entry: str, payload: str) -> None:
        """First what came before is dropped, so that no worker begins it again, and then its writer is."""
        token = await self._drop(lane, entry)
        if token is not None:
            await self._announce(lane, token, entry, payload)

    async def _drop(self, lane: str, entry: str) -> str | None:
        """Who holds the lane then; None when nothing came before."""
        token = self._token()
        if int(await self._insist("interrupt", lane, token, self._lease_ms, entry)) == 0:
            return None
        for job in self._jobs:
            if job.lane == lane:
                job.lose("it was stopped")
        return token

    async def _announce(self, lane: str, token: str, entry: str, payload: str | None) -> None:
        log = Log(self._commands, lane.removeprefix("m "), self._gone)

        async def confirm() -> None:
            if not await self._holds(lane, token, self._gone):
                raise Cancelled("another worker says so")

        try:
            if payload is not None:
                await log.open(payload, entry, token, "interrupts", confirm)
        except (Answered, Cancelled):
            pass
        finally:
            await self._insist("release", lane, token, 0, 1)

    async def _end(self, session: str, entry: str, payload: str) -> None:
        """As an event is in no lane of questions, the next question may begin at once."""
        lane = f"m {session}"
        log = Log(self._commands, session, self._gone)
        epoch = await log.epoch()
        token = await self._drop(lane, entry)
        if token is None:
            return
        try:
            await log.begin(payload, f"{entry}/{token}/interrupts", epoch)
        except ResponseError as error:
            if not is_fenced(error):
                raise
        finally:
            await self._insist("release", lane, token, 0, 1)

    async def _leave(self) -> None:
        self._stopping = True
        for job in self._jobs:
            job.cancel.set(Cancelled("the worker stops"))
        # Redis may be away: then leases run out.
        if self._running:
            await asyncio.wait(self._running, timeout=_LEAVE_SECS)
