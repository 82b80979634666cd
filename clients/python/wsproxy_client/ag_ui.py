"""A worker of agents that are asked by AG-UI: each message to the client is one event.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        yield {"type": "TEXT_MESSAGE_START", "messageId": "1", "role": "assistant"}
        ...

    worker = AgUiWorker(redis.asyncio.Redis.from_url(url), "support", answer)
    await worker.run()

docs/chat.md has the frames. ``pydantic_ai_ag_ui`` beside this module makes the events of an agent.
"""

from __future__ import annotations

from .chat import ChatError, ChatWorker, Chunk, Frame, Frames, Send, dumps, joined

_DELTAS = {
    "TEXT_MESSAGE_CONTENT": ({"type", "messageId", "delta"}, "delta"),
    "REASONING_MESSAGE_CONTENT": ({"type", "messageId", "delta"}, "delta"),
    "TOOL_CALL_ARGS": ({"type", "toolCallId", "delta"}, "delta"),
}
#: What ends what has begun, and the field that names it.
_ENDS = {
    "TEXT_MESSAGE_START": ("TEXT_MESSAGE_END", "messageId"),
    "REASONING_MESSAGE_START": ("REASONING_MESSAGE_END", "messageId"),
    "REASONING_START": ("REASONING_END", "messageId"),
    "TOOL_CALL_START": ("TOOL_CALL_END", "toolCallId"),
    "STEP_STARTED": ("STEP_FINISHED", "stepName"),
}


class AgUiWorker(ChatWorker):
    """Answers ``run`` frames, whose ``input`` is a ``RunAgentInput``, with the events that ``answer`` yields.

    ``send.chat_id`` is the thread, ``send.request_id`` the run, ``send.frame`` the input. The events that begin and end
    the run are the worker's.
    """

    asks = "run"

    def frames(self, send: Send) -> Frames:
        return Events(send)

    def fields(self, frame: Frame) -> Frame:
        given = frame.get("input")
        known: Frame = given if isinstance(given, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        return {**known, "id": known.get("threadId")}


class Events(Frames):
    """The events of a run."""

    def __init__(self, send: Send) -> None:
        super().__init__(send)
        self._run = {"threadId": send.chat_id, "runId": send.request_id}
        #: What has begun and not ended, by what ends it.
        self._open: dict[tuple[str, str], Chunk] = {}
        self._last: Chunk = {}

    def begin(self) -> str:
        return dumps({"type": "RUN_STARTED", **self._run})

    def chunks(self, chunk: Chunk) -> list[Chunk]:
        kind = chunk["type"]
        if kind == "RUN_ERROR":
            raise ChatError(chunk["message"])
        if kind in ("RUN_STARTED", "RUN_FINISHED"):
            self._last = chunk if kind == "RUN_FINISHED" else {}
            return []
        self.has_shown = True
        # When it was made says nothing that the client cannot see, and keeps deltas apart.
        event = {name: value for name, value in chunk.items() if name != "timestamp"}
        if kind in _ENDS:
            end, name = _ENDS[kind]
            self._open[(end, chunk[name])] = {"type": end, name: chunk[name]}
        for end, name in _ENDS.values():
            if kind == end:
                self._open.pop((end, chunk[name]), None)
        return [event]

    def abort(self) -> list[Chunk]:
        return list(reversed(self._open.values()))

    def join(self, pieces: list[str]) -> list[str]:
        return [dumps(event) for event in joined(pieces, _DELTAS)]

    def end(self) -> str:
        last = {name: value for name, value in self._last.items() if name != "timestamp"}
        return dumps({**last, "type": "RUN_FINISHED", **self._run})

    def error(self, text: str) -> str:
        return dumps({"type": "RUN_ERROR", "message": text})
