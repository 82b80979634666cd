"""The answers of a Pydantic AI agent, for a page of the AI SDK.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        async for chunk in chunks(agent, send, await load(send.chat_id), on_complete=save):
            yield chunk

It needs pydantic-ai (``pip install wsproxy-client[backend,pydantic-ai]``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_ai import CancellationToken
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage
from pydantic_ai.output import OutputDataT
from pydantic_ai.tools import AgentDepsT
from pydantic_ai.ui import OnCancelFunc, OnCompleteFunc
from pydantic_ai.ui.vercel_ai import VercelAIAdapter, VercelAIEventStream
from pydantic_ai.ui.vercel_ai.response_types import BaseChunk, DoneChunk

from .chat import ChatError, Chunk, Send, dumps

_SDK_VERSION: Literal[7] = 7


class _Stream(VercelAIEventStream[AgentDepsT, OutputDataT]):
    """Leaves an error to the worker: its text is not for users."""

    async def on_error(self, error: Exception) -> AsyncIterator[BaseChunk]:
        raise error
        yield  # It is a generator.


class _Adapter(VercelAIAdapter[AgentDepsT, OutputDataT]):
    def build_event_stream(self) -> _Stream[AgentDepsT, OutputDataT]:
        return _Stream(
            self.run_input,
            sdk_version=_SDK_VERSION,
            server_message_id=self.server_message_id,
            manage_system_prompt=self.manage_system_prompt,
        )


def adapter(agent: AbstractAgent[AgentDepsT, OutputDataT], send: Send) -> VercelAIAdapter[AgentDepsT, OutputDataT]:
    """The library's own adapter of an agent for one question, with the history on the server."""
    asked = {"trigger": send.trigger, "id": send.chat_id, "messages": send.messages, "messageId": send.message_id}
    try:
        run_input = VercelAIAdapter.build_run_input(dumps(asked).encode())
    except ValidationError as error:
        raise ChatError("The question was not understood.") from error
    return _Adapter(
        agent,
        run_input,
        sdk_version=_SDK_VERSION,
        server_message_id=send.answer_id,
        manage_message_history="server",
    )


async def chunks(
    agent: AbstractAgent[AgentDepsT, OutputDataT],
    send: Send,
    message_history: Sequence[ModelMessage] | None = None,
    *,
    on_complete: OnCompleteFunc[BaseChunk] | None = None,
    on_cancel: OnCancelFunc[BaseChunk] | None = None,
    **options: Any,
) -> AsyncIterator[Chunk]:
    """What an agent answers.

    ``message_history`` is what was stored of the chat: ``all_messages()`` of the result that ``on_complete`` was given,
    or of the ``RunCancelled`` that ``on_cancel`` was given at an abort. The rest goes to the adapter's ``run_stream``.
    """
    token = CancellationToken()
    send.cancel = token.cancel
    stream = adapter(agent, send).run_stream(
        message_history=message_history,
        on_complete=on_complete,
        on_cancel=on_cancel,
        cancellation_token=token,
        **options,
    )
    try:
        async for chunk in stream:
            if not isinstance(chunk, DoneChunk):
                yield json.loads(chunk.encode(_SDK_VERSION))
    except UserError as error:
        if send.trigger != "regenerate-message":
            raise
        raise ChatError("The message to answer anew is not known: reload the chat.") from error
