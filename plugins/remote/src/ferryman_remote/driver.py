"""The driver for hosts behind a daemon: chosen by the transport of a connection URI, such as ``qemu+tcp://host/system``.

It keeps nothing: hooks and the host's end of migrations are the daemon's, called over Ferryman's own program.  A link
that broke is made anew by the next call; what became of the call that it broke in is not known, and is told so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.engine import Begun, HostEnd, Prepared
from ferryman.errors import (
    ConnectError,
    ConnectionClosedError,
    FerrymanError,
    HypervisorError,
    NotSupportedError,
)
from ferryman.handover import PaperKind, with_kind
from ferryman.hookspecs import (
    ConsoleRequest,
    DriverHooks,
    HostRequest,
    OpenReply,
    OpenRequest,
    hook_names,
    hookimpl,
)
from ferryman.types import DomainEvent, TransferStatistics
from ferryman_remote import ferry
from ferryman_remote.caller import Caller
from ferryman_remote.link import Link
from ferryman_remote.transports import connect_stream
from ferryman_remote.values import ValueFormError, dump, hints_of, load
from ferryman_remote.wire import MAX_MESSAGE_BYTES, Packet
from ferryman_remote.xdr import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import ByteStream, TaskGroup

    from ferryman.engine import Confirmed, Finished, Performed
    from ferryman.handover import MigrationRow
    from ferryman.resolve import Resolution, Testimony
    from ferryman.types import DomainInfo, DomainUUID, MigrationId, MigrationOptions, Side, Tuning
    from ferryman.uri import ConnectionURI
    from ferryman_remote.streams import PacketStream

_log = logging.getLogger(__name__)

_OPEN_S = 20.0
_PING_S = 5.0
_PINGS = 5


class Remote:
    """A host behind a daemon, over one link at a time."""

    def __init__(self, uri: ConnectionURI, tasks: TaskGroup, emit: Callable[[DomainEvent], None]) -> None:
        self.uri = uri
        self.opened = ferry.OpenReply("", "", ())
        self._tasks = tasks
        self._emit = emit
        self._caller: Caller | None = None
        self._opening = anyio.Lock()

    async def caller(self) -> Caller:
        """The link that stands, or a new one.

        :raises ConnectError: the daemon cannot be reached, or does not serve the host.
        """
        async with self._opening:
            if self._caller is None or self._caller.link.ended:
                self._caller = await self._open()
            return self._caller

    async def _open(self) -> Caller:
        caller: Caller | None = None
        try:
            with anyio.fail_after(_OPEN_S):
                stream = await connect_stream(self.uri)
                link = Link(stream, name=str(self.uri), limit=MAX_MESSAGE_BYTES)
                caller = Caller(link, self._happened)
                self._tasks.start_soon(caller.run)
                self.opened = await caller.call(
                    ferry.PROGRAM, ferry.Number.OPEN, ferry.Open(_local(self.uri), 0), ferry.OpenReply
                )
        except BaseException as error:
            if caller is not None:
                caller.link.cut("it was not opened")
            if isinstance(error, TimeoutError):
                raise ConnectError(f"{self.uri} did not answer within {_OPEN_S:g} s") from error
            if isinstance(error, (OSError, ConnectionClosedError)):
                raise ConnectError(f"{self.uri} cannot be reached: {error}") from error
            raise
        link.keep_alive(_PING_S, _PINGS)
        return caller

    def _happened(self, packet: Packet) -> None:
        if (packet.program, packet.procedure) != (ferry.PROGRAM, ferry.Number.EVENT):
            return
        self._emit(load(DomainEvent, decode(ferry.Happened, packet.payload).event))

    async def call(
        self,
        number: ferry.Number,
        name: str,
        arguments: object,
        result: Any,
        *,
        progress: Callable[[bytes], None] | None = None,
        late: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Call a hook or a method; returns what it returned."""

        def read(reply: ferry.CallReply) -> Any:
            try:
                return load(result, reply.result)
            except ValueFormError as error:
                raise HypervisorError(
                    f"{self.uri} answered {name} with what cannot be read: {error}"
                ) from error

        async def undo(reply: ferry.CallReply) -> None:
            if late is not None:
                await late(read(reply))

        caller = await self.caller()
        reply = await caller.call(
            ferry.PROGRAM,
            number,
            ferry.Call(name, dump(arguments)),
            ferry.CallReply,
            progress=progress,
            late=undo if late is not None else None,
        )
        return read(reply)

    async def console(self, request: ConsoleRequest) -> PacketStream:
        """Open a guest's console."""
        caller = await self.caller()
        return await caller.stream(
            ferry.PROGRAM, ferry.Number.CONSOLE, ferry.Call("domain_console", dump(request))
        )

    def close(self) -> None:
        """End the link."""
        if self._caller is not None:
            self._caller.link.cut("it was closed")


def _local(uri: ConnectionURI) -> str:
    """The URI by which the daemon itself opens the host; the parameter ``name`` says it outright, as libvirt has it."""
    named = uri.param("name")
    if named is not None:
        return named
    own = ("socket", "pkipath")
    params = tuple((key, value) for key, value in uri.params if key not in own)
    return type(uri)(scheme=uri.scheme, path=uri.path, params=params).render()


class RemoteEnd(HostEnd):
    """A host's end of migrations, behind its daemon."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    @property
    def address(self) -> str:
        return self._remote.opened.address or self._remote.uri.render()

    async def _call(self, method: str, arguments: dict[str, object], **how: Any) -> Any:
        hint = hints_of(getattr(HostEnd, method))["return"]
        return await self._remote.call(ferry.Number.HOST, method, arguments, hint, **how)

    async def begin(
        self, domain: DomainInfo, options: MigrationOptions, *, migration_id: MigrationId | None = None
    ) -> Begun:
        async def undo(begun: Begun) -> None:
            await self.give_up(begun.id)

        arguments = {"domain": domain, "options": options, "migration_id": migration_id}
        begun: Begun = await self._call("begin", arguments, late=undo)
        return begun

    async def expect(
        self, migration_id: MigrationId, domain: DomainInfo, definition: str, options: MigrationOptions
    ) -> None:
        arguments = {
            "migration_id": migration_id,
            "domain": domain,
            "definition": definition,
            "options": options,
        }
        try:
            await self._call("expect", arguments)
        except FerrymanError as error:
            # Nothing fails here: that the host is away, or does not let the guest come, prepare says as well.
            _log.info("nothing was started ahead for domain %s: %s", domain.name, error)

    async def prepare(
        self, cookie: bytes, domain: DomainInfo, definition: str, options: MigrationOptions, *, paused: bool
    ) -> Prepared:
        async def undo(prepared: Prepared) -> None:
            await self.decide(with_kind(prepared.cookie, PaperKind.CANCEL))

        prepared: Prepared = await self._call(
            "prepare",
            {
                "cookie": cookie,
                "domain": domain,
                "definition": definition,
                "options": options,
                "paused": paused,
            },
            late=undo,
        )
        return prepared

    async def perform(
        self,
        cookie: bytes,
        migration_uri: str,
        options: MigrationOptions,
        progress: Callable[[TransferStatistics], None],
    ) -> Performed:
        def sample(data: bytes) -> None:
            progress(load(TransferStatistics, data))

        performed: Performed = await self._call(
            "perform", {"cookie": cookie, "migration_uri": migration_uri, "options": options}, progress=sample
        )
        return performed

    async def decide(self, cookie: bytes) -> Finished:
        finished: Finished = await self._call("decide", {"cookie": cookie})
        return finished

    async def confirm(self, cookie: bytes) -> Confirmed:
        confirmed: Confirmed = await self._call("confirm", {"cookie": cookie})
        return confirmed

    async def inquire(self, cookie: bytes) -> bytes:
        answer: bytes = await self._call("inquire", {"cookie": cookie})
        return answer

    async def switch(self, cookie: bytes) -> None:
        await self._call("switch", {"cookie": cookie})

    async def mend(self, cookie: bytes) -> str:
        uri: str = await self._call("mend", {"cookie": cookie})
        return uri

    async def give_up(self, migration_id: MigrationId) -> None:
        await self._call("give_up", {"migration_id": migration_id})

    async def tune(self, migration_id: MigrationId, tuning: Tuning) -> None:
        await self._call("tune", {"migration_id": migration_id, "tuning": tuning})

    async def renew(self, side: Side, migration_id: MigrationId) -> None:
        await self._call("renew", {"side": side, "migration_id": migration_id})

    def require_free(self, uuid: DomainUUID, name: str) -> None:
        """Nothing: the daemon does it, with every change."""

    def open_migrations(self) -> list[MigrationRow]:
        raise NotSupportedError("a daemon's open migrations are told by resolve()")

    def in_doubt(self) -> list[Resolution]:
        raise NotSupportedError("a daemon's open migrations are told by resolve()")

    async def resolve(
        self, migration_id: MigrationId | None = None, testimony: Testimony | None = None
    ) -> list[Resolution]:
        if testimony is not None:
            raise NotSupportedError("evidence is brought on the host itself, and not over a daemon")
        resolutions: list[Resolution] = await self._call("resolve", {"migration_id": migration_id})
        return resolutions


class RemoteDriver:
    """One connection to a host behind a daemon."""

    def __init__(self) -> None:
        self._remote: Remote | None = None

    @hookimpl
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        remote = self._remote = Remote(request.uri, request.tasks, request.emit)
        await remote.caller()
        return OpenReply(end=RemoteEnd(remote), hooks=frozenset(remote.opened.hooks))

    @hookimpl
    async def connection_close(self, request: HostRequest) -> None:
        if self._remote is not None:
            self._remote.close()

    @hookimpl
    async def domain_console(self, request: ConsoleRequest) -> ByteStream:
        assert self._remote is not None
        return await self._remote.console(request)

    async def forward(self, name: str, request: object) -> object:
        """Call a hook of the host's own driver."""
        assert self._remote is not None
        if name not in ferry.FORWARDED:
            raise NotSupportedError(f"{name} is not called over a daemon")
        hint = hints_of(getattr(DriverHooks, name))["return"]
        return await self._remote.call(ferry.Number.HOOK, name, request, hint)


def _forwarding(name: str) -> Any:
    async def forward(self: RemoteDriver, request: object) -> object:
        return await self.forward(name, request)

    forward.__name__ = name
    return hookimpl(forward)


for _name in hook_names(DriverHooks):
    if not hasattr(RemoteDriver, _name):
        setattr(RemoteDriver, _name, _forwarding(_name))
