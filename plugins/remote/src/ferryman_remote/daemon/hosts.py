"""The hosts that the daemon has open: one connection each, with what libvirt's clients need besides."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import anyio

import ferryman
from ferryman.errors import ConnectError, FerrymanError
from ferryman.types import DomainEventKind
from ferryman.uri import ConnectionURI
from ferryman_remote.contain import contained

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup, TaskStatus

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
            with contained(f"telling a client of {event.kind.value} of domain {event.name}"):
                listener(event)


class Hosts:
    """Opens each host once, at its first client, and keeps it.

    :param address: makes the address by which others reach a host through this daemon.
    :param default: the host of clients that name none.
    :param features: libvirt's numbers of what hosts can do.
    :param reviewer: an observer that says who may do what, beside those that are installed; None is nobody.
    :param allows: whether clients may open a host.  Opening it makes its directory, takes its lock and settles what is
        open there, with the daemon's own rights.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        address: Callable[[ConnectionURI], str | None],
        *,
        default: str,
        features: frozenset[int],
        allows: Callable[[ConnectionURI], bool],
        reviewer: object | None = None,
    ) -> None:
        self._tasks = tasks
        self._address = address
        self.default = default
        self.features = features
        self._allows = allows
        self._reviewer = reviewer
        self._hosts: dict[str, ServedHost] = {}
        self._opening: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    def start(self, what: str, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run something that outlives the client who asked for it.

        :param what: it is, for the log.
        """

        async def run() -> None:
            with contained(what):
                await body()

        self._tasks.start_soon(run)

    async def get(self, text: str) -> ServedHost:
        """The host of a local connection URI.

        :raises URIError: the text is none. :raises ConnectError: it is that of another daemon, or not allowed.
        :raises FerrymanError: the host cannot be opened.
        """
        uri = ConnectionURI.parse(text)
        if uri.transport is not None:
            raise ConnectError(f"{uri} leads to another daemon, and is not served by this one")
        key = uri.render()
        if not self._allows(uri):
            raise ConnectError(f"{uri} is not served here: the daemon's allowed_uris names what is")
        async with self._opening[key]:
            if key not in self._hosts:
                self._hosts[key] = await self._tasks.start(self._keep, uri, key)
            return self._hosts[key]

    async def _keep(
        self, uri: ConnectionURI, key: str, *, task_status: TaskStatus[ServedHost] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Hold a host open: entered and left by one task, as its task groups want it."""
        host: ServedHost | None = None
        try:
            async with ferryman.connect(uri, address=self._address(uri)) as connection:
                if self._reviewer is not None:
                    connection.hooks.add_observer(self._reviewer, "ferryman-remote")
                await connection.acquire()
                with connection.events() as events:
                    host = ServedHost(connection)
                    task_status.started(host)
                    async for event in events:
                        host.happened(event)
        except FerrymanError as error:
            if host is None:
                raise  # to whoever waits for the host
            _log.error("the host %s was lost: %s", uri, error)
        finally:
            self._hosts.pop(key, None)
