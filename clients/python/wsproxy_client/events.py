"""What a client is told, and the errors that it raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Message:
    """A message; its position, if it was logged."""

    text: str
    position: str | None


@dataclass(frozen=True)
class Gap:
    """Messages are missing for good: reload the state.

    The client goes on behind the gap by itself: from ``position``, where the proxy tells it.
    """

    reason: str
    position: str | None = None


@dataclass(frozen=True)
class Live:
    """All that was missed has come."""

    position: str | None


@dataclass(frozen=True)
class Unheard:
    """So many of the messages given to :meth:`Client.send` reached no backend, or may not have."""

    messages: int


@dataclass(frozen=True)
class Complaint:
    """What the proxy says of a mistake: ``error`` has at least the key ``"error"``."""

    error: dict[str, Any]


Event: TypeAlias = Message | Gap | Live | Unheard | Complaint


@dataclass(frozen=True)
class Sent:
    """Who has a message that was given to :meth:`Client.submit`: so many backends, and whether the inbox has it."""

    id: str
    receivers: int
    entered: bool


class Unsent(Exception):
    """No backend is known to have a message.

    ``reason`` is ``unheard`` (no backend was there, and no inbox took it), ``unconfirmed`` (it may have arrived),
    ``refused`` (Redis did not take it, or the proxy is too old to answer, or has no log), ``invalid`` (not JSON, too
    large, or an id that is none or belongs to one that waits), ``full`` (too many wait), or ``closed`` (the client was
    left, or its session is closed for good).
    """

    def __init__(self, reason: str, id: str) -> None:
        super().__init__(f"message not sent: {reason}")
        self.reason = reason
        self.id = id


class Closed(Exception):
    """A connection is closed; when a loop ends with it, for good.

    ``code`` is that of the close; of a refusal it is 4000 and the HTTP status.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code = code
        self.reason = reason
