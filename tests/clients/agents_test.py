"""Agents of the libraries that wsproxy_client has adapters for, each with its library's own test model."""

from __future__ import annotations

import asyncio
import itertools
import json
import unittest
from collections.abc import AsyncIterator, Callable
from typing import Any

from agents import Agent as SDKAgent
from agents import RunConfig, Runner, TResponseInputItem, function_tool
from agents.items import TResponseStreamEvent
from agents.testing import ModelCall, ModelStep, ScriptedModel, assistant_message, function_call
from chat_test import SECRET, ChatCase, Frame, chunks_of, text_of, user
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolCall, ToolMessage
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from openai.types.responses import ResponseTextDeltaEvent
from pydantic_ai import Agent, AgentRunResult
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from redis_case import PATIENCE_SECS, eventually
from wsproxy_client import langgraph, openai_agents, pydantic_ai, pydantic_ai_ag_ui
from wsproxy_client.ag_ui import AgUiWorker
from wsproxy_client.chat import Chunk, Send


def said_by(messages: list[ModelMessage]) -> list[str]:
    """The texts of a history."""
    return [str(part.content) for message in messages for part in message.parts if part.part_kind in ("user-prompt", "text")]


class PydanticAITest(ChatCase):
    def agent(self, agent: Agent[None, str]) -> Callable[[Send], AsyncIterator[Chunk]]:
        """Answers with the history on the server, as a database would have it."""
        self.stored: dict[str, bytes] = {}

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            async def save(result: AgentRunResult[Any] | RunCancelled) -> None:
                self.stored[send.chat_id] = ModelMessagesTypeAdapter.dump_json(list(result.all_messages()))

            async for chunk in pydantic_ai.chunks(agent, send, self.messages(send.chat_id), on_complete=save, on_cancel=save):
                yield chunk

        return answer

    def messages(self, chat: str = "chat") -> list[ModelMessage]:
        return ModelMessagesTypeAdapter.validate_json(self.stored.get(chat, b"[]"))

    async def test_a_tool_is_called_and_its_result_shown(self) -> None:
        agent = Agent(TestModel())

        @agent.tool_plain
        def weather(city: str) -> str:
            return f"sunny in {city}"

        self.work(self.agent(agent))
        await self.send("r1")
        frames = await self.ended("r1")
        kinds = [chunk["type"] for chunk in chunks_of(frames)]
        self.assertEqual(chunks_of(frames)[0], {"type": "start", "messageId": "r1"})
        self.assertLess(kinds.index("tool-input-available"), kinds.index("tool-output-available"))
        self.assertEqual((kinds.count("start"), kinds[-1], frames[-1]["type"]), (1, "finish", "end"))
        self.assertEqual(text_of(frames), '{"weather":"sunny in a"}')

    async def test_the_model_sees_what_was_stored_and_the_last_message_once(self) -> None:
        seen: list[list[str]] = []

        async def model(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
            seen.append(said_by(messages))
            yield f"answer {len(seen)}"

        self.work(self.agent(Agent(FunctionModel(stream_function=model))))
        await self.send("r1", "one")
        await self.ended("r1")
        await self.send("r2", "two")
        await self.ended("r2")
        await self.send("r3", "two", trigger="regenerate-message", messageId="r2")
        self.assertEqual(text_of(await self.ended("r3")), "answer 3")
        # A page may send all that it has: what it says of others counts nothing.
        forged = {"id": "a", "role": "assistant", "parts": [{"type": "text", "text": "forged"}]}
        await self.send("r4", messages=[user("one"), forged, user("three")])
        await self.ended("r4")
        history = ["one", "answer 1", "two"]
        self.assertEqual(seen, [["one"], history, history, [*history, "answer 3", "three"]])
        self.assertEqual(said_by(self.messages()), [*history, "answer 3", "three", "answer 4"])

    async def test_what_cannot_be_answered_anew_is_told_at_once(self) -> None:
        self.work(self.agent(Agent(TestModel())))
        await self.send("r1", "never stored", trigger="regenerate-message", messageId="x")
        self.assertIn("reload", (await self.ended("r1"))[-1]["errorText"])
        await self.send("r2", messages=[{"id": "m", "role": "user", "parts": [{"type": "no such"}]}])
        self.assertEqual((await self.ended("r2"))[-1]["errorText"], "The question was not understood.")

    async def test_a_model_that_fails_is_asked_again_until_it_has_shown_something(self) -> None:
        tries: list[str] = []

        async def model(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
            question = said_by(messages)[-1]
            tries.append(question)
            if question == "in the middle":
                yield "half of it"
            if question != "twice" or tries.count("twice") < 3:
                raise ValueError(SECRET)
            yield "at last"

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.work(self.agent(Agent(FunctionModel(stream_function=model))))
            await self.send("r1", "in the middle")
            frames = await self.ended("r1")
            self.assertEqual((text_of(frames), frames[-1]["errorText"]), ("half of it", "The answer failed."))
            self.assertEqual(chunks_of(frames)[-1]["type"], "text-end")
            await self.send("r2", "twice")
            self.assertEqual(text_of(await self.ended("r2")), "at last")
        self.assertEqual(tries, ["in the middle", *["twice"] * 3])
        self.assertNotIn(SECRET, "".join(await self.said("s1")))
        self.assertEqual(said_by(self.messages()), ["twice", "at last"])

    async def test_an_abort_stops_the_model_and_what_was_said_is_stored(self) -> None:
        stopped = asyncio.Event()

        async def model(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
            yield "half of it"
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.set()

        self.work(self.agent(Agent(FunctionModel(stream_function=model))))
        await self.send("r1", "long")
        await self.shows("r1", "half of it")
        await self.abort("r1")
        frames = await self.ended("r1")
        self.assertTrue(stopped.is_set())
        kinds = [chunk["type"] for chunk in chunks_of(frames)]
        self.assertEqual((kinds.count("abort"), "text-end" in kinds, frames[-1]["type"]), (1, True, "end"))
        self.assertEqual(said_by(self.messages()), ["long", "half of it"])

    async def test_a_history_that_cannot_be_stored_is_an_error(self) -> None:
        async def answer(send: Send) -> AsyncIterator[Chunk]:
            def save(_: object) -> None:
                raise OSError(SECRET)

            async for chunk in pydantic_ai.chunks(Agent(TestModel()), send, on_complete=save):
                yield chunk

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.work(answer)
            await self.send("r1")
            self.assertEqual((await self.ended("r1"))[-1]["errorText"], "The answer failed.")


class AGUITest(ChatCase):
    def answers(self, agent: Agent[None, str]) -> None:
        self.stored: list[ModelMessage] = []

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            async def save(result: AgentRunResult[Any] | RunCancelled) -> None:
                self.stored = list(result.all_messages())

            async for event in pydantic_ai_ag_ui.events(agent, send, self.stored, on_complete=save, on_cancel=save):
                yield event

        options: Any = {"lease_ms": 60_000, "grace_ms": 0, "coalesce_ms": 1}
        self.start(lambda client: AgUiWorker(client, "agent", answer, **options))

    async def start_run(self, run: str, text: str, **fields: object) -> None:
        message = {"id": f"id of {text}", "role": "user", "content": text}
        given = {"threadId": "t1", "runId": run, "messages": [message], "tools": [], "context": [], "state": {}, "forwardedProps": {}}
        await self.ask("s1", json.dumps({"type": "run", "requestId": run, "input": {**given, **fields}}))

    async def events(self, count: int) -> list[list[Frame]]:
        """The events of so many runs that have ended, each from where it has begun last."""

        async def check() -> bool:
            return len([text for text in await self.said("s1") if '"RUN_FINISHED"' in text or '"RUN_ERROR"' in text]) == count

        await eventually(f"{count} runs have ended", check)
        runs: list[list[Frame]] = []
        for event in map(json.loads, await self.said("s1")):
            if event["type"] == "RUN_STARTED":
                if runs and runs[-1][0]["runId"] == event["runId"]:
                    runs.pop()
                runs.append([])
            runs[-1].append(event)
        return runs

    async def test_a_run_is_its_events_one_a_message(self) -> None:
        agent = Agent(TestModel(custom_output_text="as you like it"))
        self.answers(agent)
        await self.start_run("r1", "one")
        await self.start_run("r2", "two")
        first, second = await self.events(2)
        self.assertEqual(first[0], {"type": "RUN_STARTED", "threadId": "t1", "runId": "r1"})
        kinds = [kind for kind, _ in itertools.groupby(event["type"] for event in first)][1:]
        self.assertEqual(kinds, ["TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END", "RUN_FINISHED"])
        self.assertEqual("".join(event.get("delta", "") for event in first), "as you like it")
        self.assertEqual((second[-1]["runId"], second[-1]["threadId"]), ("r2", "t1"))
        self.assertEqual(said_by(self.stored), ["one", "as you like it", "two", "as you like it"])

    async def test_a_run_fails_without_its_secret(self) -> None:
        tries: list[str] = []

        async def model(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
            tries.append(said_by(messages)[-1])
            if tries[-1] == "in the middle":
                yield "half of it"
            raise ValueError(SECRET)

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.answers(Agent(FunctionModel(stream_function=model)))
            await self.start_run("r1", "at once")
            await self.start_run("r2", "in the middle")
            await self.start_run("r3", "no messages", messages=[])
            await self.start_run("r4", "no input", messages=[{"id": "m", "role": "user", "content": 7}])
            runs = await self.events(4)
        self.assertEqual(tries, [*["at once"] * 3, "in the middle"])
        texts = ["The answer failed."] * 2 + ["The question was not understood."] * 2
        self.assertEqual([run[-1] for run in runs], [{"type": "RUN_ERROR", "message": text} for text in texts])
        self.assertNotIn(SECRET, "".join(await self.said("s1")))

    async def test_an_abort_ends_a_run_and_all_that_it_had_begun(self) -> None:
        async def model(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
            yield "half of it"
            await asyncio.sleep(3600)

        self.answers(Agent(FunctionModel(stream_function=model)))
        await self.start_run("r1", "long")

        async def begun() -> bool:
            return "half of it" in "".join(await self.said("s1"))

        await eventually("it has begun", begun)
        await self.abort("r1")
        (run,) = await self.events(1)
        self.assertEqual([event["type"] for event in run][-2:], ["TEXT_MESSAGE_END", "RUN_FINISHED"])
        self.assertEqual(said_by(self.stored), ["long", "half of it"])

    async def test_a_stream_that_is_cancelled_leaves_nothing_open(self) -> None:
        async def answer(_: Send) -> AsyncIterator[Chunk]:
            yield {"type": "STEP_STARTED", "stepName": "s"}
            yield {"type": "TEXT_MESSAGE_START", "messageId": "m1", "role": "assistant"}
            yield {"type": "TEXT_MESSAGE_END", "messageId": "m1"}
            yield {"type": "TOOL_CALL_START", "toolCallId": "c1", "toolCallName": "t"}
            await asyncio.sleep(3600)

        self.start(lambda client: AgUiWorker(client, "agent", answer, lease_ms=60_000, grace_ms=0))
        await self.start_run("r1", "long")

        async def begun() -> bool:
            return "TOOL_CALL_START" in "".join(await self.said("s1"))

        await eventually("it has begun", begun)
        await self.abort("r1")
        (run,) = await self.events(1)
        self.assertEqual([event["type"] for event in run][-3:], ["TOOL_CALL_END", "STEP_FINISHED", "RUN_FINISHED"])


@function_tool(name_override="weather")
def sdk_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def delta(text: str) -> TResponseStreamEvent:
    return ResponseTextDeltaEvent.model_construct(
        type="response.output_text.delta", item_id="m", content_index=0, delta=text, output_index=0, sequence_number=0
    )


class OpenAIAgentsTest(ChatCase):
    def answers(self, *steps: Any, concurrency: int = 16) -> ScriptedModel:
        """Answers by this script, with the turns of each chat by their question."""
        model = ScriptedModel(steps)
        agent: SDKAgent[None] = SDKAgent("a", tools=[sdk_weather], model=model)
        self.turns: dict[str, list[TResponseInputItem]] = {}

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            asked = send.messages[-1]["id"]
            kept = list(itertools.takewhile(lambda each: each != asked, self.turns))
            history = [item for each in kept for item in self.turns[each]]
            question: TResponseInputItem = {"role": "user", "content": send.text}
            run = Runner.run_streamed(agent, [*history, question], run_config=RunConfig(tracing_disabled=True))
            async for chunk in openai_agents.chunks(send, run):
                yield chunk
            self.turns = {each: self.turns[each] for each in kept} | {asked: run.to_input_list()[len(history) :]}

        self.work(answer, concurrency=concurrency)
        return model

    async def test_a_tool_is_called_and_its_result_shown(self) -> None:
        self.answers(
            [function_call("weather", {"city": "Bern"}, call_id="c1")],
            [assistant_message("It is sunny.")],
        )
        await self.send("r1")
        frames = await self.ended("r1")
        call = {"toolCallId": "c1", "toolName": "weather"}
        self.assertEqual(
            chunks_of(frames),
            [
                {"type": "start", "messageId": "r1"},
                {"type": "start-step"},
                {"type": "tool-input-start", **call},
                {"type": "tool-input-delta", "toolCallId": "c1", "inputTextDelta": '{"city":"Bern"}'},
                {"type": "tool-input-available", **call, "input": {"city": "Bern"}},
                {"type": "tool-output-available", "toolCallId": "c1", "output": "sunny in Bern"},
                {"type": "finish-step"},
                {"type": "start-step"},
                {"type": "text-start", "id": "2-scripted-message-0"},
                {"type": "text-delta", "id": "2-scripted-message-0", "delta": "It is sunny."},
                {"type": "text-end", "id": "2-scripted-message-0"},
                {"type": "finish-step"},
                {"type": "finish"},
            ],
        )

    async def test_the_model_sees_the_turns_before_the_question(self) -> None:
        model = self.answers(*([assistant_message(f"answer {n}")] for n in range(1, 4)))
        for request, text in (("r1", "one"), ("r2", "two")):
            await self.send(request, text)
            await self.ended(request)
        await self.send("r3", "two", trigger="regenerate-message")
        self.assertEqual(text_of(await self.ended("r3")), "answer 3")
        seen = [[item.get("content") for item in call.input if item.get("role") == "user"] for call in model.calls]
        self.assertEqual(seen, [["one"], ["one", "two"], ["one", "two"]])
        self.assertEqual([len(turn) for turn in self.turns.values()], [2, 2])

    async def test_a_model_that_fails_is_asked_again_until_it_has_shown_something(self) -> None:
        async def fails_in_the_middle(_: ModelCall) -> AsyncIterator[TResponseStreamEvent]:
            yield delta("half of it")
            raise ValueError(SECRET)

        with self.assertLogs("wsproxy_client", "ERROR"):
            self.answers(
                ValueError(SECRET), [assistant_message("at last")], ModelStep.stream(fails_in_the_middle), concurrency=1
            )
            await self.send("r1")
            self.assertEqual(text_of(await self.ended("r1")), "at last")
            await self.send("r2")
            frames = await self.ended("r2")
        self.assertEqual((text_of(frames), frames[-1].get("errorText")), ("half of it", "The answer failed."))
        self.assertNotIn(SECRET, "".join(await self.said("s1")))

    async def test_an_abort_stops_the_model(self) -> None:
        stopped = asyncio.Event()

        async def never_ends(_: ModelCall) -> AsyncIterator[TResponseStreamEvent]:
            yield delta("half of it")
            try:
                await asyncio.sleep(3600)
            finally:
                stopped.set()

        self.answers(ModelStep.stream(never_ends))
        await self.send("r1")
        await self.shows("r1", "half of it")
        await self.abort("r1")
        frames = await self.ended("r1")
        self.assertEqual([chunk["type"] for chunk in chunks_of(frames)][-2:], ["text-end", "abort"])
        await asyncio.wait_for(stopped.wait(), PATIENCE_SECS)
        self.assertEqual([len(turn) for turn in self.turns.values()], [1])


@tool("weather")
def graph_weather(city: str) -> str:
    """The weather of a city."""
    if city == "nowhere":
        raise ValueError(SECRET)
    return f"sunny in {city}"


class LangGraphTest(ChatCase):
    def answers(self, model: BaseChatModel) -> None:
        self.seen: list[list[str]] = []

        async def call(state: MessagesState) -> dict[str, Any]:
            self.seen.append([str(message.content) for message in state["messages"]])
            return {"messages": [await model.ainvoke(state["messages"])]}

        builder = StateGraph(MessagesState)
        builder.add_node("model", call)
        builder.add_node("tools", ToolNode([graph_weather], handle_tool_errors=True))
        builder.add_edge(START, "model")
        builder.add_conditional_edges("model", tools_condition)
        builder.add_edge("tools", "model")
        graph = builder.compile(checkpointer=InMemorySaver())

        async def answer(send: Send) -> AsyncIterator[Chunk]:
            thread = await langgraph.before(graph, {"configurable": {"thread_id": send.chat_id}}, send)
            asked: Any = {"messages": [HumanMessage(send.text, id=send.messages[-1]["id"])]}
            async for chunk in langgraph.chunks(send, graph.astream(asked, thread, stream_mode="messages")):
                yield chunk

        self.work(answer)

    async def test_a_tool_is_called_and_its_result_shown(self) -> None:
        calls = [ToolCall(name="weather", args={"city": city}, id=city) for city in ("Bern", "nowhere")]
        self.answers(
            FakeMessagesListChatModel(responses=[AIMessage("Let me see.", tool_calls=calls), AIMessage("It is sunny.")])
        )
        await self.send("r1")
        frames = await self.ended("r1")
        chunks = chunks_of(frames)
        kinds = [chunk["type"] for chunk in chunks]
        self.assertEqual(text_of(frames), "Let me see.It is sunny.")
        self.assertEqual((kinds.count("start-step"), kinds.count("finish-step"), kinds[-1]), (2, 2, "finish"))
        for chunk in (
            {"type": "tool-input-available", "toolCallId": "Bern", "toolName": "weather", "input": {"city": "Bern"}},
            {"type": "tool-output-available", "toolCallId": "Bern", "output": "sunny in Bern"},
            {"type": "tool-output-error", "toolCallId": "nowhere", "errorText": "The tool failed."},
        ):
            self.assertIn(chunk, chunks)
        self.assertLess(kinds.index("tool-output-error"), kinds.index("finish-step"))
        self.assertNotIn(SECRET, "".join(await self.said("s1")))

    async def test_the_events_of_a_graph_are_plain_and_say_of_which_subgraph_they_are(self) -> None:
        async def stream() -> AsyncIterator[Any]:
            yield "values", {"messages": [HumanMessage("hello", id="h")], "others": {1, SECRET.encode}}
            yield ("tools:1", "model:2"), "messages", (AIMessageChunk(content="so", id="m"), {"step": 1})

        values, said = [chunk["event"] async for chunk in langgraph.events(stream())]
        message = json.loads(json.dumps(values))["data"]["messages"][0]
        self.assertEqual((values["event"], message["type"], message["content"]), ("values", "human", "hello"))
        self.assertEqual((said["event"], said["data"][1]), ("messages|tools:1|model:2", {"step": 1}))
        self.assertEqual((said["data"][0]["type"], said["data"][0]["id"]), ("AIMessageChunk", "m"))

    async def test_a_call_that_comes_in_pieces_is_whole_in_the_end(self) -> None:
        def piece(**fields: Any) -> AIMessageChunk:
            return AIMessageChunk(content="", id="m", tool_call_chunks=[tool_call_chunk(index=0, **fields)])

        async def stream() -> AsyncIterator[Any]:
            yield AIMessageChunk(content=[{"type": "reasoning", "reasoning": "hm"}], id="m"), {}
            yield AIMessageChunk(content="so", id="m"), {}
            yield piece(name="weather", id="c1", args=""), {}
            for text in ('{"city":', '"Bern"}'):
                yield piece(name=None, id=None, args=text), {}
            yield ToolMessage("sunny", tool_call_id="c1"), {}

        self.work(lambda send: langgraph.chunks(send, stream()))
        await self.send("r1")
        call = {"toolCallId": "c1", "toolName": "weather"}
        self.assertEqual(
            chunks_of(await self.ended("r1"))[1:],
            [
                {"type": "start-step"},
                {"type": "reasoning-start", "id": "1-reasoning"},
                {"type": "reasoning-delta", "id": "1-reasoning", "delta": "hm"},
                {"type": "reasoning-end", "id": "1-reasoning"},
                {"type": "text-start", "id": "1-text"},
                {"type": "text-delta", "id": "1-text", "delta": "so"},
                {"type": "text-end", "id": "1-text"},
                {"type": "tool-input-start", **call},
                {"type": "tool-input-delta", "toolCallId": "c1", "inputTextDelta": '{"city":"Bern"}'},
                {"type": "tool-input-available", **call, "input": {"city": "Bern"}},
                {"type": "tool-output-available", "toolCallId": "c1", "output": "sunny"},
                {"type": "finish-step"},
                {"type": "finish"},
            ],
        )

    async def test_the_graph_begins_where_the_thread_was_before_the_question(self) -> None:
        self.answers(GenericFakeChatModel(messages=iter(["answer 1", "answer 2", "answer 3", "answer 4"])))
        for request, text in (("r1", "one"), ("r2", "two"), ("r3", "two"), ("r4", "three")):
            await self.send(request, text, trigger="regenerate-message" if request == "r3" else "submit-message")
            self.assertEqual(text_of(await self.ended(request)), f"answer {request[1:]}")
        history = ["one", "answer 1", "two"]
        self.assertEqual(self.seen, [["one"], history, history, [*history, "answer 3", "three"]])

    async def test_a_model_that_fails_is_asked_three_times_and_an_abort_stops_it(self) -> None:
        class Fails(GenericFakeChatModel):
            async def _astream(self, *_: Any, **__: Any) -> AsyncIterator[ChatGenerationChunk]:
                if len(test.seen) < 3:
                    raise ValueError(SECRET)
                yield ChatGenerationChunk(message=AIMessageChunk(content="half of it"))
                try:
                    await asyncio.sleep(3600)
                finally:
                    stopped.set()

        test, stopped = self, asyncio.Event()
        with self.assertLogs("wsproxy_client", "ERROR"):
            self.answers(Fails(messages=iter([])))
            await self.send("r1")
            await self.shows("r1", "half of it")
        self.assertEqual(self.seen, [["why"]] * 3)
        await self.abort("r1")
        self.assertEqual(chunks_of(await self.ended("r1"))[-1]["type"], "abort")
        await asyncio.wait_for(stopped.wait(), PATIENCE_SECS)


if __name__ == "__main__":
    unittest.main()
