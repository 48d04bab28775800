"""One client of the daemon: its calls, which run beside each other, and the events that it asked for."""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_origin

import anyio
from anyio.abc import ByteStream

from ferryman.connection import Connection, Domain
from ferryman.definition import arriving_definition, parse_definition
from ferryman.engine import HostEnd
from ferryman.errors import AccessDeniedError, DomainNotFoundError, FerrymanError, NotSupportedError
from ferryman.hookspecs import AccessRequest, Client, ConsoleRequest, DriverHooks
from ferryman.types import DomainInfo, DomainUUID
from ferryman_remote import ferry
from ferryman_remote.contain import contained
from ferryman_remote.daemon.access import UNASKED, Subject, audit, defined, known, subject_of
from ferryman_remote.daemon.answers import ANSWERS, CLOSE, Answer
from ferryman_remote.daemon.errors import Code, Of, WireFault, fault, told, told_to_ferryman
from ferryman_remote.daemon.events import packets_of
from ferryman_remote.link import Link
from ferryman_remote.protocol import REMOTE_PROGRAM, RemoteError, Void
from ferryman_remote.streams import PacketStream, carry
from ferryman_remote.values import ValueFormError, dump, hints_of, load, load_arguments
from ferryman_remote.wire import MAX_MESSAGE_BYTES, Packet, PacketType, Status
from ferryman_remote.xdr import XDRError, decode, encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from anyio.abc import TaskGroup

    from ferryman.types import DomainEvent, TransferStatistics
    from ferryman_remote.daemon.hosts import Hosts, ServedHost

Result: TypeAlias = tuple[Any, ...] | AbstractAsyncContextManager[ByteStream] | None
"""Of a call: what is answered, or a stream to open; None is an empty answer."""

_log = logging.getLogger(__name__)

_WAITING_PER_CALL = 8
_OPENING_BYTES = 65_536
_AWAITED = 256
_ACTIONS = {
    "begin": "migrate_out",
    "expect": "migrate_in",
    "prepare": "migrate_in",
    "tune": "migrate_tune",
    "resolve": "migrate_resolve",
}
"""What methods of a host's end are called where it is asked who may do it."""

_END_METHODS = frozenset(name for name, _ in inspect.getmembers(HostEnd, inspect.iscoroutinefunction))


@dataclass(frozen=True, slots=True)
class Listener:
    """What a client wants to hear.

    :param event_id: libvirt's number of the kind of event.
    :param uuid: of the one domain that it is about; None is every one.
    """

    event_id: int
    uuid: DomainUUID | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may use.

    :param calls: that run at a time; more wait, and when very many do, no more is read.
    :param message_bytes: of one message.
    :param opening_s: for a client to ask for a host; until it has one its messages are short.
    :param listeners: that it registers for events.
    :param streams: that it has open, such as consoles.
    """

    calls: int = 32
    message_bytes: int = MAX_MESSAGE_BYTES
    opening_s: float = 30.0
    listeners: int = 1024
    streams: int = 32
    keepalive_s: float = 5.0
    keepalive_count: int = 5


@dataclass(eq=False)
class Session:
    """One client.

    :ivar host: what it has opened; None before.
    :ivar read_only: it may change nothing.
    :ivar listeners: by the number that the client knows them by.
    """

    link: Link
    hosts: Hosts
    limits: Limits
    client: Client
    read_only: bool = False
    secure: bool = False
    """Nobody else can read what it says."""
    host: ServedHost | None = None
    uri: str = ""
    listeners: dict[int, Listener] = field(default_factory=dict)
    leaves: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """What is done when the client is gone."""
    awaited: dict[str, tuple[DomainUUID, bool]] = field(default_factory=dict)
    """Guests that it has announced here, by the name that they will have."""
    ferryman: bool = False
    """It speaks Ferryman's program, and hears of every event in its words."""

    def __post_init__(self) -> None:
        self.who = str(self.client)
        self._calls: dict[int, anyio.CancelScope] = {}
        self._streams: dict[int, PacketStream] = {}
        self._room = anyio.Semaphore(self.limits.calls)
        self._waiting_room = anyio.Semaphore(self.limits.calls * _WAITING_PER_CALL + self.limits.streams)
        self._asked = anyio.Event()
        self._opening = anyio.Lock()
        self._next_listener = 0

    async def run(self) -> None:
        """Serve the client until its connection ends; then what it began is cancelled, and what it left is removed."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_opening)
                await self.link.run(partial(self._take, tasks))
                tasks.cancel_scope.cancel()
        finally:
            if self.host is not None and self._hear in self.host.listeners:
                self.host.listeners.remove(self._hear)
            with anyio.CancelScope(shield=True):
                for leave in self.leaves:
                    try:
                        await leave()
                    except FerrymanError as error:
                        _log.warning("what %s left could not be cleaned up: %s", self.who, error)
            if self.link.reason:
                _log.info("%s: %s", self.who, self.link.reason)

    async def _watch_opening(self) -> None:
        with anyio.move_on_after(self.limits.opening_s):
            await self._asked.wait()
            return
        self.link.cut(f"it asked for no host within {self.limits.opening_s:g} s")

    # Calls

    async def _take(self, tasks: TaskGroup, packet: Packet) -> None:
        if packet.type is not PacketType.CALL:
            if packet.type is PacketType.STREAM:
                self._take_of_stream(packet)
            else:
                self.link.cut(f"a packet of type {packet.type.name}, which no client sends")
            return
        if packet.version != 1 or packet.program not in (REMOTE_PROGRAM, ferry.PROGRAM):
            self._refuse(packet, Code.RPC, f"Cannot find program {packet.program} version {packet.version}")
            return
        if (packet.program, packet.procedure) == (ferry.PROGRAM, ferry.Number.CANCEL):
            self._cancel(packet)
            return
        if packet.serial in self._calls:
            self.link.cut(f"serial {packet.serial} is that of a call which is not answered yet")
            return
        if packet.program == REMOTE_PROGRAM:
            answer = ANSWERS.get(packet.procedure)
            if answer is None:
                self._refuse(packet, Code.RPC, f"unknown procedure: {packet.procedure}")
                return
            if not answer.waits:
                with self._answering(packet):
                    self._reply(packet, answer.body(self, self._arguments(packet, answer)))
                if packet.procedure == CLOSE:
                    self.link.finish()
                return
        await self._waiting_room.acquire()
        scope = self._calls[packet.serial] = anyio.CancelScope()
        tasks.start_soon(self._run_call, packet, scope)

    async def _run_call(self, packet: Packet, scope: anyio.CancelScope) -> None:
        try:
            with scope, self._answering(packet):
                async with self._room:
                    result = await self._result(packet)
                if isinstance(result, AbstractAsyncContextManager):
                    await self._run_stream(packet, result)
                else:
                    self._reply(packet, result)
            if scope.cancelled_caught:
                self._refuse(packet, Code.OPERATION_ABORTED, "the call was cancelled")
        finally:
            del self._calls[packet.serial]
            self._waiting_room.release()

    async def _result(self, packet: Packet) -> Result:
        """What a call comes to: an answer, or a stream to open."""
        if packet.program == ferry.PROGRAM:
            return await self._ferryman(packet)
        answer = ANSWERS[packet.procedure]
        arguments = self._arguments(packet, answer)
        if answer.streams:
            return self._guarded_stream(answer.action, subject_of(arguments), answer.body(self, arguments))
        if not answer.action:
            return cast("Result", await answer.body(self, arguments))
        async with self._doing(answer.action, subject_of(arguments)):
            return cast("Result", await answer.body(self, arguments))

    # What it may do, and what it has done

    @asynccontextmanager
    async def _doing(self, action: str, subject: Subject) -> AsyncIterator[None]:
        """Let the client do something to its host, if it may, and write down what became of it.

        :raises AccessDeniedError: it may not.
        """
        assert self.host is not None
        connection = self.host.connection
        if connection.hooks.reviews_access and action not in UNASKED:
            if subject.known is not None:
                # A client says names as it likes: what counts is the one that the host has for the uuid.
                found = await connection.lookup_by_uuid(subject.known[0])
                subject = Subject(found.uuid, found.name)
            await self._review(connection, self.uri, action, subject)
        told = partial(audit, self.client, action, self.uri)
        try:
            yield
        except anyio.get_cancelled_exc_class():
            told(subject.name, "cancelled")
            raise
        except BaseException as error:
            told(subject.name, "failed", str(error) or type(error).__name__)
            raise
        told(subject.name, "done")

    async def _review(self, connection: Connection, uri: str, action: str, subject: Subject) -> None:
        """Ask whether the client may do something. :raises AccessDeniedError: it may not."""
        request = AccessRequest(
            client=self.client, action=action, host=uri, uuid=subject.uuid, name=subject.name
        )
        reason = await connection.hooks.review_access(request)
        if reason is not None:
            audit(self.client, action, uri, subject.name, "refused", reason)
            raise AccessDeniedError(f"access denied: {reason}")

    @asynccontextmanager
    async def _guarded_stream(
        self, action: str, subject: Subject, opening: AbstractAsyncContextManager[ByteStream]
    ) -> AsyncIterator[ByteStream]:
        """The same of a stream: what became of its opening."""
        async with AsyncExitStack() as stack:
            async with self._doing(action, subject):
                stream = await stack.enter_async_context(opening)
            yield stream

    # Streams

    async def _run_stream(self, packet: Packet, opening: AbstractAsyncContextManager[ByteStream]) -> None:
        """Open a stream, answer the call that asked for it, and serve it until it ends."""
        if len(self._streams) >= self.limits.streams:
            raise WireFault(Code.OPERATION_FAILED, f"a client has at most {self.limits.streams} streams")
        async with AsyncExitStack() as stack:
            guest = await stack.enter_async_context(opening)
            stream = self._streams[packet.serial] = PacketStream(self.link, packet)
            stack.callback(self._streams.pop, packet.serial)
            self._reply(packet, None)
            # The call has its answer, so nothing that goes wrong from here on may become another one.
            with contained(f"a stream of {self.who}"):
                await carry(stream, guest)
                await stack.aclose()

    def _take_of_stream(self, packet: Packet) -> None:
        """Give a packet to its stream; one that has just ended needs it no more."""
        stream = self._streams.get(packet.serial)
        if stream is not None and stream.owns(packet):
            stream.take(packet)

    @contextmanager
    def _answering(self, packet: Packet) -> Iterator[None]:
        """Answer a call with what its answering raises."""
        try:
            yield
        except WireFault as error:
            self._reply_error(packet, fault(error))
        except FerrymanError as error:
            self._reply_error(
                packet, told_to_ferryman(error) if packet.program == ferry.PROGRAM else told(error)
            )
        except (XDRError, ValueFormError) as error:
            self._refuse(packet, Code.RPC, f"Unable to decode message payload: {error}")
        except Exception:  # noqa: BLE001
            # A client has other calls under way, and one of them may be a migration, which would be aborted with the
            # session. So a defect in the answer to one call is that call's answer, and the log has its traceback.
            _log.exception("call %d of %s failed", packet.procedure, self.who)
            self._refuse(packet, Code.INTERNAL, "internal error: the daemon's log says more")

    def _arguments(self, packet: Packet, answer: Answer) -> tuple[Any, ...]:
        """What a call says. :raises WireFault: it may not be made. :raises XDRError: it cannot be read."""
        if answer.needs_host and self.host is None:
            raise WireFault(Code.INTERNAL, "hypervisor connection not open", Of.RPC)
        if answer.action and self.read_only:
            raise WireFault(
                Code.OPERATION_DENIED,
                f"operation forbidden: read only access prevents {answer.procedure.name}",
                Of.DOMAIN,
            )
        return decode(answer.procedure.arguments, packet.payload)

    def _reply(self, packet: Packet, result: tuple[Any, ...] | None) -> None:
        payload = encode(result) if result else b""
        self.link.send(packet._replace(type=PacketType.REPLY, payload=payload))

    def _reply_error(self, packet: Packet, error: RemoteError) -> None:
        self.link.send(
            packet._replace(type=PacketType.REPLY, status=Status.ERROR, payload=encode(error), descriptors=0)
        )

    def _refuse(self, packet: Packet, code: Code, message: str) -> None:
        self._reply_error(packet, fault(WireFault(code, message, Of.RPC)))

    # Ferryman's program

    async def _ferryman(self, packet: Packet) -> Result:
        if packet.procedure == ferry.Number.OPEN:
            opening = decode(ferry.Open, packet.payload)
            await self.open(opening.uri, read_only=bool(opening.flags & 1))
            assert self.host is not None
            self.ferryman = True
            connection = self.host.connection
            hooks = tuple(sorted(filter(connection.hooks.has, ferry.OFFERED)))
            return ferry.OpenReply(connection.hooks.distribution, connection.address, hooks)
        if packet.procedure not in (ferry.Number.HOOK, ferry.Number.HOST, ferry.Number.CONSOLE):
            raise NotSupportedError(f"Ferryman's program has no procedure {packet.procedure} here")
        if self.host is None:
            raise NotSupportedError("no host is open: OPEN is the first call")
        call = decode(ferry.Call, packet.payload)
        if packet.procedure == ferry.Number.CONSOLE:
            return self._console(call)
        if packet.procedure == ferry.Number.HOOK:
            return ferry.CallReply(dump(await self._hook(call)))
        return ferry.CallReply(dump(await self._end(call, packet.serial)))

    async def _hook(self, call: ferry.Call) -> object:
        assert self.host is not None
        connection = self.host.connection
        if call.name not in ferry.FORWARDED:
            raise NotSupportedError(f"there is no hook {call.name:.60} to call")
        hints = hints_of(getattr(DriverHooks, call.name))
        admit = {"admit": connection.host.require_free} if call.name == "domain_restore" else {}
        request = load(hints["request"], call.arguments, **admit)
        returned = hints["return"]
        returned = get_origin(returned) or returned
        if call.name in ferry.READS:
            reply = await connection.hooks.call(call.name, request, returned)
            if call.name == "domain_definition" and self.read_only:
                return parse_definition(str(reply)).without_secrets().render()
            return reply
        self._need_to_change(call.name)
        subject = subject_of(request)
        async with self._doing(call.name, subject):
            await connection.acquire()
            # What is suspended while it is migrated goes on where it ends up.
            if call.name != "domain_suspend" and subject.known:
                connection.host.require_free(*subject.known)
            reply = await connection.hooks.call(call.name, request, returned)
            if getattr(request, "autodestroy", False):
                assert isinstance(reply, DomainInfo)
                self.destroy_on_leaving(Domain(connection, reply.name, reply.uuid))
            return reply

    def _console(self, call: ferry.Call) -> AbstractAsyncContextManager[ByteStream]:
        assert self.host is not None
        self._need_to_change("domain_console")
        request = load(ConsoleRequest, call.arguments)
        domain = Domain(self.host.connection, request.name, request.uuid)
        return self._guarded_stream("domain_console", subject_of(request), domain.console(request.device))

    async def _end(self, call: ferry.Call, serial: int) -> object:
        assert self.host is not None
        if call.name not in _END_METHODS:
            raise NotSupportedError(f"there is no method {call.name:.60} to call")
        self._need_to_change(call.name)
        given = {"progress": partial(self._sample, serial)} if call.name == "perform" else {}
        arguments = load_arguments(getattr(HostEnd, call.name), call.arguments, **given)
        method = getattr(self.host.connection.host, call.name)
        action = _ACTIONS.get(call.name)
        if action is None:
            # It settles what has begun: nobody may keep it from that.
            return await method(**arguments)
        async with self._doing(action, self._subject_of_end(arguments)):
            return await method(**arguments)

    def _subject_of_end(self, arguments: dict[str, Any]) -> Subject:
        """The domain that a method of the host's end is about."""
        assert self.host is not None
        if "definition" in arguments:
            # It arrives: what counts is what will be built here, whatever the caller calls it.
            return defined(arriving_definition(arguments["definition"], arguments["options"]))
        if "domain" in arguments:
            return known(arguments["domain"].uuid, arguments["domain"].name)
        for row in self.host.connection.host.open_migrations():
            if row.migration_id == arguments.get("migration_id"):
                return Subject(row.uuid, row.name)
        return Subject()

    def _sample(self, serial: int, statistics: TransferStatistics) -> None:
        self._tell(ferry.PROGRAM, ferry.Number.PROGRESS, ferry.Progress(serial, dump(statistics)))

    def _cancel(self, packet: Packet) -> None:
        try:
            serial = decode(ferry.Cancel, packet.payload).serial
        except XDRError as error:
            self._refuse(packet, Code.RPC, f"Unable to decode message payload: {error}")
            return
        if serial in self._streams:
            self._streams[serial].break_off("it was cancelled")
        elif serial in self._calls:
            self._calls[serial].cancel()
        self._reply(packet, Void())

    # What it may do, and hears

    def _need_to_change(self, what: str) -> None:
        """Refuse a change to a client that only reads."""
        if self.read_only:
            raise AccessDeniedError(f"this connection is read-only, and {what} changes something")

    async def open(self, uri: str, *, read_only: bool = False) -> None:
        """Open a host for this client.

        :param read_only: it asks to change nothing.
        """
        self._asked.set()
        async with self._opening:
            if self.host is not None:
                raise WireFault(Code.INTERNAL, "connection already open", Of.RPC)
            host = await self.hosts.get(uri)
            await self._review(host.connection, uri, "connection_open", Subject())
            self.read_only = self.read_only or read_only
            self.host, self.uri = host, uri
            host.listeners.append(self._hear)
            self.link.limit(self.limits.message_bytes)

    def destroy_on_leaving(self, domain: Domain) -> None:
        """End a guest when this client is gone; the driver ends it when the daemon is."""

        async def destroy() -> None:
            try:
                if (await domain.info()).state.active:
                    await domain.destroy()
            except DomainNotFoundError:
                return

        self.leaves.append(destroy)

    def announce(self, name: str, uuid: DomainUUID, *, active: bool) -> None:
        """Keep in mind that this client means to bring a guest here; of very many only the last.

        :param active: the domain is active here already.
        """
        self.awaited.pop(name, None)
        self.awaited[name] = (uuid, active)
        if len(self.awaited) > _AWAITED:
            del self.awaited[next(iter(self.awaited))]

    def listen(self, listener: Listener) -> int:
        """Hear of a kind of event; returns the number of the registration.

        :raises WireFault: it listens to as much as it may.
        """
        if len(self.listeners) >= self.limits.listeners:
            raise WireFault(Code.OPERATION_FAILED, f"a client has at most {self.limits.listeners} listeners")
        self._next_listener += 1
        self.listeners[self._next_listener] = listener
        return self._next_listener

    def _hear(self, event: DomainEvent) -> None:
        assert self.host is not None
        if self.ferryman:
            self._tell(ferry.PROGRAM, ferry.Number.EVENT, ferry.Happened(dump(event)))
        for callback, listener in self.listeners.items():
            if listener.uuid is not None and listener.uuid != event.uuid:
                continue
            for number, message in packets_of(
                event, listener.event_id, callback, self.host.known_id(event.uuid)
            ):
                self._tell(REMOTE_PROGRAM, number, message)

    def _tell(self, program: int, number: int, message: tuple[Any, ...]) -> None:
        self.link.send(Packet(program, 1, number, PacketType.EVENT, 0, payload=encode(message)))


async def serve(
    stream: ByteStream,
    hosts: Hosts,
    limits: Limits,
    *,
    client: Client,
    read_only: bool = False,
    secure: bool = False,
) -> None:
    """Serve one client, and end with it."""
    from ferryman_remote.daemon import calls  # noqa: F401 - it fills the registry, and needs sessions itself

    link = Link(stream, name=str(client), limit=min(limits.message_bytes, _OPENING_BYTES))
    session = Session(
        link=link, hosts=hosts, limits=limits, client=client, read_only=read_only, secure=secure
    )
    _log.debug("%s connected", client)
    await session.run()
