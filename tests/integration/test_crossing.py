"""Live migrations on real QEMU, watched from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import pytest

import ferryman
import ferryman.sync
from ferryman import GuestState, MigrationOptions
from ferryman.errors import (
    DefinitionError,
    GuestLostError,
    HostBusyError,
    MigrationAbortedError,
    MigrationError,
    PlanBlockedError,
    PrepareError,
)
from ferryman.types import DomainState, Phase, Side
from tests.guests.inspect import pids

if TYPE_CHECKING:
    from tests.integration.conftest import Field

NAME = "counter"
SLOW = MigrationOptions(bandwidth_bytes_per_s=4 << 20)


async def test_there_and_back_many_times(field: Field, anyio_backend_name: str) -> None:
    rounds = 20 if anyio_backend_name == "asyncio" else 4
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await a.create(field.definition)
        uuid = domain.uuid
        await anyio.to_thread.run_sync(field.wait_ticks, 50)
        ends = [a, b]
        for number in range(rounds):
            here, there = ends[number % 2], ends[(number + 1) % 2]
            result = await domain.migrate(there)
            domain = await there.lookup_by_uuid(uuid)
            info = await domain.info()
            assert (result.name, info.name, info.uuid, info.state) == (NAME, NAME, uuid, DomainState.RUNNING)
            assert await here.list_domains() == []
            assert len(pids(field.roots[(number + 1) % 2])) == 1
            assert pids(field.roots[number % 2]) == []
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
        await domain.suspend()
    assert field.wrong_pages(field.roots[rounds % 2]) == 0
    seen = field.witness.report()
    assert (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) == (0, 0, ())
    assert len(seen.blackouts) == rounds
    async with ferryman.connect(field.uris[rounds % 2]) as end:
        await (await end.lookup_by_name(NAME)).destroy()


def test_paused_stays_paused_and_options_hold(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition, paused=True)
        socket = field.directory / "stream"
        result = domain.migrate(
            b, MigrationOptions(migration_uri=f"unix:{socket}", name="other", persist=True)
        ).result()
        assert (result.name, result.blackout_ms) == ("other", None)
        assert not socket.exists()
        domain = b.lookup_by_name("other")
        assert domain.info().state is DomainState.PAUSED
        assert domain.info().persistent
        domain.resume()
        field.wait_ticks(10)
        result = domain.migrate(a, MigrationOptions(paused=True, undefine_source=True)).result()
        assert a.lookup_by_name("other").info().state is DomainState.PAUSED
        assert b.list_domains() == []
        a.lookup_by_name("other").destroy()


def test_steered_in_flight(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        with domain.migrate(b, MigrationOptions(bandwidth_bytes_per_s=1 << 20)) as job:
            job.set_max_downtime(500)
            job.set_bandwidth(0)
            events = list(job.progress())
        assert isinstance(events[-1], ferryman.SettledEvent)
        assert events[-1].guest_state is GuestState.DESTINATION
        assert [e.elapsed_ms for e in events] == sorted(e.elapsed_ms for e in events)
        # 20 MiB at 1 MiB/s would take 20 s.
        assert job.result().total_ms < 15_000
        b.lookup_by_name(NAME).destroy()


def test_guests_outlive_the_program_and_a_root_has_one_program(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        a.create(field.definition)
        with pytest.raises(HostBusyError, match=str(os.getpid())), ferryman.sync.connect(field.uris[0]):
            pass
    before = pids(field.roots[0])
    field.wait_ticks(50)
    with ferryman.sync.connect(field.uris[0]) as a:
        domain = a.lookup_by_name(NAME)
        assert pids(field.roots[0]) == before
        assert domain.info().state is DomainState.RUNNING
        domain.destroy()


def test_a_definition_that_is_not_understood_is_refused_by_name(field: Field) -> None:
    odd = field.definition.replace("<devices>", "<devices>\n<hostdev mode='subsystem'/>")
    with (
        ferryman.sync.connect(field.uris[0]) as a,
        pytest.raises(DefinitionError, match=r"<hostdev> in <devices> is not understood.*line \d+"),
    ):
        a.create(odd)


def test_blocked_before_anything_moves(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(20)
        (field.directory / "image").rename(field.directory / "moved")
        plan = domain.plan_migration(b)
        assert {(f.code, f.side) for f in plan.blockers} == {("storage-missing", Side.DESTINATION)}
        with pytest.raises(PlanBlockedError, match="cannot be read there"):
            domain.migrate(b).result()
        (field.directory / "moved").rename(field.directory / "image")
        assert "same-host" in {f.code for f in domain.plan_migration(a).blockers}
        assert domain.info().state is DomainState.RUNNING
        domain.destroy()


def test_port_taken(field: Field) -> None:
    import socket

    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(PrepareError, match="cannot listen") as caught:
                domain.migrate(b, MigrationOptions(migration_uri=f"tcp://127.0.0.1:{port}")).result()
        error = caught.value
        assert (error.phase, error.side, error.guest_state) == (
            Phase.PREPARE,
            Side.DESTINATION,
            GuestState.SOURCE,
        )
        assert domain.info().state is DomainState.RUNNING
        domain.migrate(b).result()
        b.lookup_by_name(NAME).destroy()


@pytest.mark.parametrize("end", ["a", "b"])
def test_a_qemu_killed_during_the_transfer(field: Field, end: str) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        expected = GuestLostError if end == "a" else MigrationError
        with pytest.raises(expected) as caught, domain.migrate(b, SLOW) as job:
            for event in job.progress():
                if isinstance(event, ferryman.ProgressEvent):
                    os.kill(pids(field.directory / end)[0], signal.SIGKILL)
                    break
        error = caught.value
        assert (error.phase, error.side) == (Phase.PERFORM, Side.SOURCE)
        assert a.open_migrations() == b.open_migrations() == []
        assert b.list_domains() == []
        if end == "a":
            assert error.guest_state is GuestState.GONE
            assert a.list_domains() == []
        else:
            assert error.guest_state is GuestState.SOURCE
            assert domain.info().state is DomainState.RUNNING
            field.wait_ticks(50)
            domain.migrate(b).result()
            b.lookup_by_name(NAME).destroy()


@pytest.mark.parametrize("when", [Phase.PREPARE, Phase.PERFORM])
def test_abort(field: Field, when: Phase) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        with pytest.raises(MigrationAbortedError) as caught, domain.migrate(b, SLOW) as job:
            for event in job.progress():
                if isinstance(event, ferryman.PhaseEvent) and event.phase is when:
                    job.abort()
                    break
        assert caught.value.guest_state is GuestState.SOURCE
        assert domain.info().state is DomainState.RUNNING
        field.wait_ticks(50)
        assert pids(field.roots[1]) == []
        seen = field.witness.report()
        assert (seen.ticks_lost, seen.ticks_doubled) == (0, 0)
        domain.destroy()


_CALLER = """
import os, signal, sys
import ferryman.sync, ferryman.journal, ferryman.handover
from ferryman import MigrationOptions
moment, a, b = sys.argv[1:]
write = ferryman.journal.Journal.write_now
def killed(self, row):
    if moment == "before-" + row.record.value:
        os.kill(os.getpid(), signal.SIGKILL)
    written = write(self, row)
    if moment == "after-" + row.record.value:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
ferryman.journal.Journal.write_now = killed
with ferryman.sync.connect(a) as source, ferryman.sync.connect(b) as destination:
    source.lookup_by_name("counter").migrate(destination).result()
"""


@pytest.mark.parametrize("record", ["begun", "prepared", "handing", "claiming", "claimed", "given"])
@pytest.mark.parametrize("edge", ["before", "after"])
def test_the_caller_is_killed_at_every_durable_write(field: Field, edge: str, record: str) -> None:
    with ferryman.sync.connect(field.uris[0]) as a:
        a.create(field.definition)
    field.wait_ticks(50)
    ended = subprocess.run(
        [sys.executable, "-c", _CALLER, f"{edge}-{record}", *field.uris], check=False, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:

        async def settled() -> None:
            with anyio.fail_after(40):
                while a.open_migrations() or b.open_migrations():
                    await anyio.sleep(0.02)

        a._call(settled)
        places = [end for end in (a, b) if end.list_domains()]
        assert len(places) == 1
        assert (places[0] is b) == (record in ("claimed", "given") or (edge, record) == ("after", "claiming"))
        domain = places[0].lookup_by_name(NAME)
        assert domain.info().state is DomainState.RUNNING
        assert len(pids(field.roots[0]) + pids(field.roots[1])) == 1
        field.wait_ticks(20)
        seen = field.witness.report()
        assert (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) == (0, 0, ())
        other = b if places[0] is a else a
        domain.migrate(other).result()
        other.lookup_by_name(NAME).destroy()
