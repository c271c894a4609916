"""A TCP proxy on loopback that does to a connection what networks do: cut, reset, half-close, stall, slow down, repeat bytes.

It runs in a thread with an asyncio loop of its own. A fault strikes once, at a byte offset of one direction.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

TO_NODE, TO_PEER = "to node", "to peer"
Kind = Literal["cut", "reset", "half-close", "stall", "trickle", "delay", "duplicate", "insert"]
BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one direction of a connection after `offset` bytes of it were passed on.

    cut: both sides are closed in order. reset: both sides are reset. half-close: the receiving side sees the end, the other
    direction goes on. stall: nothing more passes and nothing is closed. trickle: the next `count` bytes pass singly, `seconds`
    apart. delay: a pause. duplicate: the last `count` bytes pass once more. insert: `data` passes in addition, then both are closed.
    """

    kind: Kind
    direction: str
    offset: int
    count: int = 0
    seconds: float = 0.0
    data: bytes = b""


class FaultProxy:
    """Passes connections on to a port of loopback, from `with` to its end."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._connections: set[asyncio.Task[None]] = set()
        self._fault: Fault | None = None
        self.struck = 0  # connections that the fault has struck
        self.passed = {TO_NODE: 0, TO_PEER: 0}  # bytes of the latest connection

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop).result(120)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(120)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(120)
        self._loop.close()

    def strike(self, fault: Fault | None) -> None:
        """Set the fault of each connection from now on."""
        self._fault = fault
        self.struck = 0

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        pair = [(reader, writer)]
        try:
            pair.append(await asyncio.open_connection("127.0.0.1", self._target_port))
            for _, end in pair:
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.passed = {TO_NODE: 0, TO_PEER: 0}
            streams = [
                asyncio.create_task(self._pass_on(pair[0][0], pair[1][1], pair, TO_NODE)),
                asyncio.create_task(self._pass_on(pair[1][0], pair[0][1], pair, TO_PEER)),
            ]
            try:
                await asyncio.gather(*streams)
            finally:
                for stream in streams:
                    stream.cancel()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for _, end in pair:
                end.transport.abort() if end.transport.get_write_buffer_size() else end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: list, direction: str) -> None:  # type: ignore[type-arg]  # streams
        fault = self._fault if self._fault is not None and self._fault.direction == direction else None
        passed, latest = 0, b""
        while True:
            if fault is not None and passed == fault.offset:
                self.struck += 1
                if not await self._strike(fault, reader, writer, pair, latest):
                    return
                fault = None
            data = await reader.read(BYTES if fault is None else min(BYTES, fault.offset - passed))
            if not data:
                break
            writer.write(data)
            await writer.drain()
            passed += len(data)
            self.passed[direction] = passed
            latest = (latest + data)[-BYTES:]
        if writer.can_write_eof():
            writer.write_eof()

    async def _strike(self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: list, latest: bytes) -> bool:  # type: ignore[type-arg]
        """Let the fault happen; whether the direction goes on after it."""
        match fault.kind:
            case "cut":
                raise ConnectionAbortedError
            case "reset":
                for _, end in pair:
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.transport.abort()
                raise ConnectionResetError
            case "insert":
                writer.write(fault.data)
                await writer.drain()
                raise ConnectionAbortedError
            case "half-close":
                writer.write_eof()
                while await reader.read(BYTES):
                    pass
                return False
            case "stall":
                await asyncio.Event().wait()
            case "delay":
                await asyncio.sleep(fault.seconds)
            case "duplicate":
                writer.write(latest[-fault.count :])
                await writer.drain()
            case "trickle":
                for _ in range(fault.count):
                    data = await reader.read(1)
                    if not data:
                        break
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(fault.seconds)
        return True
