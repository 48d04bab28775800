"""The hosts that the daemon has open: one connection each, with what libvirt's clients need besides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anyio

import ferryman
from ferryman.errors import ConnectError, FerrymanError
from ferryman.types import DomainEventKind
from ferryman.uri import ConnectionURI

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup

    from ferryman.connection import Connection
    from ferryman.types import DomainEvent, DomainInfo, DomainUUID
    from ferryman_remote.daemon.moves import Move

_log = logging.getLogger(__name__)

_ENDED = frozenset(
    {
        DomainEventKind.SHUT_DOWN,
        DomainEventKind.DESTROYED,
        DomainEventKind.SAVED,
        DomainEventKind.CRASHED,
        DomainEventKind.MIGRATED_OUT,
    }
)


class ServedHost:
    """One open host.

    :ivar moves: the last migration of each domain away from here, running or over.
    :ivar listeners: are told every event.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.moves: dict[DomainUUID, Move] = {}
        self.speeds: dict[DomainUUID, int] = {}
        """Cap of the next migration of a domain in MiB/s, where a client has set one."""
        self.listeners: list[Callable[[DomainEvent], None]] = []
        self._ids: dict[DomainUUID, int] = {}
        self._last_id = 0

    def id_of(self, info: DomainInfo) -> int:
        """Number of an active domain, which it keeps until it ends; -1 of another."""
        if not info.state.active:
            self._ids.pop(info.uuid, None)
            return -1
        return self._number(info.uuid)

    def _number(self, uuid: DomainUUID) -> int:
        """The number of an active domain, which may have been seen before its event was."""
        if uuid not in self._ids:
            self._last_id += 1
            self._ids[uuid] = self._last_id
        return self._ids[uuid]

    def known_id(self, uuid: DomainUUID) -> int:
        """Number of a domain as it is known without asking; -1 where it is not."""
        return self._ids.get(uuid, -1)

    def uuid_of(self, number: int) -> DomainUUID | None:
        """The domain that has a number."""
        return next((uuid for uuid, known in self._ids.items() if known == number), None)

    def happened(self, event: DomainEvent) -> None:
        """Tell everybody, and forget the number of a domain that has ended."""
        if event.kind in _ENDED:
            self._ids.pop(event.uuid, None)
        elif event.kind in (DomainEventKind.STARTED, DomainEventKind.MIGRATED_IN):
            self._number(event.uuid)
        for listener in list(self.listeners):
            listener(event)


class Hosts:
    """Opens each host once, at its first client, and keeps it.

    :param address: makes the address by which others reach a host through this daemon.
    :param default: the host of clients that name none.
    :param features: libvirt's numbers of what hosts can do.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        address: Callable[[ConnectionURI], str | None],
        *,
        default: str,
        features: frozenset[int],
    ) -> None:
        self._tasks = tasks
        self._address = address
        self.default = default
        self.features = features
        self._hosts: dict[str, ServedHost] = {}
        self._opening = anyio.Lock()

    def start(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run something that outlives the client who asked for it."""
        self._tasks.start_soon(body)

    async def get(self, text: str) -> ServedHost:
        """The host of a local connection URI.

        :raises URIError: the text is none. :raises ConnectError: it is that of another daemon.
        :raises FerrymanError: the host cannot be opened.
        """
        uri = ConnectionURI.parse(text)
        if uri.transport is not None:
            raise ConnectError(f"{uri} leads to another daemon, and is not served by this one")
        key = uri.render()
        async with self._opening:
            if key not in self._hosts:
                self._hosts[key] = await self._open(uri)
            return self._hosts[key]

    async def _open(self, uri: ConnectionURI) -> ServedHost:
        failures: list[FerrymanError] = []
        opened: list[ServedHost] = []
        ready = anyio.Event()
        self._tasks.start_soon(self._keep, uri, opened, failures, ready)
        await ready.wait()
        if failures:
            raise failures[0]
        return opened[0]

    async def _keep(
        self, uri: ConnectionURI, opened: list[ServedHost], failures: list[FerrymanError], ready: anyio.Event
    ) -> None:
        """Hold a host open: entered and left by one task, as its task groups want it."""
        try:
            async with ferryman.connect(uri, address=self._address(uri)) as connection:
                await connection.acquire()
                host = ServedHost(connection)
                with connection.events() as events:
                    opened.append(host)
                    ready.set()
                    async for event in events:
                        host.happened(event)
        except FerrymanError as error:
            failures.append(error)
            if ready.is_set():
                _log.error("the host %s was lost: %s", uri, error)
        finally:
            self._hosts.pop(uri.render(), None)
            ready.set()
