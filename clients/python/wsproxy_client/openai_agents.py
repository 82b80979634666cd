"""The answers of the OpenAI Agents SDK, for a page of the AI SDK.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        result = Runner.run_streamed(agent, [*history, {"role": "user", "content": send.text}])
        async for chunk in chunks(send, result):
            yield chunk

It needs openai-agents (``pip install wsproxy-client[backend,openai-agents]``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from agents import RunResultStreaming, StreamEvent
from openai.types.responses import ResponseFunctionToolCall

from .chat import Chunk, Send, Texts

_JSON = (str, int, float, bool, dict, list)


async def chunks(send: Send, result: RunResultStreaming) -> AsyncIterator[Chunk]:
    """What a run says. An abort cancels it: what it has said until then ends, and ``to_input_list()`` has it."""
    send.cancel = result.cancel
    events = _Events()
    async for event in result.stream_events():
        for chunk in events.chunks(event):
            yield chunk
    for chunk in events.end():
        yield chunk
    if result.run_loop_exception:
        raise result.run_loop_exception
    if not send.aborted.is_set():
        yield {"type": "finish"}


class _Events:
    def __init__(self) -> None:
        self._texts = Texts()
        self._steps = 0
        #: By the id of their item.
        self._calls: dict[str, str] = {}

    def chunks(self, event: StreamEvent) -> list[Chunk]:
        if event.type == "run_item_stream_event":
            return self._item(event.item.raw_item, getattr(event.item, "output", None))
        return self._raw(event.data) if event.type == "raw_response_event" else []

    def end(self) -> list[Chunk]:
        return [*self._texts.end(), *([{"type": "finish-step"}] if self._steps else [])]

    def _raw(self, data: Any) -> list[Chunk]:
        match data.type:
            case "response.created":
                ended = self.end()
                self._steps += 1
                return [*ended, {"type": "start-step"}]
            case "response.output_text.delta" | "response.refusal.delta":
                return self._texts.add("text", f"{self._steps}-{data.item_id}-{data.content_index}", data.delta)
            case "response.reasoning_summary_text.delta":
                return self._texts.add("reasoning", f"{self._steps}-{data.item_id}-{data.summary_index}", data.delta)
            case "response.output_item.done":
                return self._texts.end()
            case "response.output_item.added" if isinstance(data.item, ResponseFunctionToolCall):
                self._calls[data.item.id or ""] = data.item.call_id
                call = {"toolCallId": data.item.call_id, "toolName": data.item.name}
                return [*self._texts.end(), {"type": "tool-input-start", **call}]
            case "response.function_call_arguments.delta" if data.item_id in self._calls:
                call_id = self._calls[data.item_id]
                return [{"type": "tool-input-delta", "toolCallId": call_id, "inputTextDelta": data.delta}]
            case _:
                return []

    def _item(self, item: Any, output: Any) -> list[Chunk]:
        if isinstance(item, ResponseFunctionToolCall):
            called = {"toolCallId": item.call_id, "toolName": item.name, "input": _json(item.arguments)}
            return [{"type": "tool-input-available", **called}]
        if isinstance(item, dict):
            made: dict[str, Any] = item  # pyright: ignore[reportUnknownVariableType]
            if made.get("type") == "function_call_output":
                result: Any = made["output"] if output is None else output
                shown: Any = result if isinstance(result, _JSON) else str(result)  # pyright: ignore[reportUnknownVariableType]
                return [{"type": "tool-output-available", "toolCallId": made["call_id"], "output": shown}]
        return []


def _json(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text
