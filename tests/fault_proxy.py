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
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from urllib.parse import unquote, urlsplit

from tests.s3_server import S3Server

_PIECE = 1 << 16
_HEAD_LIMIT = 1 << 16


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
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_HEAD_LIMIT)
        async with listener:
            host, port = listener.sockets[0].getsockname()
            self.server = replace(self.server, endpoint=f"http://{host}:{port}")
            ready.set()
            await stop.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Peer(reader, writer)
        server: _Peer | None = None
        try:
            while head := await client.head():
                if server is None or server.reader.at_eof():
                    server = await _connect(self._behind.hostname, self._behind.port)
                if not await self._exchange(head, client, server):
                    return
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # one side went away, or the proxy stops: the other is let go too
        finally:
            client.writer.close()
            if server:
                server.writer.close()

    async def _exchange(self, head: "_Head", client: "_Peer", server: "_Peer") -> bool:
        """Answer one request, and say whether the connection can take another."""
        request = head.request()
        rule, fault = self._choose(request)
        request.fault = fault
        self._requests.append(request)
        if fault is Fault.RESET:
            raise _reset(client, server)
        if fault in _ANSWERS:
            return await _answer(head, request, client, *_ANSWERS[fault])
        if fault is Fault.SILENCE:
            await client.until_gone()
        if fault in (Fault.CUT, Fault.STALL) and head.has_body:
            server.writer.write(head.raw)
            async for piece in head.body(client.reader, half=True):
                request.received += len(piece)
                await server.write(piece)
            if fault is Fault.STALL:
                await client.until_gone()
            raise _reset(client, server)
        if rule and fault is Fault.SLOW_START:
            await asyncio.sleep(rule.seconds)
        return await self._pass(head, request, client, server)

    def _choose(self, request: Request) -> tuple[_Rule | None, Fault | None]:
        for rule in self._rules:
            if fault := rule.choose(request):
                return rule, fault
        return None, None

    async def _pass(
        self, head: "_Head", request: Request, client: "_Peer", server: "_Peer"
    ) -> bool:
        async def upload() -> None:
            async for piece in head.body(client.reader):
                request.received += len(piece)
                await server.write(piece)

        await server.write(head.raw)
        # Beside the answer, which may begin before the body ends: 100 Continue, or a refusal.
        uploading = asyncio.create_task(upload())
        try:
            while (answer := await server.head()) and answer.is_interim:
                await client.write(answer.raw)
            if answer is None:
                raise _reset(client, server)
            if request.fault is Fault.LOST_ANSWER:
                raise _reset(client, server)
            whole = await _pass_answer(answer, request, client, server)
            return whole and uploading.done() and not answer.closes
        finally:
            uploading.cancel()
            with suppress(asyncio.CancelledError, OSError, EOFError):
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


@dataclass
class _Head:
    """First lines of a request or an answer."""

    raw: bytes
    start: list[str]
    headers: dict[str, str]
    bodiless: bool = field(default=False)

    @property
    def length(self) -> int | None:
        return int(self.headers["content-length"]) if "content-length" in self.headers else None

    @property
    def chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def has_body(self) -> bool:
        return not self.bodiless and (self.chunked or bool(self.length))

    @property
    def is_interim(self) -> bool:
        return self.start[1].startswith("1")

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    def request(self) -> Request:
        path, _, query = self.start[1].partition("?")
        return Request(
            self.start[0], unquote(path).lstrip("/"), unquote(query), self.headers.get("range")
        )

    async def body(self, reader: asyncio.StreamReader, half: bool = False) -> AsyncIterator[bytes]:
        """Yield the body as it came, with its framing; of half of it, a chunked one has a byte."""
        if not self.has_body:
            return
        if half and self.chunked:
            yield await reader.readexactly(1)
        elif self.length is not None:
            left = (self.length + 1) // 2 if half else self.length
            while left:
                piece = await reader.read(min(left, _PIECE))
                if not piece:
                    raise EOFError
                left -= len(piece)
                yield piece
        else:
            size = -1
            while size:
                line = await reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                # The last chunk is empty; trailers and an empty line follow it.
                rest = await reader.readexactly(size + 2) if size else await _trailers(reader)
                yield line + rest


async def _trailers(reader: asyncio.StreamReader) -> bytes:
    lines = [await reader.readuntil(b"\r\n")]
    while lines[-1] != b"\r\n":
        lines.append(await reader.readuntil(b"\r\n"))
    return b"".join(lines)


@dataclass
class _Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> _Head | None:
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        first, *lines = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return _Head(raw, first.split(" ", 2), headers)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until_gone(self) -> None:
        """Swallow what still comes, until the peer gives up."""
        while await self.reader.read(_PIECE):
            pass
        raise EOFError


async def _connect(host: str | None, port: int | None) -> _Peer:
    return _Peer(*await asyncio.open_connection(host, port, limit=_HEAD_LIMIT))


async def _answer(
    head: _Head, request: Request, client: _Peer, status: int, code: str | None, text: str
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


async def _pass_answer(answer: _Head, request: Request, client: _Peer, server: _Peer) -> bool:
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
        raise _reset(client, server)
    return True


def _reset(*peers: _Peer) -> ConnectionError:
    """Close at once, so that the peers get a reset instead of an orderly end."""
    for peer in peers:
        peer_socket = peer.writer.get_extra_info("socket")
        with suppress(OSError):
            peer_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.writer.transport.abort()
    return ConnectionResetError("as scripted")
