"""A FastAPI backend whose answers survive reloads, tunnels and its own crashes: a worker with a database.

POST /sessions?session_id=… opens a session: a token, what was said so far, and the position to resume from. The truth is
in the database (here SQLite); the log is a cache that brings a client up to date without asking it. A "stop" is a message
of its own, as a client that is away has not said it; a newer question replaces the one that is being answered.
"""

import asyncio
import json
import os
import sqlite3
import sys
import time
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import jwt
from fastapi import FastAPI
from redis.asyncio import Redis

sys.path.insert(0, str(Path(__file__).parent.parent / "clients/python"))
from wsproxy_client.worker import Question, Worker  # noqa: E402

JWT_SECRET = os.environ["JWT_SECRET"]
PROXY_URL = os.environ.get("PROXY_URL", "ws://127.0.0.1:8080")
database = sqlite3.connect(os.environ.get("DATABASE", ":memory:"))
database.execute("CREATE TABLE IF NOT EXISTS said (session TEXT, n INTEGER, text TEXT, position TEXT)")


def kind_of(data: str) -> str | None:
    """What a client wants; None for what it should not have sent."""
    try:
        said = json.loads(data)
        return said["type"] if isinstance(said["text"] if said["type"] == "ask" else "", str) else None
    except (ValueError, TypeError, KeyError):
        return None


def interrupts(entry: dict[str, str]) -> str | None:
    """A stop and a newer question end what came before: this is said then."""
    return json.dumps({"type": "stopped"}) if kind_of(entry.get("data", "")) in ("ask", "stop") else None


def keep(session_id: str, text: str, position: str) -> None:
    row = (session_id, text, position, session_id)
    database.execute("INSERT INTO said SELECT ?, COUNT(*), ?, ? FROM said WHERE session = ?", row)
    database.commit()


async def handle(question: Question) -> None:
    """Answers, whether or not a client listens now, from where a worker before this one stopped."""
    if kind_of(question.data) != "ask":
        return
    answer = await question.begin(json.dumps({"type": "start"}))
    words = f"You asked {json.loads(question.data)['text']} and every word of this is in the log.".split()
    for word in words[len(await answer.so_far()) :]:
        await asyncio.sleep(0.05)  # A language model takes its time.
        text = json.dumps({"type": "word", "text": word})
        await answer.send(text)
        keep(question.session, text, answer.position)
    await answer.end(json.dumps({"type": "end"}))
    keep(question.session, json.dumps({"type": "end"}), answer.position)


@asynccontextmanager
async def lifespan(_: FastAPI):
    redis = Redis.from_url(os.environ.get("REDIS_URL", "redis://127.0.0.1:6379"))
    worker = Worker(redis, "agent", handle, interrupts=interrupts, lease_ms=5000, grace_ms=2000)
    working = asyncio.create_task(worker.run())
    yield
    worker.stop()
    await working
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
