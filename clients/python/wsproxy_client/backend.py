"""What a backend says to sessions."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis
    from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
    from redis.cluster import RedisCluster

#: The close code after which clients stay away.
CLOSED_FOR_GOOD = 4403


def down_channel(session: str) -> str:
    """The channel, and the log, of what goes to a session's client."""
    return f"session:{session}:down"


def up_channel(session: str) -> str:
    """The channel of what a session's client sends."""
    return f"session:{session}:up"


def text_of(value: Any) -> str:
    """What Redis has answered, as a text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _sent(reply: Any) -> tuple[str, int]:
    position, receivers = reply
    return text_of(position), int(receivers)


class Backend:
    """Sends to sessions, over a ``redis.Redis`` or a ``redis.cluster.RedisCluster``."""

    def __init__(self, redis: Redis | RedisCluster) -> None:
        self._redis: Any = redis

    def send(self, session: str, payload: str | bytes, nonce: str | None = None) -> tuple[str, int]:
        """Logs and publishes a message; returns its position, and how many proxies have it now.

        redis-py sends a call again when the connection breaks. The nonce, one of its own for each message unless
        given, keeps that from being a second message.
        """
        return _sent(self._redis.fcall("wsproxy_send", 1, down_channel(session), payload, nonce or uuid.uuid4().hex))

    def close(self, session: str, code: int = CLOSED_FOR_GOOD, reason: str = "") -> int:
        """Closes the session's sockets after what was sent before.

        ``code`` is 1000 or 3000 to 4999; after 1000 clients come back, after 4403 they do not.
        """
        return int(self._redis.fcall("wsproxy_close", 1, down_channel(session), code, reason))


class AsyncBackend:
    """The same over a ``redis.asyncio.Redis`` or a ``redis.asyncio.cluster.RedisCluster``."""

    def __init__(self, redis: AsyncRedis | AsyncRedisCluster) -> None:
        self._redis: Any = redis

    async def send(self, session: str, payload: str | bytes, nonce: str | None = None) -> tuple[str, int]:
        """See :meth:`Backend.send`."""
        call = self._redis.fcall("wsproxy_send", 1, down_channel(session), payload, nonce or uuid.uuid4().hex)
        return _sent(await call)

    async def close(self, session: str, code: int = CLOSED_FOR_GOOD, reason: str = "") -> int:
        """See :meth:`Backend.close`."""
        return int(await self._redis.fcall("wsproxy_close", 1, down_channel(session), code, reason))
