"""A proxy before the tests' S3 server that fails on demand, and remembers what was asked of it.

It speaks plain HTTP/1.1 and passes every byte as it is, the Host header too, so signatures stay
right. Clients may be in any process; what they must do is take `proxy.env`:

    with fault_proxy(server) as proxy:
        proxy.fail(Fault.SLOW_DOWN, times=3, method="GET", key="shard-")
        ...
        assert len(proxy.requests(method="GET", key="shard-00000")) == 4
        assert proxy.bytes_read(key="shard-") < 10_000
"""

import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from urllib.parse import unquote, urlsplit

from pipelines.local_s3 import S3Server
from tests.http_wire import HEAD_LIMIT, Head, Peer, connect, reset


class Fault(Enum):
    """What can happen to a request."""

    SLOW_DOWN = "answered 503 SlowDown; the server never sees it"
    INTERNAL_ERROR = "answered 500 InternalError; the server never sees it"
    BAD_GATEWAY = "answered 502 without S3's XML, as a load balancer does"
    RESET = "the connection is reset; the server never sees it"
    LOST_ANSWER = "the server does it, then the connection is reset without an answer"
    CUT = "the connection is reset in the middle of the body (the request's, if it has one)"
    SLOW_START = "the answer begins only after some seconds"
    STALL = "the body stops in its middle and the connection stays open"
    SILENCE = "no answer, and the connection stays open; the server never sees it"


_ANSWERS = {
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.INTERNAL_ERROR: (500, "InternalError", "We encountered an internal error."),
    Fault.BAD_GATEWAY: (502, None, "<html>Bad Gateway</html>"),
}


@dataclass
class Request:
    """One request that reached the proxy."""

    method: str
    key: str
    """bucket/key, decoded."""
    query: str
    """What follows the question mark, decoded."""
    range: str | None
    """The Range header, such as bytes=0-99."""
    fault: Fault | None = None
    """What befell it."""
    status: int | None = None
    """Status of the answer, once it began."""
    received: int = 0
    """Bytes of body the client sent (with the framing, if it was chunked)."""
    sent: int = 0
    """Bytes of body the client was sent (with the framing, if it was chunked)."""

    def matches(self, method: str | None, key: str) -> bool:
        """Whether it is of the method, and ``key`` is part of its bucket/key?query."""
        return method in (None, self.method) and key in f"{self.key}?{self.query}"


@dataclass
class _Rule:
    faults: tuple[Fault, ...]
    left: int | None
    method: str | None
    key: str
    probability: float
    seconds: float
    draw: random.Random

    def choose(self, request: Request) -> Fault | None:
        if self.left == 0 or not request.matches(self.method, self.key):
            return None
        if self.draw.random() >= self.probability:
            return None
        if self.left is not None:
            self.left -= 1
        return self.draw.choice(self.faults)


class FaultProxy:
    """Where requests are scripted and counted; made by :func:`fault_proxy`."""

    def __init__(self, behind: S3Server) -> None:
        self._behind = urlsplit(behind.endpoint)
        self._rules: list[_Rule] = []
        self._requests: list[Request] = []
        self.server = behind
        """The server as it is reached through the proxy: `client()`, `bucket()`, `endpoint`."""

    @property
    def env(self) -> dict[str, str]:
        """The standard variables that make any S3 client talk through this proxy."""
        return self.server.env

    def fail(
        self,
        *faults: Fault,
        times: int | None = 1,
        method: str | None = None,
        key: str = "",
        probability: float = 1.0,
        seconds: float = 3.0,
        seed: int = 0,
    ) -> None:
        """Let requests fail from now on; the first rule that chooses a fault for one wins.

        Args:
            faults: What happens; one of them at random if several are given.
            times: How many requests fail; None is no end.
            method: Only requests of this method.
            key: Only requests with this in their `bucket/key?query`.
            probability: Chance of each such request to fail.
            seconds: Length of SLOW_START.
            seed: Of the draws. Requests draw in the order they come in.
        """
        draw = random.Random(seed)
        self._rules.append(_Rule(faults, times, method, key, probability, seconds, draw))

    def requests(self, *, method: str | None = None, key: str = "") -> list[Request]:
        """All requests since the last `clear`, failed ones too, in the order they came in."""
        return [each for each in list(self._requests) if each.matches(method, key)]

    def bytes_read(self, *, key: str = "") -> int:
        """Bytes that GETs were answered with, cut ones too, since the last `clear`."""
        return sum(each.sent for each in self.requests(method="GET", key=key))

    def bytes_written(self, *, key: str = "") -> int:
        """Bytes that PUTs and POSTs sent since the last `clear`."""
        sent = [*self.requests(method="PUT", key=key), *self.requests(method="POST", key=key)]
        return sum(each.received for each in sent)

    def clear(self) -> None:
        """Let nothing fail any more, and forget all requests."""
        self._rules, self._requests = [], []

    async def run(self, ready: threading.Event, stop: asyncio.Event) -> None:
        """Serve until ``stop``, on any free port of the loopback interface."""
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_LIMIT)
        async with listener:
            host, port = listener.sockets[0].getsockname()
            self.server = replace(self.server, endpoint=f"http://{host}:{port}")
            ready.set()
            await stop.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = Peer(reader, writer)
        server: Peer | None = None
        try:
            while head := await client.head():
                if server is None or server.reader.at_eof():
                    server = await connect(self._behind.hostname, self._behind.port)
                if not await self._exchange(head, client, server):
                    return
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one side went away, or the proxy stops: the other is let go too
        finally:
            client.writer.close()
            if server:
                server.writer.close()

    async def _exchange(self, head: Head, client: Peer, server: Peer) -> bool:
        """Answer one request, and say whether the connection can take another."""
        request = _request(head)
        rule, fault = self._choose(request)
        request.fault = fault
        self._requests.append(request)
        if fault is Fault.RESET:
            raise reset(client, server)
        if fault in _ANSWERS:
            return await _answer(head, request, client, *_ANSWERS[fault])
        if fault is Fault.SILENCE:
            await client.until_gone()
        if fault in (Fault.CUT, Fault.STALL) and head.has_body:
            if "expect" in head.headers:
                await client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            server.writer.write(head.raw)
            async for piece in head.body(client.reader, half=True):
                request.received += len(piece)
                await server.write(piece)
            if fault is Fault.STALL:
                await client.until_gone()
            raise reset(client, server)
        if rule and fault is Fault.SLOW_START:
            await asyncio.sleep(rule.seconds)
        return await self._pass(head, request, client, server)

    def _choose(self, request: Request) -> tuple[_Rule | None, Fault | None]:
        for rule in self._rules:
            if fault := rule.choose(request):
                return rule, fault
        return None, None

    async def _pass(self, head: Head, request: Request, client: Peer, server: Peer) -> bool:
        async def upload() -> None:
            try:
                async for piece in head.body(client.reader):
                    request.received += len(piece)
                    await server.write(piece)
            except (OSError, EOFError):
                reset(server)  # else the server, and so this proxy, would wait for the rest

        await server.write(head.raw)
        # Beside the answer, which may begin before the body ends: 100 Continue, or a refusal.
        uploading = asyncio.create_task(upload())
        try:
            while (answer := await server.head()) and answer.is_interim:
                await client.write(answer.raw)
            if answer is None:
                raise reset(client, server)
            if request.fault is Fault.LOST_ANSWER:
                raise reset(client, server)
            whole = await _pass_answer(answer, request, client, server)
            return whole and uploading.done() and not answer.closes
        finally:
            uploading.cancel()
            with suppress(asyncio.CancelledError):
                await uploading


@contextmanager
def fault_proxy(server: S3Server) -> Iterator[FaultProxy]:
    """Run a proxy before ``server`` until the block ends."""
    proxy = FaultProxy(server)
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(proxy.run(ready, stop))

    thread = threading.Thread(target=serve, name="fault-proxy", daemon=True)
    thread.start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the proxy did not start within 10 s")
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def _request(head: Head) -> Request:
    method, target, _ = head.start
    path, _, query = target.partition("?")
    return Request(method, unquote(path).lstrip("/"), unquote(query), head.headers.get("range"))


async def _answer(
    head: Head, request: Request, client: Peer, status: int, code: str | None, text: str
) -> bool:
    """Answer in the server's place."""
    request.status = status
    waits = "expect" in head.headers  # for leave to send its body, which it doesn't get
    if not waits:
        async for piece in head.body(client.reader):
            request.received += len(piece)
    body = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>" if code else text
    fields = [
        f"HTTP/1.1 {status} {code or 'Bad Gateway'}",
        f"Content-Type: {'application/xml' if code else 'text/html'}",
        f"Content-Length: {len(body)}",
        f"Connection: {'close' if waits else 'keep-alive'}",
    ]
    if request.method == "HEAD":
        body = ""
    request.sent = len(body)
    await client.write(("\r\n".join(fields) + "\r\n\r\n" + body).encode())
    return not waits


async def _pass_answer(answer: Head, request: Request, client: Peer, server: Peer) -> bool:
    """Pass an answer on, perhaps half of it, and say whether the connection is still good."""
    request.status = int(answer.start[1])
    answer.bodiless = request.method == "HEAD" or request.status in (204, 304)
    half = request.fault in (Fault.CUT, Fault.STALL)
    if half and not answer.has_body:
        await client.write(answer.raw[: len(answer.raw) // 2])
    else:
        client.writer.write(answer.raw)
        async for piece in answer.body(server.reader, half):
            request.sent += len(piece)
            await client.write(piece)
    if request.fault is Fault.STALL:
        await client.until_gone()
    if half:
        raise reset(client, server)
    return True
