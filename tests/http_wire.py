"""As much of HTTP/1.1 as the fault proxy needs: heads, and bodies passed on as they came."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

HEAD_LIMIT = 1 << 16
_PIECE = 1 << 16


@dataclass
class Head:
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
class Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self) -> Head | None:
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        first, *lines = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return Head(raw, first.split(" ", 2), headers)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until_gone(self) -> None:
        """Swallow what still comes, until the peer gives up."""
        while await self.reader.read(_PIECE):
            pass
        raise EOFError


async def connect(host: str | None, port: int | None) -> Peer:
    return Peer(*await asyncio.open_connection(host, port, limit=HEAD_LIMIT))


def reset(*peers: Peer) -> ConnectionError:
    """Close at once, so that the peers get a reset instead of an orderly end."""
    for peer in peers:
        peer_socket = peer.writer.get_extra_info("socket")
        with suppress(OSError):
            peer_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.writer.transport.abort()
    return ConnectionResetError("as scripted")
