"""Every planned fault at every point, on the simulated hypervisor: the guest runs in exactly one place."""

from __future__ import annotations

import anyio
import pytest

import ferryman
from ferryman import Connection, GuestState, MigrationOptions
from ferryman.errors import GuestLostError, InDoubtError, MigrationAbortedError, MigrationError
from ferryman.testing import Fault, World
from ferryman.testing.faults import POINTS
from ferryman.testing.world import ProcessState
from tests.simulated import NAME, UUID, definition, receivers, start, two_hosts

HONEST = [Fault.FAIL, Fault.BREAK_CONTRACT, Fault.KILL_GUEST, Fault.CUT]
# The driver hears of these after it gave the proof, which no driver may do: it must not raise there.
AFTER_PROOF = {("migrate_perform.completed", Fault.FAIL), ("migrate_perform.completed", Fault.CUT)}
# A cut is of the stream: it means something only while there is one.
CASES = [
    (point, fault)
    for point in POINTS
    for fault in HONEST
    if (fault is not Fault.CUT or point.startswith("migrate_perform")) and (point, fault) not in AFTER_PROOF
]


async def settle(lab: World) -> None:
    """Open both hosts as new programs would, until nothing is in doubt."""
    async with two_hosts(lab) as (alpha, beta):
        with anyio.fail_after(5):
            while alpha.open_migrations() or beta.open_migrations():
                await anyio.sleep(0.01)


def owners(lab: World) -> list[str]:
    """Hosts where the guest is active."""
    return [name for name, host in lab.hosts.items() if any(p.name == NAME for p in host.processes.values())]


@pytest.mark.parametrize(("point", "fault"), CASES, ids=lambda value: getattr(value, "value", value))
async def test_one_fault(lab: World, point: str, fault: Fault) -> None:
    lab.faults.at(f"*.{point}", fault)
    told: GuestState | None = None
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        await lab.elapse(0.1)
        try:
            await domain.migrate(beta, MigrationOptions(patience_s=1.0))
            told = GuestState.DESTINATION
        except MigrationError as error:
            told = error.guest_state or GuestState.SOURCE
            assert isinstance(error, GuestLostError) == (told is GuestState.GONE)
    assert lab.violations == []
    await settle(lab)
    assert lab.violations == []
    assert receivers(lab) == []
    running = lab.runners(ferryman.types.DomainUUID(UUID))
    killed = fault is Fault.KILL_GUEST
    if told is GuestState.DESTINATION:
        # Killed after it ran there: the guest is lost with its owner, and never resumed from an older memory.
        assert running == ["beta"] or (killed and running == [])
    elif told is GuestState.SOURCE:
        assert running == ["alpha"] or (killed and running == [])
    elif told is GuestState.GONE:
        assert killed
        assert running == []
    else:
        assert told is GuestState.IN_DOUBT
        assert len(running) == 1
    assert len(owners(lab)) <= 1
    if running:
        async with two_hosts(lab) as (alpha, beta):
            ends: dict[str, Connection] = {"alpha": alpha, "beta": beta}
            here = ends.pop(running[0])
            there = next(iter(ends.values()))
            result = await (await here.lookup_by_name(NAME)).migrate(there)
            assert result.uuid == UUID
    assert lab.violations == []


@pytest.mark.parametrize(("point", "fault"), sorted(AFTER_PROOF, key=str))
async def test_a_driver_that_raises_after_completion(lab: World, point: str, fault: Fault) -> None:
    """Its word is that the guest stays; the simulator's guest then stays, and nothing runs twice."""
    lab.faults.at(f"*.{point}", fault)
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        with pytest.raises(MigrationError):
            await domain.migrate(beta, MigrationOptions(patience_s=1.0))
    await settle(lab)
    assert lab.violations == []
    assert lab.runners(domain.uuid) == ["alpha"]


@pytest.mark.parametrize("event", ["plan", "begin", "prepare", "perform", "finish", "confirm"])
async def test_abort(lab: World, event: str) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        outcome: str
        try:
            async with domain.migrate(beta) as job:
                async for seen in job.progress():
                    if event == "plan" or (
                        isinstance(seen, ferryman.PhaseEvent) and seen.phase.value == event
                    ):
                        job.abort()
            outcome = "beta"
        except MigrationAbortedError as error:
            assert error.guest_state is GuestState.SOURCE
            outcome = "alpha"
        assert lab.runners(domain.uuid) == [outcome]
        assert lab.violations == []
        assert receivers(lab) == []
        assert alpha.open_migrations() == beta.open_migrations() == []
    if event in ("plan", "begin"):
        assert outcome == "alpha"


async def test_cancelled_at_any_moment(lab: World) -> None:
    """A caller that is cancelled after 0, 1, 2, … ms leaves one guest and settled journals."""
    places = set()
    async with two_hosts(lab) as (alpha, beta):
        await start(alpha)
        for after_ms in range(40):
            here, there = (
                (alpha, beta) if lab.runners(ferryman.types.DomainUUID(UUID)) == ["alpha"] else (beta, alpha)
            )
            domain = await here.lookup_by_name(NAME)
            with anyio.move_on_after(after_ms / 1000):
                await domain.migrate(there)
            running = lab.runners(domain.uuid)
            assert len(running) == 1
            places.add(running[0])
            assert lab.violations == []
            assert receivers(lab) == []
            assert alpha.open_migrations() == beta.open_migrations() == []
    assert "alpha" in places


async def test_in_doubt_until_the_destination_is_back(lab: World) -> None:
    """The destination's process is away after the proof: the guest stays stopped, and is settled by asking."""
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        lab.faults.at("beta.migrate_finish.before", Fault.BREAK_CONTRACT, times=1000)
        lab.faults.at("beta.migrate_finish.after", Fault.BREAK_CONTRACT, times=1000)
        try:
            await domain.migrate(beta, MigrationOptions(patience_s=0.3))
        except MigrationError as error:
            assert error.guest_state in (GuestState.SOURCE, GuestState.IN_DOUBT)
            assert isinstance(error, InDoubtError) == (error.guest_state is GuestState.IN_DOUBT)
        assert lab.violations == []
    lab.faults = type(lab.faults)()
    await settle(lab)
    assert len(lab.runners(domain.uuid)) == 1
    assert lab.violations == []


async def test_planted_violations_are_seen(lab: World) -> None:
    """The witness of these tests can fail."""
    lab.faults.at("alpha.migrate_confirm.before", Fault.RUN_TWICE)
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        await domain.migrate(beta)
    assert any("two run" in violation for violation in lab.violations)


async def test_many_at_once_there_and_back(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        names = [f"g{number}" for number in range(20)]
        for number, name in enumerate(names):
            await alpha.create(definition(name, f"00000000-0000-4000-8000-{number:012}", memory_mib=1))
        for here, there in ((alpha, beta), (beta, alpha)):
            async with anyio.create_task_group() as tasks:
                for name in names:
                    domain = await here.lookup_by_name(name)
                    tasks.start_soon(_run, domain, there)
            assert sorted(d.name for d in await there.list_domains()) == sorted(names)
            assert await here.list_domains() == []
    assert lab.violations == []
    for host in lab.hosts.values():
        for process in host.processes.values():
            assert process.state is ProcessState.RUNNING
            assert lab.check_memory(process) == 0


async def _run(domain: ferryman.Domain, there: Connection) -> None:
    await domain.migrate(there)
