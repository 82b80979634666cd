"""The agent that answers. Its model is what MODEL names, such as anthropic:claude-sonnet-4-5 or openai:gpt-5.2."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic_ai import Agent, ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel

KEPT_TEXT = Path(__file__).with_name("answer.md").read_text()
WORD_SECS = 0.03


async def read_aloud(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
    """Stands in for a model that costs money: whatever is asked, it streams a text that is kept beside this file."""
    for word in re.findall(r"\S+\s*", KEPT_TEXT):
        await asyncio.sleep(WORD_SECS)
        yield word


agent = Agent(
    os.environ.get("MODEL") or FunctionModel(stream_function=read_aloud),
    instructions="You are a helpful assistant. Answer briefly, in Markdown.",
)
