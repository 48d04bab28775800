"""The source's half of a live migration with QEMU: from ``migrate`` to the proof of stop.

The end is told by events of this attempt, never found by looking.  Sources: QEMU 7.2 qapi/migration.json,
migration/migration.c (``migration_iteration_finish``), qapi/yank.json.

Proof of stop
    ``completed`` of this attempt *and* the run state ``finish-migrate`` or ``postmigrate``.  Neither alone proves
    anything: QEMU resumes a source by itself when its stream breaks before completion.
Abort
    The stream is broken out of band (``yank``), since QEMU's main loop may be silent at the end until the stream moves;
    QEMU then fails the migration and resumes the guest itself.  Never ``migrate_cancel``: where it comes while the
    guest is being stopped, QEMU 7.2 resumes the guest on disks that it has given up, and aborts at the next write
    (``migration_completion`` takes them back only in the states ``active`` and ``device``).
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from ferryman.errors import HypervisorError, InDoubtError, PerformError
from ferryman.hookspecs import PerformReply, PerformRequest
from ferryman.types import GuestState, MigrationOptions, Side, TransferStatistics
from ferryman.uri import MigrationURI
from ferryman_qemu.monitor import Command, MonitorClosedError, MonitorError, MonitorTimeout

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from ferryman_qemu.guest import Guest
    from ferryman_qemu.monitor import EventStream

_log = logging.getLogger(__name__)

DEFAULT_DOWNTIME_MS = 300
"""QEMU's own default of ``downtime-limit``; set each time, since an earlier migration may have left another."""

_END_PATIENCE_S = 30.0
_SAMPLE_S = 0.25
_CONNECT_S = 10.0
_SILENCE_S = 30
"""How long a peer may be silent before the stream is broken: the longest blackout of a cut network."""

_FD_NAME = "ferryman-migration"
_SAMPLE_APART_S = 0.05
_STOPPED_STATES = ("finish-migrate", "postmigrate")

ACTIVE = frozenset(
    {
        "setup",
        "active",
        "device",
        "pre-switchover",
        "cancelling",
        "wait-unplug",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
    }
)
"""What ``query-migrate`` answers while a transfer has not ended (qapi/migration.json, MigrationStatus)."""


def capabilities(*names: str) -> Command:
    """The command that switches capabilities of QEMU's migrations on."""
    states = [{"capability": name, "state": True} for name in names]
    return Command("migrate-set-capabilities", {"capabilities": states})


def parameters(options: MigrationOptions) -> Command:
    """The command that sets what a source is asked for; a bandwidth of 0 is no cap."""
    return Command(
        "migrate-set-parameters",
        {
            "max-bandwidth": options.bandwidth_bytes_per_s or 0,
            "downtime-limit": options.max_downtime_ms or DEFAULT_DOWNTIME_MS,
        },
    )


class Transfer:
    """One attempt to send a guest."""

    def __init__(self, guest: Guest, request: PerformRequest, tasks: TaskGroup) -> None:
        self._guest = guest
        self._request = request
        self._tasks = tasks
        self._stopped_at: float | None = None
        self._was_running = False
        self._sample_wanted = anyio.Event()
        self.begun = anyio.Event()

    async def run(self) -> PerformReply:
        """Send, and return with the proof of stop.

        :raises PerformError: the guest is here as before.
        :raises InDoubtError: QEMU died or fell silent. :raises HypervisorError: the same, after the transfer's end.
        :cancellation: aborts; returns all the same when it is too late for that.
        """
        try:
            with self._guest.control.events("MIGRATION", "MIGRATION_PASS", "STOP") as events:
                await self._begin()
                sampling = anyio.CancelScope()
                self._tasks.start_soon(self._sample, sampling)
                try:
                    return await self._follow(events)
                finally:
                    sampling.cancel()
        except MonitorClosedError as error:
            raise InDoubtError(
                f"QEMU of domain {self._guest.record.name} ended during the transfer",
                evidence_missing="the destination's word",
                side=Side.SOURCE,
            ) from error

    async def _begin(self) -> None:
        try:
            stream = await _connect(self._request.migration_uri)
        except OSError as error:
            raise self._failed(
                f"the receiver at {self._request.migration_uri} cannot be reached: {error}"
            ) from error
        with stream:
            await anyio.lowlevel.checkpoint_if_cancelled()
            # INVARIANT: once QEMU may have been told to send, a cancellation goes through _abort, which ends that.
            with anyio.CancelScope(shield=True):
                await self._migrate(stream)
        self.begun.set()

    async def _migrate(self, stream: socket.socket) -> None:
        """Tell QEMU to send; where it gets no descriptor, the command for that fails too."""
        guest = self._guest
        commands = (
            Command("query-status"),
            Command("getfd", {"fdname": _FD_NAME}, [stream.fileno()]),
            Command("migrate", {"uri": f"fd:{_FD_NAME}"}),
        )
        async with guest.lock:
            try:
                status, *_ = await guest.control.execute_all(commands)
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
                end = await self._abort(events)
                if end != "completed":
                    await settle_source(self._guest)
                    raise
                return await self._prove()
        if end == "completed":
            with anyio.CancelScope(shield=True):
                return await self._prove()
        reason = await self._reason()
        raise self._failed(reason)

    async def _wait_end(self, events: EventStream) -> str:
        """Wait until this attempt has ended: ``completed``, ``failed`` or ``cancelled``."""
        while True:
            event = await events.get()
            if event.name == "STOP":
                self._stopped_at = event.timestamp_s
            elif event.name == "MIGRATION_PASS":
                self._sample_wanted.set()
            else:
                status = str(event.data.get("status"))
                if status in ("completed", "failed", "cancelled"):
                    return status

    async def _prove(self) -> PerformReply:
        state = await self._guest.run_state()
        if state not in _STOPPED_STATES:
            raise InDoubtError(
                f"QEMU says that the migration completed, but its run state is {state}",
                evidence_missing="the destination's word",
                side=Side.SOURCE,
            )
        stopped_for_ms = None
        if self._was_running and self._stopped_at is not None:
            stopped_for_ms = max(0.0, (time.time() - self._stopped_at) * 1000)
        return PerformReply(statistics=TransferStatistics(), stopped_for_ms=stopped_for_ms)

    async def _abort(self, events: EventStream) -> str:
        """End the transfer at any moment, and say how it ended."""
        await break_stream(self._guest)
        with anyio.move_on_after(_END_PATIENCE_S):
            return await self._wait_end(events)
        raise InDoubtError(
            f"QEMU of domain {self._guest.record.name} did not end the transfer within {_END_PATIENCE_S:g} s",
            evidence_missing="QEMU's answer",
            side=Side.SOURCE,
        )

    async def _reason(self) -> str:
        await settle_source(self._guest)
        info = await self._guest.command("query-migrate")
        return str(info.get("error-desc") or f"the stream to {self._request.migration_uri} broke")

    def _failed(self, reason: str) -> PerformError:
        return PerformError(
            reason, side=Side.SOURCE, domain=self._guest.record.name, guest_state=GuestState.SOURCE
        )

    async def _sample(self, scope: anyio.CancelScope) -> None:
        """Show counters when a pass over the memory ends, and now and then between."""
        with scope:
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
                    return
                self._request.progress(statistics_of(info))


async def break_stream(guest: Guest) -> None:
    """Break a source's stream, out of band; QEMU then fails the migration and resumes the guest by itself.

    :raises MonitorClosedError: the process is gone.
    """
    try:
        await guest.control.execute_oob("yank", {"instances": [{"type": "migration"}]})
    except MonitorClosedError:
        raise
    except MonitorError as error:
        # There is none where the transfer has just ended.
        _log.info("the stream of domain %s could not be broken: %s", guest.record.name, error)


async def settle_source(guest: Guest) -> str:
    """Wait until a source whose transfer failed has left ``finish-migrate``; returns its run state.

    QEMU tells ``failed`` a moment before it resumes the guest.
    """
    with anyio.move_on_after(_END_PATIENCE_S), guest.control.events("RESUME", "STOP", "MIGRATION") as events:
        state = await guest.run_state()
        while state == "finish-migrate":
            await events.get()
            state = await guest.run_state()
        return state
    return await guest.run_state()


async def _connect(text: str) -> socket.socket:
    """Do :func:`connect_stream` in a thread. :cancellation: at once; a connection that comes later is closed."""
    lock, kept, abandoned = threading.Lock(), list[socket.socket](), False

    def connect() -> socket.socket:
        stream = connect_stream(text)
        with lock:
            if abandoned:
                stream.close()
            else:
                kept.append(stream)
        return stream

    try:
        return await anyio.to_thread.run_sync(connect, abandon_on_cancel=True)
    except BaseException:
        with lock:
            abandoned = True
            for stream in kept:
                stream.close()
        raise


def connect_stream(text: str) -> socket.socket:
    """Connect to a receiver; blocking.

    QEMU gets the connected socket, since it would leave Nagle's algorithm on: with a return path the last small
    segment then waits for a delayed acknowledgement, 40 ms of blackout.  And a peer that falls silent must end the
    stream, or the transfer would never end.

    :raises OSError: nobody listens there. :raises PerformError: there is no such transport.
    """
    uri = MigrationURI.parse(text)
    if uri.protocol == "unix" and uri.path:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(uri.path)
        except BaseException:
            stream.close()
            raise
        return stream
    if uri.protocol not in ("", "tcp") or not uri.host or not uri.port:
        raise PerformError(f"QEMU cannot send to {text}: use tcp://host:port or unix:/path", side=Side.SOURCE)
    stream = socket.create_connection((uri.host, uri.port), timeout=_CONNECT_S)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _SILENCE_S // 3),
        (socket.TCP_KEEPINTVL, _SILENCE_S // 6),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, _SILENCE_S * 1000),
    ):
        stream.setsockopt(socket.IPPROTO_TCP, option, value)
    return stream


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
    )


__all__ = ["Transfer", "capabilities", "connect_stream", "parameters", "settle_source", "statistics_of"]
