"""A worker of examples/chat as it is, but for its model, which says what chat_model.ts says, and has a tool to look up."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic_ai import ModelMessage, ModelRequest, ModelResponse, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

from chat_model import steps_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples/chat/backend"))

from agent import agent  # noqa: E402
from worker import main  # noqa: E402


async def say(
    messages: list[ModelMessage], info: AgentInfo
) -> AsyncIterator[str | dict[int, DeltaThinkingPart] | dict[int, DeltaToolCall]]:
    question, said = "", 0
    for message in messages:
        if isinstance(message, ModelResponse):
            said += 1
        for part in message.parts if isinstance(message, ModelRequest) else ():
            if isinstance(part, UserPromptPart):
                question, said = str(part.content), 0
    for kind, words in steps_of(question)[said]:
        for word in words:
            await asyncio.sleep(0.01 + 0.04 * random.random())
            if kind == "tool":
                yield {0: DeltaToolCall("look", json.dumps({"what": word}), tool_call_id=f"call-{question}")}
            elif kind == "reasoning":
                yield {0: DeltaThinkingPart(content=f"{word} ")}
            else:
                yield f"{word} "


@agent.tool_plain
async def look(what: str) -> str:
    """Looks something up."""
    await asyncio.sleep(0.05)
    return what


if __name__ == "__main__":
    with agent.override(model=FunctionModel(stream_function=say)):
        asyncio.run(main())
