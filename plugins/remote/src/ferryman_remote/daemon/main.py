"""``ferrymand``: listens, and serves each client by a session of its own."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import stat
import struct
import sys
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.abc

from ferryman.errors import ConnectError, FerrymanError
from ferryman.hookspecs import Client
from ferryman.registry import DRIVERS
from ferryman.uri import ConnectionURI
from ferryman_remote.daemon.activation import Given, given_sockets
from ferryman_remote.daemon.config import Config, ConfigError, default_path, read_config, split_address
from ferryman_remote.daemon.hosts import Hosts
from ferryman_remote.daemon.session import serve
from ferryman_remote.sockets import PlainStream, accept, connect_unix, listen_tcp, listen_unix
from ferryman_remote.tls import as_server, context_of, pki
from ferryman_remote.transports import PKI_DIRECTORY, socket_name

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger("ferrymand")

_PEER_CREDENTIALS = struct.Struct("3i")


class Daemon:
    """The listeners, the clients and the hosts of one process.

    :param given: sockets that somebody else has opened for it.
    :ivar addresses: that it listens on, for messages and tests.
    :raises ConfigError: the rules cannot be read.
    """

    def __init__(self, config: Config, given: Sequence[Given] = ()) -> None:
        self.config = config
        self._given = given
        self._tls: ssl.SSLContext | None = None
        self.addresses: list[str] = []
        self._clients = 0
        self._reviewer = config.reviewer()
        self._reached: tuple[str, str, int] | None = None

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until cancelled; then migrations are aborted safely, hosts are closed, and guests run on.

        :param ready: called once everything listens.
        :raises ConfigError: an address cannot be listened on.
        """
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(anyio.create_task_group())
            hosts = Hosts(
                tasks,
                self._address,
                default=self.config.default_uri,
                features=self.config.features,
                allows=self.config.allows,
                reviewer=self._reviewer,
            )
            serving = {
                "tls": partial(self._serve_tls, hosts),
                "tcp": partial(self._serve_tcp, hosts),
                "unix": partial(self._serve_unix, hosts, read_only=False),
                "unix-ro": partial(self._serve_unix, hosts, read_only=True),
            }
            given = [(_address_of(each), each) for each in self._given]
            taken = {address for address, _ in given}
            for scheme in self.config.schemes or _installed_schemes():
                for kind in ("unix", "unix-ro"):
                    path = Path(self.config.socket_directory) / socket_name(
                        scheme, read_only=kind == "unix-ro"
                    )
                    if str(path) in taken:
                        continue
                    listener = await _listen_unix(path, read_only=kind == "unix-ro")
                    stack.callback(path.unlink, missing_ok=True)
                    tasks.start_soon(accept, listener, serving[kind])
                    self.addresses.append(f"unix:{path}")
            for address, each in given:
                kind = self._kind_of(each, address)
                tasks.start_soon(accept, each.listener, serving[kind])
                self._announce(kind, each.listener, address)
            for kind, address in (("tls", self.config.tls_listen), ("tcp", self.config.tcp_listen)):
                if address:
                    tasks.start_soon(accept, self._listen(kind, address), serving[kind])
            for uri in self.config.hosts:
                tasks.start_soon(_open_ahead, hosts, uri)
            ready()
            await anyio.sleep_forever()

    def _listen(self, transport: str, address: str) -> socket.socket:
        if transport == "tls":
            self._context()
        host, port = split_address(address, f"{transport}_listen")
        try:
            listener = listen_tcp(host, port)
        except OSError as error:
            raise ConfigError(f"{address} cannot be listened on: {error}") from error
        self._announce(transport, listener, host)
        return listener

    def _announce(self, kind: str, listener: socket.socket, host: str) -> None:
        """Note an address that is listened on."""
        if listener.family == socket.AF_UNIX:
            self.addresses.append(f"unix:{host}")
            return
        port = listener.getsockname()[1]
        if self._reached is None or (kind == "tls" and self._reached[0] == "tcp"):
            self._reached = (kind, host, port)
        self.addresses.append(f"{kind}:{host}:{port}")

    def _kind_of(self, given: Given, address: str) -> str:
        """How a socket that was passed is served.

        :raises ConfigError: its unit does not say, or it would need what the configuration does not allow.
        """
        if given.listener.family == socket.AF_UNIX:
            return "unix-ro" if address.endswith("-ro") else "unix"
        if given.name not in ("tls", "tcp"):
            raise ConfigError(
                f"a socket of {address} was passed, named {given.name!r:.60}: its unit must say"
                " FileDescriptorName=tls or FileDescriptorName=tcp"
            )
        if given.name == "tcp" and not self.config.tcp_without_encryption:
            raise ConfigError(
                f"a socket of {address} was passed for tcp, which serves everybody who can reach it, unencrypted and"
                " unasked: pass one for tls, or set tcp_without_encryption = true if the network is yours alone"
            )
        if given.name == "tls":
            self._context()
        return given.name

    def _context(self) -> ssl.SSLContext:
        """What the daemon shows and asks for over TLS. :raises ConnectError: its certificates cannot be used."""
        if self._tls is None:
            self._tls = context_of(pki(self.config.pki_directory or None, "server"), server=True)
        return self._tls

    def _address(self, uri: ConnectionURI) -> str | None:
        """By which other hosts reach a host of this daemon; None where they cannot."""
        if self.config.address:
            asked = ConnectionURI.parse(self.config.address)
            transport, host, port = asked.scheme, asked.host, asked.port
        elif self._reached is not None:
            transport, host, port = self._reached
            if host in ("0.0.0.0", "::"):  # noqa: S104 - it is compared, and not bound
                host = socket.gethostname()
        else:
            return None
        return ConnectionURI(
            scheme=uri.scheme, transport=transport, host=host, port=port, path=uri.path, params=uri.params
        ).render()

    async def _serve_unix(self, hosts: Hosts, stream: PlainStream, _peer: object, *, read_only: bool) -> None:
        raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        found = raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, _ = _PEER_CREDENTIALS.unpack(found)
        if not read_only and uid not in (0, os.geteuid()):
            _log.warning("user %d, process %d, may not change anything here: refused", uid, pid)
            return
        client = Client(transport="unix", uid=uid, pid=pid)
        with self._place(client) as place:
            if place:
                await serve(
                    stream, hosts, self.config.limits, client=client, read_only=read_only, secure=True
                )

    async def _serve_tls(self, hosts: Hosts, stream: PlainStream, peer: tuple[str, int]) -> None:
        client = _at("tls", peer)
        with self._place(client) as place:
            if not place:
                return
            try:
                with anyio.fail_after(self.config.opening_s):
                    encrypted, name = await as_server(stream, self._context(), self.config.tls_allowed_names)
            except (ConnectError, TimeoutError) as error:
                why = str(error) or f"the handshake took longer than {self.config.opening_s:g} s"
                _log.warning("%s is refused: %s", client, why)
                return
            client = replace(client, certificate=name)
            await serve(encrypted, hosts, self.config.limits, client=client, secure=True)

    async def _serve_tcp(self, hosts: Hosts, stream: PlainStream, peer: tuple[str, int]) -> None:
        client = _at("tcp", peer)
        with self._place(client) as place:
            if place:
                await serve(stream, hosts, self.config.limits, client=client)

    @contextmanager
    def _place(self, who: Client) -> Iterator[bool]:
        """A place among the clients, or False where there is none; the log says who was turned away."""
        if self._clients >= self.config.clients:
            _log.warning("%s is one client more than %d: refused", who, self.config.clients)
            yield False
            return
        self._clients += 1
        try:
            yield True
        finally:
            self._clients -= 1


def _address_of(given: Given) -> str:
    """Where a socket listens: a path, or a host."""
    name = given.listener.getsockname()
    return str(name if given.listener.family == socket.AF_UNIX else name[0])


def _at(transport: str, peer: tuple[str, int]) -> Client:
    return Client(transport=transport, address=f"{peer[0]} port {peer[1]}")


async def _open_ahead(hosts: Hosts, uri: str) -> None:
    """Open a host before anybody asks for it; who asks tries again where it fails."""
    try:
        await hosts.get(uri)
    except FerrymanError as error:
        _log.error("%s cannot be opened: %s", uri, error)


def _installed_schemes() -> list[str]:
    return sorted({entry.name for entry in metadata.entry_points(group=DRIVERS)})


async def _listen_unix(path: Path, *, read_only: bool) -> socket.socket:
    """Listen at a path; a socket that a daemon left behind is replaced.

    :raises ConfigError: somebody listens there, or it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755 if os.geteuid() == 0 else 0o700)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        try:
            async with await connect_unix(path):
                raise ConfigError(f"another daemon listens at {path}: end it, or set socket_directory")
        except OSError:
            path.unlink(missing_ok=True)
    try:
        return listen_unix(path, 0o666 if read_only else 0o600)
    except OSError as error:
        raise ConfigError(f"{path} cannot be listened on: {error}") from error


async def run(config: Config) -> None:
    """Serve until a signal asks to end. :raises ValueError: sockets that were passed cannot be used."""
    daemon = Daemon(config, given_sockets(os.environ))

    def ready() -> None:
        _log.info("listening on %s", ", ".join(daemon.addresses))
        _notify(f"READY=1\nSTATUS=listening on {', '.join(daemon.addresses)}")

    async with anyio.create_task_group() as tasks:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            tasks.start_soon(daemon.run, ready)
            async for received in signals:
                _log.info("ending after %s", received.name)
                _notify("STOPPING=1")
                tasks.cancel_scope.cancel()
                break


def _notify(state: str) -> None:
    """Tell systemd, where it listens. Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect("\0" + path[1:] if path.startswith("@") else path)
        notify.send(state.encode())


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(argv: list[str] | None = None) -> int:
    """Run the daemon."""
    parser = argparse.ArgumentParser(
        prog="ferrymand", description="Serve Ferryman's drivers to libvirt's clients and to other hosts."
    )
    parser.add_argument("--config", type=Path, help=f"TOML file; default: {default_path()} where it is there")
    parser.add_argument(
        "--version", action="version", version=f"ferrymand {metadata.version('ferryman-remote')}"
    )
    arguments = parser.parse_args(argv)
    try:
        path = arguments.config or default_path()
        text = path.read_text() if arguments.config is not None or path.exists() else ""
        config = read_config(text)
        logging.basicConfig(level=config.log_level, format="%(levelname)s %(name)s: %(message)s")
        if config.pki_directory:
            os.environ[PKI_DIRECTORY] = config.pki_directory
        anyio.run(run, config)
    except (FerrymanError, OSError, ValueError, ExceptionGroup) as error:
        first = _first(error)
        if not isinstance(first, (FerrymanError, OSError, ValueError)):
            raise
        sys.stderr.write(f"ferrymand: {first}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
