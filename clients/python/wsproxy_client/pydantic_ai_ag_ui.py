"""The answers of a Pydantic AI agent, for a client of AG-UI.

    async def answer(send: Send) -> AsyncIterator[Chunk]:
        async for event in events(agent, send, await load(send.chat_id), on_complete=save):
            yield event

It needs pydantic-ai and ag-ui-protocol (``pip install wsproxy-client[backend,pydantic-ai-ag-ui]``).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ag_ui.core import BaseEvent
from pydantic import ValidationError
from pydantic_ai import CancellationToken
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.messages import ModelMessage
from pydantic_ai.output import OutputDataT
from pydantic_ai.tools import AgentDepsT
from pydantic_ai.ui import OnCancelFunc, OnCompleteFunc
from pydantic_ai.ui.ag_ui import AGUIAdapter, AGUIEventStream

from .chat import ChatError, Chunk, Send, dumps


class _Stream(AGUIEventStream[AgentDepsT, OutputDataT]):
    """Leaves an error to the worker: its text is not for users."""

    async def on_error(self, error: Exception) -> AsyncIterator[BaseEvent]:
        raise error
        yield  # It is a generator.


class _Adapter(AGUIAdapter[AgentDepsT, OutputDataT]):
    def build_event_stream(self) -> _Stream[AgentDepsT, OutputDataT]:
        return _Stream(
            self.run_input,
            ag_ui_version=self.ag_ui_version,
            manage_system_prompt=self.manage_system_prompt,
            include_usage=self.include_usage,
        )


def adapter(agent: AbstractAgent[AgentDepsT, OutputDataT], send: Send) -> AGUIAdapter[AgentDepsT, OutputDataT]:
    """The library's own adapter of an agent for one run, with the history on the server."""
    try:
        run_input = AGUIAdapter.build_run_input(dumps({**send.frame, "runId": send.request_id}).encode())
    except ValidationError as error:
        raise ChatError("The question was not understood.") from error
    return _Adapter(agent, run_input, manage_message_history="server")


async def events(
    agent: AbstractAgent[AgentDepsT, OutputDataT],
    send: Send,
    message_history: Sequence[ModelMessage] | None = None,
    *,
    on_complete: OnCompleteFunc[BaseEvent] | None = None,
    on_cancel: OnCancelFunc[BaseEvent] | None = None,
    **options: Any,
) -> AsyncIterator[Chunk]:
    """What an agent answers: as :func:`wsproxy_client.pydantic_ai.chunks`, in events."""
    token = CancellationToken()
    send.cancel = token.cancel
    stream = adapter(agent, send).run_stream(
        message_history=message_history,
        on_complete=on_complete,
        on_cancel=on_cancel,
        cancellation_token=token,
        **options,
    )
    async for event in stream:
        yield json.loads(event.model_dump_json(by_alias=True, exclude_none=True))
