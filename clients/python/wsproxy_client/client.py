"""A client that stays connected, resumes where it was, and tells of gaps.

One task (:meth:`Client._run`) has the socket from ``async with`` to its end, and puts events into a queue. What else it
starts, ends with the socket. So a loop over the client, and whatever waits for it, may be cancelled at any time.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import random
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from .events import Closed, Complaint, Event, Gap, Live, Message, Sent, Unheard, Unsent
from .watch import Watch

if TYPE_CHECKING:
    from .websocket import WebSocket

#: Closes after which coming back is of no use: malformed, binary, too large, forbidden, replaced.
FINAL_CODES = frozenset({1002, 1003, 1007, 1009, 4403, 4409})
#: Refusals in a row that end it: another try changes one only when there is another token, or a route again.
MAX_REFUSALS = 2
FIRST_DELAY_SECS = 0.5
#: A connection that stayed open for so long has lived: the next one is as good as the first.
LIVED_SECS = 10.0
#: Time between two calls for a token that is to replace the one which runs out.
RENEWAL_SECS = 5.0
#: Events that wait for the loop; then the socket is read no further.
MAX_WAITING = 64
#: Submitted messages that may wait for an answer.
MAX_PENDING = 100
#: Time for an answer to ``!ping``; and how long the connection may be silent while a message waits for its answer.
PONG_SECS = 5.0
#: The end of a connection that gave no sign of life.
DEAD = Closed(1006, "no sign of life")
#: The complaint of a proxy that is too old for ``!send``.
UNKNOWN_COMMAND = "Unknown command"

log = logging.getLogger("wsproxy_client")


class Client:
    """A session's connection, kept from ``async with`` to its end.

    ``url`` is ``ws://host/{agent_id}/ws/{session_id}``. ``token`` is a string, or a function (async, or one that does
    not block) that makes one; it is called before each connect, and before the last token ends. ``timeout`` is what a
    token, and a handshake, may take, ``silence`` after how long the proxy is asked for a sign of life, and ``max_delay``
    the longest pause between two tries; all in seconds.

    Iterate over the client for events, in one place at a time. A loop may stop and go on: nothing is lost or repeated.
    The next connection resumes by itself. ``position`` is that of the last message which the loop is done with (it has
    asked for the next one): store it to go on in another process, and pass it as ``position`` there; with
    ``history_loaded`` if it came with a history just loaded, as a log that has expired since then is no gap.

    A loop ends with :class:`Closed` when the session is closed for good, or refused twice in a row with a status that
    another try does not change. Whatever else goes wrong is told to the logger ``wsproxy_client``, and tried again.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str | Awaitable[str]],
        position: str = "0",
        *,
        history_loaded: bool = False,
        max_delay: float = 30.0,
        timeout: float = 10.0,
        silence: float = 20.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise ValueError(f"url must be ws://… or wss://…: it is {url!r}")
        self.url = url
        self.position = position
        self._history_loaded = history_loaded
        self._token = token
        self._max_delay = max_delay
        self._timeout = timeout
        self._silence = silence
        self._task: asyncio.Task[Closed] | None = None
        self._left = False
        self._socket: WebSocket | None = None
        self._watch: Watch | None = None
        #: What ends with the socket.
        self._chores: set[asyncio.Task[None]] = set()
        self._last_token = ""
        self._renewed_at = float("-inf")
        #: Where the log is read from next: ahead of ``position`` by what waits in ``_events``.
        self._received = position
        #: What the loop has not asked for yet, and the position after each of it.
        self._events: deque[tuple[Event, str | None]] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        #: The position after the event that the loop has now.
        self._handled: str | None = None
        self._iterating = False
        #: Submitted messages without an answer, by id, in order.
        self._pending: dict[str, tuple[str, asyncio.Future[Sent | Unsent]]] = {}

    async def __aenter__(self) -> Client:
        from .websocket import WebSocket  # only clients need the package websockets

        if self._task is not None:
            raise RuntimeError("a Client is entered once")
        self._task = asyncio.create_task(self._run(WebSocket), name="wsproxy_client")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = self._task
        assert task is not None
        self._left = True
        # Cancelled once it closes the socket as it should be, and cancelled again it cuts it.
        task.cancel()
        await _end([task], task.cancel)
        self._events.clear()

    @property
    def open(self) -> bool:
        """Messages can be sent now."""
        return self._socket is not None

    async def send(self, text: str) -> bool:
        """Sends a message that need not arrive; False when it cannot be sent now, as before the connection is open."""
        return self._socket is not None and await self._socket.send(text)

    async def submit(self, text: str, id: str | None = None) -> Sent:
        """Sends a message that must arrive, and says who has it.

        It is kept, sent when the connection is open, and sent again after a reconnect, until it has an answer. A
        backend may see it twice, and knows by the id (1 to 64 characters of ``[A-Za-z0-9_-]``; a UUID unless given).
        Raises :class:`Unsent`. Give up by cancelling it; the message may have arrived.
        """
        if id is None:
            id = uuid.uuid4().hex
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", id) or id in self._pending or not _is_unicode(text):
            raise Unsent("invalid", id)
        if self._task is None or self._task.done() or self._left:
            raise Unsent("closed", id)
        if len(self._pending) >= MAX_PENDING:
            raise Unsent("full", id)
        socket = self._socket
        if socket is not None and not socket.resumes:
            raise Unsent("refused", id)
        answer: asyncio.Future[Sent | Unsent] = asyncio.get_running_loop().create_future()
        self._pending[id] = (text, answer)
        # The answer comes behind what the loop has not asked for yet.
        self._room.set()
        try:
            if socket is not None:
                if self._watch is not None:
                    self._watch.look()
                await socket.send(_submission(id, text))
            result = await answer
        finally:
            del self._pending[id]
        if isinstance(result, Unsent):
            raise result
        return result

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        task = self._task
        if task is None:
            raise RuntimeError("iterate inside of `async with`")
        if self._iterating:
            raise RuntimeError("a Client is iterated over in one place at a time")
        self._iterating = True
        try:
            # A loop that asks for the next one is done with the last one.
            if self._handled is not None and not self._left:
                self.position, self._handled = self._handled, None
            while not self._left:
                if self._events:
                    event, self._handled = self._events.popleft()
                    self._room.set()
                    return event
                if task.done():
                    break
                self._arrived.clear()
                await self._arrived.wait()
            if self._left or task.cancelled():
                raise StopAsyncIteration
            raise task.result()
        finally:
            self._iterating = False

    async def _run(self, socket_class: type[WebSocket]) -> Closed:
        """Connects again and again, and returns why no more."""
        from .websocket import Refused

        failures = refusals = 0
        try:
            while True:
                opened_at, retry_after_secs, is_dead = None, 0.0, False
                try:
                    self._last_token = await self._fresh_token()
                    socket = await socket_class.open(self._address(), self._last_token, self._timeout)
                    opened_at, refusals = time.monotonic(), 0
                    closed = await self._serve(socket)
                    log.info("connection closed: %s", closed)
                    is_dead = closed is DEAD
                    if closed.code in FINAL_CODES:
                        return closed
                except Refused as refused:
                    log.warning("connection refused: %s", refused)
                    retry_after_secs = refused.retry_after_secs
                    if 400 <= refused.status < 429 and refused.status != 408:
                        refusals += 1
                        if refusals >= MAX_REFUSALS:
                            return Closed(4000 + refused.status, refused.reason)
                except Exception as error:
                    # No token, no network, no answer in time, words that are none: each may pass.
                    log.warning("no connection: %s", str(error) or type(error).__name__)
                if opened_at is not None and time.monotonic() - opened_at >= LIVED_SECS:
                    failures = 0
                # A dead connection has waited for long enough.
                if not is_dead or failures > 0:
                    # Full jitter, so that all that a broken proxy had come back spread out.
                    jitter = random.uniform(0, min(self._max_delay, FIRST_DELAY_SECS * 2**failures))
                    await asyncio.sleep(min(self._max_delay, retry_after_secs) + jitter)
                failures = min(failures + 1, 20)
        finally:
            for id in self._pending:
                self._answer(id, Unsent("closed", id))
            self._arrived.set()

    async def _fresh_token(self) -> str:
        token: Any = self._token() if callable(self._token) else self._token
        if inspect.isawaitable(token):
            # Not asyncio.wait_for: before Python 3.12 it forgets a cancellation that comes with the result.
            making: asyncio.Future[Any] = asyncio.ensure_future(token)
            try:
                await asyncio.wait([making], timeout=self._timeout)
                if not making.done():
                    raise TimeoutError(f"no token within {self._timeout:g} s")
                if making.cancelled():
                    raise RuntimeError("the token function was cancelled")
                token = making.result()
            finally:
                making.cancel()
                await _end([making])
        if not isinstance(token, str):
            raise TypeError(f"a token must be a string: it is of type {type(token).__name__}")
        return token

    def _address(self) -> str:
        ours = {"resume": self._received}
        if self._history_loaded:
            ours["from"] = "history"
        parts = urlsplit(self.url)
        # The rest of a query stays as it is: it may be signed.
        theirs = [each for each in parts.query.split("&") if each and each.partition("=")[0] not in ("resume", "from")]
        return urlunsplit(parts._replace(query="&".join([*theirs, urlencode(ours)]), fragment=""))

    async def _serve(self, socket: WebSocket) -> Closed:
        """Receives until the socket is closed; then nothing of it is left."""
        self._socket = socket
        watch = self._watch = Watch(
            patience=lambda: PONG_SECS if self._pending else self._silence,
            answer=PONG_SECS,
            ask=lambda: self._start(self._ask(socket)),
            cut=socket.abort,
        )
        try:
            watch.look()
            if socket.resumes:
                self._start(self._send_pending(socket))
            else:
                for id in self._pending:
                    self._answer(id, Unsent("refused", id))
                await self._tell(Live(None))
            while True:
                frame = await socket.receive()
                if isinstance(frame, Closed):
                    return DEAD if watch.has_cut else frame
                watch.heard()
                if socket.resumes:
                    await self._receive(frame)
                else:
                    await self._tell(Message(frame, None))
        finally:
            self._socket = self._watch = None
            watch.stop()
            for chore in self._chores:
                chore.cancel()
            await _end([asyncio.ensure_future(socket.close()), *self._chores], socket.abort)

    def _start(self, chore: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def _send_pending(self, socket: WebSocket) -> None:
        """Sends what has no answer yet, in order: one, and for each answer two more.

        All at once may be over the proxy's rate limit, which closes the connection before there is an answer, and so
        again each time.
        """
        room, waiting = 1, set[asyncio.Future[Sent | Unsent]]()
        for id, (text, answer) in list(self._pending.items()):
            while len(waiting) >= room:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                room += len(done)
            if not answer.done() and await socket.send(_submission(id, text)):
                waiting.add(answer)

    async def _receive(self, frame: str) -> None:
        head, _, body = frame.partition("\n")
        if not head.startswith("!"):
            return await self._tell(Message(body, head or None), head or None)
        match head[1:]:
            case "live":
                await self._tell(Live(body), body)
            case "gap":
                gap = json.loads(body)
                await self._tell(Gap(gap["reason"], gap.get("position")), gap.get("position"))
            case "unheard":
                await self._tell(Unheard(json.loads(body)["messages"]))
            case "expiring":
                if time.monotonic() - self._renewed_at >= RENEWAL_SECS:
                    self._renewed_at = time.monotonic()
                    self._start(self._renew())
            case "pong":
                if self._watch:
                    self._watch.answered()
            case "sent":
                sent = json.loads(body)
                self._answer(sent["id"], Sent(sent["id"], sent["receivers"], sent["entered"]))
            case "unsent":
                unsent = json.loads(body)
                self._answer(unsent["id"], Unsent(unsent["reason"], unsent["id"]))
            case "error":
                complaint = json.loads(body)
                if complaint["error"] == UNKNOWN_COMMAND and self._watch and self._watch.answered():
                    # A proxy that is too old for `!ping` answers, too.
                    return
                log.warning("the proxy complains: %s", complaint["error"])
                if complaint["error"] == UNKNOWN_COMMAND:
                    for id in self._pending:
                        self._answer(id, Unsent("refused", id))
                await self._tell(Complaint(complaint))
            case _:
                pass  # a word of a later proxy

    async def _tell(self, event: Event, position: str | None = None) -> None:
        # A loop that is slower than the session makes the proxy wait, unless it waits itself: for an answer.
        while len(self._events) >= MAX_WAITING and not self._pending:
            self._room.clear()
            # Nothing is read now, and so nothing heard.
            if self._watch:
                self._watch.hold()
            await self._room.wait()
            if self._watch:
                self._watch.heard()
        self._events.append((event, position))
        self._arrived.set()
        if position is not None:
            self._received = position
            self._history_loaded = False

    async def _ask(self, socket: WebSocket) -> None:
        """Asks for a sign of life: a bare connection by a ping of WebSocket itself."""
        if socket.resumes:
            await socket.send("!ping\n")
        elif await socket.ping() and self._watch:
            self._watch.answered()

    async def _renew(self) -> None:
        """The token runs out: gives the proxy another one."""
        try:
            token = await self._fresh_token()
        except Exception as error:
            log.warning("no new token: %s", str(error) or type(error).__name__)
            return
        # The same one again would run out at the same time.
        if token != self._last_token and await self.send(f"!token\n{token}"):
            self._last_token = token

    def _answer(self, id: str, answer: Sent | Unsent) -> None:
        if (pending := self._pending.get(id)) and not pending[1].done():
            pending[1].set_result(answer)


async def _end(tasks: Collection[asyncio.Future[Any]], hurry: Callable[[], object] = lambda: None) -> None:
    """Waits for tasks that are about to end, also when it is cancelled meanwhile, and then calls ``hurry``."""
    cancelled: asyncio.CancelledError | None = None
    while waiting := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
            hurry()
    if cancelled is not None:
        raise cancelled


def _submission(id: str, text: str) -> str:
    return f"!send\n{id}\n{text}"


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no frame can carry."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
