"""A FastAPI backend whose answers survive reloads, tunnels and its own crashes: it writes to the session's log.

POST /sessions?session_id=… opens a session: a token, what was said so far, and the position to resume from. The truth is
in the database (here SQLite); the log is a cache that brings a client up to date without asking it. A "stop" is a message
of its own: a client that is away has not said it.
"""

import asyncio
import json
import os
import sqlite3
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import jwt
from fastapi import FastAPI
from redis.asyncio import Redis

sys.path.insert(0, str(Path(__file__).parent.parent / "clients/python"))
from wsproxy_client import AsyncBackend  # noqa: E402

JWT_SECRET = os.environ["JWT_SECRET"]
PROXY_URL = os.environ.get("PROXY_URL", "ws://127.0.0.1:8080")
WORD_DELAY_SECS = 0.05

redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"), decode_responses=True)
backend = AsyncBackend(redis)
database = sqlite3.connect(os.environ.get("DATABASE", ":memory:"))
database.execute("CREATE TABLE IF NOT EXISTS said (session TEXT, n INTEGER, text TEXT, position TEXT)")
answers: dict[str, asyncio.Task] = {}


async def model(question: str) -> AsyncIterator[str]:
    """Stands in for a language model: the words of an answer, one by one."""
    for word in f"You asked {question} and every word of this is in the log.".split():
        await asyncio.sleep(WORD_DELAY_SECS)
        yield word


async def say(session_id: str, message: dict) -> None:
    """To the client and its log, then to the database with the position that it has there."""
    text = json.dumps(message)
    position, _ = await backend.send(session_id, text)
    database.execute(
        "INSERT INTO said SELECT ?, COUNT(*), ?, ? FROM said WHERE session = ?", (session_id, text, position, session_id)
    )
    database.commit()


async def answer(session_id: str, question: str) -> None:
    """Streams one answer, whether or not a client listens now."""
    async for word in model(question):
        await say(session_id, {"type": "word", "text": word})
    await say(session_id, {"type": "end"})


async def listen(subscribed: asyncio.Event) -> None:
    async with redis.pubsub() as pubsub:
        await pubsub.psubscribe("session:*:up")
        async for message in pubsub.listen():
            if message["type"] == "psubscribe":
                subscribed.set()
            elif message["type"] == "pmessage":
                session_id = message["channel"].removeprefix("session:").removesuffix(":up")
                said = json.loads(message["data"])
                if session_id in answers:
                    answers.pop(session_id).cancel()
                if said["type"] == "ask":
                    answers[session_id] = asyncio.create_task(answer(session_id, said["text"]))
                elif said["type"] == "stop":
                    await say(session_id, {"type": "stopped"})


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
async def open_session(session_id: str | None = None) -> dict:
    """A token, all that was said, and where the log goes on from there. A real backend would ask who is asking."""
    session_id = session_id or uuid.uuid4().hex
    now = int(time.time())
    token = jwt.encode({"session_id": session_id, "iat": now, "exp": now + 3600}, JWT_SECRET, algorithm="HS256")
    rows = database.execute("SELECT text, position FROM said WHERE session = ? ORDER BY n", (session_id,)).fetchall()
    return {
        "session_id": session_id,
        "token": token,
        "url": f"{PROXY_URL}/agent/ws/{quote(session_id, safe='')}",
        "said": [json.loads(text) for text, _ in rows],
        "position": rows[-1][1] if rows else "0",
    }
