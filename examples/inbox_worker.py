"""A worker that answers what clients send, of which any number can run: they share an agent's inbox.

    python inbox_worker.py <name> [--agent AGENT]

Start some with different names, and kill one in the middle of an answer: after IDLE_SECS another goes on where it
stopped. `{"type":"stop"}` ends the answer, wherever it is written. The proxy needs INBOX=true, the worker REDIS_URL.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from redis.asyncio import Redis

sys.path.insert(0, str(Path(__file__).parent.parent / "clients/python"))
from wsproxy_client.worker import Question, Worker  # noqa: E402

REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
IDLE_SECS = float(os.environ.get("IDLE_SECS", "5"))
WORD_DELAY_SECS = 0.05


def model(question: str) -> list[str]:
    """Stands in for a language model, which would be asked again with what has been said already."""
    return f"You said {question} and this is what any of us has to say about it, word by word.".split()


def is_stop(data: str) -> bool:
    """Whatever a client sends is a question, but for this."""
    try:
        said = json.loads(data)
    except ValueError:
        return False  # A proxy with VALIDATE_JSON=false lets anything pass.
    return isinstance(said, dict) and said.get("type") == "stop"


def interrupts(entry: dict[str, str]) -> str | None:
    """What is said when an answer goes no further: at a stop, and when no client is left to read it."""
    stops = entry["type"] == "vacated" or entry["type"] == "message" and is_stop(entry["data"])
    return json.dumps({"type": "stopped"}) if stops else None


async def handle(name: str, question: Question) -> None:
    """Answers one question, from where a worker before this one stopped."""
    if is_stop(question.data):
        return
    answer = await question.begin(json.dumps({"type": "start", "answer": question.id, "by": name}))
    said = len(await answer.so_far())
    print(f"{name}: {'goes on with' if said else 'answers'} {question.session}", flush=True)
    for at, text in list(enumerate(model(question.data)))[said:]:
        await answer.send(json.dumps({"type": "word", "answer": question.id, "at": at, "text": text}))
        await asyncio.sleep(WORD_DELAY_SECS)
    await answer.end(json.dumps({"type": "end", "answer": question.id}))
    print(f"{name}: {question.session} answered", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--agent", default="agent")
    options = parser.parse_args()
    redis = Redis.from_url(REDIS_URL)
    lease_ms = int(IDLE_SECS * 1000)
    handler = partial(handle, options.name)
    worker = Worker(redis, options.agent, handler, interrupts=interrupts, lease_ms=lease_ms)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    print(f"{options.name}: ready", flush=True)
    await worker.run()


if __name__ == "__main__":
    asyncio.run(main())
