"""For Python on both sides of wsproxy: what a backend sends to a session, and a client that resumes.

A backend needs redis-py, sync or async:

    backend = Backend(redis.Redis.from_url(url))
    position, receivers = backend.send("session-1", '{"token":"hello"}')
    backend.close("session-1", 4403, "banned")

A client needs websockets:

    async with Client(url, token=make_token) as client:
        async for event in client:
            match event:
                case Message(text, position): ...
                case Gap(reason): ...
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

logger = logging.getLogger(__name__)

__all__ = ["AsyncBackend", "Backend", "Client", "Closed", "Gap", "Live", "Message", "Unheard"]

RESUME_PROTOCOL = "wsproxy.resume.v1"
#: Closes after which coming back is of no use: malformed, binary, too large, forbidden, replaced.
FINAL_CODES = frozenset({1002, 1003, 1007, 1009, 4403, 4409})


def down_channel(session: str) -> str:
    """The channel, and the log, of what goes to a session's client."""
    return f"session:{session}:down"


def up_channel(session: str) -> str:
    """The channel of what a session's client sends."""
    return f"session:{session}:up"


def _sent(reply: Any) -> tuple[str, int]:
    position, receivers = reply
    return (position.decode() if isinstance(position, bytes) else position), int(receivers)


class Backend:
    """Sends to sessions, over a ``redis.Redis``."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    def send(self, session: str, payload: str | bytes, nonce: str | None = None) -> tuple[str, int]:
        """Logs and publishes a message; returns its position, and how many proxies have it now.

        redis-py sends a call again when the connection breaks. The nonce, one of its own for each message unless
        given, keeps that from being a second message.
        """
        return _sent(self._redis.fcall("wsproxy_send", 1, down_channel(session), payload, nonce or uuid.uuid4().hex))

    def close(self, session: str, code: int = 1000, reason: str = "") -> int:
        """Closes the session's sockets after what was sent before, with 1000 or 3000 to 4999."""
        return int(self._redis.fcall("wsproxy_close", 1, down_channel(session), code, reason))


class AsyncBackend:
    """The same over a ``redis.asyncio.Redis``."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis

    async def send(self, session: str, payload: str | bytes, nonce: str | None = None) -> tuple[str, int]:
        """See :meth:`Backend.send`."""
        call = self._redis.fcall("wsproxy_send", 1, down_channel(session), payload, nonce or uuid.uuid4().hex)
        return _sent(await call)

    async def close(self, session: str, code: int = 1000, reason: str = "") -> int:
        """See :meth:`Backend.close`."""
        return int(await self._redis.fcall("wsproxy_close", 1, down_channel(session), code, reason))


@dataclass(frozen=True)
class Message:
    """A message; its position, if it was logged."""

    text: str
    position: str | None


@dataclass(frozen=True)
class Gap:
    """Messages are missing for good: reload the state."""

    reason: str


@dataclass(frozen=True)
class Live:
    """All that was missed has come."""

    position: str | None


@dataclass(frozen=True)
class Unheard:
    """So many of the client's messages reached no backend."""

    messages: int


class Closed(Exception):
    """The proxy has closed the session for good."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Client:
    """A client that stays connected, resumes where it was, and tells of gaps.

    ``url`` is ``ws://host/{agent_id}/ws/{session_id}``; ``token`` is a string, or a function (async or not) that makes
    one. Iterate over it for events; ``position`` is the last one handled, to go on from in another process.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str | Awaitable[str]],
        position: str = "0",
        max_delay: float = 30.0,
    ) -> None:
        self.url = url
        self.position = position
        self._token = token
        self._max_delay = max_delay
        self._socket: Any = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def send(self, text: str) -> bool:
        """Sends a message; False when it cannot be sent now."""
        if self._socket is None:
            return False
        await self._socket.send(text)
        return True

    async def __aiter__(self) -> AsyncIterator[Message | Gap | Live | Unheard]:
        from websockets.exceptions import ConnectionClosed, InvalidHandshake

        attempts = 0
        while True:
            code, reason = 1006, ""
            try:
                self._socket = await self._dial()
                attempts = 0
                async for event in self._events():
                    yield event
                code, reason = self._socket.close_code, self._socket.close_reason
            except ConnectionClosed as closed:
                if closed.rcvd is not None:
                    code, reason = closed.rcvd.code, closed.rcvd.reason
            except (InvalidHandshake, OSError, TimeoutError) as error:
                logger.warning("not connected: %s", error)
            finally:
                self._socket = None
            if code in FINAL_CODES:
                raise Closed(code, reason)
            # Full jitter, so that all that a broken proxy had come back spread out.
            await asyncio.sleep(random.uniform(0, min(self._max_delay, 0.5 * 2**attempts)))
            attempts += 1

    async def _fresh_token(self) -> str:
        token = self._token() if callable(self._token) else self._token
        return await token if inspect.isawaitable(token) else token

    async def _dial(self) -> Any:
        from websockets.asyncio.client import connect

        return await connect(
            f"{self.url}?{urlencode({'resume': self.position})}",
            additional_headers={"Authorization": f"Bearer {await self._fresh_token()}"},
            subprotocols=[RESUME_PROTOCOL],
            max_size=None,
        )

    async def _events(self) -> AsyncIterator[Message | Gap | Live | Unheard]:
        resuming = self._socket.subprotocol == RESUME_PROTOCOL
        if not resuming:
            yield Live(None)
        async for frame in self._socket:
            if not resuming:
                yield Message(frame, None)
                continue
            head, _, body = frame.partition("\n")
            if not head.startswith("!"):
                yield Message(body, head or None)
                # Handled now: whoever iterates has come back for the next one.
                self.position = head or self.position
            elif head == "!live":
                self.position = body
                yield Live(body)
            elif head == "!gap":
                yield Gap(json.loads(body)["reason"])
            elif head == "!unheard":
                yield Unheard(json.loads(body)["messages"])
            elif head == "!expiring":
                await self._socket.send(f"!token\n{await self._fresh_token()}")
