"""The answers of a LangGraph graph with messages, for a page of the AI SDK.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        thread = await before(graph, {"configurable": {"thread_id": send.chat_id}}, send)
        asked = {"messages": [HumanMessage(send.text, id=send.messages[-1]["id"])]}
        async for chunk in chunks(send, graph.astream(asked, thread, stream_mode="messages")):
            yield chunk

``events`` is for a page of LangGraph's own ``useStream``, over ``langgraph.js`` of clients/js.

It needs langgraph (``pip install wsproxy-client[backend,langgraph]``).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.pregel.protocol import PregelProtocol  # pyright: ignore[reportMissingTypeStubs]
from pydantic_core import to_jsonable_python

from .chat import Chunk, Send, Texts


async def before(graph: PregelProtocol[Any, Any, Any, Any], config: RunnableConfig, send: Send) -> RunnableConfig:
    """The thread as it was before the question, which may come again: to another worker, changed, or to be answered anew."""
    asked = send.messages[-1]["id"]
    async for state in graph.aget_state_history(config):
        if all(message.id != asked for message in state.values.get("messages", [])):
            return state.config
    return config


async def events(stream: AsyncIterator[Any]) -> AsyncIterator[Chunk]:
    """What a graph says whose ``stream_mode`` is a list, such as of ``values`` and ``messages``, for an ``AgUiWorker``."""
    async for *inner, mode, data in stream:
        # With subgraphs it is said of which.
        name = "|".join([mode, *(inner[0] if inner else ())])
        yield {"type": "RAW", "event": {"event": name, "data": to_jsonable_python(data, fallback=str)}}


async def chunks(send: Send, stream: AsyncIterator[Any]) -> AsyncIterator[Chunk]:
    """What a graph says whose ``stream_mode`` is ``messages``: of each AI message a step, with the results of its tools."""
    said = _Messages()
    async for message, _ in stream:
        for chunk in said.chunks(message):
            yield chunk
    for chunk in said.end():
        yield chunk
    yield {"type": "finish"}


class _Messages:
    def __init__(self) -> None:
        self._texts = Texts()
        self._steps = 0
        #: The message that comes in chunks.
        self._message: AIMessageChunk | None = None
        #: Calls by their place in the message.
        self._calls: dict[Any, str] = {}

    def chunks(self, message: Any) -> list[Chunk]:
        if isinstance(message, ToolMessage):
            return [*self._end_message(), _result(message)]
        if not isinstance(message, AIMessage):
            return []
        begun: list[Chunk] = []
        if self._message is None or self._message.id != message.id or not isinstance(message, AIMessageChunk):
            begun = [*self.end(), {"type": "start-step"}]
            self._steps += 1
        if isinstance(message, AIMessageChunk):
            self._message = message if self._message is None else self._message + message
            return [*begun, *self._parts(message), *self._inputs(message)]
        return [*begun, *self._parts(message), *self._texts.end(), *_available(message)]

    def end(self) -> list[Chunk]:
        return [*self._end_message(), *([{"type": "finish-step"}] if self._steps else [])]

    def _end_message(self) -> list[Chunk]:
        message, self._message = self._message, None
        self._calls = {}
        return [*self._texts.end(), *(_available(message) if message else [])]

    def _parts(self, message: AIMessage) -> list[Chunk]:
        chunks: list[Chunk] = []
        for block in message.content_blocks:
            if block["type"] == "text":
                chunks += self._texts.add("text", f"{self._steps}-text", block["text"])
            elif block["type"] == "reasoning":
                chunks += self._texts.add("reasoning", f"{self._steps}-reasoning", block.get("reasoning", ""))
        return chunks

    def _inputs(self, message: AIMessageChunk) -> list[Chunk]:
        """A call's name and id come with its first chunk."""
        chunks: list[Chunk] = []
        for call in message.tool_call_chunks:
            if call["id"] and call["name"]:
                self._calls[call["index"]] = call["id"]
                chunks += [*self._texts.end(), {"type": "tool-input-start", "toolCallId": call["id"], "toolName": call["name"]}]
            if call["args"] and call["index"] in self._calls:
                called = {"toolCallId": self._calls[call["index"]], "inputTextDelta": call["args"]}
                chunks.append({"type": "tool-input-delta", **called})
        return chunks


def _available(message: AIMessage) -> list[Chunk]:
    return [
        {"type": "tool-input-available", "toolCallId": call["id"], "toolName": call["name"], "input": call["args"]}
        for call in message.tool_calls
    ]


def _result(message: ToolMessage) -> Chunk:
    if message.status == "error":
        return {"type": "tool-output-error", "toolCallId": message.tool_call_id, "errorText": "The tool failed."}
    return {"type": "tool-output-available", "toolCallId": message.tool_call_id, "output": message.content}
