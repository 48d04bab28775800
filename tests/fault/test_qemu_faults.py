"""Faults in every phase of a migration between two real QEMUs: the guest runs in one place, and goes on from there."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

import ferryman
import ferryman_qemu.streams
import ferryman_qemu.transfer
from ferryman import Connection, Domain, GuestState, MigrationOptions, PhaseEvent, ProgressEvent
from ferryman.errors import (
    BeginError,
    ConfirmError,
    DomainBusyError,
    DriverContractError,
    FinishError,
    GuestLostError,
    InDoubtError,
    JournalFullError,
    MigrationAbortedError,
    MigrationError,
    PerformError,
    PlanBlockedError,
    PrepareError,
)
from ferryman.handover import PaperKind, decode_cookie
from ferryman.hookspecs import AbortRequest
from ferryman.types import DomainEventKind, DomainState, Phase, Side
from tests.fault.moments import at
from tests.guests.inspect import pids
from tests.guests.witness import WitnessTimeoutError
from tests.qemu import (
    HEAVY,
    MIB,
    NAME,
    PROMPT_S,
    USUAL,
    Field,
    Relay,
    end_process,
    laid_out,
    need,
    relayed,
    settled,
)

if TYPE_CHECKING:
    from ferryman import MigrationJob

ROOT = Path(__file__).parents[2]
SLOW = MigrationOptions(bandwidth_bytes_per_s=8 * MIB)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop, where a test does not ask for more: it is QEMU that is looked at here."""
    return "asyncio"


@asynccontextmanager
async def both(field: Field) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both hosts, open."""
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        yield a, b


async def start(field: Field, connection: Connection) -> Domain:
    """The usual guest, ticking."""
    domain = await connection.create(field.definition)
    await anyio.to_thread.run_sync(field.wait_ticks, 50)
    return domain


async def assert_runs_only(field: Field, here: Connection, there: Connection) -> Domain:
    """The guest runs here and nowhere else, nothing was lost, and nothing is left open."""
    assert here.open_migrations() == there.open_migrations() == []
    root = field.roots[0] if str(here.uri) == field.uris[0] else field.roots[1]
    runner = await anyio.to_thread.run_sync(field.the_runner)
    assert pids(root) == [runner]
    assert [domain.name for domain in await here.list_domains()] == [NAME]
    assert await there.list_domains() == []
    domain = await here.lookup_by_name(NAME)
    assert (await domain.info()).state is DomainState.RUNNING
    field.assert_unbroken()
    return domain


async def retry_and_end(field: Field, domain: Domain, there: Connection) -> None:
    """What failed or was cut short can be done again at once; the memory that arrives is whole."""
    here = domain.connection
    await domain.migrate(there)
    domain = await assert_runs_only(field, there, here)
    await domain.destroy()


def told(error: BaseException | None) -> tuple[Phase | None, Side | None, GuestState | None]:
    """What a migration's error says."""
    assert isinstance(error, MigrationError)
    assert error.domain == NAME
    assert error.guest_state is not None
    assert error.guest_state.sentence in str(error)
    return error.phase, error.side, error.guest_state


def kill(root: Path) -> None:
    """End the emulators of a root, and wait until they are gone."""
    for pid in pids(root):
        end_process(pid)


# Prepare


@pytest.fixture
def emulator(field: Field) -> Path:
    """Another name of QEMU, which stands in the definition, and which a host may lack."""
    path = field.directory / "emulator"
    path.symlink_to(str(shutil.which("qemu-system-x86_64")))
    field.definition = field.definition.replace("<devices>", f"<devices><emulator>{path}</emulator>")
    return path


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("", "No such file or directory"),
        ('#!/bin/sh\nexec qemu-system-x86_64 "$@" -m 999999G\n', "(?i)memory|ram"),
        ("#!/bin/sh\necho no machine today >&2\nexit 1\n", "no machine today"),
        ('#!/bin/sh\nexec qemu-system-x86_64 "$@" -incoming tcp:256.0.0.1:1\n', "256.0.0.1"),
    ],
    ids=["missing", "too-much-memory", "own-words", "cannot-listen"],
)
async def test_the_receiver_cannot_start(field: Field, emulator: Path, program: str, said: str) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        target = os.readlink(emulator)
        emulator.unlink()
        if program:
            emulator.write_text(program)
            emulator.chmod(0o755)
        with pytest.raises(PrepareError, match=said) as caught:
            await domain.migrate(b)
        assert told(caught.value) == (Phase.PREPARE, Side.DESTINATION, GuestState.SOURCE)
        assert field.emulators(field.roots[1]) == []
        await assert_runs_only(field, a, b)
        emulator.unlink(missing_ok=True)
        emulator.symlink_to(target)
        await retry_and_end(field, domain, b)


async def test_the_receiver_dies_while_it_is_prepared(field: Field) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        with (
            at("receiver-up", partial(kill, field.roots[1])) as passed,
            pytest.raises(PrepareError) as caught,
        ):
            await domain.migrate(b)
        assert passed
        assert told(caught.value) == (Phase.PREPARE, Side.DESTINATION, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("uri", ["tcp", "unix"])
async def test_the_address_is_taken(field: Field, uri: str) -> None:
    path = field.directory / "stream"
    async with both(field) as (a, b):
        domain = await start(field, a)
        family = socket.AF_INET if uri == "tcp" else socket.AF_UNIX
        with socket.socket(family) as taken:
            taken.bind(("127.0.0.1", 0) if uri == "tcp" else str(path))
            taken.listen()
            asked = f"tcp://127.0.0.1:{taken.getsockname()[1]}" if uri == "tcp" else f"unix:{path}"
            with pytest.raises(PrepareError, match="cannot listen at") as caught:
                await domain.migrate(b, MigrationOptions(migration_uri=asked))
            assert told(caught.value) == (Phase.PREPARE, Side.DESTINATION, GuestState.SOURCE)
            if uri == "unix":
                # It is somebody else's, who still listens there.
                with socket.socket(family) as caller:
                    caller.connect(str(path))
        path.unlink(missing_ok=True)
        await assert_runs_only(field, a, b)
        await domain.migrate(b, MigrationOptions(migration_uri=asked))
        await (await assert_runs_only(field, b, a)).destroy()


# Perform


async def test_the_receiver_dies_during_the_transfer(field: Field) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        with pytest.raises(PerformError) as caught:
            async with domain.migrate(b, SLOW) as job:
                await until_sending(job)
                os.kill(pids(field.roots[1])[0], signal.SIGKILL)
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        assert "the guest goes on at the source" in caught.value.rolled_back
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def test_aborting_the_transfer_of_a_process_that_has_just_died(field: Field) -> None:
    """After a restart, that is no error of the system's: evidence says that it is gone."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        await a.host.begin(await domain.info(), MigrationOptions())
        (row,) = a.open_migrations()
        os.kill(pids(field.roots[0])[0], signal.SIGKILL)
        request = AbortRequest(id=row.migration_id, uuid=row.uuid, process=row.process)
        await a.hooks.call("migrate_abort", request, type(None))
        await a.host.give_up(row.migration_id)
        await settled(a, b)
        assert field.emulators() == []


async def until_sending(job: MigrationJob) -> None:
    """Wait until some of the guest's state is on its way."""
    async for event in job.progress():
        if isinstance(event, ProgressEvent) and (event.statistics.transferred_bytes or 0) > MIB:
            return
    pytest.fail("the migration ended before it sent anything")


async def test_the_source_dies_during_the_transfer(field: Field) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        with a.events() as seen:
            with pytest.raises(GuestLostError) as caught:
                async with domain.migrate(b, SLOW) as job:
                    await until_sending(job)
                    os.kill(pids(field.roots[0])[0], signal.SIGKILL)
            with anyio.fail_after(PROMPT_S):
                assert (await anext(seen)).kind is DomainEventKind.CRASHED
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.GONE)
        assert a.open_migrations() == b.open_migrations() == []
        assert await a.list_domains() == await b.list_domains() == []
        assert field.emulators() == []
        # The name and the uuid are free again on both sides.
        for end in (b, a):
            again = await end.create(field.definition)
            await anyio.to_thread.run_sync(
                partial(field.witness.wait_new_process, PROMPT_S, other_than=field.witness.report().pids[-1])
            )
            await again.destroy()


async def test_nobody_listens_any_more(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver is there, but the way to it is not."""

    def connect_stream(text: str) -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    async with both(field) as (a, b):
        domain = await start(field, a)
        with monkeypatch.context() as patch:
            patch.setattr(ferryman_qemu.streams, "connect_stream", connect_stream)
            with pytest.raises(PerformError, match="cannot be reached: .*refused") as caught:
                await domain.migrate(b)
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("how", ["cut", "ended, and nothing read"])
async def test_the_stream_breaks_half_way(field: Field, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """TCP's own limits do not end the second one: the peer's kernel answers every probe, and its window stays shut."""
    monkeypatch.setattr(ferryman_qemu.transfer, "SILENCE_S", 3)
    async with both(field) as (a, b):
        domain = await start(field, a)
        with relayed(monkeypatch, partial(Relay, stop_after_bytes=8 * MIB)) as relays:
            with pytest.raises(PerformError) as caught:
                async with domain.migrate(b) as job:
                    await until_sending(job)
                    assert await anyio.to_thread.run_sync(relays[0].stopped.wait, PROMPT_S)
                    strike = relays[0].close if how == "cut" else relays[0].end_sending
                    await anyio.to_thread.run_sync(strike)
                    with anyio.fail_after(PROMPT_S):
                        await job.result()
            assert relays[0].passed_bytes == 8 * MIB
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_the_stream_is_cut_after_the_last_byte(
    field: Field, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    """The receiver has everything and says so, but the source never hears it: it goes on by itself, and alone."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        if paused:
            await domain.suspend()
        with (
            relayed(monkeypatch, partial(Relay, cut_at_last_answer=True)) as relays,
            pytest.raises(PerformError) as caught,
        ):
            await domain.migrate(b)
        assert relays[0].swallowed
        assert relays[0].passed_bytes > 19 * MIB
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        assert field.emulators(field.roots[1]) == []
        if paused:
            assert (await domain.info()).state is DomainState.PAUSED
            await domain.resume()
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def silent_at_switchover(field: Field, a: Connection, relays: list[Relay]) -> None:
    """Let the relay fall silent once the guest is stopped, while many of its pages are still to be sent."""
    with a.events() as seen:
        with anyio.fail_after(PROMPT_S):
            while (await anext(seen)).kind is not DomainEventKind.SUSPENDED:
                pass
        relays[0].stop_reading()


async def test_abort_at_switchover_of_a_stream_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's main loop is silent then: only the way out of band breaks the stream, and the guest goes on."""
    with laid_out(HEAVY) as field:
        async with both(field) as (a, b):
            domain = await start(field, a)
            # A stop that is long enough for all pages, over a stream that takes a second for them.
            options = MigrationOptions(max_downtime_ms=20_000)
            with relayed(monkeypatch, partial(Relay, bytes_per_s=24 * MIB)) as relays:
                with pytest.raises(MigrationAbortedError) as caught:
                    async with domain.migrate(b, options) as job:
                        await silent_at_switchover(field, a, relays)
                        count = await anyio.to_thread.run_sync(field.witness.count)
                        await anyio.sleep(0.3)
                        assert await anyio.to_thread.run_sync(field.witness.count) == count
                        begin_s = time.monotonic()
                        job.abort()
                assert time.monotonic() - begin_s < 5
                assert relays[0].passed_bytes < 200 * MIB
            assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
            await assert_runs_only(field, a, b)
            await retry_and_end(field, domain, b)


async def test_abort_of_a_paused_guest_whose_stream_nobody_reads(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        await domain.suspend()
        with relayed(monkeypatch, partial(Relay, bytes_per_s=16 * MIB)) as relays:
            with pytest.raises(MigrationAbortedError) as caught:
                async with domain.migrate(b) as job:
                    await until_sending(job)
                    relays[0].stop_reading()
                    await anyio.sleep(0.5)
                    begin_s = time.monotonic()
                    job.abort()
            assert time.monotonic() - begin_s < 5
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        assert (await domain.info()).state is DomainState.PAUSED
        assert a.open_migrations() == b.open_migrations() == []
        assert field.emulators(field.roots[1]) == []
        await domain.resume()
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("options", [SLOW, replace(SLOW, streams=2)], ids=["one-stream", "streams"])
async def test_a_silent_receiver_ends_the_stream_by_itself(
    field: Field, monkeypatch: pytest.MonkeyPatch, options: MigrationOptions
) -> None:
    """A receiver that hangs, and a caller that does not abort: the limit of silence ends it."""
    monkeypatch.setattr(ferryman_qemu.streams, "SILENCE_S", 6)
    if options.streams:
        # QEMU connects by itself, and the system knows of no limit there.
        monkeypatch.setattr(ferryman_qemu.transfer, "SILENCE_S", 6)
    async with both(field) as (a, b):
        domain = await start(field, a)
        with pytest.raises(PerformError) as caught:
            async with domain.migrate(b, options) as job:
                await until_sending(job)
                os.kill(pids(field.roots[1])[0], signal.SIGSTOP)
                with anyio.fail_after(30):
                    await job.result()
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.0\r\n\r\n", b""], ids=["talks", "is-silent"])
async def test_a_stranger_comes_first(field: Field, monkeypatch: pytest.MonkeyPatch, words: bytes) -> None:
    """The receiver takes the first connection; the source finds nobody, and keeps its guest."""
    real = ferryman_qemu.streams.connect_stream
    strangers: list[socket.socket] = []

    def connect_stream(text: str) -> socket.socket:
        strangers.append(real(text))
        strangers[-1].sendall(words)
        if words:
            strangers[-1].settimeout(PROMPT_S)
            with suppress(ConnectionError):
                strangers[-1].recv(1)
        return real(text)

    async with both(field) as (a, b):
        domain = await start(field, a)
        with monkeypatch.context() as patch, ExitStack() as stack:
            patch.setattr(ferryman_qemu.streams, "connect_stream", connect_stream)
            patch.setattr(ferryman_qemu.streams, "SILENCE_S", 6)
            stack.callback(lambda: strangers[-1].close())
            with pytest.raises(PerformError) as caught:
                await domain.migrate(b)
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


# Finish


@pytest.mark.parametrize("moment", ["completed", "wrote-claiming"])
async def test_the_receiver_dies_before_it_was_told_to_run(field: Field, moment: str) -> None:
    """It never ran, and this program knows that: the source, which gave its proof, goes on with the refusal."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        with at(moment, partial(kill, field.roots[1])) as passed, pytest.raises(FinishError) as caught:
            await domain.migrate(b)
        assert passed
        assert told(caught.value) == (Phase.FINISH, Side.DESTINATION, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("moment", ["ran", "wrote-claimed"])
async def test_the_receiver_dies_after_it_ran(field: Field, moment: str) -> None:
    """The guest is lost with its owner; its older memory at the source never runs again."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        (source,) = pids(field.roots[0])
        with at(moment, partial(kill, field.roots[1])) as passed:
            result = await domain.migrate(b)
        assert passed
        assert result.uuid == domain.uuid
        await settled(a, b)
        assert await a.list_domains() == await b.list_domains() == []
        assert field.emulators() == []
    seen = field.witness.report()
    assert (seen.ticks_doubled, seen.overlaps) == (0, ())
    # What the source said, it said before anybody else.
    assert seen.pids[0] == source
    # Nor does it come back when the hosts are opened again.
    async with both(field) as (a, b):
        assert await a.list_domains() == await b.list_domains() == []
        await (await start(field, a)).destroy()


async def test_the_source_dies_after_its_proof(field: Field) -> None:
    """The destination has the whole guest and the proof: it needs nobody."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        with at("completed", partial(kill, field.roots[0])) as passed:
            result = await domain.migrate(b)
        assert passed
        assert result.uuid == domain.uuid
        await settled(a, b)
        await (await assert_runs_only(field, b, a)).destroy()


class ImageLock:
    """The lock by which QEMU keeps others from an image, held by a third program's open file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb+")

    def take(self) -> None:
        self._set(fcntl.F_WRLCK)

    def release(self) -> None:
        self._set(fcntl.F_UNLCK)

    def close(self) -> None:
        self._file.close()

    def _set(self, kind: int) -> None:
        # struct flock: type, whence, start, length (0 is the whole file), pid. Of this open file, not of this process.
        fcntl.fcntl(self._file, _F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


_F_OFD_SETLK = 37
"""fcntl(2), open file description locks; Python has no name for it before 3.14."""


@pytest.fixture
def writable_disk(field: Field) -> Path:
    """A disk of the guest's that it may write, so that one process at a time may have it."""
    image = field.directory / "disk"
    image.write_bytes(bytes(MIB))
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{image}'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    field.definition = field.definition.replace("<controller", f"{disk}<controller", 1)
    return image


async def test_the_guest_cannot_run_because_its_disk_is_taken(field: Field, writable_disk: Path) -> None:
    """``cont`` fails at the destination: it refuses, and the source runs as soon as it has its disk back."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        # With nobody in the way it crosses, and the lock with it.
        await domain.migrate(b)
        await (await assert_runs_only(field, b, a)).migrate(a)
        domain = await assert_runs_only(field, a, b)
        with (
            closing(ImageLock(writable_disk)) as lock,
            at("wrote-claiming", lock.take),
            at("wrote-refused", lock.release),
            pytest.raises(FinishError, match="lock") as caught,
        ):
            await domain.migrate(b)
        assert told(caught.value) == (Phase.FINISH, Side.DESTINATION, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def test_the_source_cannot_resume_because_its_disk_is_taken(field: Field, writable_disk: Path) -> None:
    """The owner is decided and told: the source, where the guest stands still until its disk is free again."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        with (
            closing(ImageLock(writable_disk)) as lock,
            at("wrote-claiming", lock.take) as passed,
            pytest.raises(ConfirmError, match="lock") as caught,
        ):
            await domain.migrate(b)
        assert passed
        assert told(caught.value) == (Phase.CONFIRM, Side.SOURCE, GuestState.SOURCE)
        assert field.emulators(field.roots[1]) == []
        assert await b.list_domains() == []
    # What was left to do is done at the next opening.
    async with both(field) as (a, b):
        await settled(a, b)
        domain = await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


# Abort and cancellation


@pytest.mark.parametrize(
    ("phase", "ended"),
    [(Phase.BEGIN, False), (Phase.PREPARE, False), (Phase.PREPARE, True), (Phase.PERFORM, False)],
)
async def test_abort_before_anything_is_sent(field: Field, phase: Phase, ended: bool) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        with pytest.raises(MigrationAbortedError) as caught:
            async with domain.migrate(b, SLOW) as job:
                async for event in job.progress():
                    if isinstance(event, PhaseEvent) and (event.phase, event.ended) == (phase, ended):
                        job.abort()
                        break
        assert told(caught.value)[2] is GuestState.SOURCE
        assert (caught.value.phase, caught.value.side) != (None, None)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def test_abort_during_the_transfer(field: Field) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        with pytest.raises(MigrationAbortedError) as caught:
            async with domain.migrate(b, SLOW) as job:
                await until_sending(job)
                job.abort()
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        assert set(caught.value.rolled_back) >= {
            "the destination ended its receiver",
            "the guest goes on at the source",
        }
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def test_abort_while_the_source_connects(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that comes too late is closed."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        job = domain.migrate(b)
        real = ferryman_qemu.streams.connect_stream

        def connect_stream(text: str) -> socket.socket:
            stream = real(text)
            anyio.from_thread.run_sync(job.abort)
            return stream

        with monkeypatch.context() as patch:
            patch.setattr(ferryman_qemu.streams, "connect_stream", connect_stream)
            with pytest.raises(MigrationAbortedError) as caught:
                await job
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("options", [MigrationOptions(), SLOW], ids=["fast", "slow"])
async def test_abort_while_qemu_is_told_to_send(field: Field, options: MigrationOptions) -> None:
    """The command has left and its answer has not come: QEMU sends, and must be stopped."""

    def take_time() -> None:
        """Let the guest go on for a second and a half; one that stands still was stopped at the end of a transfer."""
        last = field.witness.last()
        assert last is not None
        with suppress(WitnessTimeoutError):
            field.witness.wait_tick(last.value + USUAL.tick_hz * 3 // 2, timeout_s=2)

    async with both(field) as (a, b):
        domain = await start(field, a)
        job = domain.migrate(b, options)
        with (
            at("migrate-sent", job.abort) as passed,
            at("wrote-refused", take_time),
            pytest.raises(MigrationAbortedError) as caught,
        ):
            await job
        assert passed
        assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
        state = (await domain.info()).state
        # The refusal of a plan here would mean that QEMU still sends.
        blockers = (await domain.plan_migration(b)).blockers
        await domain.resume()
        assert (state, blockers) == (DomainState.RUNNING, ())
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


async def test_abort_between_the_proof_and_the_decision(field: Field) -> None:
    """The source is stopped for good by itself; the destination refuses, and it goes on with that."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        job = domain.migrate(b)
        with at("completed", job.abort) as passed, pytest.raises(MigrationAbortedError) as caught:
            await job
        assert passed
        assert told(caught.value)[1:] == (Side.DESTINATION, GuestState.SOURCE)
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize("moment", ["wrote-claiming", "ran", "wrote-claimed", "wrote-given"])
async def test_abort_after_the_decision_is_too_late(field: Field, moment: str) -> None:
    async with both(field) as (a, b):
        domain = await start(field, a)
        job = domain.migrate(b)
        # The journal is written in a thread beside the event loop.
        strike = partial(anyio.from_thread.run_sync, job.abort) if moment.startswith("wrote") else job.abort
        with at(moment, strike) as passed:
            async with job:
                assert (await job.result()).name == NAME
        assert passed
        await (await assert_runs_only(field, b, a)).destroy()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_caller_that_is_cancelled_at_any_moment(field: Field, anyio_backend: str) -> None:
    """After every cancellation the guest is in one place, and both hosts are clean; then it goes on from there."""
    places = []
    async with both(field) as (a, b):
        domain = await start(field, a)
        here, there = a, b
        for after_ms in (0, 10, 30, 60, 100, 150, 300, 800, None):
            with anyio.move_on_after(None if after_ms is None else after_ms / 1000) as scope:
                await domain.migrate(there, MigrationOptions(bandwidth_bytes_per_s=64 * MIB))
            arrived = bool(await there.list_domains())
            assert arrived or scope.cancelled_caught
            if arrived:
                here, there = there, here
            places.append(arrived)
            domain = await assert_runs_only(field, here, there)
        assert places[0] is False
        assert places[-1] is True
        await domain.destroy()


async def test_a_caller_that_goes_away_without_a_word(field: Field) -> None:
    """Each side ends by itself what its caller does not go on with."""
    options = MigrationOptions(lease_s=0.5)
    async with both(field) as (a, b):
        domain = await start(field, a)
        info = await domain.info()

        # After prepare: both give up.
        begun = await a.host.begin(info, options)
        with pytest.raises(DomainBusyError):
            await domain.suspend()
        await b.host.prepare(begun.cookie, info, begun.definition, options, paused=False)
        assert len(field.emulators(field.roots[1])) == 1
        await settled(a, b)
        domain = await assert_runs_only(field, a, b)

        # During the transfer: the source takes it back.
        slow = MigrationOptions(lease_s=0.5, bandwidth_bytes_per_s=4 * MIB)
        begun = await a.host.begin(info, slow)
        prepared = await b.host.prepare(begun.cookie, info, begun.definition, slow, paused=False)
        performed = await a.host.perform(prepared.cookie, prepared.migration_uri, slow, lambda _sample: None)
        assert performed.kind is PaperKind.KEPT
        await settled(a, b)
        domain = await assert_runs_only(field, a, b)

        # After the proof: the source shows it to the destination by itself.
        begun = await a.host.begin(info, options)
        prepared = await b.host.prepare(begun.cookie, info, begun.definition, options, paused=False)
        fast = MigrationOptions(lease_s=0.5)
        performed = await a.host.perform(prepared.cookie, prepared.migration_uri, fast, lambda _sample: None)
        assert performed.kind is decode_cookie(performed.cookie).paper.kind is PaperKind.PROOF
        await settled(a, b)
        arrived = await b.list_domains()
        ends = (b, a) if arrived else (a, b)
        await (await assert_runs_only(field, *ends)).destroy()


# A full disk


@contextmanager
def small_root(field: Field, number: int) -> Iterator[Path]:
    """Put one of the roots on a file system of 2 MiB for the length of a block."""
    need("root, who may mount a file system", here=os.geteuid() == 0)
    root = field.roots[number]
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", root], check=True)
    try:
        yield root
    finally:
        for pid in field.emulators():
            end_process(pid)
        subprocess.run(["umount", root], check=True)


def fill(root: Path, *, leave_bytes: int = 0) -> None:
    """Use up the room of a file system."""
    with (root / "filler").open("ab", buffering=0) as file:
        try:
            while os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > leave_bytes:
                file.write(bytes(4096))
        except OSError as error:
            assert "No space" in str(error)


def free(root: Path) -> None:
    """Give the room back."""
    (root / "filler").unlink()


@pytest.mark.parametrize(
    ("number", "expected", "place"),
    [
        (0, BeginError, (Phase.BEGIN, Side.SOURCE, GuestState.SOURCE)),
        (1, PrepareError, (Phase.PREPARE, Side.DESTINATION, GuestState.SOURCE)),
    ],
    ids=["source", "destination"],
)
@pytest.mark.parametrize("room_bytes", [0, 131_072])
async def test_too_little_room_for_the_journal(
    field: Field,
    number: int,
    expected: type[MigrationError],
    place: tuple[Phase, Side, GuestState],
    room_bytes: int,
) -> None:
    """A migration does not start where its decision may not be written, whether or not the reserve is whole."""
    with small_root(field, number) as root:
        async with both(field) as (a, b):
            domain = await start(field, a)
            if room_bytes:
                (root / "journal.reserve").unlink()
            fill(root, leave_bytes=room_bytes)
            with pytest.raises(expected) as caught:
                await domain.migrate(b)
            assert told(caught.value) == place
            if number == 0 or room_bytes:
                assert isinstance(caught.value.__cause__, JournalFullError)
            else:
                # The reserve is whole, but the receiver's own files have no room.
                assert not isinstance(caught.value.__cause__, DriverContractError)
                assert "No space left" in str(caught.value)
            assert field.emulators(field.roots[1]) == []
            await assert_runs_only(field, a, b)
            free(root)
            await retry_and_end(field, domain, b)


@pytest.mark.parametrize("number", [0, 1], ids=["source", "destination"])
@pytest.mark.parametrize("moment", ["sending", "completed"])
async def test_the_reserve_pays_for_the_decision(field: Field, number: int, moment: str) -> None:
    """The disk fills up once the migration is under way: it is decided, told, and found again all the same."""
    with small_root(field, number) as root:
        async with both(field) as (a, b):
            domain = await start(field, a)
            with at(moment, partial(fill, root)) as passed:
                result = await domain.migrate(b)
            assert passed
            assert result.uuid == domain.uuid
            await assert_runs_only(field, b, a)
        # As full as before, for the next program.
        async with both(field) as (a, b):
            domain = await assert_runs_only(field, b, a)
            free(root)
            await retry_and_end(field, domain, a)


async def test_in_doubt_while_the_decision_cannot_be_written(field: Field) -> None:
    """Not even the reserve is left: the guest stands still at the source until there is room, and is then settled."""
    options = MigrationOptions(patience_s=0.5, lease_s=1.0)

    def use_up() -> None:
        (root / "journal.reserve").unlink()
        fill(root)

    with small_root(field, 1) as root:
        async with both(field) as (a, b):
            domain = await start(field, a)
            with at("completed", use_up) as passed, pytest.raises(InDoubtError) as caught:
                await domain.migrate(b, options)
            assert passed
            assert told(caught.value) == (Phase.FINISH, Side.DESTINATION, GuestState.IN_DOUBT)
            assert caught.value.evidence_missing
            assert (await domain.info()).state is DomainState.PAUSED
            with pytest.raises(DomainBusyError):
                await domain.resume()
            assert [row.name for row in a.open_migrations()] == [NAME]
            count = await anyio.to_thread.run_sync(field.witness.count)
            await anyio.sleep(2)
            assert await anyio.to_thread.run_sync(field.witness.count) == count
            free(root)
            await settled(a, b)
            ends = (b, a) if await b.list_domains() else (a, b)
            await retry_and_end(field, await assert_runs_only(field, *ends), ends[1])


async def test_the_reserve_pays_for_taking_it_back(field: Field) -> None:
    with small_root(field, 0) as root:
        async with both(field) as (a, b):
            domain = await start(field, a)
            with at("sending", partial(fill, root)), pytest.raises(MigrationAbortedError) as caught:
                async with domain.migrate(b, SLOW) as job:
                    await until_sending(job)
                    job.abort()
            assert told(caught.value) == (Phase.PERFORM, Side.SOURCE, GuestState.SOURCE)
            await assert_runs_only(field, a, b)
            free(root)
            await retry_and_end(field, domain, b)


# A caller that is killed


def killed_at(field: Field, moment: str, *, bytes_per_s: int = 0) -> None:
    """Run a migration in a program of its own, and kill that at a moment."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fault.moments", moment, *field.uris, str(bytes_per_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as caller:
        assert caller.stdout is not None
        try:
            assert caller.stdout.readline() == b"here\n"
        finally:
            os.kill(caller.pid, signal.SIGKILL)
            caller.wait()
    assert caller.returncode == -signal.SIGKILL


@pytest.fixture
def begun(field: Field) -> Field:
    """A field whose guest ticks at the first host, which nobody has open."""

    async def create() -> None:
        async with ferryman.connect(field.uris[0]) as a:
            await a.create(field.definition)

    anyio.run(create)
    field.wait_ticks(50)
    return field


AT_EVERY_STEP = {
    "wrote-begun": 0,
    "receiver-started": 0,
    "receiver-up": 0,
    "receiver-listens": 0,
    "wrote-prepared": 0,
    "wrote-handing": 0,
    "migrate-sent": 0,
    "sending": 0,
    "completed": 0,
    "wrote-claiming": 1,
    "ran": 1,
    "wrote-claimed": 1,
    "adopted": 1,
    "wrote-given": 1,
}
"""Where the guest is when the caller was killed there and both hosts were opened again: 0 is the source."""


@pytest.mark.parametrize(
    ("moment", "first"),
    [
        *((moment, 1) for moment in AT_EVERY_STEP),
        # Here the source asks a destination that nobody has opened yet.
        *((moment, 0) for moment in ("sending", "completed", "wrote-claiming", "ran")),
    ],
    ids=lambda value: value if isinstance(value, str) else ["source-first", "destination-first"][value],
)
async def test_the_caller_is_killed(begun: Field, moment: str, first: int) -> None:
    """A new program opens both hosts: one guest, no older tick, nothing left open, and a retry succeeds."""
    field, place = begun, AT_EVERY_STEP[moment]
    slow = moment in ("migrate-sent", "sending")
    await anyio.to_thread.run_sync(partial(killed_at, field, moment, bytes_per_s=8 * MIB * slow))
    async with (
        ferryman.connect(field.uris[first]) as one,
        ferryman.connect(field.uris[1 - first]) as other,
    ):
        a, b = (one, other) if first == 0 else (other, one)
        await settled(a, b)
        here, there = ((a, b), (b, a))[place]
        domain = await assert_runs_only(field, here, there)
        await retry_and_end(field, domain, there)


@pytest.mark.parametrize(
    ("moment", "again", "place"),
    [
        ("wrote-claiming", "ran", 1),
        ("wrote-claiming", "wrote-claimed", 1),
        ("ran", "adopted", 1),
        ("wrote-claimed", "wrote-given", 1),
        ("completed", "wrote-refused", 0),
        ("completed", "wrote-kept", 0),
        ("sending", "wrote-kept", 0),
    ],
)
async def test_who_cleans_up_is_killed_too(begun: Field, moment: str, again: str, place: int) -> None:
    field = begun
    bytes_per_s = 8 * MIB * (moment == "sending")
    await anyio.to_thread.run_sync(partial(killed_at, field, moment, bytes_per_s=bytes_per_s))
    await anyio.to_thread.run_sync(partial(killed_at, field, again, bytes_per_s=-1))
    async with both(field) as (a, b):
        await settled(a, b)
        here, there = ((a, b), (b, a))[place]
        domain = await assert_runs_only(field, here, there)
        await retry_and_end(field, domain, there)


async def test_the_transfer_ends_after_the_caller_was_killed(begun: Field) -> None:
    """QEMU goes on alone and stops the guest; nobody has shown the proof, so the destination refuses."""
    field = begun
    await anyio.to_thread.run_sync(partial(killed_at, field, "sending", bytes_per_s=64 * MIB))
    with anyio.fail_after(PROMPT_S):
        count = -1
        while count != (count := await anyio.to_thread.run_sync(field.witness.count)):
            await anyio.sleep(0.5)
    assert len(field.emulators()) == 2
    async with both(field) as (a, b):
        await settled(a, b)
        domain = await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)


@pytest.mark.parametrize(("moment", "place"), [("sending", 0), ("completed", 0), ("wrote-claiming", 1)])
async def test_a_paused_guest_stays_paused_when_its_caller_is_killed(
    begun: Field, moment: str, place: int
) -> None:
    field = begun
    async with ferryman.connect(field.uris[0]) as a:
        await (await a.lookup_by_name(NAME)).suspend()
    bytes_per_s = 8 * MIB * (moment == "sending")
    await anyio.to_thread.run_sync(partial(killed_at, field, moment, bytes_per_s=bytes_per_s))
    async with both(field) as (a, b):
        await settled(a, b)
        here, there = ((a, b), (b, a))[place]
        assert await there.list_domains() == []
        (domain,) = await here.list_domains()
        assert (await domain.info()).state is DomainState.PAUSED
        assert len(field.emulators()) == 1
        await domain.resume()
        domain = await assert_runs_only(field, here, there)
        await retry_and_end(field, domain, there)


async def test_a_paused_guest_that_was_refused_can_try_again(field: Field) -> None:
    """Without being run in between; or else the plan says what is in the way, before anything moves."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        await domain.suspend()
        with at("completed", partial(kill, field.roots[1])), pytest.raises(FinishError):
            await domain.migrate(b)
        assert (await domain.info()).state is DomainState.PAUSED
        plan = await domain.plan_migration(b)
        if plan.blockers:
            assert [finding.code for finding in plan.blockers] == ["guest-state"]
            assert "resume" in plan.blockers[0].remedy
            await domain.resume()
            await domain.suspend()
        await domain.migrate(b)
        arrived = await b.lookup_by_name(NAME)
        assert (await arrived.info()).state is DomainState.PAUSED
        await arrived.resume()
        await (await assert_runs_only(field, b, a)).destroy()


_HOLDER = """
import sys, ferryman.sync
with ferryman.sync.connect(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


async def test_in_doubt_while_the_other_host_cannot_be_asked(begun: Field) -> None:
    """The guest runs at the destination, which another program has open: the source stays stopped until it knows."""
    field = begun
    await anyio.to_thread.run_sync(partial(killed_at, field, "wrote-claimed"))
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, field.uris[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert await anyio.to_thread.run_sync(holder.stdout.readline) == b"open\n"
        async with ferryman.connect(field.uris[0]) as a:
            assert [row.name for row in a.open_migrations()] == [NAME]
            (domain,) = await a.list_domains()
            assert (await domain.info()).state is DomainState.PAUSED
            for change in (domain.resume, domain.destroy, domain.undefine):
                with pytest.raises(DomainBusyError, match="is open here"):
                    await change()
            # It ticks at the destination, and only there.
            since_ns = time.monotonic_ns()
            await anyio.to_thread.run_sync(field.wait_ticks, 100)
            heard = {tick.pid for tick in field.witness.ticks() if tick.t_ns > since_ns}
            assert sorted(heard) == pids(field.roots[1])
            holder.stdin.close()
            await anyio.to_thread.run_sync(holder.wait)
            # Nobody does anything: the question is asked again.
            await settled(a)
            assert await a.list_domains() == []
    async with both(field) as (a, b):
        await (await assert_runs_only(field, b, a)).destroy()


async def test_the_receiver_starts_beside_the_plan(field: Field) -> None:
    """Before anything is written down; prepare takes it over, and starts no second one."""
    order: list[str] = []
    async with both(field) as (a, b):
        domain = await start(field, a)
        with (
            at("receiver-started", partial(order.append, "receiver")),
            at("wrote-begun", partial(order.append, "begun")),
            at("wrote-prepared", lambda: order.append(str(len(field.emulators(field.roots[1]))))),
        ):
            await domain.migrate(b)
        assert order == ["receiver", "begun", "1"]
        await (await assert_runs_only(field, b, a)).destroy()


async def test_a_receiver_that_nobody_needs_after_all_is_ended(field: Field) -> None:
    """The plan finds a blocker, or the caller aborts, while it starts."""
    async with both(field) as (a, b):
        domain = await start(field, a)
        image = field.directory / "image"
        image.rename(field.directory / "moved")
        with at("receiver-started", lambda: None) as passed, pytest.raises(PlanBlockedError):
            await domain.migrate(b)
        assert passed
        assert field.emulators(field.roots[1]) == []
        (field.directory / "moved").rename(image)
        job = domain.migrate(b)
        with at("receiver-started", job.abort), pytest.raises(MigrationAbortedError):
            await job
        assert field.emulators(field.roots[1]) == []
        await assert_runs_only(field, a, b)
        await retry_and_end(field, domain, b)
