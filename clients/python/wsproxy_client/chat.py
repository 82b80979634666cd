"""A worker of a chat: any agent's answers, in the frames of the AI SDK's ``WebSocketChatTransport``.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        yield {"type": "text-start", "id": "1"}
        ...

    worker = ChatWorker(redis.asyncio.Redis.from_url(url), "support", answer)
    await worker.run()

docs/chat.md has the frames. What makes the chunks of an agent is in ``pydantic_ai``, ``openai_agents`` and ``langgraph``
beside this module; this one needs no more than the worker does.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .answer import Answer, Question
from .queue import Cancelled
from .worker import Entry, Worker

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ChatError", "ChatWorker", "Chunk", "Send", "Texts"]

logger = logging.getLogger(__name__)

#: One of a UI message stream, such as ``{"type": "text-delta", "id": "1", "delta": "hello"}``.
Chunk = Mapping[str, Any]
Frame = dict[str, Any]

#: The fields of a delta, and which of them can be joined: a delta with others is left as it is.
_DELTAS = {
    "text-delta": ({"type", "id", "delta"}, "delta"),
    "reasoning-delta": ({"type", "id", "delta"}, "delta"),
    "tool-input-delta": ({"type", "toolCallId", "inputTextDelta"}, "inputTextDelta"),
}
_MAX_JOINED = 65_536
#: Chunks that show nothing: an answer which has no others yet may begin anew without being noticed.
_SILENT = {"start", "start-step", "message-metadata"}
_MAX_ABORTED = 10_000
#: Stands in a question that has none.
_NO_MESSAGE: Frame = {"id": "", "role": "user"}
#: How long an agent that ends its run itself may take for that.
_ABORT_SECS = 5.0


class ChatError(Exception):
    """Ends an answer, with a text for the user."""


class WorkerOptions(TypedDict, total=False):
    """What :class:`Worker` may be told besides."""

    on_event: Callable[[Entry], object] | None
    coalesce_ms: float
    group: str
    concurrency: int
    lease_ms: int
    max_deliveries: int
    grace_ms: float


def dumps(value: object) -> str:
    """As JSON. Half of a surrogate pair, as some models stream one, is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def frame_of(data: str) -> Frame | None:
    """What a client has sent; None for what is no frame with a ``requestId``."""
    try:
        frame: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(frame, dict):
        return None
    known: Frame = frame  # pyright: ignore[reportUnknownVariableType]
    return known if isinstance(known.get("type"), str) and isinstance(known.get("requestId"), str) else None


class Send:
    """A question of a chat. All of it is the client's word, but for ``question.session`` and ``question.claims``."""

    def __init__(self, question: Question, frame: Frame) -> None:
        #: As the worker has it.
        self.question = question
        #: As the client has sent it, with what is not named here.
        self.frame = frame
        self.request_id: str = frame["requestId"]
        #: The chat's id: a session may have several.
        self.chat_id = _text(frame, "id", question.session)
        #: ``submit-message`` or ``regenerate-message``.
        self.trigger = _text(frame, "trigger", "submit-message")
        #: Of the message to be answered anew, or of the one that was changed.
        self.message_id: str | None = _text(frame, "messageId", "") or None
        #: UI messages: the last one of the chat, or all.
        self.messages: list[Frame] = frame["messages"]
        #: What the page's transport was given for its requests.
        self.body: Frame = frame["body"] if isinstance(frame.get("body"), dict) else {}
        last = self.messages[-1]
        #: The id of the UI message that is the answer: store it under this one, and store it anew when it comes again.
        self.answer_id: str = last["id"] if last["role"] == "assistant" else self.request_id
        #: The client has aborted the answer.
        self.aborted = asyncio.Event()
        #: Is called at an abort, after which the stream ends by itself. Without it the stream is cancelled.
        self.cancel: Callable[[], object] | None = None
        self._answer: Answer | None = None

    @property
    def text(self) -> str:
        """What the last message says."""
        last = self.messages[-1]
        content: Any = last.get("parts", last.get("content"))
        if isinstance(content, str):
            return content
        parts: list[Any] = content if isinstance(content, list) else []  # pyright: ignore[reportUnknownVariableType]
        return "".join(_text(part, "text", "") for part in parts if isinstance(part, dict))  # pyright: ignore[reportUnknownArgumentType]

    @property
    def answer(self) -> Answer:
        """As the worker has it."""
        if self._answer is None:
            raise RuntimeError("the answer has not begun")
        return self._answer

    @answer.setter
    def answer(self, answer: Answer) -> None:
        self._answer = answer

    async def position(self) -> str:
        """Where in the log what was yielded until now ends: to be stored with the history."""
        await self.answer.settled()
        return self.answer.position


class Texts:
    """Chunks of the texts of a message, of which one is open at a time."""

    def __init__(self) -> None:
        self._open: tuple[str, str] | None = None

    def add(self, kind: Literal["text", "reasoning"], part: str, text: str) -> list[Chunk]:
        """What says that a part has got longer."""
        if text == "":
            return []
        chunks: list[Chunk] = []
        if self._open != (kind, part):
            chunks = [*self.end(), {"type": f"{kind}-start", "id": part}]
            self._open = (kind, part)
        return [*chunks, {"type": f"{kind}-delta", "id": part, "delta": text}]

    def end(self) -> list[Chunk]:
        """What says that the part which was open is whole."""
        if self._open is None:
            return []
        kind, part = self._open
        self._open = None
        return [{"type": f"{kind}-end", "id": part}]


def _text(frame: Frame, name: str, default: str) -> str:
    value = frame.get(name)
    return value if isinstance(value, str) else default


def _is_list_of_messages(messages: Any) -> bool:
    return isinstance(messages, list) and messages != [] and all(map(_is_message, messages))  # pyright: ignore


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("id", "role"))  # pyright: ignore


class Frames:
    """What is sent of an answer, in the frames of the AI SDK."""

    def __init__(self, send: Send) -> None:
        #: The answer cannot begin anew without a change at the screen.
        self.has_shown = False
        self._send = send
        self._kinds: set[str] = set()
        self._sequence = 0

    def begin(self) -> str:
        """The first frame."""
        return self._frame("start", id=self._send.chat_id)

    def chunks(self, chunk: Chunk) -> list[Chunk]:
        """What is to be sent of a chunk: the first one has the message's id."""
        kind = chunk["type"]
        if kind == "error":
            raise ChatError(chunk["errorText"])
        begun = [] if "start" in self._kinds or kind == "start" else self.chunks({"type": "start"})
        self._kinds.add(kind)
        self.has_shown = self.has_shown or kind not in _SILENT
        return [*begun, {**chunk, "messageId": self._send.answer_id} if kind == "start" else chunk]

    def abort(self) -> list[Chunk]:
        """What is to be sent at an abort, unless the stream has ended or has said so."""
        return [] if self._kinds & {"finish", "abort"} else self.chunks({"type": "abort"})

    def join(self, pieces: list[str]) -> list[str]:
        """Makes frames of chunks: neighbours that are deltas of one part go as one."""
        return [self._numbered(chunk) for chunk in joined(pieces, _DELTAS)]

    def end(self) -> str:
        """The last frame."""
        return self._frame("end")

    def error(self, text: str) -> str:
        """The last frame of an answer that has failed."""
        return self._frame("error", errorText=text)

    def _numbered(self, chunk: Chunk) -> str:
        self._sequence += 1
        return self._frame("chunk", sequence=self._sequence - 1, chunk=chunk)

    def _frame(self, kind: str, **fields: object) -> str:
        return dumps({"type": kind, "requestId": self._send.request_id, **fields})


def joined(pieces: list[str], deltas: Mapping[str, tuple[set[str], str]]) -> list[Chunk]:
    """Chunks, with neighbours that are deltas of one part as one; of a delta its fields are known, and the one to join."""
    chunks: list[Frame] = []
    for piece in pieces:
        chunk: Frame = json.loads(piece)
        fields, joins = deltas.get(chunk["type"], (None, ""))
        last = chunks[-1] if chunks else {}
        if (
            fields
            and fields == chunk.keys() == last.keys()
            and all(last[name] == chunk[name] for name in fields if name != joins)
            and len(last[joins]) < _MAX_JOINED
        ):
            last[joins] += chunk[joins]
        else:
            chunks.append(chunk)
    return list(chunks)


class ChatWorker(Worker):
    """Answers the ``send`` frames of an agent's clients with the chunks that ``answer`` yields.

    ``answer`` that raises before it has shown anything is asked again, three times in all; later, and after that, the
    user is told ``error_text``, or the text of a :class:`ChatError`, which is told at once.

    ``on_question`` is called before the answer begins, which other pages of the session are told of: store the question
    there, and they find it. It is called again when another worker takes the question over.
    """

    def __init__(
        self,
        redis: Any,
        agent: str,
        answer: Callable[[Send], AsyncIterator[Chunk]],
        *,
        on_question: Callable[[Send], Awaitable[object]] | None = None,
        error_text: str = "The answer failed.",
        interrupts: Callable[[Entry], str | None] | None = None,
        **options: Unpack[WorkerOptions],
    ) -> None:
        super().__init__(
            redis, agent, self._take_up, interrupts=self._hear, failed=self._say_failed, **options
        )
        self._stream = answer
        self._on_question = on_question
        self._error_text = error_text
        self._interrupts_besides = interrupts
        self._sends: dict[str, Send] = {}
        #: Aborts whose request has not begun here: all workers hear of each.
        self._aborted: OrderedDict[str, bool] = OrderedDict()

    def _hear(self, entry: Entry) -> str | None:
        """An abort ends the request that it names, and drops no other."""
        frame = frame_of(entry.get("data", "")) if entry.get("type") == "message" else None
        if frame is None or frame["type"] != "abort":
            return self._interrupts_besides(entry) if self._interrupts_besides else None
        key = _key(entry.get("session", ""), frame["requestId"])
        if key in self._sends:
            self._sends[key].aborted.set()
        else:
            self._aborted[key] = True
            while len(self._aborted) > _MAX_ABORTED:
                self._aborted.popitem(last=False)
        return None

    #: The type of the frames that are questions.
    asks = "send"

    def frames(self, send: Send) -> Frames:
        """Those in which it answers."""
        return Frames(send)

    def fields(self, frame: Frame) -> Frame:
        """What a question says; ``messages`` and ``id`` are looked for in it."""
        return frame

    def _say_failed(self, question: Question, reason: str) -> str:  # noqa: ARG002
        frame = frame_of(question.data) or {"requestId": question.id}
        return self.frames(self._send_of(question, frame)[0]).error(self._error_text)

    def _send_of(self, question: Question, frame: Frame) -> tuple[Send, bool]:
        """The question, and whether it is one."""
        fields = self.fields(frame)
        is_one = _is_list_of_messages(fields.get("messages"))
        send = Send(question, {**fields, "requestId": frame["requestId"], **({} if is_one else {"messages": [_NO_MESSAGE]})})
        return send, is_one

    async def _take_up(self, question: Question) -> None:
        frame = frame_of(question.data)
        kind = frame and frame["type"]
        if frame and kind == "abort":
            self._aborted.pop(_key(question.session, frame["requestId"]), None)
        elif frame and kind == "resume":
            await question.begin(dumps({"type": "no-active", "requestId": frame["requestId"]}))
        elif frame and kind == self.asks:
            send, is_one = self._send_of(question, frame)
            try:
                if not is_one:
                    raise ChatError("The question was not understood.")
                if self._on_question:
                    await self._on_question(send)
            except ChatError as error:
                frames = self.frames(send)
                answer = await question.begin(frames.begin())
                await answer.end(frames.error(str(error)))
            else:
                await self._answer_send(send)
        else:
            logger.info("message %s of session %s is no frame of a chat", question.entry, question.session)

    async def _answer_send(self, send: Send) -> None:
        key = _key(send.question.session, send.request_id)
        frames = self.frames(send)
        self._sends[key] = send
        try:
            answer = send.answer = await send.question.begin(frames.begin(), join=frames.join)
            if self._aborted.pop(key, False):
                send.aborted.set()
            last: str | None = None
            try:
                await self._write(send, frames)
            except ChatError as error:
                last = frames.error(str(error))
            except Exception:
                # What another worker writes, or shows at another try, takes the place of nothing that was seen.
                if answer.cancelled.is_set() or not frames.has_shown:
                    raise
                logger.exception("question %s of session %s", send.question.entry, send.question.session)
                last = frames.error(self._error_text)
            await answer.end(last or frames.end())
        finally:
            self._sends.pop(key, None)

    async def _write(self, send: Send, frames: Frames) -> None:
        """Until the stream ends, or something ends it, and the model with it, which costs."""
        cancelled = send.answer.cancelled
        if not send.aborted.is_set():
            events = [asyncio.create_task(event.wait()) for event in (send.aborted, cancelled)]
            writing = asyncio.create_task(self._forward(send, frames))
            try:
                await asyncio.wait({writing, *events}, return_when=asyncio.FIRST_COMPLETED)
                if send.aborted.is_set() and send.cancel:
                    send.cancel()
                    await asyncio.wait({writing, events[1]}, timeout=_ABORT_SECS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (*events, writing):
                    task.cancel()
                await asyncio.wait({writing}, timeout=_ABORT_SECS)
            if cancelled.is_set():
                raise Cancelled("the answer goes no further")
            if not send.aborted.is_set():
                if writing.cancelled():
                    raise RuntimeError("the stream was cancelled")
                return writing.result()
        for chunk in frames.abort():
            await send.answer.send(dumps(chunk))

    async def _forward(self, send: Send, frames: Frames) -> None:
        stream = self._stream(send)
        try:
            async for chunk in stream:
                for each in frames.chunks(chunk):
                    await send.answer.send(dumps(each))
        finally:
            close = getattr(stream, "aclose", None)
            if close:
                await close()


def _key(session: str, request_id: str) -> str:
    return f"{session} {request_id}"
