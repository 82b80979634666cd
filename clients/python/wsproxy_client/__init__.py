"""For Python on both sides of wsproxy: what a backend sends to a session, and a client that resumes.

A backend needs redis-py, sync or async (``pip install wsproxy-client[backend]``):

    backend = Backend(redis.Redis.from_url(url))
    position, receivers = backend.send("session-1", '{"token":"hello"}')
    backend.close("session-1", 4403, "banned")

A client needs websockets (``pip install wsproxy-client[client]``):

    async with Client(url, token=make_token) as client:
        async for event in client:
            match event:
                case Message(text, position): ...
                case Gap(reason): ...
"""

from .backend import AsyncBackend, Backend, down_channel, up_channel
from .client import Client
from .events import Closed, Complaint, Event, Gap, Live, Message, Sent, Unheard, Unsent

__all__ = [
    "AsyncBackend",
    "Backend",
    "Client",
    "Closed",
    "Complaint",
    "Event",
    "Gap",
    "Live",
    "Message",
    "Sent",
    "Unheard",
    "Unsent",
    "down_channel",
    "up_channel",
]
