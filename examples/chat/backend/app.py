"""The page's API: chats of the signed-in user, what was said in them, and tokens for their sessions.

Answers do not pass through here: worker.py writes them, and the proxy holds the page's connection.
"""

import os
import time
import uuid
from pathlib import Path
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse

from store import Store

AGENT = "chat"
TOKEN_SECS = 900
PROXY_URL = os.environ.get("PROXY_URL", "ws://127.0.0.1:8080")
JWT_SECRET = os.environ["JWT_SECRET"]

app = FastAPI()
store = Store(os.environ.get("DATABASE", "chat.sqlite"))


# YOUR SIGN-IN: returns the id of the user who asks, or raises HTTPException(401). This one takes a browser for a user.
async def signed_in_user(request: Request, response: Response) -> str:
    user = request.cookies.get("user") or uuid.uuid4().hex
    response.set_cookie("user", user, max_age=365 * 24 * 3600, httponly=True, samesite="lax")
    return user


User = Annotated[str, Depends(signed_in_user)]


async def own_chat(chat: str, user: User) -> str:
    """The id of a chat that belongs to the user who asks."""
    if not store.belongs(chat, user):
        raise HTTPException(404)
    return chat


OwnChat = Annotated[str, Depends(own_chat)]


@app.post("/api/chats")
async def create_chat(user: User) -> dict:
    return {"id": store.create(user)}


@app.get("/api/chats")
async def list_chats(user: User) -> list:
    return store.chats(user)


@app.get("/api/chats/{chat}")
async def open_chat(chat: OwnChat) -> dict:
    messages, position = store.history(chat)
    return {"messages": messages, "position": position, "url": f"{PROXY_URL}/{AGENT}/ws/{chat}"}


@app.post("/api/chats/{chat}/token")
async def create_token(chat: OwnChat, user: User) -> dict:
    store.use(chat)
    now = int(time.time())
    claims = {"session_id": chat, "agent_id": AGENT, "sub": user, "iat": now, "exp": now + TOKEN_SECS}
    return {"token": jwt.encode(claims, JWT_SECRET, algorithm="HS256")}


# What `npm run build` has made. While you write the page, Vite serves it.
built = Path(__file__).parent.parent / "dist"
if built.exists():
    app.mount("/assets", StaticFiles(directory=built / "assets"))

    @app.get("/")
    @app.get("/c/{chat}")
    async def page() -> FileResponse:
        return FileResponse(built / "index.html")
