"""Whether a connection still lives: after a silence its other end is asked for a sign."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watch:
    """The watch over one connection, with one timer.

    ``patience`` is how long it may be silent now, ``answer`` how long an answer may take, both in seconds. ``ask`` asks
    for a sign of life, and ``cut`` is called when none has come.
    """

    def __init__(
        self, patience: Callable[[], float], answer: float, ask: Callable[[], object], cut: Callable[[], object]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._answer = answer
        self._ask = ask
        self._cut = cut
        self._heard_at = self._loop.time()
        self._asked_at: float | None = None
        self._held = False
        self._timer: asyncio.TimerHandle | None = None
        #: The connection was cut.
        self.has_cut = False

    def heard(self) -> None:
        """Something has come."""
        self._held = False
        self._heard_at = self._loop.time()

    def hold(self) -> None:
        """Nothing is read until the next call of :meth:`heard`, so that silence means nothing."""
        self._held = True

    def answered(self) -> bool:
        """The answer has come; False when nothing was asked."""
        was_asked, self._asked_at = self._asked_at is not None, None
        return was_asked

    def look(self) -> None:
        """Does what is due, and sets the timer for what is next. To be called when ``patience`` gets shorter."""
        self.stop()
        now = self._loop.time()
        if self._held:
            self._heard_at = now
        if self._asked_at is None and now >= self._heard_at + self._patience():
            self._asked_at = now
            self._ask()
        if self._asked_at is None:
            due = self._heard_at + self._patience()
        else:
            # What was under way when it was asked is no answer, and holds the answer up.
            due = max(self._asked_at, self._heard_at) + self._answer
        if now >= due:
            self.has_cut = True
            self._cut()
        else:
            self._timer = self._loop.call_at(due, self.look)

    def stop(self) -> None:
        """Ends the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
