"""One host's manager as a program of its own: opens a root of the QEMU driver and serves it to the other programs.

It says ``ready`` when it serves and ``here`` when it stands at a point it was told.  It obeys ``create FILE`` and
``state`` on standard input, and ends with it.  What a migration waits for in vain is shortened: a campaign has many.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock

import anyio

import ferryman
import ferryman_qemu.streams
from ferryman import Connection
from ferryman.engine import Endpoint
from ferryman.errors import ConnectError, DomainNotFoundError, FinishError
from ferryman.hookspecs import DriverHooks, hook_names
from ferryman.types import Side
from ferryman_qemu.driver import QemuDriver
from tests.fault.coordinator import FarHost
from tests.fault.points import stopping
from tests.fault.rpc import Link, ask, be_impatient, serve

STREAM_SILENCE_S = 1.5
"""How long the peer of a migration stream may be silent here."""

_ASK_LONGEST_S = 0.5


class _Desk:
    """What the other programs may call besides the hooks and the endpoint."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def greet(self) -> tuple[str, str, frozenset[str]]:
        """Address, distribution and hooks of this host."""
        hooks = self._connection.hooks
        return (
            self._connection.address,
            hooks.distribution,
            frozenset(name for name in hook_names(DriverHooks) if hooks.has(name)),
        )


def _address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)


@contextmanager
def _altered(arguments: argparse.Namespace) -> Iterator[None]:
    """Put in place what this program does otherwise than the product."""
    real_stream = ferryman_qemu.streams.connect_stream

    def connect_stream(text: str) -> socket.socket:
        stream = real_stream(text)
        be_impatient(stream, STREAM_SILENCE_S)
        return stream

    async def ask_peer(address: str, question: Callable[[Endpoint], Awaitable[None]]) -> None:
        if address != arguments.peer_uri:
            raise ConnectError(f"no host is known by the address {address}")

        async def put(link: Link) -> None:
            await question(FarHost(address, link))

        await ask(*_address(arguments.peer_at), put)

    async def refuse_to_run(*_arguments: object) -> None:
        raise FinishError("the guest is not to run here", side=Side.DESTINATION)

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(ferryman_qemu.streams, "connect_stream", connect_stream))
        enter(mock.patch("ferryman.connection._ask_peer", ask_peer))
        enter(mock.patch("ferryman.engine._ASK_LONGEST_S", _ASK_LONGEST_S))
        if arguments.finish_fails:
            enter(mock.patch.object(QemuDriver, "_run", refuse_to_run))
        enter(stopping(arguments.point, arguments.trace))
        yield


async def _domains(connection: Connection) -> list[list[str]]:
    """Names and states; a domain that ends while it is looked at is not there."""
    found = []
    for domain in await connection.list_domains():
        with suppress(DomainNotFoundError):
            found.append([domain.name, (await domain.info()).state.value])
    return found


async def _obey(connection: Connection, busy: list[str]) -> None:
    rest = b""
    while True:
        await anyio.wait_readable(0)
        data = os.read(0, 4096)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            match line.decode().split(" ", 1):
                case ["create", path]:
                    await connection.create(Path(path).read_text())
                    print("created", flush=True)
                case ["state"]:
                    told = {
                        "open": [
                            f"{row.migration_id} {row.record.value}" for row in connection.open_migrations()
                        ],
                        "busy": busy,
                        "domains": await _domains(connection),
                    }
                    print("state", json.dumps(told), flush=True)
                case _:
                    raise ValueError(f"no such command: {line!r}")


async def _main(arguments: argparse.Namespace) -> None:
    with _altered(arguments):
        async with ferryman.connect(arguments.uri) as connection:
            busy: list[str] = []
            targets = {"hooks": connection.hooks, "host": connection.host, "desk": _Desk(connection)}

            async def handle(stream: anyio.abc.SocketStream) -> None:
                await serve(stream, targets, progress_of=frozenset({"perform"}), busy=busy)

            async with anyio.create_task_group() as tasks:
                for address in arguments.listen:
                    host, port = _address(address)
                    listener = await anyio.create_tcp_listener(local_host=host, local_port=port)
                    tasks.start_soon(listener.serve, handle)
                print("ready", flush=True)
                await _obey(connection, busy)
                tasks.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--listen", required=True, nargs="+", help="HOST:PORT of each side of the network")
    parser.add_argument("--peer-uri", required=True)
    parser.add_argument(
        "--peer-at", required=True, help="HOST:PORT where the other manager answers questions"
    )
    parser.add_argument("--trace", required=True, type=Path, help="every point that is passed")
    parser.add_argument("--point", action="append", default=[], help="where to stand still once")
    parser.add_argument("--finish-fails", action="store_true", help="running an arrived guest fails")
    anyio.run(_main, parser.parse_args())


if __name__ == "__main__":
    main()
