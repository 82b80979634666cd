"""A Python client for the torture of clients: it prints what it is told, and submits what it is asked to.

    torture_client.py URL TOKEN [POSITION [MAX_DELAY]]

URL is ws://host:port/{agent_id}/ws/{session_id}, TOKEN a token or an http:// url whose body is one, POSITION where to
go on ("0" unless given), MAX_DELAY the longest pause between two tries in seconds (30 unless given).

Lines to stdout, each flushed, each a JSON object:
    {"event":"message","text":"…","position":"1-2"}        position is null for a plain one
    {"event":"gap","reason":"trimmed","position":"1-2"}    position is null where the proxy tells none
    {"event":"live","position":"1-2"}                      null from a proxy without a log
    {"event":"unheard","messages":1}
    {"event":"complaint","error":{…}}
    {"event":"sent","id":"…","receivers":1,"entered":false}
    {"event":"unsent","id":"…","reason":"…"}
    {"event":"report","tasks":2,"sockets":1,"rss_kb":30000}
    {"event":"closed","code":4403}                         the last one; 1000 when it was asked to close

Lines from stdin, each a JSON object:
    {"submit":"text","id":"…"}     answered by "sent" or "unsent" with this id
    {"report":true}                answered by "report": tasks of asyncio, open TCP sockets, resident memory
    {"close":true}                 ends it; so does the end of stdin

It logs to stderr, and ends with 0 after "closed".
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from tortured import tcp_sockets

from wsproxy_client import Client, Closed, Unsent


def tell(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def fetch(url: str) -> str:
    """What a GET answers; it can be cancelled at any time."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise OSError(f"the token service answers {status}")
    return body.decode().strip()


async def submit(client: Client, text: str, id: str) -> None:
    try:
        tell("sent", **asdict(await client.submit(text, id)))
    except Unsent as unsent:
        tell("unsent", id=unsent.id, reason=unsent.reason)


def report() -> None:
    """What this process has now, where there is /proc; 0 elsewhere."""
    rss_kb = 0
    if os.path.isdir("/proc/self"):
        with open("/proc/self/statm") as statm:
            rss_kb = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    tell("report", tasks=len(asyncio.all_tasks()), sockets=len(tcp_sockets()), rss_kb=rss_kb)


async def obey(client: Client) -> None:
    """Does what stdin asks for, until that ends or asks to close."""
    stdin = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    submitting: set[asyncio.Task[None]] = set()
    try:
        while line := await stdin.readline():
            match json.loads(line):
                case {"submit": str(text), "id": str(id)}:
                    task = asyncio.create_task(submit(client, text, id))
                    submitting.add(task)
                    task.add_done_callback(submitting.discard)
                case {"report": True}:
                    report()
                case {"close": True}:
                    return
                case other:
                    raise ValueError(f"stdin: {other!r}")
    finally:
        for task in submitting:
            task.cancel()


async def listen(client: Client) -> int:
    """Prints every event; returns the code with which the session is closed for good."""
    try:
        async for event in client:
            tell(type(event).__name__.lower(), **asdict(event))
        return 1000
    except Closed as closed:
        return closed.code


async def main(url: str, token: str, position: str = "0", max_delay: str = "30") -> None:
    async def fresh() -> str:
        return await fetch(token) if token.startswith("http://") else token

    async with Client(url, fresh, position, max_delay=float(max_delay)) as client:
        obeying = asyncio.ensure_future(obey(client))
        listening = asyncio.ensure_future(listen(client))
        await asyncio.wait([obeying, listening], return_when=asyncio.FIRST_COMPLETED)
        if obeying.done():
            obeying.result()
        obeying.cancel()
    tell("closed", code=await listening)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(message)s")
    asyncio.run(main(*sys.argv[1:]))
