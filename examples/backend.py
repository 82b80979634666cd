"""A backend in FastAPI and redis-py that never sees a WebSocket.

POST /sessions opens a session: a token, and the URL to connect to. GET / is a page that does so and connects.
What a client says arrives on session:{id}:up; answers go to session:{id}:down, word by word, until PUBLISH
says that no client listens. It needs the proxy's own JWT_SECRET and REDIS_URL.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import jwt
from fastapi import FastAPI
from fastapi.responses import FileResponse
from redis import RedisError
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

JWT_SECRET = os.environ["JWT_SECRET"]
REDIS_URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
PROXY_URL = os.environ.get("PROXY_URL", "ws://127.0.0.1:8080")
TOKEN_TTL_SECS = 3600
WORD_DELAY_SECS = 0.05

# Connections that a restart of Redis has left are found out by the command that fails.
redis = Redis.from_url(REDIS_URL, decode_responses=True, retry_on_error=[RedisConnectionError])


async def answer(question: str) -> AsyncIterator[str]:
    """Stands in for a language model: the words of an answer, one by one."""
    for word in f"You said {question} and Python has this to say about it.".split():
        await asyncio.sleep(WORD_DELAY_SECS)
        yield word


async def stream(session_id: str, question: str, former: asyncio.Task | None) -> None:
    """Streams one answer when the session's former one has ended, and stops at the word that no client received."""
    if former:
        await asyncio.wait([former])
    channel = f"session:{session_id}:down"
    async for text in answer(question):
        if await redis.publish(channel, json.dumps({"type": "word", "text": text})) == 0:
            print(f"session {session_id}: stopped, no client listens", flush=True)
            return
    await redis.publish(channel, json.dumps({"type": "end"}))
    print(f"session {session_id}: answered", flush=True)


async def listen(subscribed: asyncio.Event) -> None:
    """Hears every session, those from before a restart of this process too.

    With several processes every one of them would hear, and answer: let each subscribe to its own sessions instead.
    """
    # The last answer of each session: the next one waits for it, or the words of both would mix. And asyncio itself keeps
    # only weak references to its tasks.
    answers: dict[str, asyncio.Task] = {}

    def forget(task: asyncio.Task) -> None:
        if answers.get(task.get_name()) is task:
            del answers[task.get_name()]

    while True:
        try:
            async with redis.pubsub() as pubsub:
                await pubsub.psubscribe("session:*:up")
                async for message in pubsub.listen():
                    if message["type"] == "psubscribe":
                        subscribed.set()
                    elif message["type"] == "pmessage":
                        session_id = message["channel"].removeprefix("session:").removesuffix(":up")
                        answering = stream(session_id, message["data"], answers.get(session_id))
                        answers[session_id] = asyncio.create_task(answering, name=session_id)
                        answers[session_id].add_done_callback(forget)
        except RedisError as error:
            print(f"Redis: {error}", flush=True)
            await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(_: FastAPI):
    subscribed = asyncio.Event()
    listener = asyncio.create_task(listen(subscribed))
    await subscribed.wait()
    yield
    listener.cancel()
    await redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/sessions")
def open_session(session_id: str | None = None) -> dict[str, str]:
    """A token for a session, new or known, and where to connect. A real backend would check its user."""
    session_id = session_id or uuid.uuid4().hex
    now = int(time.time())
    claims = {"session_id": session_id, "iat": now, "exp": now + TOKEN_TTL_SECS}
    token = jwt.encode(claims, JWT_SECRET, algorithm="HS256")
    return {"session_id": session_id, "token": token, "url": f"{PROXY_URL}/agent/ws/{quote(session_id, safe='')}"}


@app.get("/")
def page() -> FileResponse:
    return FileResponse(Path(__file__).with_name("index.html"))
