"""The blocking face of Ferryman: the same objects, names and types as the asynchronous API, without ``await``.

::

    from ferryman.sync import connect

    with connect("qemu:///embed?root=/srv/a") as a, connect("qemu:///embed?root=/srv/b") as b:
        result = a.lookup_by_name("web").migrate(b).result()

One event loop in a background thread serves all connections of the process and ends with the last of them.  Every
call may be made from any thread.  Ctrl-C in a call is the cancellation of that call: in a migration it is the safe
abort, and ``KeyboardInterrupt`` is raised once the guest's place is settled.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, BlockingPortalProvider

from ferryman import connection as _async
from ferryman.types import MigrationOptions, Scope, ShutdownMode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from ferryman import migration as _migration
    from ferryman import plan as _plan
    from ferryman.capabilities import Capabilities, Negotiation
    from ferryman.handover import MigrationRow
    from ferryman.resolve import Resolution, Testimony
    from ferryman.types import (
        DomainEvent,
        DomainInfo,
        DomainStatistics,
        DomainUUID,
        Finding,
        MigrationEvent,
        MigrationId,
        MigrationResult,
        Screenshot,
    )
    from ferryman.uri import ConnectionURI

T = TypeVar("T")

_provider = BlockingPortalProvider()


class _Call:
    """One call on the loop's thread, whose cancellation can be awaited."""

    def __init__(self, portal: BlockingPortal) -> None:
        self._portal = portal
        self._scope: anyio.CancelScope | None = None
        self._interrupted = False
        self._ended = threading.Event()

    def run(self, ask: Callable[[], Awaitable[T]]) -> T:
        future = self._portal.start_task_soon(self._run, ask)
        try:
            return future.result()
        except KeyboardInterrupt:
            # INVARIANT: nothing is left undecided behind an interrupt: the call has ended when it is raised.
            _to_the_end(partial(self._portal.call, self._cancel))
            _to_the_end(self._ended.wait)
            raise

    async def _run(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            with anyio.CancelScope() as self._scope:
                if not self._interrupted:
                    return await ask()
            raise InterruptedError("the call was cancelled by an interrupt")
        finally:
            self._ended.set()

    def _cancel(self) -> None:
        self._interrupted = True
        if self._scope is not None:
            self._scope.cancel()


def _to_the_end(wait: Callable[[], T]) -> T:
    """Wait on, however often Ctrl-C comes again: the caller has heard the first one, and raises it afterwards."""
    while True:
        try:
            return wait()
        except KeyboardInterrupt:
            continue


def _iterate(call: Callable[[Callable[[], Awaitable[T]]], T], stream: AsyncIterator[T]) -> Iterator[T]:
    while True:
        try:
            yield call(stream.__anext__)
        except StopAsyncIteration:
            return


def connect(uri: str | ConnectionURI, *, address: str | None = None) -> Connection:
    """Make the connection to a host; it opens when it is entered with ``with``.

    :param address: connection URI by which other hosts reach this one through the caller; None is what the driver says.
    :raises URIError: the URI is malformed.
    """
    return Connection(_async.connect(uri, address=address))


class Connection:
    """See :class:`ferryman.connection.Connection`."""

    def __init__(self, connection: _async.Connection) -> None:
        self._connection = connection
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None
        self.uri = connection.uri

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(_provider)
            stack.enter_context(_entered(self._portal, self._connection))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.__exit__(None, None, None)
        self._portal = None

    @property
    def address(self) -> str:
        """Connection URI by which another end can ask this host."""
        return self._connection.address

    def capabilities(self) -> Capabilities:
        """See :meth:`ferryman.connection.Connection.capabilities`."""
        return self._call(self._connection.capabilities)

    def list_domains(self) -> list[Domain]:
        """See :meth:`ferryman.connection.Connection.list_domains`."""
        return [Domain(self, domain) for domain in self._call(self._connection.list_domains)]

    def list_domain_infos(self) -> list[DomainInfo]:
        """See :meth:`ferryman.connection.Connection.list_domain_infos`."""
        return self._call(self._connection.list_domain_infos)

    def lookup_by_name(self, name: str) -> Domain:
        """See :meth:`ferryman.connection.Connection.lookup_by_name`."""
        return Domain(self, self._call(partial(self._connection.lookup_by_name, name)))

    def lookup_by_uuid(self, uuid: str) -> Domain:
        """See :meth:`ferryman.connection.Connection.lookup_by_uuid`."""
        return Domain(self, self._call(partial(self._connection.lookup_by_uuid, uuid)))

    def acquire(self) -> None:
        """See :meth:`ferryman.connection.Connection.acquire`."""
        self._call(self._connection.acquire)

    def define(self, definition: str) -> Domain:
        """See :meth:`ferryman.connection.Connection.define`."""
        return Domain(self, self._call(partial(self._connection.define, definition)))

    def create(self, definition: str, *, paused: bool = False, autodestroy: bool = False) -> Domain:
        """See :meth:`ferryman.connection.Connection.create`."""
        make = partial(self._connection.create, definition, paused=paused, autodestroy=autodestroy)
        return Domain(self, self._call(make))

    def attach(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        uuid: str | None = None,
        pid: int | None = None,
    ) -> Domain:
        """See :meth:`ferryman.connection.Connection.attach`."""
        take = partial(self._connection.attach, path, name=name, uuid=uuid, pid=pid)
        return Domain(self, self._call(take))

    def attach_receiver(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        uuid: str | None = None,
        pid: int | None = None,
    ) -> None:
        """See :meth:`ferryman.connection.Connection.attach_receiver`."""
        self._call(partial(self._connection.attach_receiver, path, name=name, uuid=uuid, pid=pid))

    def restore(
        self, path: str | os.PathLike[str], *, paused: bool | None = None, definition: str | None = None
    ) -> Domain:
        """See :meth:`ferryman.connection.Connection.restore`."""
        make = partial(self._connection.restore, path, paused=paused, definition=definition)
        return Domain(self, self._call(make))

    def statistics(self, domains: Iterable[Domain] | None = None) -> dict[DomainUUID, DomainStatistics]:
        """See :meth:`ferryman.connection.Connection.statistics`."""
        asked = None if domains is None else [domain._domain for domain in domains]
        return self._call(partial(self._connection.statistics, asked))

    @contextmanager
    def events(self) -> Iterator[Iterator[DomainEvent]]:
        """See :meth:`ferryman.connection.Connection.events`; the iterator blocks for the next event."""
        listening = self._connection.events()
        stream = self._call(partial(_in_loop, listening.__enter__))
        try:
            yield _iterate(self._call, stream)
        finally:
            self._call(partial(_in_loop, partial(listening.__exit__, None, None, None)))

    def in_doubt(self) -> list[Resolution]:
        """See :meth:`ferryman.connection.Connection.in_doubt`; acquires the host."""
        self.acquire()
        return self._call(partial(_in_loop, self._connection.in_doubt))

    def resolve(
        self, migration_id: str | None = None, testimony: Testimony | None = None
    ) -> list[Resolution]:
        """See :meth:`ferryman.connection.Connection.resolve`."""
        return self._call(partial(self._connection.resolve, migration_id, testimony))

    def open_migrations(self) -> list[MigrationRow]:
        """See :meth:`ferryman.connection.Connection.open_migrations`; acquires the host."""
        self.acquire()
        return self._call(partial(_in_loop, self._connection.open_migrations))

    def _call(self, ask: Callable[[], Awaitable[T]]) -> T:
        if self._portal is None:
            # The asynchronous object says so, with the error and the words that it always has.
            self._connection.hooks  # noqa: B018
            raise AssertionError("unreachable")
        return _Call(self._portal).run(ask)


class Domain:
    """See :class:`ferryman.connection.Domain`."""

    def __init__(self, connection: Connection, domain: _async.Domain) -> None:
        self.connection = connection
        self._domain = domain
        self.name: str = domain.name
        self.uuid: DomainUUID = domain.uuid

    def __repr__(self) -> str:
        return repr(self._domain)

    def info(self) -> DomainInfo:
        """See :meth:`ferryman.connection.Domain.info`."""
        return self._call(self._domain.info)

    def definition(self) -> str:
        """See :meth:`ferryman.connection.Domain.definition`."""
        return self._call(self._domain.definition)

    def statistics(self) -> DomainStatistics:
        """See :meth:`ferryman.connection.Domain.statistics`."""
        return self._call(self._domain.statistics)

    def start(self, *, paused: bool = False, autodestroy: bool = False) -> None:
        """See :meth:`ferryman.connection.Domain.start`."""
        self._call(partial(self._domain.start, paused=paused, autodestroy=autodestroy))

    def suspend(self) -> None:
        """See :meth:`ferryman.connection.Domain.suspend`."""
        self._call(self._domain.suspend)

    def resume(self) -> None:
        """See :meth:`ferryman.connection.Domain.resume`."""
        self._call(self._domain.resume)

    def shutdown(self, mode: ShutdownMode = ShutdownMode.DEFAULT) -> None:
        """See :meth:`ferryman.connection.Domain.shutdown`."""
        self._call(partial(self._domain.shutdown, mode))

    def reboot(self, mode: ShutdownMode = ShutdownMode.DEFAULT) -> None:
        """See :meth:`ferryman.connection.Domain.reboot`."""
        self._call(partial(self._domain.reboot, mode))

    def reset(self) -> None:
        """See :meth:`ferryman.connection.Domain.reset`."""
        self._call(self._domain.reset)

    def set_autostart(self, enabled: bool) -> None:  # noqa: FBT001 - the name of the method says it
        """See :meth:`ferryman.connection.Domain.set_autostart`."""
        self._call(partial(self._domain.set_autostart, enabled))

    def save(self, path: str | os.PathLike[str]) -> None:
        """See :meth:`ferryman.connection.Domain.save`."""
        self._call(partial(self._domain.save, path))

    def screenshot(self, screen: int = 0) -> Screenshot:
        """See :meth:`ferryman.connection.Domain.screenshot`."""
        return self._call(partial(self._domain.screenshot, screen))

    @contextmanager
    def console(self, device: str | None = None) -> Iterator[ByteStream]:
        """See :meth:`ferryman.connection.Domain.console`; the stream's calls block."""
        portal = self.connection._portal
        if portal is None:
            self._call(_never)
        assert portal is not None
        with _entered(portal, self._domain.console(device)) as stream:
            yield ByteStream(self.connection, stream)

    def set_memory(self, memory_bytes: int, scope: Scope = Scope.CURRENT) -> None:
        """See :meth:`ferryman.connection.Domain.set_memory`."""
        self._call(partial(self._domain.set_memory, memory_bytes, scope))

    def attach_device(self, definition: str, scope: Scope = Scope.CURRENT) -> None:
        """See :meth:`ferryman.connection.Domain.attach_device`."""
        self._call(partial(self._domain.attach_device, definition, scope))

    def detach_device(
        self, definition: str, scope: Scope = Scope.CURRENT, *, timeout_s: float = 30.0
    ) -> None:
        """See :meth:`ferryman.connection.Domain.detach_device`."""
        self._call(partial(self._domain.detach_device, definition, scope, timeout_s=timeout_s))

    def set_vcpus(self, count: int, scope: Scope = Scope.CURRENT) -> None:
        """See :meth:`ferryman.connection.Domain.set_vcpus`."""
        self._call(partial(self._domain.set_vcpus, count, scope))

    def agent_command(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
    ) -> Any:
        """See :meth:`ferryman.connection.Domain.agent_command`."""
        return self._call(partial(self._domain.agent_command, name, arguments, timeout_s=timeout_s))

    def dirty_rate(self, duration_s: float = 1.0) -> int:
        """See :meth:`ferryman.connection.Domain.dirty_rate`."""
        return self._call(partial(self._domain.dirty_rate, duration_s))

    def destroy(self) -> None:
        """See :meth:`ferryman.connection.Domain.destroy`."""
        self._call(self._domain.destroy)

    def undefine(self) -> None:
        """See :meth:`ferryman.connection.Domain.undefine`."""
        self._call(self._domain.undefine)

    def plan_migration(self, destination: Connection, options: MigrationOptions | None = None) -> Plan:
        """See :meth:`ferryman.connection.Domain.plan_migration`."""
        plan = self._call(partial(self._domain.plan_migration, destination._connection, options))
        return Plan(self, destination, plan)

    def migrate(self, destination: Connection, options: MigrationOptions | None = None) -> MigrationJob:
        """See :meth:`ferryman.connection.Domain.migrate`; ``result()`` runs it."""
        make = partial(self._domain.migrate, destination._connection, options)
        return MigrationJob(self, destination, options or MigrationOptions(), make)

    def _call(self, ask: Callable[[], Awaitable[T]]) -> T:
        return self.connection._call(ask)


class ByteStream:
    """A console's bytes, both ways; see :class:`anyio.abc.ByteStream`."""

    def __init__(self, connection: Connection, stream: anyio.abc.ByteStream) -> None:
        self._connection = connection
        self._stream = stream

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self._connection._call(partial(self._stream.send, data))

    def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for some bytes. :raises anyio.EndOfStream: the guest has ended."""
        return self._connection._call(partial(self._stream.receive, max_bytes))


class Plan:
    """See :class:`ferryman.plan.Plan`."""

    def __init__(self, domain: Domain, destination: Connection, plan: _plan.Plan) -> None:
        self._plan = plan
        self.domain = domain
        self.destination = destination
        self.source: Connection = domain.connection
        self.info: DomainInfo = plan.info
        self.options: MigrationOptions = plan.options
        self.effective: MigrationOptions = plan.effective
        self.negotiation: Negotiation = plan.negotiation
        self.findings: tuple[Finding, ...] = plan.findings
        self.blockers: tuple[Finding, ...] = plan.blockers
        self.warnings: tuple[Finding, ...] = plan.warnings
        self.dropped: tuple[str, ...] = plan.dropped
        self.definition_digest: str = plan.definition_digest
        self.source_capabilities: Capabilities = plan.source_capabilities
        self.destination_capabilities: Capabilities = plan.destination_capabilities

    def changes(self, newer: Plan) -> list[str]:
        """See :meth:`ferryman.plan.Plan.changes`."""
        return self._plan.changes(newer._plan)

    def explain(self) -> str:
        """See :meth:`ferryman.plan.Plan.explain`."""
        return self._plan.explain()

    def execute(self) -> MigrationJob:
        """See :meth:`ferryman.plan.Plan.execute`."""
        return MigrationJob(self.domain, self.destination, self.options, self._plan.execute, plan=self)


class MigrationJob:
    """See :class:`ferryman.migration.MigrationJob`."""

    def __init__(
        self,
        domain: Domain,
        destination: Connection,
        options: MigrationOptions,
        make: Callable[[], _migration.MigrationJob],
        *,
        plan: Plan | None = None,
    ) -> None:
        self.domain = domain
        self.destination = destination
        self.options = options
        self._connection = domain.connection
        self._make = make
        self._shown = plan
        self._job: _migration.MigrationJob | None = None
        self._entered: AbstractContextManager[Any] | None = None

    @property
    def id(self) -> MigrationId | None:
        """The migration's id; None until begin has made one."""
        return self._job.id if self._job is not None else None

    @property
    def plan(self) -> Plan | None:
        """The plan that runs, or the one that was shown; None until there is one."""
        made = self._job.plan if self._job is not None else None
        return Plan(self.domain, self.destination, made) if made is not None else self._shown

    def __enter__(self) -> Self:
        portal = self._connection._portal
        if portal is None:
            self._connection._call(_never)
        assert portal is not None
        self._job = self._connection._call(partial(_in_loop, self._make))
        self._entered = _entered(portal, self._job, hurry=partial(portal.call, self._job.abort))
        self._entered.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        assert self._entered is not None
        self._entered.__exit__(kind, error, trace)

    def result(self) -> MigrationResult:
        """See :meth:`ferryman.migration.MigrationJob.result`; a job that was not entered is run through."""
        if self._job is None:
            with self:
                return self.result()
        return self._call(self._job.result)

    def progress(self) -> Iterator[MigrationEvent]:
        """See :meth:`ferryman.migration.MigrationJob.progress`; the iterator blocks for the next event."""
        return _iterate(self._call, self._running().progress())

    def abort(self) -> None:
        """See :meth:`ferryman.migration.MigrationJob.abort`."""
        self._call(partial(_in_loop, self._running().abort))

    def set_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """See :meth:`ferryman.migration.MigrationJob.set_bandwidth`."""
        self._call(partial(self._running().set_bandwidth, bandwidth_bytes_per_s))

    def set_max_downtime(self, max_downtime_ms: int) -> None:
        """See :meth:`ferryman.migration.MigrationJob.set_max_downtime`."""
        self._call(partial(self._running().set_max_downtime, max_downtime_ms))

    def set_postcopy_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """See :meth:`ferryman.migration.MigrationJob.set_postcopy_bandwidth`."""
        self._call(partial(self._running().set_postcopy_bandwidth, bandwidth_bytes_per_s))

    def set_copy_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """See :meth:`ferryman.migration.MigrationJob.set_copy_bandwidth`."""
        self._call(partial(self._running().set_copy_bandwidth, bandwidth_bytes_per_s))

    def switch_to_postcopy(self) -> None:
        """See :meth:`ferryman.migration.MigrationJob.switch_to_postcopy`."""
        self._call(self._running().switch_to_postcopy)

    def suspend(self) -> None:
        """See :meth:`ferryman.migration.MigrationJob.suspend`."""
        self._call(self._running().suspend)

    def _call(self, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            return self._connection._call(ask)
        except KeyboardInterrupt:
            _to_the_end(partial(self._connection._call, self._settle))
            raise

    async def _settle(self) -> None:
        """Abort, and wait until the guest's place is settled; what came of it is the job's to tell."""
        running = self._running()
        running.abort()
        async for _event in running.progress():
            pass

    def _running(self) -> _migration.MigrationJob:
        if self._job is None:
            raise RuntimeError("the job has not begun: enter it with 'with' to watch and steer it")
        return self._job


async def _in_loop(call: Callable[[], T]) -> T:
    return call()


async def _never() -> None:
    raise AssertionError("unreachable")


class _entered(AbstractContextManager[Any]):  # noqa: N801 - used as a function
    """Enter and leave an asynchronous context manager in one task of the loop; Ctrl-C waits until it is left.

    :param hurry: called when Ctrl-C comes while it is being left.
    """

    def __init__(
        self, portal: BlockingPortal, manager: Any, *, hurry: Callable[[], None] = lambda: None
    ) -> None:
        self._wrapped: AbstractContextManager[Any] = portal.wrap_async_context_manager(manager)
        self._hurry = hurry

    def __enter__(self) -> Any:
        try:
            return self._wrapped.__enter__()
        except KeyboardInterrupt:
            # Nobody else would leave what is being entered, and the loop would wait for it for ever.
            self._leave(None, None, None)
            raise

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        try:
            return self._wrapped.__exit__(kind, error, trace)
        except KeyboardInterrupt:
            self._leave(kind, error, trace)
            raise

    def _leave(self, kind: Any, error: Any, trace: Any) -> None:
        with suppress(Exception):  # the interrupt is what the caller hears of
            _to_the_end(self._hurry)
            _to_the_end(partial(self._wrapped.__exit__, kind, error, trace))
