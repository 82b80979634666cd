"""What carries a connection: a WebSocket of the package websockets."""

from __future__ import annotations

import asyncio
import sys
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from .events import Closed

RESUME_PROTOCOL = Subprotocol("wsproxy.resume.v1")
#: Time for the other end to answer a close.
CLOSE_SECS = 2.0
#: What is kept of the text of a refusal, as much as a close can have.
MAX_REASON = 123


class Refused(Exception):
    """The proxy, or what stands before it, has answered the handshake with another status than 101."""

    def __init__(self, error: InvalidStatus) -> None:
        response = error.response
        self.status = response.status_code
        text = bytes(response.body or b"").decode(errors="replace").strip()
        self.reason = text[:MAX_REASON] or response.reason_phrase
        #: How long it asks to wait; a date is not understood.
        asked = [each for each in response.headers.get_all("Retry-After") if each.isdecimal()]
        self.retry_after_secs = float(asked[0]) if asked else 0.0
        super().__init__(f"{self.status} {self.reason}")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    scheme = {"https": "wss", "http": "ws"}.get(parts.scheme, parts.scheme)
    return scheme, parts.hostname, parts.port or {"wss": 443, "ws": 80}.get(scheme)


class _Connect(connect):
    """A connect that takes the token to no other origin: a redirect to one is a refusal."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        origin = _origin(self.uri)
        target = super().process_redirect(exc)
        return exc if isinstance(target, str) and _origin(target) != origin else target


class WebSocket:
    """An open WebSocket."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        #: The other end speaks ``wsproxy.resume.v1``.
        self.resumes = connection.subprotocol == RESUME_PROTOCOL

    @classmethod
    async def open(cls, url: str, token: str, timeout: float) -> WebSocket:
        """Connects. Raises :class:`Refused`, or whatever else went wrong."""
        tls: dict[str, Any] = {}
        if urlsplit(url).scheme == "wss":
            # One that is given up while it shakes hands goes on doing so until this, and not for a minute.
            tls["ssl_handshake_timeout"] = timeout
            if sys.version_info >= (3, 11):
                tls["ssl_shutdown_timeout"] = CLOSE_SECS
        made: list[ClientConnection] = []

        class Made(ClientConnection):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                made.append(self)

        try:
            connection = await _Connect(
                url,
                **tls,
                create_connection=Made,
                additional_headers={"Authorization": f"Bearer {token}"},
                subprotocols=[RESUME_PROTOCOL],
                max_size=None,
                open_timeout=timeout,
                # The client has a watch of its own, which does not take a loop that is slow for a dead connection.
                ping_interval=None,
                close_timeout=CLOSE_SECS,
            )
        except BaseException as error:
            # Closed is not enough: over TLS Python 3.10 waits for the goodbye of the other end, which may be gone.
            for each in made:
                if transport := getattr(each, "transport", None):
                    transport.abort()
            if isinstance(error, InvalidStatus):
                raise Refused(error) from None
            raise
        return cls(connection)

    async def send(self, text: str) -> bool:
        """False when it is closed."""
        try:
            await self._connection.send(text)
        except ConnectionClosed:
            return False
        return True

    async def ping(self) -> bool:
        """Sends a ping of WebSocket, and waits for its pong; False when it is closed."""
        try:
            await (await self._connection.ping())
        except ConnectionClosed:
            return False
        return True

    async def receive(self) -> str | Closed:
        """The next message, or the end, and why the other end has closed it."""
        while True:
            try:
                frame = await self._connection.recv()
            except ConnectionClosed as error:
                return Closed(1006, "") if error.rcvd is None else Closed(error.rcvd.code, error.rcvd.reason)
            if isinstance(frame, str):
                return frame

    async def close(self) -> None:
        """Closes it, and waits a little for the other end; then it is cut, and waited for no longer."""
        closing = asyncio.ensure_future(self._connection.close())
        try:
            # Of a connection over TLS that is gone, Python 3.10 may never say so.
            await asyncio.wait([closing], timeout=CLOSE_SECS + 0.5)
        finally:
            # Also of one that is closed: over TLS its end may wait for the other one for ever.
            self.abort()
            closing.cancel()

    def abort(self) -> None:
        """Cuts it, and waits for nothing."""
        self._connection.transport.abort()
