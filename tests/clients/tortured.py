"""Python clients that are tortured, as tortured.js has those in JavaScript.

    tortured.py ORDERS

They connect, submit, break off loops, throw, leave and come back, with tokens that run out, hang, fail or are forged,
and report all that they see. What they report and obey is what torture.ts gives and takes, line by line.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import random
import socket
import stat
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from wsproxy_client import Client, Closed, Gap, Live, Message, Unsent
from wsproxy_client.watch import Watch


def report(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def mint(claims: dict[str, Any], secret: str) -> str:
    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    header = b'{"alg":"HS256"}'
    text = f"{part(header)}.{part(json.dumps(claims).encode())}"
    return f"{text}.{part(hmac.digest(secret.encode(), text.encode(), hashlib.sha256))}"


class Nuisance(Exception):
    """What a body of a loop may raise."""


class Tortured:
    """A client of one session, and the application around it."""

    def __init__(self, session: str, url: str, secret: str, chance: random.Random) -> None:
        self.session = session
        self.url = url
        self.secret = secret
        self.chance = chance
        #: Nothing goes wrong on this side any more.
        self.calm = False
        self.position = "0"
        self.client: Client | None = None
        self.last_error = ""
        self._live: object = None
        self._submitted = 0
        self._submitting: set[asyncio.Task[None]] = set()

    def one_of(self, probability: float) -> bool:
        return not self.calm and self.chance.random() < probability

    async def token(self) -> str:
        if self.one_of(0.04):
            await asyncio.sleep(3600)
        if self.one_of(0.04):
            raise OSError("no token today")
        life = 3600 if self.calm else 3 + self.chance.randrange(40)
        now = int(time.time())
        claims = {"session_id": self.session, "iat": now, "exp": now + life}
        return mint(claims, "x" * 32 if self.one_of(0.03) else self.secret)

    async def run(self) -> None:
        submitting = asyncio.create_task(self.submit_all())
        while not submitting.done():
            try:
                await self.visit()
            except Nuisance:
                pass
            except Closed as closed:
                # Refused for good, as far as it can tell: a person would begin anew.
                report(session=self.session, event="closed", reason=str(closed))
                await asyncio.sleep(0.1)

    async def visit(self) -> None:
        client = Client(self.url, self.token, self.position, timeout=1.5, silence=0.5, max_delay=10.0)
        self.client = client
        try:
            async with client:
                while await self.listen(client):
                    pass
        finally:
            self.position = client.position

    async def listen(self, client: Client) -> bool:
        """A loop, which may be broken off in any way; False to leave the client, and come back."""
        if self.one_of(0.6):
            # One that waits for a single event, and is cancelled after a few turns of asyncio, or a few milliseconds, or
            # in the very turn in which an event has come.
            waiting = asyncio.ensure_future(anext(client))
            for _ in range(self.chance.randrange(5)):
                await asyncio.sleep(0)
            if self.one_of(0.2):
                await asyncio.sleep(self.chance.random() * 0.02)
            if self.one_of(0.5) and not waiting.done():
                await client._arrived.wait()
            waiting.cancel()
            try:
                event = await waiting
            except asyncio.CancelledError:
                return True
            return self.handle(client, event)
        async for event in client:
            # What it leaves at is still to come: the next connection gets it.
            if self.one_of(0.003):
                return False
            if self.one_of(0.003):
                raise Nuisance
            self.handle(client, event)
            if self.one_of(0.001):
                await asyncio.sleep(self.chance.random())
            if self.one_of(0.01):
                return True
        raise RuntimeError("a loop ended by itself")

    def handle(self, client: Client, event: object) -> bool:
        match event:
            case Message(text, position):
                report(session=self.session, event="message", number=int(text.split(" ")[0]), position=position)
            case Gap(reason):
                report(session=self.session, event="gap", reason=reason)
            case Live():
                self._live = client._socket
                report(session=self.session, event="open")
            case _:
                self.last_error = str(event)
        return True

    async def submit_all(self) -> None:
        while not self.calm:
            self._submitted += 1
            task = asyncio.create_task(self.submit(self._submitted))
            self._submitting.add(task)
            task.add_done_callback(self._submitting.discard)
            await asyncio.sleep(self.chance.random() * 0.4)
            if self.one_of(0.02):
                task.cancel()
        await asyncio.Event().wait()

    async def submit(self, number: int) -> None:
        assert self.client is not None
        report(session=self.session, event="submitted", number=number)
        try:
            await self.client.submit(json.dumps(f"{self.session}:{number}"))
            report(session=self.session, event="acknowledged", number=number)
        except Unsent as unsent:
            report(session=self.session, event="unsent", number=number, reason=unsent.reason)
        except asyncio.CancelledError:
            report(session=self.session, event="unsent", number=number, reason="cancelled")

    def status(self, sockets: list[tuple[int, int]]) -> dict[str, Any]:
        client = self.client
        assert client is not None
        return {
            "open": client.open,
            "live": client.open and self._live is client._socket,
            "pending": len(client._pending),
            "carriers": [inode for port, inode in sockets if port == urlsplit(self.url).port],
            "lastError": self.last_error,
        }


def tcp_sockets() -> list[tuple[int, int]]:
    """Of each TCP socket of this process, the port at its other end, and its inode; of none where there is no /proc."""
    sockets: list[tuple[int, int]] = []
    for each in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        # The listing's own is closed already; and not each socket is connected.
        with contextlib.suppress(OSError):
            status = os.fstat(int(each))
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(int(each))) as copy:
                    if copy.family == socket.AF_INET:
                        sockets.append((copy.getpeername()[1], status.st_ino))
    return sockets


def timers() -> int:
    """The timers of the clients, or their tasks, if there are more: each has one of both when it is open."""
    loop: Any = asyncio.get_running_loop()
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "wsproxy_client"]
    watches = [
        each
        for each in loop._scheduled
        if not each.cancelled() and getattr(each._callback, "__func__", None) is Watch.look
    ]
    return max(len(tasks), len(watches))


def summarize(clients: list[Tortured]) -> None:
    with open("/proc/self/statm") as statm:
        heap_mb = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
    sockets = tcp_sockets()
    statuses = [client.status(sockets) for client in clients]
    report(event="summary", clients=statuses, timers=timers(), listeners=0, heapMb=heap_mb)


async def main(orders: dict[str, Any]) -> None:
    # Waits are a tenth of what they would be.
    uniform = random.uniform
    random.uniform = lambda a, b: uniform(a, b) / 10
    chance = random.Random(orders["seed"])
    clients = [Tortured(each["session"], each["url"], orders["secret"], chance) for each in orders["clients"]]
    running = [asyncio.create_task(client.run()) for client in clients]
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: report(session=clients[0].session, event="fault", reason=str(context)))
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)

    async def obey() -> None:
        while line := await stdin.readline():
            if line == b"calm\n":
                for client in clients:
                    client.calm = True
            else:
                summarize(clients)

    obeying = asyncio.create_task(obey())
    done, _ = await asyncio.wait([obeying, *running], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    os._exit(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(main(json.loads(sys.argv[1])))
