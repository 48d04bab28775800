"""Connections to hosts and the domains on them: the asynchronous API.

A :class:`Connection` is an asynchronous context manager: leaving it ends its background work and lets the host go.
Guests go on running.  :mod:`ferryman.sync` is the blocking face of the same objects.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid as uuid_module
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import anyio.to_thread

from ferryman.capabilities import Capabilities
from ferryman.definition import minimal_definition
from ferryman.engine import Endpoint, Host
from ferryman.errors import ConnectError, ConnectionClosedError, NotSupportedError
from ferryman.hookspecs import (
    DefinitionRequest,
    DomainRequest,
    HostRequest,
    LookupRequest,
    OpenReply,
    OpenRequest,
)
from ferryman.registry import Hooks, open_driver
from ferryman.types import (
    DomainEvent,
    DomainInfo,
    DomainState,
    DomainStatistics,
    DomainUUID,
    MigrationId,
    MigrationOptions,
)
from ferryman.uri import ConnectionURI

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from types import TracebackType

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectSendStream

    from ferryman.handover import MigrationRow
    from ferryman.migration import MigrationJob
    from ferryman.plan import Plan
    from ferryman.resolve import Resolution, Testimony

_log = logging.getLogger(__name__)

_EVENTS_KEPT = 10_000

_open_hosts: dict[tuple[Any, str], Connection] = {}
"""Hosts that are open in this process, by event loop and address: asking one of them needs no second opening."""


def connect(uri: str | ConnectionURI) -> Connection:
    """Make the connection to a host; it opens when it is entered with ``async with``.

    :raises URIError: the URI is malformed.
    """
    return Connection(ConnectionURI.parse(uri) if isinstance(uri, str) else uri)


class Connection:
    """A connection to one host.

    Entering it loads the driver, opens the host, and settles what earlier programs left open there.

    :raises UnknownSchemeError: on entering: nothing installed serves the URI.
    :raises ConnectError: on entering: the host cannot be used.
    :raises HostBusyError: on entering: another program holds the host.
    :raises JournalError: on entering: the host's journal cannot be trusted.
    :cancellation: while entering: nothing is left open.
    """

    def __init__(self, uri: ConnectionURI) -> None:
        self.uri = uri
        self._stack = AsyncExitStack()
        self._hooks: Hooks | None = None
        self._host: Host | None = None
        self._listeners: list[MemoryObjectSendStream[DomainEvent]] = []
        self._bare: dict[DomainUUID, DomainInfo] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            # Without the exception, which the task groups would wrap in an ExceptionGroup.
            await self._stack.__aexit__(None, None, None)
            raise
        return self

    async def _open(self) -> None:
        stack = self._stack = AsyncExitStack()
        hooks = await anyio.to_thread.run_sync(open_driver, self.uri)
        # INVARIANT: two groups, since the engine's tasks end before the journal, and the driver's after its close.
        tasks = await _enter_tasks(stack)
        reply = OpenReply()
        if hooks.has("connection_open"):
            reply = await hooks.call(
                "connection_open", OpenRequest(uri=self.uri, tasks=tasks, emit=self._emit), OpenReply
            )
        if hooks.has("connection_close"):
            stack.push_async_callback(_close_host, hooks)
        address = reply.address or self.uri.render()
        from ferryman.journal import Journal  # sqlite3 is loaded where a host is opened

        path = reply.journal or _default_journal(self.uri.scheme, address)
        journal = await anyio.to_thread.run_sync(Journal.open, path)
        stack.callback(journal.close)
        host = Host(
            hooks, journal, address=address, peer=_ask_peer, start=_starter(await _enter_tasks(stack))
        )
        key = (anyio.lowlevel.current_token(), address)
        if key not in _open_hosts:
            _open_hosts[key] = self
            stack.callback(_open_hosts.pop, key, None)
        self._hooks, self._host = hooks, host
        stack.callback(self._closed)
        await host.recover()

    async def __aexit__(self, *exc_info: object) -> None:
        # The block's own exception stays out of the task groups, which would wrap it in an ExceptionGroup.
        await self._stack.__aexit__(None, None, None)

    def _closed(self) -> None:
        self._hooks = None
        self._host = None
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _emit(self, event: DomainEvent) -> None:
        for listener in list(self._listeners):
            try:
                listener.send_nowait(event)
            except anyio.WouldBlock:
                _log.warning("a listener is %d events behind and missed one", _EVENTS_KEPT)
            except anyio.BrokenResourceError:
                self._listeners.remove(listener)

    @property
    def hooks(self) -> Hooks:
        """The driver's hooks. :raises ConnectionClosedError: the connection is not open."""
        if self._hooks is None:
            raise ConnectionClosedError(
                f"the connection to {self.uri} is not open: use it inside its async with block"
            )
        return self._hooks

    @property
    def host(self) -> Host:
        """The host's end of migrations. :raises ConnectionClosedError: the connection is not open."""
        if self._host is None:
            raise ConnectionClosedError(
                f"the connection to {self.uri} is not open: use it inside its async with block"
            )
        return self._host

    @property
    def address(self) -> str:
        """Connection URI by which another end can ask this host."""
        return self.host.address

    async def capabilities(self) -> Capabilities:
        """Say what this host and its driver can do."""
        return await self.hooks.call("capabilities", HostRequest(), Capabilities)

    async def list_domains(self) -> list[Domain]:
        """List all domains, active or not."""
        found: list[DomainInfo] = await self.hooks.call("domain_list", HostRequest(), list)
        return [Domain(self, info.name, info.uuid) for info in found]

    async def lookup_by_name(self, name: str) -> Domain:
        """Find a domain by its name. :raises DomainNotFoundError: there is none."""
        info = await self.hook_lookup(LookupRequest(name=name))
        return Domain(self, info.name, info.uuid)

    async def lookup_by_uuid(self, uuid: str) -> Domain:
        """Find a domain by its uuid. :raises DomainNotFoundError: there is none, or the text is no uuid."""
        info = await self.hook_lookup(LookupRequest(uuid=DomainUUID(uuid.lower())))
        return Domain(self, info.name, info.uuid)

    async def define(self, definition: str) -> Domain:
        """Make a persistent domain from libvirt domain XML, or redefine the one of that uuid.

        :raises DefinitionError: names the element at fault. :raises DomainExistsError: the name belongs to another.
        """
        info = await self.hooks.call("domain_define", DefinitionRequest(definition=definition), DomainInfo)
        return Domain(self, info.name, info.uuid)

    async def create(self, definition: str, *, paused: bool = False) -> Domain:
        """Make and start a transient domain from libvirt domain XML.  Errors as :meth:`define`."""
        info = await self.hooks.call(
            "domain_create", DefinitionRequest(definition=definition, paused=paused), DomainInfo
        )
        return Domain(self, info.name, info.uuid)

    @contextmanager
    def events(self) -> Iterator[AsyncIterator[DomainEvent]]:
        """Listen to events of all domains; those from now on come, in order, until the block is left."""
        self.hooks  # noqa: B018 - raises where the connection is closed
        send, receive = anyio.create_memory_object_stream[DomainEvent](_EVENTS_KEPT)
        self._listeners.append(send)
        try:
            with receive:
                yield receive
        finally:
            send.close()
            if send in self._listeners:
                self._listeners.remove(send)

    def open_migrations(self) -> list[MigrationRow]:
        """Migrations that are under way or in doubt at this host."""
        return self.host.open_migrations()

    def in_doubt(self) -> list[Resolution]:
        """Every migration that is open at this host, and which evidence is missing; asks nobody."""
        return self.host.in_doubt()

    async def resolve(
        self, migration_id: str | None = None, testimony: Testimony | None = None
    ) -> list[Resolution]:
        """Settle what is open at this host: alone, by asking the other end, and with what a person brings.

        :param migration_id: only this one; None is every open one.
        :raises MigrationNotFoundError: nothing of that id is known here.
        :raises OptionError: evidence was brought, and several migrations are open.
        :raises JournalError: the journal that was brought cannot be used. :raises HostBusyError: it is in use.
        :cancellation: between two steps; what was decided stays.
        """
        found = MigrationId(migration_id) if migration_id is not None else None
        return await self.host.resolve(found, testimony)

    async def hook_lookup(self, request: LookupRequest) -> DomainInfo:
        """Find a domain through the driver, or make the default handle that ``hookspecs`` documents."""
        if self.hooks.has("domain_lookup"):
            return await self.hooks.call("domain_lookup", request, DomainInfo)
        known = self._bare.get(request.uuid) if request.uuid is not None else None
        if known is not None:
            return known
        if request.name is None:
            raise NotSupportedError(f"the driver {self.hooks.distribution} does not look domains up by uuid")
        uuid = DomainUUID(
            str(uuid_module.uuid5(uuid_module.NAMESPACE_URL, f"{self.uri.scheme}:{request.name}"))
        )
        info = DomainInfo(
            name=request.name,
            uuid=uuid,
            state=DomainState.RUNNING,
            persistent=False,
            memory_bytes=0,
            vcpus=0,
        )
        self._bare[uuid] = info
        return info


class Domain:
    """A domain on one host: a handle, which holds no state of the domain.

    It stays valid while the domain exists there; after a migration use the result's.
    """

    def __init__(self, connection: Connection, name: str, uuid: DomainUUID) -> None:
        self.connection = connection
        self.name = name
        self.uuid = uuid

    def __repr__(self) -> str:
        return f"<Domain {self.name} {self.uuid} at {self.connection.uri}>"

    async def info(self) -> DomainInfo:
        """Name, uuid, state and size now. :raises DomainNotFoundError: it is no longer there."""
        return await self.connection.hook_lookup(LookupRequest(uuid=self.uuid))

    async def definition(self) -> str:
        """The definition as libvirt domain XML; of an active domain, what it was started from."""
        hooks = self.connection.hooks
        if not hooks.has("domain_definition"):
            return minimal_definition(name=self.name, uuid=self.uuid)
        return await hooks.call("domain_definition", self._request(), str)

    async def statistics(self) -> DomainStatistics:
        """Counters now."""
        return await self.connection.hooks.call("domain_statistics", self._request(), DomainStatistics)

    async def start(self, *, paused: bool = False) -> None:
        """Start a persistent domain. :raises DomainStateError: it is active."""
        await self._change("domain_start", DomainInfo, paused=paused)

    async def suspend(self) -> None:
        """Pause the guest; a paused one stays paused."""
        await self._change("domain_suspend", type(None))

    async def resume(self) -> None:
        """Run a paused guest; a running one goes on."""
        await self._change("domain_resume", type(None))

    async def shutdown(self) -> None:
        """Ask the guest to shut down; returns before it has."""
        await self._change("domain_shutdown", type(None))

    async def destroy(self) -> None:
        """End the guest at once, as pulling the plug does."""
        await self._change("domain_destroy", type(None))

    async def undefine(self) -> None:
        """Forget the persistent definition; a running guest goes on and becomes transient."""
        await self._change("domain_undefine", type(None))

    async def plan_migration(self, destination: Connection, options: MigrationOptions | None = None) -> Plan:
        """Check a migration against both hosts; changes nothing.

        :returns: a plan whose blockers say what stops it, each with its remedy.
        """
        from ferryman.plan import make_plan

        return await make_plan(self, destination, options or MigrationOptions())

    def migrate(self, destination: Connection, options: MigrationOptions | None = None) -> MigrationJob:
        """Plan and migrate: ``await`` the job for its result, or enter it with ``async with`` to watch and steer."""
        from ferryman.migration import MigrationJob

        return MigrationJob(self, destination, options or MigrationOptions())

    def _request(self, *, paused: bool = False) -> DomainRequest:
        return DomainRequest(uuid=self.uuid, name=self.name, paused=paused)

    async def _change(self, hook: str, expects: type[Any], *, paused: bool = False) -> None:
        self.connection.host.require_free(self.uuid, self.name)
        await self.connection.hooks.call(hook, self._request(paused=paused), expects)


async def _enter_tasks(stack: AsyncExitStack) -> TaskGroup:
    tasks = anyio.create_task_group()
    await tasks.__aenter__()

    async def leave(
        kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return await tasks.__aexit__(kind, error, trace)
        except BaseException as raised:
            # The exit stack would make an exception that comes back its own context, over which anyio loops for ever.
            if raised is error:
                return False
            raise

    stack.push_async_exit(leave)
    stack.callback(tasks.cancel_scope.cancel)
    return tasks


async def _close_host(hooks: Hooks) -> None:
    with anyio.CancelScope(shield=True):
        await hooks.call("connection_close", HostRequest(), type(None))


def _default_journal(scheme: str, address: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "ferryman" / f"{scheme}-{hashlib.sha256(address.encode()).hexdigest()[:16]}.journal"


def _starter(tasks: TaskGroup) -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    def start(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        tasks.start_soon(body)

    return start


async def _ask_peer(address: str, ask: Callable[[Endpoint], Awaitable[None]]) -> None:
    """Open the endpoint behind an address, and ask it."""
    if not address:
        raise ConnectError("the other host's address is not known: its papers did not name one")
    async with _peer_connection(address) as connection:
        await ask(connection.host)


@asynccontextmanager
async def _peer_connection(address: str) -> AsyncIterator[Connection]:
    known = _open_hosts.get((anyio.lowlevel.current_token(), address))
    if known is not None:
        yield known
        return
    async with connect(address) as opened:
        yield opened
