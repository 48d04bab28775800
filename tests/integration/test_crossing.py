"""Live migrations on real QEMU, watched from outside."""

from __future__ import annotations

import itertools
import re
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import ferryman
import ferryman.sync
import ferryman_qemu.streams
from ferryman import GuestState, MigrationOptions, PhaseEvent, ProgressEvent, SettledEvent
from ferryman.errors import (
    DomainBusyError,
    DomainExistsError,
    DomainStateError,
    MigrationAbortedError,
    NotSupportedError,
    OptionError,
    PlanBlockedError,
)
from ferryman.types import DomainEventKind, DomainState, Phase, Side
from tests.guests.inspect import pids, pids_by_name
from tests.guests.linux import LinuxGuest
from tests.qemu import MIB, NAME, PROMPT_S, Field, laid_out

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ferryman import Connection, Domain
    from ferryman.types import DomainEvent


async def test_there_and_back_many_times(heavy_field: Field, anyio_backend_name: str) -> None:
    """Each time the same domain, in one place; its memory is compared half-way and at the end."""
    field, legs = heavy_field, 10 if anyio_backend_name == "asyncio" else 3
    async with ferryman.connect(field.uris[0]) as a:
        uuid = (await a.create(field.definition)).uuid
    await anyio.to_thread.run_sync(field.wait_ticks, 100)
    here = 0
    for _half in range(2):
        async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
            ends = [a, b]
            domain = await ends[here].lookup_by_name(NAME)
            await domain.resume()
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            for _leg in range(legs):
                there = 1 - here
                result = await domain.migrate(ends[there])
                domain = await ends[there].lookup_by_uuid(uuid)
                info = await domain.info()
                assert (result.name, result.uuid) == (info.name, info.uuid) == (NAME, uuid)
                assert (info.state, info.persistent) == (DomainState.RUNNING, False)
                assert (info.memory_bytes // MIB, info.vcpus) == (field.guest.memory_bytes // MIB, 1)
                assert await ends[here].list_domains() == []
                assert [d.name for d in await ends[there].list_domains()] == [NAME]
                assert ends[0].open_migrations() == ends[1].open_migrations() == []
                assert await anyio.to_thread.run_sync(field.the_runner) == pids(field.roots[there])[0]
                assert field.emulators(field.roots[here]) == []
                here = there
            await domain.suspend()
        assert await anyio.to_thread.run_sync(field.wrong_pages, field.roots[here]) == 0
    field.assert_unbroken(crossings=2 * legs)
    async with ferryman.connect(field.uris[here]) as end:
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


def test_a_slow_transfer_speeds_up(calm_field: Field) -> None:
    field = calm_field
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        with domain.migrate(b, MigrationOptions(bandwidth_bytes_per_s=MIB)) as job:
            for event in job.progress():
                if isinstance(event, ProgressEvent) and event.elapsed_ms > 1000:
                    # 20 MiB would take 20 s.
                    assert (event.statistics.transferred_bytes or 0) < 4 * MIB
                    job.set_bandwidth(0)
                    break
            with pytest.raises(NotSupportedError, match="postcopy"):
                job.switch_to_postcopy()
            with pytest.raises(OptionError, match="bandwidth_bytes_per_s"):
                job.set_bandwidth(-1)
            result = job.result()
            assert (result.transferred_bytes or 0) > 19 * MIB
            assert result.total_ms < 12_000
            with pytest.raises(DomainStateError, match="nothing to change"):
                job.set_bandwidth(MIB)
        b.lookup_by_name(NAME).destroy()


def test_a_longer_stop_ends_what_would_never_end(heavy_field: Field) -> None:
    """All pages are stale again before they were sent: only a stop of 1.3 s is long enough for them."""
    field = heavy_field
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(100)
        options = MigrationOptions(bandwidth_bytes_per_s=16 * MIB, max_downtime_ms=50)
        with domain.migrate(b, options) as job:
            for event in job.progress():
                assert not isinstance(event, SettledEvent), event
                if isinstance(event, ProgressEvent) and (event.statistics.iteration or 0) >= 3:
                    assert event.statistics.dirty_bytes_per_s is not None
                    assert (event.statistics.expected_downtime_ms or 0) > 50
                    job.set_max_downtime(8000)
                    break
            result = job.result()
        assert result.downtime_ms is not None
        assert result.blackout_ms is not None
        assert 0 < result.downtime_ms < 8000
        assert (result.iterations or 0) >= 3
        assert field.the_runner() == pids(field.roots[1])[0]
        b.lookup_by_name(NAME).suspend()
    field.assert_unbroken(crossings=1)
    # The call's own measure is an upper bound of what the outside saw, but for one tick.
    (blackout,) = field.witness.report().blackouts
    assert blackout.ms < result.blackout_ms + 250
    assert field.wrong_pages(field.roots[1]) == 0
    with ferryman.sync.connect(field.uris[1]) as b:
        b.lookup_by_name(NAME).destroy()


def test_memory_is_whole_after_many_passes(field: Field) -> None:
    """Every write of every pass arrives: a guest of this size would lose some, so it was given a little more."""
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        result = domain.migrate(b, MigrationOptions(bandwidth_bytes_per_s=16 * MIB)).result()
        assert (result.iterations or 0) > 3
        field.wait_ticks(20)
        b.lookup_by_name(NAME).suspend()
    wrong = field.wrong_pages(field.roots[1])
    with ferryman.sync.connect(field.uris[1]) as b:
        b.lookup_by_name(NAME).destroy()
    assert wrong == 0
    field.assert_unbroken(crossings=1)


def test_a_transfer_keeps_to_its_bandwidth(calm_field: Field) -> None:
    field = calm_field
    cap = 10 * MIB
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        options = MigrationOptions(bandwidth_bytes_per_s=cap, max_downtime_ms=10)
        result = domain.migrate(b, options).result()
        assert result.transferred_bytes is not None
        assert result.transferred_bytes > 19 * MIB
        assert result.transferred_bytes / (result.phase_ms[Phase.PERFORM] / 1000) < 1.25 * cap
        b.lookup_by_name(NAME).destroy()


def test_transports_and_addresses(calm_field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    field = calm_field
    connected: list[str] = []

    def connect_stream(text: str) -> socket.socket:
        connected.append(text)
        return real(text)

    real = ferryman_qemu.streams.connect_stream
    monkeypatch.setattr(ferryman_qemu.streams, "connect_stream", connect_stream)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = field.directory / "stream"
    asked = [
        (MigrationOptions(), "tcp://127.0.0.1:{port}"),
        (MigrationOptions(migration_uri=f"unix:{path}"), f"unix:{path}"),
        (MigrationOptions(migration_uri=f"tcp://127.0.0.1:{port}"), f"tcp://127.0.0.1:{port}"),
        (MigrationOptions(migration_uri=f"127.0.0.1:{port}"), f"127.0.0.1:{port}"),
        (MigrationOptions(migration_uri="tcp://localhost"), "tcp://localhost:{port}"),
        (
            MigrationOptions(migration_uri="tcp://127.0.0.2", listen_address="0.0.0.0"),
            "tcp://127.0.0.2:{port}",
        ),
    ]
    if Path("/proc/net/if_inet6").exists():
        asked += [
            (MigrationOptions(listen_address="::1"), "tcp://[::1]:{port}"),
            (MigrationOptions(migration_uri="tcp://[::1]"), "tcp://[::1]:{port}"),
        ]
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        ends = [a, b]
        for number, (options, expected) in enumerate(asked):
            there = ends[(number + 1) % 2]
            domain.migrate(there, options).result()
            domain = there.lookup_by_name(NAME)
            assert re.fullmatch(re.escape(expected).replace(r"\{port\}", "[0-9]+"), connected[-1])
            assert not path.exists()
            field.wait_ticks(20)
        domain.destroy()
    assert len(connected) == len(asked)
    field.assert_unbroken(crossings=len(asked))


def test_a_running_guest_arrives_paused_where_that_is_asked(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        result = domain.migrate(b, MigrationOptions(paused=True)).result()
        assert result.blackout_ms is not None
        count = field.witness.count()
        arrived = b.lookup_by_name(NAME)
        assert arrived.info().state is DomainState.PAUSED
        assert field.witness.count() == count
        assert a.list_domains() == []
    assert field.wrong_pages(field.roots[1]) == 0
    with ferryman.sync.connect(field.uris[1]) as b:
        b.lookup_by_name(NAME).resume()
        field.the_runner()
        field.assert_unbroken(crossings=1)
        b.lookup_by_name(NAME).destroy()


def test_definitions_stay_move_and_are_renamed(field: Field) -> None:
    """A definition is kept where the domain was defined unless that is asked for, and made at the destination."""
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.define(field.definition)
        domain.start()
        field.wait_ticks(50)
        domain.migrate(b, MigrationOptions(name="moved")).result()
        left = a.lookup_by_name(NAME)
        assert (left.uuid, left.info().state, left.info().persistent) == (
            domain.uuid,
            DomainState.SHUT_OFF,
            True,
        )
        moved = b.lookup_by_name("moved")
        assert (moved.uuid, moved.info().state, moved.info().persistent) == (
            domain.uuid,
            DomainState.RUNNING,
            False,
        )
        assert "<name>moved</name>" in moved.definition()
        # Back under the name that its definition here has, and it is at home again.
        moved.migrate(a, MigrationOptions(name=NAME)).result()
        assert a.lookup_by_name(NAME).info().persistent
        assert b.list_domains() == []
        assert len(a.list_domains()) == 1

        options = MigrationOptions(name="second", persist=True, undefine_source=True)
        assert a.lookup_by_name(NAME).migrate(b, options).result().name == "second"
        assert a.list_domains() == []
        second = b.lookup_by_name("second")
        assert second.info().persistent
        field.the_runner()
        field.assert_unbroken(crossings=3)
        second.destroy()
        assert second.info().state is DomainState.SHUT_OFF
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        assert a.list_domains() == []
        second = b.lookup_by_name("second")
        assert (second.uuid, second.info().persistent) == (domain.uuid, True)
        second.start()
        assert second.info().state is DomainState.RUNNING
        second.destroy()
        second.undefine()
        assert b.list_domains() == []


def test_what_is_told_of_a_migration(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        domain = a.create(field.definition)
        field.wait_ticks(50)
        with domain.migrate(b, MigrationOptions(bandwidth_bytes_per_s=16 * MIB)) as job:
            assert job.id is None or len(job.id) == 32
            events = list(job.progress())
            result = job.result()
        assert list(job.progress()) == events
        assert result.migration_id == job.id
        b.lookup_by_name(NAME).destroy()

    phases = [(e.phase, e.side, e.ended) for e in events if isinstance(e, PhaseEvent)]
    sides = [Side.SOURCE, Side.DESTINATION, Side.SOURCE, Side.DESTINATION, Side.SOURCE]
    assert phases == [
        (phase, side, ended) for phase, side in zip(Phase, sides, strict=True) for ended in (False, True)
    ]
    assert [e.error for e in events if isinstance(e, PhaseEvent)] == [None] * 10
    assert [e.elapsed_ms for e in events] == sorted(e.elapsed_ms for e in events)
    (settled,) = [e for e in events if isinstance(e, SettledEvent)]
    assert settled is events[-1]
    assert (settled.guest_state, settled.error) == (GuestState.DESTINATION, None)

    samples = [e for e in events if isinstance(e, ProgressEvent)]
    begin, end = (
        next(e for e in events if isinstance(e, PhaseEvent) and (e.phase, e.ended) == (Phase.PERFORM, ended))
        for ended in (False, True)
    )
    assert len(samples) >= 3
    assert all(events.index(begin) < events.index(e) < events.index(end) for e in samples)
    sent = [e.statistics.transferred_bytes for e in samples if e.statistics.transferred_bytes is not None]
    assert sent == sorted(sent)
    assert sent[-1] > 0
    assert {e.statistics.total_bytes for e in samples} - {None, 0}
    assert [e.statistics.iteration for e in samples] == sorted(e.statistics.iteration or 0 for e in samples)

    assert set(result.phase_ms) == set(Phase)
    assert sum(result.phase_ms.values()) <= result.total_ms + 50
    assert result.setup_ms is not None
    assert 0 < result.setup_ms < result.total_ms
    assert (result.source, result.destination) == tuple(field.uris)
    (blackout,) = field.witness.report().blackouts
    assert result.blackout_ms is not None
    # From the stop to the start, while the outside sees from the last tick to the first.
    assert abs(blackout.ms - result.blackout_ms) < 250


async def test_events_of_domains_on_both_ends(field: Field) -> None:
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        with a.events() as seen_a, b.events() as seen_b:
            domain = await a.create(field.definition)
            await anyio.to_thread.run_sync(field.wait_ticks, 50)
            await domain.migrate(b)
            arrived = await b.lookup_by_name(NAME)
            for change in (arrived.suspend, arrived.resume, arrived.destroy):
                await change()
            told_a = await _until(seen_a, DomainEventKind.MIGRATED_OUT)
            told_b = await _until(seen_b, DomainEventKind.DESTROYED)
            assert await b.list_domains() == []
    assert {event.uuid for event in (*told_a, *told_b)} == {domain.uuid}
    assert {event.name for event in (*told_a, *told_b)} == {NAME}
    kinds = [event.kind for event in told_a]
    # Started, and stopped by the migration; it is no crash and nobody shut it down.
    assert [kind for kind in kinds if kind not in (DomainEventKind.RESUMED, DomainEventKind.SUSPENDED)] == [
        DomainEventKind.STARTED,
        DomainEventKind.MIGRATED_OUT,
    ]
    kinds = [event.kind for event in told_b]
    assert kinds[0] is DomainEventKind.MIGRATED_IN
    assert kinds[-3:] == [DomainEventKind.SUSPENDED, DomainEventKind.RESUMED, DomainEventKind.DESTROYED]


async def _until(seen: AsyncIterator[DomainEvent], last: DomainEventKind) -> list[DomainEvent]:
    told: list[DomainEvent] = []
    with anyio.fail_after(PROMPT_S):
        while not told or told[-1].kind is not last:
            told.append(await anext(seen))
    return told


def test_events_without_await(field: Field) -> None:
    with ferryman.sync.connect(field.uris[0]) as a, a.events() as seen:
        domain = a.create(field.definition, paused=True)
        domain.resume()
        domain.destroy()
        kinds = [event.kind for event in itertools.islice(seen, 3)]
    assert kinds == [DomainEventKind.STARTED, DomainEventKind.RESUMED, DomainEventKind.DESTROYED]


def test_a_domain_is_locked_while_it_moves(field: Field) -> None:
    """Nobody changes it, moves it, or takes its name or uuid at either end."""
    slow = MigrationOptions(bandwidth_bytes_per_s=4 * MIB)
    with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
        a.define(field.definition)
        domain = a.lookup_by_name(NAME)
        domain.start()
        field.wait_ticks(50)
        with pytest.raises(MigrationAbortedError), domain.migrate(b, slow) as job:
            for event in job.progress():
                if isinstance(event, ProgressEvent):
                    break
            assert [row.migration_id for row in a.open_migrations()] == [job.id]
            assert [row.migration_id for row in b.open_migrations()] == [job.id]
            for change in (domain.suspend, domain.resume, domain.destroy, domain.undefine, domain.shutdown):
                with pytest.raises(DomainBusyError, match=str(job.id)):
                    change()
            assert {(f.code, f.side) for f in domain.plan_migration(b).blockers} >= {
                ("domain-busy", Side.SOURCE),
                ("domain-busy", Side.DESTINATION),
            }
            with pytest.raises(PlanBlockedError):
                domain.migrate(b).result()
            # A receiver is no domain yet, but its name and uuid are taken.
            assert b.list_domains() == []
            with pytest.raises(DomainBusyError, match=str(job.id)):
                b.create(field.definition)
            for make in (b.create, b.define):
                with pytest.raises(DomainExistsError):
                    make(field.define(NAME))
            assert domain.info().state is DomainState.RUNNING
            job.abort()
        assert field.the_runner() == pids(field.roots[0])[0]
        field.assert_unbroken(crossings=0)
        b.create(field.definition.replace(NAME, "other"), paused=True).destroy()
        domain.destroy()
        domain.undefine()


async def test_three_guests_cross_at_once(field: Field) -> None:
    """Two go and one comes, each watched by itself."""
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domains = [
            await end.create(field.define(name)) for end, name in ((a, "first"), (a, "second"), (b, "third"))
        ]
        with anyio.fail_after(60):
            while len({tick.pid for tick in field.witness.ticks()}) < 3:
                await anyio.to_thread.run_sync(field.wait_ticks, 10)
        before = pids_by_name(field.roots[0]) | pids_by_name(field.roots[1])
        async with anyio.create_task_group() as tasks:
            for domain in domains:
                tasks.start_soon(_migrate, domain, b if domain.connection is a else a)
        assert [d.name for d in await a.list_domains()] == ["third"]
        assert sorted(d.name for d in await b.list_domains()) == ["first", "second"]
        after = pids_by_name(field.roots[0]) | pids_by_name(field.roots[1])
        for name in before:
            await anyio.to_thread.run_sync(
                partial(field.witness.wait_new_process, PROMPT_S, other_than=before[name])
            )
        for end in (a, b):
            for domain in await end.list_domains():
                await domain.suspend()
    for name in before:
        seen = field.witness.report(pids={before[name], after[name]})
        assert seen.ticks > 20
        assert (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) == (0, 0, ())
        assert seen.pids == (before[name], after[name])
        root = field.roots[0 if name == "third" else 1]
        assert await anyio.to_thread.run_sync(partial(field.wrong_pages, root, name=name)) == 0
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        for end in (a, b):
            for domain in await end.list_domains():
                await domain.destroy()


async def _migrate(domain: Domain, there: Connection) -> None:
    await domain.migrate(there)


def test_linux_there_and_back() -> None:
    """A real kernel, watched on its console, checks its own memory all the time."""
    guest = LinuxGuest(
        memory_bytes=128 * MIB, tick_ms=2, blocks_bytes=4 * MIB, block_bytes=256 * 1024, pause_ms=2
    )
    rounds = 20
    with laid_out(guest) as field:
        witness = field.witness
        with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
            domain = a.create(field.definition)
            witness.wait_line("boot ok", PROMPT_S)
            witness.wait_line("mem ok", PROMPT_S)
            ends = [a, b]
            for number in range(rounds):
                there = ends[(number + 1) % 2]
                domain.migrate(there).result()
                domain = there.lookup_by_name(NAME)
                (pid,) = pids(field.roots[(number + 1) % 2])
                assert field.the_runner() == pid
                if number % 4 == 3:
                    # The first line may be about a comparison that began at the source.
                    line = witness.wait_line("mem ok", PROMPT_S, after_ns=time.monotonic_ns())
                    line = witness.wait_line("mem ok", PROMPT_S, after_ns=line.t_ns)
                    assert line.pid == pid
            domain.destroy()
        assert witness.lines("mem BAD") == []
        assert [line.text for line in witness.lines("boot ok")] == ["boot ok"]
        passes = [int(line.text.removeprefix("mem ok ")) for line in witness.lines("mem ok")]
        assert passes == list(range(1, len(passes) + 1))
        field.assert_unbroken(crossings=rounds)
