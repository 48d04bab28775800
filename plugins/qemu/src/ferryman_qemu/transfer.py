"""The source's half of a live migration with QEMU: from ``migrate`` to the proof of stop.

The end is told by events of this attempt, never found by looking.  Sources: QEMU 7.2 qapi/migration.json,
migration/migration.c (``migration_iteration_finish``), qapi/yank.json.

Proof of stop
    ``completed`` of this attempt *and* the run state ``finish-migrate`` or ``postmigrate``.  Neither alone proves
    anything: QEMU resumes a source by itself when its stream breaks before completion.
Post-copy
    ``postcopy-active`` is told when the switch begins, and QEMU can still fail it while it sends the devices' state; it
    holds its main lock until that is done.  So the proof is the run state ``finish-migrate`` and ``postcopy-active`` in
    answers *after* that event, which come only when the lock is free again.  QEMU 7.2 never resumes a source that has
    begun the switch: at worst the guest stands still in ``failed`` and ``postmigrate``, and waits for our ``cont``.
    A stream that breaks later leaves both halves waiting; it is mended, never given up.
Abort
    The stream is broken out of band (``yank``), since QEMU's main loop may be silent at the end until the stream moves;
    QEMU then fails the migration and resumes the guest itself.  Never ``migrate_cancel``, but for ``pre-switchover``,
    which QEMU leaves by our word alone (:func:`leave_switchover`): where it comes while the
    guest is being stopped, QEMU 7.2 resumes the guest on disks that it has given up, and aborts at the next write
    (``migration_completion`` takes them back only in the states ``active`` and ``device``).
"""

from __future__ import annotations

import logging
import socket
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ferryman.errors import HypervisorError, InDoubtError, PerformError
from ferryman.hookspecs import PerformReply, PerformRequest, ServeReply
from ferryman.types import Compression, GuestState, MigrationOptions, Side, TransferStatistics
from ferryman.uri import MigrationURI
from ferryman_qemu.monitor import Command, MonitorClosedError, MonitorError, MonitorTimeout
from ferryman_qemu.storage import Copies, CopyError, yank
from ferryman_qemu.streams import SILENCE_S, connect, cut_silent, taken
from ferryman_qemu.tls import TLS_ID, peer_name, read_rules

if TYPE_CHECKING:
    from collections.abc import Collection

    from anyio.abc import TaskGroup

    from ferryman_qemu.guest import Guest
    from ferryman_qemu.monitor import EventStream
    from ferryman_qemu.tls import Credentials

_log = logging.getLogger(__name__)

DEFAULT_DOWNTIME_MS = 300
"""QEMU's own default of ``downtime-limit``; set each time, since an earlier migration may have left another."""

_THROTTLE_INITIAL = 20
_THROTTLE_INCREMENT = 10
_THROTTLE_MAX = 99
"""QEMU's own defaults of the throttle, in percent."""

_END_PATIENCE_S = 30.0
_SAMPLE_S = 0.25

_FD_NAME = "ferryman-migration"
_SAMPLE_APART_S = 0.05
_LOOK_AGAIN_S = 0.002
_STOPPED_STATES = ("finish-migrate", "postmigrate")

POSTCOPY = ("postcopy-active", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
"""What ``query-migrate`` answers while a guest is split between two processes."""

ACTIVE = frozenset(
    {
        "setup",
        "active",
        "device",
        "pre-switchover",
        "cancelling",
        "wait-unplug",
        *POSTCOPY,
    }
)
"""What ``query-migrate`` answers while a transfer has not ended (qapi/migration.json, MigrationStatus)."""


_CAPABILITIES = (
    "events",
    "return-path",
    "multifd",
    "xbzrle",
    "auto-converge",
    "zero-copy-send",
    "postcopy-ram",
    "pause-before-switchover",
    "late-block-activate",
)
"""What is switched on or off for every transfer, since an earlier attempt may have left something on."""

_STREAMS = 2
"""Streams of a transfer that is compressed, where their number is not said; QEMU's own default."""


def streams_of(options: MigrationOptions) -> int:
    """Number of connections beside the main one; 0 is a transfer over one connection alone."""
    if options.streams is None and options.compression in (Compression.ZLIB, Compression.ZSTD):
        return _STREAMS
    return options.streams or 0


def _shared(options: MigrationOptions) -> set[str]:
    """Capabilities that both ends must have."""
    wanted = {"events", "return-path"}
    if streams_of(options):
        wanted.add("multifd")
    if options.compression is Compression.XBZRLE:
        wanted.add("xbzrle")
    if options.postcopy is not None:
        wanted.add("postcopy-ram")
    return wanted


def capabilities(wanted: Collection[str]) -> Command:
    """The command that switches on what is wanted, and off whatever an earlier transfer may have left on."""
    states = [{"capability": name, "state": name in wanted} for name in _CAPABILITIES]
    return Command("migrate-set-capabilities", {"capabilities": states})


def source_settings(options: MigrationOptions) -> tuple[Command, ...]:
    """Commands that set what a source is asked for; a bandwidth of 0 is no cap."""
    wanted = _shared(options)
    if options.auto_converge:
        wanted.add("auto-converge")
    if options.zero_copy:
        wanted.add("zero-copy-send")
    if options.copy_storage is not None:
        # The place to end the copies of disks: the guest stands still, and its state is not sent yet.
        wanted.add("pause-before-switchover")
    values: dict[str, Any] = {
        "max-bandwidth": options.bandwidth_bytes_per_s or 0,
        "downtime-limit": options.max_downtime_ms or DEFAULT_DOWNTIME_MS,
        "max-postcopy-bandwidth": options.postcopy_bandwidth_bytes_per_s or 0,
        "cpu-throttle-initial": options.throttle_initial_percent or _THROTTLE_INITIAL,
        "cpu-throttle-increment": options.throttle_increment_percent or _THROTTLE_INCREMENT,
        "max-cpu-throttle": options.throttle_max_percent or _THROTTLE_MAX,
        # Set when the address is known, where the transfer is encrypted.
        "tls-creds": "",
        "tls-hostname": "",
        **_stream_values(options),
    }
    if options.xbzrle_cache_bytes is not None:
        values["xbzrle-cache-size"] = options.xbzrle_cache_bytes
    return (capabilities(wanted), Command("migrate-set-parameters", values))


def receiver_settings(options: MigrationOptions) -> tuple[Command, ...]:
    """Commands that set what a receiver must know before it listens."""
    settings = [capabilities(_shared(options) | {"late-block-activate"})]
    if streams_of(options):
        settings.append(Command("migrate-set-parameters", _stream_values(options)))
    return tuple(settings)


def _stream_values(options: MigrationOptions) -> dict[str, Any]:
    streams = streams_of(options)
    compression = options.compression if streams else None
    values: dict[str, Any] = {
        "multifd-channels": streams or _STREAMS,
        "multifd-compression": compression.value
        if compression in (Compression.ZLIB, Compression.ZSTD)
        else "none",
    }
    if options.compression_level is not None and compression is not None:
        values[f"multifd-{compression.value}-level"] = options.compression_level
    return values


def tls_settings(credentials: Credentials, *, server: bool, name: str) -> tuple[Command, ...]:
    """Commands that encrypt the next transfer.

    :param name: of the server, which its certificate must bear; '' at the server.
    """
    values = {"tls-creds": TLS_ID, "tls-hostname": name}
    commands = [Command("object-add", {"id": TLS_ID, **credentials.object(server=server)})]
    if server and credentials.authorized is not None:
        authorization = {
            **read_rules(credentials.authorized),
            "qom-type": "authz-list",
            "id": f"{TLS_ID}-authz",
        }
        commands.append(Command("object-add", authorization))
        values["tls-authz"] = f"{TLS_ID}-authz"
    return (*commands, Command("migrate-set-parameters", values))


class Transfer:
    """One attempt to send a guest."""

    def __init__(self, guest: Guest, request: PerformRequest, tasks: TaskGroup) -> None:
        self._guest = guest
        self._request = request
        self._tasks = tasks
        self._was_running = False
        self._streams = streams_of(request.options)
        self._stream: socket.socket | None = None
        self._switching = False
        self._aborting = False
        self._trouble = ""
        self._copies: Copies | None = None
        self._sample_wanted = anyio.Event()
        self.begun = anyio.Event()

    async def run(self) -> PerformReply:
        """Send, and return with the proof of stop.

        :raises PerformError: the guest is here as before.
        :raises InDoubtError: QEMU died or fell silent. :raises HypervisorError: the same, after the transfer's end.
        :cancellation: aborts; returns all the same when it is too late for that.
        """
        try:
            await self._copy_disks()
            with self._guest.control.events("MIGRATION", "MIGRATION_PASS") as events:
                await self._begin()
                # Our copy of the connection, if it stayed open, would keep the destination from noticing the end.
                with self._stream or nullcontext():
                    scope = anyio.CancelScope()
                    self._tasks.start_soon(self._sample, scope)
                    if self._stream is not None:
                        self._tasks.start_soon(self._watch, self._stream)
                    try:
                        return await self._follow(events)
                    finally:
                        scope.cancel()
        except MonitorClosedError as error:
            raise InDoubtError(
                f"QEMU of domain {self._guest.record.name} ended during the transfer",
                evidence_missing="the destination's word",
                side=Side.SOURCE,
            ) from error

    async def set_copy_speed(self, bytes_per_s: int) -> None:
        """Cap the copy of each disk; 0 is no cap.  Nothing where no disk is copied.

        :raises HypervisorError: a copy has ended.
        """
        if self._copies is not None:
            await self._copies.set_speed(bytes_per_s)

    async def _copy_disks(self) -> None:
        """Bring every disk that is copied to where it follows the guest's writes.

        :cancellation: no copy is left.
        """
        uri = self._request.cookie.get("disks", "")
        if not uri:
            return
        options = self._request.options
        self._copies = Copies(
            self._guest,
            options,
            uri=uri,
            targets=self._request.cookie["copied"].split(","),
            tls_name=peer_name(options, uri),
            tasks=self._tasks,
            show=self._show_copies,
        )
        try:
            await self._copies.run()
        except CopyError as error:
            raise self._failed(str(error)) from error

    def _show_copies(self, done: int, total: int) -> None:
        self._request.progress(TransferStatistics(storage_bytes=done, storage_total_bytes=total))

    async def _switch_disks(self) -> None:
        """End the copies of a guest that stands still, and let its state be sent; or give the transfer up.

        INVARIANT: the transfer goes on only after every copy has ended whole.
        """
        reason = "" if not self._aborting else "aborted"
        if not reason and self._copies is not None:
            try:
                await self._copies.finish()
            except CopyError as error:
                self._trouble = reason = str(error)
        if reason:
            await leave_switchover(self._guest)
        else:
            await self._guest.command("migrate-continue", {"state": "pre-switchover"})

    def begin_switch(self) -> None:
        """Note that the switch to post-copy is being commanded: from now on nothing may break the stream."""
        self._switching = True

    async def _begin(self) -> None:
        """Tell QEMU to send, and keep a copy of its connection where it gets that from us."""
        if self._streams:
            # Each stream is a connection of its own, which QEMU makes itself.
            await anyio.lowlevel.checkpoint_if_cancelled()
            with anyio.CancelScope(shield=True):
                await self._migrate(Command("migrate", {"uri": _qemu_uri(self._request.migration_uri)}))
            self.begun.set()
            return
        try:
            stream = await connect(self._request.migration_uri)
        except OSError as error:
            raise self._failed(
                f"the receiver at {self._request.migration_uri} cannot be reached: {error}"
            ) from error
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
            # INVARIANT: once QEMU may have been told to send, a cancellation goes through _abort, which ends that.
            with anyio.CancelScope(shield=True):
                guard = anyio.CancelScope()
                if self._request.options.tls:
                    self._tasks.start_soon(cut_silent, stream, guard)
                try:
                    await self._migrate(
                        Command("getfd", {"fdname": _FD_NAME}, [stream.fileno()]),
                        Command("migrate", {"uri": f"fd:{_FD_NAME}"}),
                    )
                    if self._request.options.tls:
                        await self._await_handshake()
                finally:
                    guard.cancel()
        except BaseException:
            stream.close()
            raise
        self._stream = stream
        self.begun.set()

    async def _await_handshake(self) -> None:
        """Wait until an encrypted transfer has begun, or failed."""
        while (await self._guest.command("query-migrate")).get("status") == "setup":  # noqa: ASYNC110
            # QEMU tells neither the handshake's begin nor its end by an event.
            await anyio.sleep(_SAMPLE_APART_S)

    async def _migrate(self, *commands: Command) -> None:
        """Tell QEMU to send; where it gets no descriptor, the command for that fails too."""
        guest = self._guest
        async with guest.lock:
            try:
                status, *_ = await guest.control.execute_all((Command("query-status"), *commands))
            except MonitorClosedError:
                raise
            except MonitorTimeout as error:
                raise InDoubtError(str(error), evidence_missing="QEMU's answer", side=Side.SOURCE) from error
            except MonitorError as error:
                raise self._failed(str(error)) from error
        self._was_running = status["status"] == "running"

    async def _follow(self, events: EventStream) -> PerformReply:
        try:
            end = await self._wait_end(events)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                end = await (self._wait_end(events) if self._switching else self._abort(events))
                if end in ("failed", "cancelled"):
                    await settle_source(self._guest)
            if end in ("failed", "cancelled"):
                raise
        if end in ("failed", "cancelled"):
            raise self._failed(await self._reason())
        with anyio.CancelScope(shield=True):
            reply = await self._prove(end)
        return reply

    async def _wait_end(self, events: EventStream) -> str:
        """Wait until this attempt has ended: ``completed``, ``switched``, ``failed`` or ``cancelled``."""
        while True:
            event = await events.get()
            if event.name == "MIGRATION_PASS":
                self._sample_wanted.set()
            else:
                status = str(event.data.get("status"))
                if status in ("completed", "failed", "cancelled"):
                    return status
                if status == "pre-switchover":
                    with anyio.CancelScope(shield=True):
                        await self._switch_disks()
                elif status == "postcopy-active":
                    with anyio.CancelScope(shield=True):
                        end = await self._await_switch()
                    return end

    async def _await_switch(self) -> str:
        """Wait until the switch that has begun is over: ``switched``, ``failed``, or ``completed`` already.

        QEMU tells the state a moment before it takes its main lock to stop the guest, and tells nothing when it lets go
        of the lock; in between it answers nothing.  So the first answer of a guest that is stopped is the end of it.
        """
        while True:
            state, info = await self._guest.command_all(Command("query-status"), Command("query-migrate"))
            status = str(info.get("status"))
            if status in ("completed", "failed"):
                return status
            if status in POSTCOPY and state["status"] in _STOPPED_STATES:
                return "switched"
            await anyio.sleep(_LOOK_AGAIN_S)

    async def _prove(self, end: str) -> PerformReply:
        state = await self._guest.run_state()
        if state not in _STOPPED_STATES:
            raise InDoubtError(
                f"QEMU says that the migration completed, but its run state is {state}",
                evidence_missing="the destination's word",
                side=Side.SOURCE,
            )
        stopped_for_ms = None
        stopped_at = self._guest.stopped_at
        if self._was_running and stopped_at is not None:
            stopped_for_ms = max(0.0, (time.time() - stopped_at) * 1000)
        return PerformReply(
            statistics=TransferStatistics(), stopped_for_ms=stopped_for_ms, switched=end == "switched"
        )

    async def _abort(self, events: EventStream) -> str:
        """End the transfer at any moment, and say how it ended."""
        self._aborting = True
        await self._break()
        with anyio.move_on_after(_END_PATIENCE_S):
            return await self._wait_end(events)
        raise InDoubtError(
            f"QEMU of domain {self._guest.record.name} did not end the transfer within {_END_PATIENCE_S:g} s",
            evidence_missing="QEMU's answer",
            side=Side.SOURCE,
        )

    async def _break(self) -> None:
        """End every connection of the transfer; QEMU then fails it, and resumes the guest by itself.

        Ours is ended by our copy of it too: where the other end has ended its half, QEMU's return path closes the
        descriptor while another thread waits in ``sendmsg`` on it, and ``yank`` finds nothing to end (seen on 7.2).
        """
        if self._stream is not None:
            with suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)
        await break_stream(self._guest)

    async def _reason(self) -> str:
        await settle_source(self._guest)
        info = await self._guest.command("query-migrate")
        said = info.get("error-desc") or f"the stream to {self._request.migration_uri} broke"
        return self._trouble or str(said)

    def _failed(self, reason: str) -> PerformError:
        return PerformError(
            reason, side=Side.SOURCE, domain=self._guest.record.name, guest_state=GuestState.SOURCE
        )

    async def _sample(self, scope: anyio.CancelScope) -> None:
        """Show counters when a pass over the memory ends, and now and then between."""
        with scope:
            progress = _Progress()
            sent: object = ()
            while True:
                # A transfer that is over before this is not asked while it is in a hurry.
                await anyio.sleep(_SAMPLE_APART_S)
                with anyio.move_on_after(_SAMPLE_S):
                    await self._sample_wanted.wait()
                self._sample_wanted = anyio.Event()
                try:
                    info = await self._guest.command("query-migrate")
                except HypervisorError as error:
                    _log.info("the transfer's counters could not be read: %s", error)
                    info = {}
                    if self._guest.control.closed:
                        return
                if info:
                    self._request.progress(statistics_of(info))
                    sent = (info.get("status"), (info.get("ram") or {}).get("transferred"))
                # QEMU's own connections have no limit to a peer's silence, so a cut network would go unnoticed.
                if self._stream is None and progress.stands(sent):
                    await self._end_silence()
                    return

    async def _watch(self, stream: socket.socket) -> None:
        """End a connection whose other end takes nothing any more, until our copy of it is closed.

        QEMU is not asked: it may wait for that very end.
        """
        progress = _Progress()
        while stream.fileno() >= 0:
            if progress.stands(taken(stream)):
                await self._end_silence()
                return
            await anyio.sleep(_SAMPLE_S)

    async def _end_silence(self) -> None:
        name = self._guest.record.name
        _log.warning("nothing of domain %s was taken at the other end for %g s", name, SILENCE_S)
        # One whose process is gone has no connections, and that is found out elsewhere.
        with suppress(MonitorClosedError):
            await self._break()


class _Progress:
    """Tells when something has stood still for :data:`SILENCE_S`."""

    def __init__(self) -> None:
        self._last: object = None
        self._moved_at = anyio.current_time()

    def stands(self, now: object) -> bool:
        """Whether it has; None is nothing that could move."""
        if now is None or now != self._last:
            self._last, self._moved_at = now, anyio.current_time()
        return anyio.current_time() - self._moved_at > SILENCE_S


async def break_stream(guest: Guest) -> None:
    """Break a source's connections, out of band; QEMU then fails the migration and resumes the guest by itself.

    Those of disks that are copied too: QEMU waits for them when it stops the guest.  A transfer that stands in
    ``pre-switchover`` does not notice, since nothing is being sent there: :func:`leave_switchover` ends it.

    :raises MonitorClosedError: the process is gone.
    """
    await yank(guest, stream=True)


async def leave_switchover(guest: Guest) -> None:
    """Give up a transfer that stands in ``pre-switchover``; QEMU resumes the guest by itself.

    Here, and nowhere else, that is ``migrate_cancel``: nothing goes on from this state unless we say so, and the disks
    are not given up yet.

    :raises HypervisorError: QEMU does not answer.
    """
    await guest.command("migrate_cancel")


def _qemu_uri(text: str) -> str:
    """A migration URI as QEMU writes it."""
    uri = MigrationURI.parse(text)
    if uri.protocol == "unix":
        return f"unix:{uri.path}"
    host = f"[{uri.host}]" if uri.host and ":" in uri.host else uri.host
    return f"tcp:{host}:{uri.port}"


async def serve_pages(guest: Guest) -> ServeReply:
    """Wait until the destination has every page of a guest that runs there already, or the stream broke."""
    with guest.control.events("MIGRATION") as events:
        while True:
            try:
                status = (await guest.command("query-migrate")).get("status")
            except HypervisorError:
                if await guest.is_ending():
                    return ServeReply(lost=True)
                raise
            if status == "postcopy-paused":
                return ServeReply(broken=True)
            if status not in POSTCOPY:
                return ServeReply(lost=status == "failed")
            try:
                await events.get()
            except MonitorClosedError:
                await guest.gone.wait()
                return ServeReply(lost=True)


async def mend_source(guest: Guest, uri: str) -> None:
    """Send the rest of a guest over a new connection.

    :raises HypervisorError: the destination cannot be reached, or QEMU does not resume.
    :source: QEMU 7.2: a stream that is lost while both ends compare what is missing ends the destination's QEMU, so it
        is connected here, and nobody else is let in between.
    """
    try:
        stream = await connect(uri)
    except OSError as error:
        raise HypervisorError(f"the destination at {uri} cannot be reached: {error}") from error
    with stream, guest.control.events("MIGRATION") as events, anyio.CancelScope(shield=True):
        async with guest.lock:
            await guest.command_all(
                Command("getfd", {"fdname": _FD_NAME}, [stream.fileno()]),
                Command("migrate", {"uri": f"fd:{_FD_NAME}", "resume": True}),
            )
        with anyio.move_on_after(_END_PATIENCE_S):
            while (status := (await guest.command("query-migrate")).get("status")) in (
                "postcopy-recover",
                "postcopy-recover-setup",
            ):
                await events.get()
            if status in ("postcopy-active", "completed"):
                return
    raise HypervisorError(f"QEMU of domain {guest.record.name} did not take the new connection")


async def settle_source(guest: Guest) -> str:
    """Wait until a source whose transfer failed has left ``finish-migrate``; returns its run state.

    QEMU tells ``failed`` a moment before it leaves that state, and by no event that it has left it where the guest was
    paused before (migration/migration.c, migration_iteration_finish).
    """
    with anyio.move_on_after(_END_PATIENCE_S):
        while await guest.run_state() == "finish-migrate":  # noqa: ASYNC110
            await anyio.sleep(_LOOK_AGAIN_S)
    return await guest.run_state()


def statistics_of(info: dict[str, Any]) -> TransferStatistics:
    """Counters of ``query-migrate``."""
    ram: dict[str, Any] = info.get("ram") or {}
    page_bytes = int(ram.get("page-size", 4096))
    rate = ram.get("dirty-pages-rate")
    mbps = ram.get("mbps")
    return TransferStatistics(
        iteration=ram.get("dirty-sync-count"),
        transferred_bytes=ram.get("transferred"),
        remaining_bytes=ram.get("remaining"),
        total_bytes=ram.get("total"),
        dirty_bytes_per_s=None if rate is None else int(rate) * page_bytes,
        bandwidth_bytes_per_s=None if not mbps else int(mbps * 1_000_000 / 8),
        expected_downtime_ms=info.get("expected-downtime"),
        downtime_ms=info.get("downtime"),
        setup_ms=info.get("setup-time"),
        total_ms=info.get("total-time"),
        throttle_percent=info.get("cpu-throttle-percentage"),
        postcopy=info.get("status") in POSTCOPY,
    )
