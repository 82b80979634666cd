"""The Python client against a server that does as each test says.

What asyncio's rules ask of a client, and what it makes of refusals, tokens, closes and answers. tests/clients/python.ts
runs this with each Python that there is, and the client against the real proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import http
import logging
import unittest
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from unittest.mock import patch

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from wsproxy_client import Client, Closed, Complaint, Event, Gap, Live, Message, Sent, Unheard, Unsent
from wsproxy_client.websocket import WebSocket

PATIENCE_SECS = 20


async def soon(awaitable: Awaitable[Any]) -> Any:
    """With a generous limit, only so that a failure is told instead of hanging."""
    return await asyncio.wait_for(awaitable, PATIENCE_SECS)


async def eventually(check: Callable[[], bool]) -> None:
    async def ask() -> None:
        while not check():
            await asyncio.sleep(0.002)

    await soon(ask())


class Server:
    """A scripted proxy. The next handshakes get ``answers``; the others are accepted, and wait in ``next()``."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[Request] = []
        self.answers: list[Response | None] = []
        self.subprotocol: str | None = "wsproxy.resume.v1"
        self.open: set[ServerConnection] = set()
        self._accepted: asyncio.Queue[ServerConnection] = asyncio.Queue()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/agent/ws/s1"

    async def next(self) -> ServerConnection:
        connection: ServerConnection = await soon(self._accepted.get())
        return connection

    def _answer(self, _: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else None

    def _select(self, _: ServerConnection, offered: Any) -> Any:
        return self.subprotocol

    async def _handle(self, connection: ServerConnection) -> None:
        self.open.add(connection)
        self._accepted.put_nowait(connection)
        await connection.wait_closed()
        self.open.discard(connection)

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Server]:
        async with serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._answer,
            select_subprotocol=self._select,
            ping_interval=None,
            close_timeout=0.5,
            compression=None,
            max_queue=1000,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            yield self


def refusal(status: int, text: str = "", **headers: str) -> Response:
    fields = Headers({"Content-Length": str(len(text)), "Connection": "close"})
    for name, value in headers.items():
        fields[name.replace("_", "-")] = value
    return Response(status, http.HTTPStatus(status).phrase, fields, text.encode())


class ClientTest(unittest.IsolatedAsyncioTestCase):
    """After each test no task is left, no socket, and no error that nobody has seen."""

    async def asyncSetUp(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(False)
        self.unseen: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: self.unseen.append(context))
        self.tasks = asyncio.all_tasks()
        #: How long it could have waited before each connect but the first.
        self.waits: list[float] = []

        def uniform(_: float, high: float) -> float:
            self.waits.append(high)
            return 0.0

        patcher = patch("random.uniform", uniform)
        patcher.start()
        self.addCleanup(patcher.stop)
        self.server = await self.enterContext_(Server().run())

    async def enterContext_(self, context: contextlib.AbstractAsyncContextManager[Any]) -> Any:
        """``enterAsyncContext`` of Python 3.11."""
        value = await context.__aenter__()

        async def leave() -> None:
            await context.__aexit__(None, None, None)

        self.addAsyncCleanup(leave)
        return value

    async def asyncTearDown(self) -> None:
        await eventually(lambda: not self.server.open)
        await eventually(lambda: not self.left())
        gc.collect()
        self.assertEqual(self.unseen, [])

    def left(self) -> set[asyncio.Task[Any]]:
        """Tasks of the client."""
        return {task for task in asyncio.all_tasks() if is_ours(task)}

    def client(self, token: Any = "token", **options: Any) -> Client:
        return Client(self.server.url, token, **options)


def is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return task.get_name() == "wsproxy_client" or "wsproxy_client" in getattr(code, "co_filename", "")


async def take(client: Client, count: int) -> list[Event]:
    return [await soon(anext(client)) for _ in range(count)]


class Iterating(ClientTest):
    async def test_a_loop_that_is_cancelled_or_timed_out_goes_on_with_the_same_socket(self) -> None:
        async with self.client() as client:
            socket = await self.server.next()
            for _ in range(5):
                with self.assertRaises(asyncio.TimeoutError):
                    await asyncio.wait_for(anext(client), 0.001)
                waiting = asyncio.ensure_future(anext(client))
                await asyncio.sleep(0)
                waiting.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await waiting
            await socket.send("1-1\none")
            self.assertEqual(await take(client, 1), [Message("one", "1-1")])
        self.assertEqual(len(self.server.requests), 1)

    async def test_an_iteration_that_is_cancelled_while_a_message_comes_loses_and_repeats_none(self) -> None:
        count = 300
        got: list[Event] = []
        async with self.client() as client:
            socket = await self.server.next()

            async def send() -> None:
                for n in range(1, count + 1):
                    await socket.send(f"1-{n}\n{n}")
                    await asyncio.sleep(0)

            sending = asyncio.ensure_future(send())
            turn = 0
            while len(got) < count:
                turn += 1
                waiting = asyncio.ensure_future(anext(client))
                for _ in range(turn % 4):
                    await asyncio.sleep(0)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    got.append(await waiting)
            await sending
        self.assertEqual(got, [Message(str(n), f"1-{n}") for n in range(1, count + 1)])

    async def test_a_loop_that_breaks_and_goes_on_repeats_nothing(self) -> None:
        async with self.client(position="1-1") as client:
            socket = await self.server.next()
            for n in range(2, 6):
                await socket.send(f"1-{n}\n{n}")
            seen = []
            for _ in range(4):
                async for event in client:
                    seen.append(event)
                    break
                # It is done with what came before, but perhaps not with this one.
                self.assertEqual(client.position, f"1-{len(seen)}")
            self.assertEqual(seen, [Message(str(n), f"1-{n}") for n in range(2, 6)])
        self.assertEqual(client.position, "1-4")
        self.assertEqual(len(self.server.requests), 1)

    async def test_a_loop_whose_body_raises_leaves_the_position_before_that_message(self) -> None:
        with self.assertRaisesRegex(ZeroDivisionError, "division"):
            async with self.client() as client:
                socket = await self.server.next()
                await socket.send("1-1\none")
                await socket.send("1-2\ntwo")
                async for event in client:
                    1 / (event != Message("two", "1-2"))
        self.assertEqual(client.position, "1-1")

    async def test_there_is_one_iteration_at_a_time(self) -> None:
        client = self.client()
        with self.assertRaisesRegex(RuntimeError, "inside"):
            await anext(client)
        async with client:
            first = asyncio.ensure_future(anext(client))
            await asyncio.sleep(0)
            with self.assertRaisesRegex(RuntimeError, "one place"):
                await anext(client)
            await (await self.server.next()).send("\nplain")
            self.assertEqual(await soon(first), Message("plain", None))
            with self.assertRaisesRegex(RuntimeError, "once"):
                await client.__aenter__()
        with self.assertRaises(StopAsyncIteration):
            await anext(client)

    async def test_a_loop_in_another_task_ends_when_the_client_is_left(self) -> None:
        async def read(client: Client) -> list[Event]:
            return [event async for event in client]

        async with self.client() as client:
            await self.server.next()
            reading = asyncio.ensure_future(read(client))
            await asyncio.sleep(0)
        self.assertEqual(await soon(reading), [])

    async def test_what_waits_when_the_client_is_left_is_not_handled(self) -> None:
        async with self.client() as client:
            socket = await self.server.next()
            await socket.send("1-1\none")
            await socket.send("1-2\ntwo")
            await take(client, 1)
        self.assertEqual([event async for event in client], [])
        self.assertEqual(client.position, "0")


class Leaving(ClientTest):
    async def test_at_whichever_await_it_is_left_nothing_of_it_is_left(self) -> None:
        async def token() -> str:
            await asyncio.sleep(0)
            return "token"

        async def use(ticks: int) -> None:
            async with self.client(token) as client:
                waiting = asyncio.ensure_future(client.submit("1"))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                waiting.cancel()
            self.assertEqual(self.left(), set())

        for ticks in range(60):
            await soon(use(ticks))

    async def test_at_whichever_await_its_task_is_cancelled_nothing_of_it_is_left(self) -> None:
        async def use() -> None:
            async with self.client() as client:
                async for _ in client:
                    pass

        for ticks in range(60):
            for cancels in (1, 2, 3):
                using = asyncio.ensure_future(use())
                for _ in range(ticks):
                    await asyncio.sleep(0)
                for _ in range(cancels):
                    using.cancel()
                    await asyncio.sleep(0)
                with self.assertRaises(asyncio.CancelledError):
                    await soon(using)
                self.assertEqual(self.left(), set())

    async def test_a_peer_that_does_not_answer_is_waited_for_no_longer_when_leaving_is_cancelled(self) -> None:
        with patch("wsproxy_client.websocket.CLOSE_SECS", 3600):
            async with self.client() as client:
                socket = await self.server.next()
                await socket.send("!live\n1-0")
                self.assertEqual(await take(client, 1), [Live("1-0")])
                socket.transport.pause_reading()
                assert client._socket is not None
                transport = client._socket._connection.transport
                leaving = asyncio.ensure_future(client.__aexit__(None, None, None))
                await asyncio.sleep(0.01)
                self.assertFalse(leaving.done())
                leaving.cancel()
                await asyncio.wait([leaving], timeout=PATIENCE_SECS)
                self.assertTrue(leaving.cancelled())
                self.assertEqual(self.left(), set())
                self.assertTrue(transport.is_closing())
                socket.transport.abort()

    async def test_a_peer_that_does_not_answer_is_waited_for_a_while(self) -> None:
        with patch("wsproxy_client.websocket.CLOSE_SECS", 0.1):
            async with self.client():
                socket = await self.server.next()
                socket.transport.pause_reading()
        self.assertEqual(self.left(), set())
        socket.transport.abort()

    async def test_a_close_that_never_ends_is_waited_for_no_longer(self) -> None:
        # As over TLS on Python 3.10, which forgets to say that a connection is gone.
        async def close(_: ClientConnection) -> None:
            await asyncio.Event().wait()

        with patch("wsproxy_client.websocket.CLOSE_SECS", 0), patch.object(ClientConnection, "close", close):
            async with self.client():
                socket = await self.server.next()
            self.assertEqual(self.left(), set())
            await soon(socket.wait_closed())

    async def test_a_handshake_without_an_answer_is_cut_not_closed(self) -> None:
        ended = asyncio.Event()

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            ended.set()

        def close(_: ClientConnection) -> None:
            """As over TLS on Python 3.10: it waits for the goodbye of the other end."""

        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/agent/ws/s1"
        with patch.object(ClientConnection, "close_transport", close, create=True):
            with self.assertRaises(asyncio.TimeoutError):
                await WebSocket.open(url, "token", 0.1)
            await soon(ended.wait())
        server.close()

    async def test_a_token_function_that_is_at_work_is_ended_and_waited_for(self) -> None:
        calls, ended = 0, 0

        async def token() -> str:
            nonlocal calls, ended
            calls += 1
            if calls == 2:
                return "token"
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.01)
                ended += 1
            return "never"

        async with self.client(token):
            await eventually(lambda: calls == 1)
        self.assertEqual(ended, 1)
        async with self.client(token):
            await (await self.server.next()).send('!expiring\n{"in_secs":30}')
            await eventually(lambda: calls == 3)
        self.assertEqual(ended, 2)


class Connecting(ClientTest):
    async def test_a_query_in_the_url_stays_and_has_the_position(self) -> None:
        url = f"{self.server.url}?a=%2F+b&resume=5-5&c"
        async with Client(url, "secret", position="7-1"):
            await self.server.next()
        request = self.server.requests[0]
        self.assertEqual(request.path, "/agent/ws/s1?a=%2F+b&c&resume=7-1")
        self.assertEqual(request.headers["Authorization"], "Bearer secret")

    async def test_a_url_that_is_none_is_told_at_once(self) -> None:
        for url in ("http://a/b", "ws:/a", "a"):
            with self.assertRaisesRegex(ValueError, "url must be ws://"):
                Client(url, "token")

    async def test_a_token_function_that_fails_is_called_again(self) -> None:
        calls = 0

        async def token() -> Any:
            nonlocal calls
            calls += 1
            match calls:
                case 1:
                    raise OSError("the token service is away")
                case 2:
                    await asyncio.sleep(3600)
                case 3:
                    raise asyncio.CancelledError
                case 4:
                    return None
            return f"token {calls}"

        with self.assertLogs("wsproxy_client") as logs:
            async with self.client(token, timeout=0.1):
                await self.server.next()
        # The handshake has as long as the token: on a slow machine it may need more than one attempt.
        fitting = [f"Bearer token {n}" for n in range(5, calls + 1)]
        for each in self.server.requests:
            self.assertIn(each.headers["Authorization"], fitting)
        self.assertEqual(
            [record.getMessage().removeprefix("no connection: ") for record in logs.records][:4],
            [
                "the token service is away",
                "no token within 0.1 s",
                "the token function was cancelled",
                "a token must be a string: it is of type NoneType",
            ],
        )

    async def test_a_token_function_may_be_an_ordinary_one(self) -> None:
        tokens = iter(["a", "b"])
        async with self.client(lambda: next(tokens)):
            await (await self.server.next()).close()
            await self.server.next()
        self.assertEqual([each.headers["Authorization"] for each in self.server.requests], ["Bearer a", "Bearer b"])

    async def test_a_handshake_that_hangs_is_given_up_and_tried_again(self) -> None:
        hung: list[asyncio.StreamWriter] = []
        mute = await asyncio.start_server(lambda _, writer: hung.append(writer), "127.0.0.1", 0)
        port = mute.sockets[0].getsockname()[1]
        with self.assertLogs("wsproxy_client") as logs:
            async with Client(f"ws://127.0.0.1:{port}/agent/ws/s1", "token", timeout=0.05):
                await eventually(lambda: len(hung) >= 3)
        self.assertIn("timed out", logs.output[0])
        for writer in hung:
            writer.close()
        mute.close()

    async def test_a_refusal_twice_in_a_row_is_the_end(self) -> None:
        for status in (400, 401, 403, 404, 410):
            self.server.answers = [refusal(status, "not you"), refusal(503), refusal(status, "not you")]
            with self.assertLogs("wsproxy_client") as logs:
                async with self.client() as client:
                    waiting = asyncio.ensure_future(client.submit("1"))
                    with self.assertRaises(Closed) as caught:
                        await take(client, 1)
                    with self.assertRaises(Unsent) as unsent:
                        await soon(waiting)
                    self.assertEqual(unsent.exception.reason, "closed")
                    # It stays closed.
                    with self.assertRaises(Closed):
                        await take(client, 1)
                    with self.assertRaises(Unsent):
                        await client.submit("1")
                    self.assertFalse(await client.send("1"))
            self.assertEqual((caught.exception.code, caught.exception.reason), (4000 + status, "not you"))
            self.assertEqual(sum(f"{status} not you" in line for line in logs.output), 2)

    async def test_a_refusal_that_another_token_changes_is_none(self) -> None:
        for status in (401, 403, 404):
            self.server.answers = [refusal(status), None, refusal(status), None]
            async with self.client() as client:
                for _ in range(2):
                    await (await self.server.next()).close()
                await (await self.server.next()).send("\nhere")
                self.assertEqual(await take(client, 1), [Message("here", None)])

    async def test_a_proxy_that_is_busy_is_asked_again_when_it_says(self) -> None:
        twice = refusal(503, Retry_After="3600")
        twice.headers["Retry-After"] = "1"
        later = refusal(429, Retry_After="Sun, 29 Nov 2026 20:00:00 GMT")
        self.server.answers = [twice, later, refusal(503), refusal(408), refusal(408), refusal(502)]
        with self.assertLogs("wsproxy_client") as logs:
            async with self.client(max_delay=0.01):
                await self.server.next()
        statuses = [record.getMessage().split(" ")[2] for record in logs.records]
        self.assertEqual(statuses, ["503", "429", "503", "408", "408", "502"])

    async def test_a_redirect_within_the_origin_is_followed(self) -> None:
        self.server.answers = [refusal(307, Location="/other/ws/s1?resume=0")]
        async with self.client("secret"):
            await self.server.next()
        second = self.server.requests[1]
        self.assertEqual(second.path, "/other/ws/s1?resume=0")
        self.assertEqual(second.headers["Authorization"], "Bearer secret")

    async def test_a_redirect_to_another_origin_gets_no_token_and_is_not_the_end(self) -> None:
        other: Server = await self.enterContext_(Server().run())
        self.server.answers = [refusal(302, Location=each) for each in (other.url, "http://127.0.0.1:1/")]
        self.server.answers.append(refusal(301))
        with self.assertLogs("wsproxy_client") as logs:
            async with self.client("secret"):
                await self.server.next()
        self.assertEqual(other.requests, [])
        self.assertEqual([line.split(": ")[1][:3] for line in logs.output], ["302", "htt", "301"])

    async def test_a_connection_that_did_not_live_makes_the_next_wait_longer(self) -> None:
        async with self.client(max_delay=5):
            for _ in range(6):
                await (await self.server.next()).close(1013)
            await self.server.next()
        self.assertEqual(self.waits, [0.5, 1, 2, 4, 5, 5])

    async def test_a_connection_that_lived_makes_the_next_as_good_as_the_first(self) -> None:
        with patch("wsproxy_client.client.LIVED_SECS", 0):
            async with self.client():
                for _ in range(3):
                    await (await self.server.next()).close(1013)
                await self.server.next()
        self.assertEqual(self.waits, [0.5, 0.5, 0.5])


class Hearing(ClientTest):
    async def test_it_goes_on_where_it_was(self) -> None:
        async with self.client(position="3-1", history_loaded=True) as client:
            socket = await self.server.next()
            await socket.send("\nplain")
            await eventually(lambda: len(client._events) == 1)
            socket.transport.abort()
            socket = await self.server.next()
            await socket.send("3-2\nlogged")
            await eventually(lambda: len(client._events) == 2)
            await socket.close()
            socket = await self.server.next()
            await socket.send('!gap\n{"reason":"trimmed","position":"4-7"}')
            await eventually(lambda: len(client._events) == 3)
            await socket.close()
            socket = await self.server.next()
            await socket.send("!later\nwords of another proxy")
            await socket.send("!live\n4-8")
            self.assertEqual(
                await take(client, 4),
                [Message("plain", None), Message("logged", "3-2"), Gap("trimmed", "4-7"), Live("4-8")],
            )
            self.assertEqual(client.position, "4-7")
        self.assertEqual(
            [each.path.partition("?")[2] for each in self.server.requests],
            ["resume=3-1&from=history", "resume=3-1&from=history", "resume=3-2", "resume=4-7"],
        )

    async def test_what_the_proxy_complains_of_is_an_event_and_in_the_log(self) -> None:
        async with self.client() as client:
            socket = await self.server.next()
            with self.assertLogs("wsproxy_client") as logs:
                await socket.send('!error\n{"error":"Invalid JSON format"}')
                await socket.send('!unheard\n{"messages":2}')
                self.assertEqual(await take(client, 2), [Complaint({"error": "Invalid JSON format"}), Unheard(2)])
            self.assertEqual(len(logs.output), 1)

    async def test_words_that_are_none_lead_to_another_connection(self) -> None:
        async with self.client() as client:
            with self.assertLogs("wsproxy_client", "WARNING"):
                await (await self.server.next()).send("!gap\nno JSON")
                socket = await self.server.next()
            await socket.send(b"binary")
            await socket.send("\ngood")
            self.assertEqual(await take(client, 1), [Message("good", None)])

    async def test_a_bare_client_is_live_at_once(self) -> None:
        self.server.subprotocol = None
        async with self.client() as client:
            socket = await self.server.next()
            await socket.send("!live\nis an ordinary text")
            self.assertEqual(await take(client, 2), [Live(None), Message("!live\nis an ordinary text", None)])

    async def test_closes_that_say_so_are_the_end(self) -> None:
        for code in (1002, 1003, 1007, 1009, 4403, 4409):
            async with self.client() as client:
                socket = await self.server.next()
                await socket.send("1-1\nbefore")
                await socket.close(code, "why")
                self.assertEqual(await take(client, 1), [Message("before", "1-1")])
                with self.assertRaises(Closed) as caught:
                    await take(client, 1)
            self.assertEqual((caught.exception.code, caught.exception.reason), (code, "why"))
            self.assertEqual(client.position, "1-1")

    async def test_after_other_closes_it_comes_back(self) -> None:
        codes = (1000, 1001, 1008, 1011, 1013, 4000, 4401)
        async with self.client():
            for code in codes:
                await (await self.server.next()).close(code)
            await self.server.next()

    async def test_a_close_of_its_own_that_comes_back_is_not_the_end(self) -> None:
        async with self.client():
            # Not UTF-8: it closes with 1007, and the server answers with 1007.
            socket = await self.server.next()
            socket.transport.write(b"\x81\x01\xff")
            await socket.wait_closed()
            self.assertEqual(socket.protocol.close_code, 1007)
            await self.server.next()

    async def test_who_does_not_read_makes_the_proxy_wait(self) -> None:
        async with self.client() as client:
            socket = await self.server.next()
            text = "x" * 100_000

            async def send() -> None:
                for n in range(1, 301):
                    await socket.send(f"1-{n}\n{text}")

            sending = asyncio.ensure_future(send())
            await eventually(lambda: socket.transport.get_write_buffer_size() > 0 and len(client._events) == 64)
            self.assertFalse(sending.done())
            # And reads on, while it waits for an answer, which comes behind all that.
            asking = asyncio.ensure_future(client.submit("1", "id"))
            await soon(sending)
            await socket.send('!sent\n{"id":"id","receivers":1,"entered":false}')
            self.assertEqual(await soon(asking), Sent("id", 1, False))
            self.assertEqual(len(await take(client, 300)), 300)


class Doubting(ClientTest):
    """A connection that is dead without a word. Silence and answers take hundredths of what they may."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        patcher = patch("wsproxy_client.client.PONG_SECS", 0.05)
        patcher.start()
        self.addCleanup(patcher.stop)

    async def test_it_is_found_out_after_a_silence_and_replaced_at_once(self) -> None:
        for self.server.subprotocol in ("wsproxy.resume.v1", None):
            self.waits.clear()
            with self.assertLogs("wsproxy_client", "INFO") as logs:
                async with self.client(silence=0.05) as client:
                    dead = await self.server.next()
                    dead.transport.pause_reading()
                    await (await self.server.next()).send("\nhere")
                    while not isinstance(event := (await take(client, 1))[0], Message):
                        self.assertEqual(event, Live(None))
            self.assertEqual(self.waits, [])
            self.assertIn("1006 no sign of life", logs.output[0])
            dead.transport.abort()

    async def test_it_is_found_out_sooner_while_a_message_waits_for_its_answer(self) -> None:
        async with self.client(silence=3600) as client:
            dead = await self.server.next()
            await eventually(lambda: client.open)
            dead.transport.pause_reading()
            waiting = asyncio.ensure_future(client.submit("1", "id"))
            socket = await self.server.next()
            self.assertEqual(await soon(socket.recv()), "!send\nid\n1")
            await socket.send('!sent\n{"id":"id","receivers":1,"entered":false}')
            await soon(waiting)
            dead.transport.abort()

    async def test_dead_connections_in_a_row_make_it_wait(self) -> None:
        async with self.client(silence=0.01):
            dead = [await self.server.next() for _ in range(3)]
            for socket in dead:
                socket.transport.abort()
        self.assertEqual(self.waits[0], 1)

    @patch("wsproxy_client.client.PONG_SECS", 0.5)
    async def test_one_that_answers_is_kept_however_silent_it_is(self) -> None:
        async with self.client(silence=0.01) as client:
            socket = await self.server.next()
            for answer in ["!pong\n"] * 5 + ['!error\n{"error":"Unknown command"}'] * 5:
                self.assertEqual(await soon(socket.recv()), "!ping\n")
                await socket.send(answer)
            await socket.send("\nhere")
            # Of what a proxy says that is too old for it, the loop is told nothing.
            self.assertEqual(await take(client, 1), [Message("here", None)])
        self.server.subprotocol = None
        async with self.client(silence=0.01) as client:
            socket = await self.server.next()
            await asyncio.sleep(0.3)
            await socket.send("here")
            self.assertEqual(await take(client, 2), [Live(None), Message("here", None)])
        self.assertEqual(len(self.server.requests), 2)

    async def test_one_that_has_much_to_say_before_its_answer_is_kept(self) -> None:
        # Long enough for a machine that stalls between two of its messages.
        with patch("wsproxy_client.client.PONG_SECS", 2):
            async with self.client(silence=0.01) as client:
                socket = await self.server.next()
                self.assertEqual(await soon(socket.recv()), "!ping\n")
                for _ in range(15):
                    await socket.send("\nunder way")
                    await take(client, 1)
                    await asyncio.sleep(0.2)
        self.assertEqual(len(self.server.requests), 1)

    @patch("wsproxy_client.client.PONG_SECS", 0.5)
    async def test_a_loop_that_makes_the_proxy_wait_is_no_doubt_of_it(self) -> None:
        async with self.client(silence=0.01) as client:
            socket = await self.server.next()

            async def answer() -> None:
                async for _ in socket:
                    await socket.send("!pong\n")

            answering = asyncio.ensure_future(answer())
            for n in range(300):
                await socket.send(f"\n{n}")
            await asyncio.sleep(1.5)
            self.assertEqual(await take(client, 300), [Message(str(n), None) for n in range(300)])
        self.assertEqual(len(self.server.requests), 1)
        await soon(answering)


class Sending(ClientTest):
    async def test_send_says_whether_it_could(self) -> None:
        async with self.client() as client:
            self.assertFalse(client.open)
            self.assertFalse(await client.send("1"))
            socket = await self.server.next()
            await eventually(lambda: client.open)
            self.assertTrue(await client.send("1"))
            self.assertEqual(await soon(socket.recv()), "1")
            socket.transport.abort()
            # At any moment of the end, it says so and does not raise.
            while client.open:
                await client.send("2")
                await asyncio.sleep(0)
            self.assertFalse(await client.send("2"))
            # Nor while the loop has not yet come to what stood before the end.
            socket = await self.server.next()
            for _ in range(66):
                await socket.send("\nmuch")
            await eventually(lambda: len(client._events) == 64)
            await socket.close()
            self.assertFalse(await client.send("2"))
        self.assertFalse(await client.send("3"))

    async def test_submit_waits_for_the_answer(self) -> None:
        async with self.client() as client:
            # Before it is open.
            first = asyncio.ensure_future(client.submit("1"))
            socket = await self.server.next()
            command, id, text = (await soon(socket.recv())).split("\n")
            self.assertEqual((command, text), ("!send", "1"))
            await socket.send(f'!sent\n{{"id":"{id}","receivers":2,"entered":true}}')
            self.assertEqual(await soon(first), Sent(id, 2, True))
            # And a text of several lines, once it is.
            second = asyncio.ensure_future(client.submit("[\n]", "b"))
            self.assertEqual(await soon(socket.recv()), "!send\nb\n[\n]")
            await socket.send('!unsent\n{"id":"b","reason":"unheard"}')
            await socket.send('!sent\n{"id":"b","receivers":1,"entered":false}')
            with self.assertRaisesRegex(Unsent, "unheard") as caught:
                await soon(second)
            self.assertEqual((caught.exception.reason, caught.exception.id), ("unheard", "b"))

    async def test_submit_sends_again_what_has_no_answer_and_two_more_for_each_answer(self) -> None:
        async with self.client() as client:
            waiting = [asyncio.ensure_future(client.submit(str(n), str(n))) for n in range(6)]
            socket = await self.server.next()
            self.assertEqual(await soon(socket.recv()), "!send\n0\n0")
            await socket.close()
            socket = await self.server.next()
            await eventually(lambda: client.open)
            # Nothing else comes while that is not answered, but what is new.
            for number, ids in enumerate((["0"], ["1", "2"], ["3", "4", "5"])):
                new = f"new-{number}"
                waiting.append(asyncio.ensure_future(client.submit("new", new)))
                frames = [(await soon(socket.recv())).split("\n")[1] for _ in [*ids, new]]
                self.assertEqual([id for id in frames if id != new], ids)
                for id in frames:
                    await socket.send(f'!sent\n{{"id":"{id}","receivers":1,"entered":false}}')
            self.assertEqual([(await soon(each)).id for each in waiting], [*"012345", "new-0", "new-1", "new-2"])

    async def test_submit_refuses_what_cannot_be_sent(self) -> None:
        async def reason(text: str, id: str | None = None) -> str:
            with self.assertRaises(Unsent) as caught:
                await soon(client.submit(text, id))
            return caught.exception.reason

        client = self.client()
        self.assertEqual(await reason("1"), "closed")
        async with client:
            for id in ("", "a b", "a\n", "é", "x" * 65):
                self.assertEqual(await reason("1", id), "invalid")
            self.assertEqual(await reason("half a pair: \ud800"), "invalid")
            waiting = [asyncio.ensure_future(client.submit("1", str(n))) for n in range(100)]
            await asyncio.sleep(0)
            self.assertEqual(await reason("1", "5"), "invalid")
            self.assertEqual(await reason("1"), "full")
            waiting[5].cancel()
            await asyncio.wait([waiting[5]])
            waiting[5] = asyncio.ensure_future(client.submit("1", "5"))
            await asyncio.sleep(0)
        for each in waiting:
            with self.assertRaisesRegex(Unsent, "closed"):
                await soon(each)
        self.assertEqual(await reason("1"), "closed")

    async def test_a_submit_that_is_cancelled_is_not_sent_again(self) -> None:
        async with self.client() as client:
            first = asyncio.ensure_future(client.submit("1", "a"))
            socket = await self.server.next()
            self.assertEqual(await soon(socket.recv()), "!send\na\n1")
            first.cancel()
            await asyncio.wait([first])
            await socket.send('!unsent\n{"id":"a","reason":"unheard"}')
            await socket.close()
            socket = await self.server.next()
            second = asyncio.ensure_future(client.submit("2", "b"))
            self.assertEqual(await soon(socket.recv()), "!send\nb\n2")
            await socket.send('!sent\n{"id":"b","receivers":1,"entered":false}')
            await soon(second)

    async def test_a_proxy_without_answers_refuses_instead_of_being_silent(self) -> None:
        async with self.client() as client:
            waiting = asyncio.ensure_future(client.submit("1"))
            socket = await self.server.next()
            await soon(socket.recv())
            await socket.send('!error\n{"error":"Unknown command"}')
            with self.assertRaisesRegex(Unsent, "refused"):
                await soon(waiting)
            self.assertEqual(await take(client, 1), [Complaint({"error": "Unknown command"})])
        self.server.subprotocol = None
        async with self.client() as client:
            waiting = asyncio.ensure_future(client.submit("1"))
            with self.assertRaisesRegex(Unsent, "refused"):
                await soon(waiting)
            self.assertEqual(await take(client, 1), [Live(None)])
            with self.assertRaisesRegex(Unsent, "refused"):
                await soon(client.submit("1"))
            await self.server.next()

    async def test_a_loop_that_submits_while_much_comes_does_not_wait_for_itself(self) -> None:
        async with self.client() as client:
            socket = await self.server.next()

            async def answer() -> None:
                async for frame in socket:
                    id = frame.split("\n")[1]
                    for _ in range(10):
                        await socket.send("\nmore")
                    await socket.send(f'!sent\n{{"id":"{id}","receivers":1,"entered":false}}')

            answering = asyncio.ensure_future(answer())
            for _ in range(500):
                await socket.send("\nmuch")
            for n in range(50):
                await soon(client.submit(str(n)))
                await take(client, 1)
            self.assertEqual(len(await take(client, 950)), 950)
        await soon(answering)


class Renewing(ClientTest):
    async def test_another_token_is_sent_before_the_end_of_the_last_one(self) -> None:
        tokens = iter(["a", "b", "c"])
        async with self.client(lambda: next(tokens)):
            socket = await self.server.next()
            # Told again at once, it asks for no other one.
            for _ in range(100):
                await socket.send('!expiring\n{"in_secs":30}')
            self.assertEqual(await soon(socket.recv()), "!token\nb")
            await socket.close()
            await self.server.next()
        self.assertEqual(self.server.requests[1].headers["Authorization"], "Bearer c")

    async def test_a_token_that_is_the_same_or_fails_is_not_sent(self) -> None:
        calls = 0

        async def token() -> str:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise OSError("away")
            if calls == 4:
                await asyncio.sleep(3600)
            return "the same"

        with patch("wsproxy_client.client.RENEWAL_SECS", 0), self.assertLogs("wsproxy_client") as logs:
            async with self.client(token) as client:
                socket = await self.server.next()
                for call in (2, 3, 4):
                    await socket.send('!expiring\n{"in_secs":30}')
                    await eventually(lambda: calls == call)
                # Messages come while a token is made.
                await socket.send("\nmessage")
                self.assertEqual(await take(client, 1), [Message("message", None)])
                await client.send("first")
                self.assertEqual(await soon(socket.recv()), "first")
        self.assertEqual([record.getMessage() for record in logs.records], ["no new token: away"])


if __name__ == "__main__":
    logging.basicConfig(handlers=[logging.NullHandler()])
    unittest.main()
