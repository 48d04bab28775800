"""Connections to hosts and the domains on them: the asynchronous API.

A :class:`Connection` is an asynchronous context manager: leaving it ends its background work and lets the host go.
Guests go on running.  :mod:`ferryman.sync` is the blocking face of the same objects.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import uuid as uuid_module
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
from anyio.abc import ByteStream

from ferryman.capabilities import Capabilities
from ferryman.definition import minimal_definition, parse_definition
from ferryman.engine import Endpoint, Host, HostEnd
from ferryman.errors import (
    ConnectError,
    ConnectionClosedError,
    DomainNotFoundError,
    FerrymanError,
    HostBusyError,
    NotSupportedError,
    OptionError,
)
from ferryman.hookspecs import (
    AdoptRequest,
    AgentRequest,
    AttachRequest,
    AutostartRequest,
    BootRequest,
    ConsoleRequest,
    DefinitionRequest,
    DetachRequest,
    DirtyRateRequest,
    DomainRequest,
    HostRequest,
    LookupRequest,
    MemoryRequest,
    OpenReply,
    OpenRequest,
    RestoreRequest,
    SaveRequest,
    ScreenshotRequest,
    ShutdownRequest,
    StatisticsRequest,
    VcpusRequest,
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
    Scope,
    Screenshot,
    ShutdownMode,
)
from ferryman.uri import ConnectionURI

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
    from types import TracebackType

    from anyio.abc import TaskGroup
    from anyio.streams.memory import MemoryObjectSendStream

    from ferryman.handover import MigrationRow
    from ferryman.journal import Journal
    from ferryman.migration import MigrationJob
    from ferryman.plan import Plan
    from ferryman.resolve import Resolution, Testimony

_log = logging.getLogger(__name__)

_EVENTS_KEPT = 10_000
_ASKED_AT_ONCE = 16
_MAX_DIRTY_RATE_S = 60

_open_hosts: dict[tuple[Any, str], Connection] = {}
"""Hosts that are open in this process, by event loop and address: asking one of them needs no second opening."""


@dataclass(eq=False, slots=True)
class _Question:
    """A host is open in this process for one question only, or was."""

    answered: anyio.Event
    answered_at: float = math.inf


_questions: dict[tuple[Any, str], _Question] = {}
"""The last question to a host, by event loop and address."""

_QUESTION_KEPT_S = 60.0
"""Longer than an opening takes: one that began before the answer found the host in use, and may have it now."""


def connect(uri: str | ConnectionURI, *, address: str | None = None) -> Connection:
    """Make the connection to a host; it opens when it is entered with ``async with``.

    :param address: connection URI by which other hosts reach this one through the caller, as a daemon does; None is
        what the driver says.
    :raises URIError: the URI is malformed.
    """
    return Connection(ConnectionURI.parse(uri) if isinstance(uri, str) else uri, address=address)


class Connection:
    """A connection to one host.

    Entering it loads the driver, opens the host, and settles what earlier programs left open there.

    One program at a time changes a host, from its opening, or its first change, to its closing; others look on
    meanwhile: they list, look up, and count.  Whoever changes something does :meth:`acquire` first, by itself.

    :raises UnknownSchemeError: on entering: nothing installed serves the URI.
    :raises ConnectError: on entering: the host cannot be used.
    :raises HostBusyError: on entering: another program holds the host, and its driver lets nobody look on.
    :raises JournalError: on entering: the host's journal cannot be trusted.
    :cancellation: while entering: nothing is left open.
    """

    def __init__(self, uri: ConnectionURI, *, address: str | None = None) -> None:
        self.uri = uri
        self._address = address
        self._stack = AsyncExitStack()
        self._hooks: Hooks | None = None
        self._host: HostEnd | None = None
        self._reply = OpenReply()
        self._journal: Journal | None = None
        self._key: tuple[Any, str] | None = None
        self._asking: _Question | None = None
        self._acquiring: anyio.Lock
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
        began_at = anyio.current_time()
        # Made here, since it belongs to the loop that runs now, and not to the one that called the constructor.
        self._acquiring = anyio.Lock()
        hooks = await anyio.to_thread.run_sync(open_driver, self.uri)
        # INVARIANT: two groups, since the engine's tasks end before the journal, and the driver's after its close.
        tasks = await _enter_tasks(stack)
        if hooks.has("connection_open"):
            self._reply = await hooks.call(
                "connection_open", OpenRequest(uri=self.uri, tasks=tasks, emit=self._emit), OpenReply
            )
        if hooks.has("connection_close"):
            stack.push_async_callback(_close_host, hooks)
        stack.callback(self._close_journal)
        self._start = _starter(await _enter_tasks(stack))
        self._hooks = hooks
        stack.callback(self._closed)
        if self._reply.hooks is not None:
            hooks.limit(self._reply.hooks)
        if self._reply.end is not None:
            self._host = self._reply.end
            return
        if not self._reply.looks_on:
            await self._open_host(hooks)
            return
        asked = _questions.get((anyio.lowlevel.current_token(), self.address))
        if asked is not None and asked is not self._asking and asked.answered_at >= began_at:
            # It was this program that asked the host something, and is done at once.
            await asked.answered.wait()
            await self.acquire()

    async def _open_host(self, hooks: Hooks) -> None:
        """Open the journal of a host that this program may change, and settle what earlier ones left open."""
        from ferryman.journal import Journal  # sqlite3 is loaded where a host is opened

        address = self.address
        path = self._reply.journal or _default_journal(self.uri.scheme, self._own_address())
        self._journal = await anyio.to_thread.run_sync(Journal.open, path)
        host = self._host = Host(hooks, self._journal, address=address, peer=_ask_peer, start=self._start)
        self._key = (anyio.lowlevel.current_token(), address)
        _open_hosts.setdefault(self._key, self)
        await host.recover()
        if hooks.has("host_autostart"):
            # INVARIANT: after the recovery, since a domain whose migration is open may run elsewhere.
            await hooks.call("host_autostart", BootRequest(admit=host.require_free), type(None))

    async def acquire(self) -> None:
        """Become the program that changes this host; nothing where it is already.

        Every change does this first.

        :raises HostBusyError: another program changes the host and did not let go in time; this one looks on as before.
        :raises JournalError: the host's journal cannot be trusted; the connection is of no more use for changes.
        :cancellation: as if it had not been called.
        """
        hooks = self.hooks
        if self._host is not None:
            return
        async with self._acquiring:
            if self._host is None:
                await hooks.call("connection_acquire", HostRequest(), type(None))
                try:
                    await self._open_host(hooks)
                except BaseException:
                    self._host = None
                    self._close_journal()
                    raise

    async def __aexit__(self, *exc_info: object) -> None:
        # The block's own exception stays out of the task groups, which would wrap it in an ExceptionGroup.
        await self._stack.__aexit__(None, None, None)

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _closed(self) -> None:
        if self._key is not None and _open_hosts.get(self._key) is self:
            del _open_hosts[self._key]
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
    def host(self) -> HostEnd:
        """The host's end of migrations.

        :raises ConnectionClosedError: the connection is not open.
        :raises HostBusyError: this program only looks on; see :meth:`acquire`.
        """
        hooks = self.hooks
        if self._host is None:
            raise HostBusyError(
                f"{self.uri} was open in another program, so this one looks on with {hooks.distribution}:"
                " acquire() the host first"
            )
        return self._host

    @property
    def address(self) -> str:
        """Connection URI by which another end can ask this host."""
        self.hooks  # noqa: B018 - raises where the connection is closed
        return self._address or self._own_address()

    def _own_address(self) -> str:
        return self._reply.address or self.uri.render()

    async def capabilities(self) -> Capabilities:
        """Say what this host and its driver can do."""
        return await self.hooks.call("capabilities", HostRequest(), Capabilities)

    async def list_domains(self) -> list[Domain]:
        """List all domains, active or not."""
        return [Domain(self, info.name, info.uuid) for info in await self.list_domain_infos()]

    async def list_domain_infos(self) -> list[DomainInfo]:
        """Name, uuid, state and size of all domains now, which :meth:`Domain.info` tells of one."""
        return await self.hooks.call("domain_list", HostRequest(), list)

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
        await self.acquire()
        info = await self.hooks.call("domain_define", DefinitionRequest(definition=definition), DomainInfo)
        return Domain(self, info.name, info.uuid)

    async def create(self, definition: str, *, paused: bool = False, autodestroy: bool = False) -> Domain:
        """Make and start a transient domain from libvirt domain XML.

        The uuid of a persistent domain that is shut off runs that domain by this definition, which it does not keep.

        :param paused: leave it paused.
        :param autodestroy: destroy it when this connection closes, or when the program dies.
        :raises DefinitionError: names the element at fault.
        :raises DomainExistsError: the name belongs to another domain, or the domain is active.
        :raises DomainBusyError: a migration has locked the domain.
        """
        read = parse_definition(definition)
        await self.acquire()
        self.host.require_free(read.uuid, read.name)
        request = DefinitionRequest(definition=definition, paused=paused, autodestroy=autodestroy)
        info = await self.hooks.call("domain_create", request, DomainInfo)
        return Domain(self, info.name, info.uuid)

    async def attach(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        uuid: str | None = None,
        pid: int | None = None,
    ) -> Domain:
        """Take in a guest that another program has started, by its control socket, as a transient domain.

        So Ferryman migrates what others start: the other program starts a receiver at the destination, too, and brings
        it with :meth:`attach_receiver`.  The socket must be free; this program alone commands the guest from then on.

        :param path: of the socket, on the host of this connection.
        :param name: of the domain here; None is what the process says.
        :param uuid: the same; needed where the process says none.
        :param pid: of the process; None is who listens at the socket.
        :raises ConnectError: nothing answers there, or somebody else is connected.
        :raises DomainExistsError: the name or the uuid belongs to another domain here.
        """
        info = await self._adopt(path, name=name, uuid=uuid, pid=pid, receiver=False)
        return Domain(self, info.name, info.uuid)

    async def attach_receiver(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        uuid: str | None = None,
        pid: int | None = None,
    ) -> None:
        """Take in a process that waits for a guest which :meth:`attach` has taken in at the source.

        It must be the same machine, waiting, and unable to run by itself; the plan compares what can be seen.  It is
        ended if the migration that uses it fails.  Parameters and errors as :meth:`attach`.

        :raises DomainStateError: it does not wait for a guest, or it would run by itself.
        """
        await self._adopt(path, name=name, uuid=uuid, pid=pid, receiver=True)

    async def _adopt(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None,
        uuid: str | None,
        pid: int | None,
        receiver: bool,
    ) -> DomainInfo:
        await self.acquire()
        request = AdoptRequest(
            path=os.fspath(path),
            name=name,
            uuid=DomainUUID(uuid.lower()) if uuid is not None else None,
            pid=pid,
            receiver=receiver,
        )
        return await self.hooks.call("host_adopt", request, DomainInfo)

    async def restore(
        self, path: str | os.PathLike[str], *, paused: bool | None = None, definition: str | None = None
    ) -> Domain:
        """Run a guest from a file that :meth:`Domain.save` wrote; the file stays.

        Restoring it twice runs the guest from the same moment twice, on disks that have gone on.

        :param path: on the host of this connection.
        :param paused: leave it paused, or run it; None is as it was when it was saved.
        :param definition: runs it instead of the saved one: of the same uuid and the same machine.
        :raises DefinitionError: the file holds no guest, is not whole, or the definition is of another machine.
        :raises DomainExistsError: the domain is active. :raises DomainBusyError: a migration has locked it.
        :raises HypervisorError: the state could not be loaded; the guest did not run.
        :cancellation: nothing is left, until the guest runs.
        """
        await self.acquire()
        request = RestoreRequest(
            path=os.fspath(path), paused=paused, definition=definition, admit=self.host.require_free
        )
        info = await self.hooks.call("domain_restore", request, DomainInfo)
        return Domain(self, info.name, info.uuid)

    async def statistics(self, domains: Iterable[Domain] | None = None) -> dict[DomainUUID, DomainStatistics]:
        """Counters of several domains now; one that is gone meanwhile is left out.

        :param domains: of this connection; None is all.
        """
        uuids = None if domains is None else tuple(dict.fromkeys(domain.uuid for domain in domains))
        if self.hooks.has("host_statistics"):
            return await self.hooks.call("host_statistics", StatisticsRequest(uuids=uuids), dict)
        asked = [d for d in await self.list_domains() if uuids is None or d.uuid in uuids]
        found: dict[DomainUUID, DomainStatistics] = {}
        limiter = anyio.CapacityLimiter(_ASKED_AT_ONCE)
        failures: list[Exception] = []

        async def ask(domain: Domain) -> None:
            async with limiter:
                if failures:
                    return
                try:
                    found[domain.uuid] = await domain.statistics()
                except DomainNotFoundError:
                    _log.debug("domain %s is gone", domain.name)
                except FerrymanError as error:
                    failures.append(error)

        async with anyio.create_task_group() as tasks:
            for domain in asked:
                tasks.start_soon(ask, domain)
        if failures:
            # Not from inside the task group, which would wrap it in an ExceptionGroup.
            raise failures[0]
        return {domain.uuid: found[domain.uuid] for domain in asked if domain.uuid in found}

    @contextmanager
    def events(self) -> Iterator[AsyncIterator[DomainEvent]]:
        """Listen to events of all domains; those from now on come, in order, until the block is left.

        :raises HostBusyError: this program only looks on; see :meth:`acquire`.
        """
        self.host  # noqa: B018 - raises where the connection is closed, or only looks on
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
        """Migrations that are under way or in doubt at this host; to be acquired before."""
        return self.host.open_migrations()

    def in_doubt(self) -> list[Resolution]:
        """Every migration that is open at this host, and which evidence is missing; asks nobody.

        :raises HostBusyError: this program only looks on; see :meth:`acquire`.
        """
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
        await self.acquire()
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

    async def start(self, *, paused: bool = False, autodestroy: bool = False) -> None:
        """Start a persistent domain.

        :param paused: leave it paused.
        :param autodestroy: destroy it when this connection closes, or when the program dies.
        :raises DomainStateError: it is active.
        """
        request = DomainRequest(uuid=self.uuid, name=self.name, paused=paused, autodestroy=autodestroy)
        await self._change("domain_start", request, DomainInfo)

    async def suspend(self) -> None:
        """Pause the guest; a paused one stays paused."""
        await self._change("domain_suspend", self._request(), type(None))

    async def resume(self) -> None:
        """Run a paused guest; a running one goes on."""
        await self._change("domain_resume", self._request(), type(None))

    async def shutdown(self, mode: ShutdownMode = ShutdownMode.DEFAULT) -> None:
        """Ask the guest to shut down; returns before it has, and the event ``shut-down`` says when it has.

        :raises DomainStateError: it is shut off, or has no agent where the mode asks for one.
        """
        request = ShutdownRequest(uuid=self.uuid, name=self.name, mode=mode)
        await self._change("domain_shutdown", request, type(None))

    async def reboot(self, mode: ShutdownMode = ShutdownMode.DEFAULT) -> None:
        """Ask the guest to shut down and to boot again; returns before it has.

        The event ``rebooted`` says when it boots; a guest that ignores it goes on.

        :raises DomainStateError: as :meth:`shutdown`.
        """
        request = ShutdownRequest(uuid=self.uuid, name=self.name, mode=mode)
        await self._change("domain_reboot", request, type(None))

    async def reset(self) -> None:
        """Reset the machine, as its reset button does; a paused guest stays paused."""
        await self._change("domain_reset", self._request(), type(None))

    async def set_autostart(self, enabled: bool) -> None:  # noqa: FBT001 - the name of the method says it
        """Start the domain at the first opening of its host after each boot, or no longer.

        :raises DomainStateError: it is transient.
        """
        request = AutostartRequest(uuid=self.uuid, name=self.name, enabled=enabled)
        await self._change("domain_autostart", request, type(None))

    async def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guest's state into a file and end it; :meth:`Connection.restore` runs it again.

        :param path: on the domain's host; a file that is there is replaced.
        :raises DomainStateError: it is shut off, or cannot be saved in the state it is in.
        :raises HypervisorError: the guest goes on as before, and there is no new file.
        :cancellation: the same, while the state is being written; afterwards the save is completed.
        """
        request = SaveRequest(uuid=self.uuid, name=self.name, path=os.fspath(path))
        await self._change("domain_save", request, type(None))

    async def screenshot(self, screen: int = 0) -> Screenshot:
        """Take a picture of the guest's screen.

        :param screen: its number, from 0.
        :raises DomainStateError: it is shut off, or has no such screen.
        """
        request = ScreenshotRequest(uuid=self.uuid, name=self.name, screen=screen)
        await self.connection.acquire()
        return await self.connection.hooks.call("domain_screenshot", request, Screenshot)

    @asynccontextmanager
    async def console(self, device: str | None = None) -> AsyncIterator[ByteStream]:
        """Connect to the guest's console for the length of a block.

        The stream raises :class:`anyio.EndOfStream` when the guest has ended.

        :param device: its alias in the definition; None is the first console or serial port.
        :raises DomainStateError: it is shut off, has no such console, or somebody else is connected to it.
        """
        request = ConsoleRequest(uuid=self.uuid, name=self.name, device=device)
        await self.connection.acquire()
        stream = await self.connection.hooks.call("domain_console", request, ByteStream)
        async with stream:
            yield stream

    async def set_memory(self, memory_bytes: int, scope: Scope = Scope.CURRENT) -> None:
        """Change how much of its memory the guest has to itself; it gives the rest back in its own time.

        :param memory_bytes: above 0, up to the definition's memory.
        :raises OptionError: it is not. :raises DomainStateError: the scope asks for what the domain does not have.
        """
        if type(memory_bytes) is not int or memory_bytes <= 0:
            raise OptionError(
                f"memory_bytes must be a whole number of bytes above 0, not {memory_bytes!r:.80}",
                option="memory_bytes",
            )
        request = MemoryRequest(uuid=self.uuid, name=self.name, memory_bytes=memory_bytes, scope=scope)
        await self._change("domain_set_memory", request, type(None))

    async def attach_device(self, definition: str, scope: Scope = Scope.CURRENT) -> None:
        """Plug a device in.

        :param definition: one device as libvirt domain XML has it, such as ``<disk>`` or ``<interface>``.
        :raises DefinitionError: the device, or the domain with it, is not understood or cannot be built.
        :raises NotSupportedError: a guest that runs does not take such a device.
        :raises DomainStateError: the scope asks for what the domain does not have, or there is no room for the device.
        :raises HypervisorError: the hypervisor refused; nothing is changed.
        """
        request = AttachRequest(uuid=self.uuid, name=self.name, definition=definition, scope=scope)
        await self._change("domain_attach", request, type(None))

    async def detach_device(
        self, definition: str, scope: Scope = Scope.CURRENT, *, timeout_s: float = 30.0
    ) -> None:
        """Unplug a device; a running guest must let go of it.

        :param definition: the device, or as much of it as tells it from the others: of a disk ``<target dev>``, of an
            interface ``<mac address>``, of any ``<alias name>``.
        :param timeout_s: limit for the guest to let go of it, above 0.
        :raises DefinitionError: the domain has no such device, or several.
        :raises NotSupportedError: a guest that runs does not give such a device back.
        :raises DomainStateError: the scope asks for what the domain does not have.
        :raises HypervisorError: the guest did not let go of it; it may do so later, and the definition then follows.
        :cancellation: the same.
        """
        if type(timeout_s) not in (int, float) or not 0 < timeout_s < float("inf"):
            raise OptionError(
                f"timeout_s must be a number of seconds above 0, not {timeout_s!r:.80}", option="timeout_s"
            )
        request = DetachRequest(
            uuid=self.uuid, name=self.name, definition=definition, timeout_s=timeout_s, scope=scope
        )
        await self._change("domain_detach", request, type(None))

    async def set_vcpus(self, count: int, scope: Scope = Scope.CURRENT) -> None:
        """Change how many processors the guest has; it must let go of those that it loses.

        :param count: above 0, up to the definition's ``<vcpu>``.
        :raises OptionError: it is not. :raises DomainStateError: the scope asks for what the domain does not have.
        :raises HypervisorError: it could not be done; :meth:`info` says how many there are.
        """
        if type(count) is not int or count <= 0:
            raise OptionError(
                f"count must be a whole number of processors above 0, not {count!r:.80}", option="count"
            )
        request = VcpusRequest(uuid=self.uuid, name=self.name, count=count, scope=scope)
        await self._change("domain_set_vcpus", request, type(None))

    async def agent_command(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> Any:
        """Give a command to the agent inside the guest, and return its answer, JSON as Python has it.

        :param timeout_s: limit for the answer, above 0.
        :raises DomainStateError: it is shut off, or has no agent that is connected.
        :raises HypervisorError: the agent refused, or did not answer in time or in its language.
        :cancellation: the guest may have done it.
        """
        command: dict[str, Any] = {"execute": name}
        if arguments is not None:
            command["arguments"] = dict(arguments)
        request = AgentRequest(uuid=self.uuid, name=self.name, command=command, timeout_s=timeout_s)
        await self.connection.acquire()
        return await self.connection.hooks.call("domain_agent", request, object)

    async def dirty_rate(self, duration_s: float = 1.0) -> int:
        """Measure how fast the guest makes its memory stale, in bytes per second.

        :param duration_s: above 0, up to 60; a driver may measure for longer.
        :raises OptionError: it is not. :raises DomainStateError: the guest does not run.
        :raises HypervisorError: it could not be measured.
        """
        if type(duration_s) not in (int, float) or not 0 < duration_s <= _MAX_DIRTY_RATE_S:
            raise OptionError(
                f"duration_s must be a number of seconds above 0 and up to {_MAX_DIRTY_RATE_S}, not {duration_s!r:.80}",
                option="duration_s",
            )
        request = DirtyRateRequest(uuid=self.uuid, name=self.name, duration_s=duration_s)
        await self.connection.acquire()
        return await self.connection.hooks.call("domain_dirty_rate", request, int)

    async def destroy(self) -> None:
        """End the guest at once, as pulling the plug does."""
        await self._change("domain_destroy", self._request(), type(None))

    async def undefine(self) -> None:
        """Forget the persistent definition; a running guest goes on and becomes transient."""
        await self._change("domain_undefine", self._request(), type(None))

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

    def _request(self) -> DomainRequest:
        return DomainRequest(uuid=self.uuid, name=self.name)

    async def _change(self, hook: str, request: object, expects: type[Any]) -> None:
        await self.connection.acquire()
        self.connection.host.require_free(self.uuid, self.name)
        await self.connection.hooks.call(hook, request, expects)


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
        await connection.acquire()
        await ask(connection.host)


@asynccontextmanager
async def _peer_connection(address: str) -> AsyncIterator[Connection]:
    key = (anyio.lowlevel.current_token(), address)
    while (other := _questions.get(key)) is not None and not other.answered.is_set():
        await other.answered.wait()
    known = _open_hosts.get(key)
    if known is not None:
        yield known
        return
    _forget_questions(key[0])
    asked = _questions[key] = _Question(anyio.Event())
    try:
        opened = connect(address)
        opened._asking = asked
        async with opened:
            yield opened
    finally:
        asked.answered_at = anyio.current_time()
        asked.answered.set()


def _forget_questions(loop: Any) -> None:
    """Forget what was answered long ago, or in an event loop that may have ended."""
    past = anyio.current_time() - _QUESTION_KEPT_S
    for key, question in list(_questions.items()):
        if question.answered.is_set() and (key[0] is not loop or question.answered_at < past):
            del _questions[key]
