"""Observers see everything and stand in nobody's way; reviewers can veto, and their silence is a veto too."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import anyio
import pytest

from ferryman import Connection, GuestState, MigrationOptions, Phase, PhaseEvent, ProgressEvent, SettledEvent
from ferryman.errors import DriverContractError, MigrationError, PlanBlockedError, PlanStaleError
from ferryman.hookspecs import ObservedEvent, hookimpl
from ferryman.testing import Fault, World
from ferryman.types import Finding, FindingSeverity, Side
from tests.simulated import NAME, UUID, receivers, start, two_hosts

DIST = "acme-audit"
OURS = PlanStaleError("planted", changes=())
PHASES = list(zip(Phase, [Side.SOURCE, Side.DESTINATION] * 2 + [Side.SOURCE], strict=True))


def observer(**hooks: Callable[..., object]) -> object:
    """An observer of some hooks."""
    return type("Observer", (), {name: hookimpl(hook) for name, hook in hooks.items()})()


class Watcher:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[ObservedEvent] = []

    @hookimpl
    async def migration_event(self, request: ObservedEvent) -> None:
        self.seen.append(request)


def fails(self: object, request: object) -> None:
    raise ValueError("planted")


def raising(error: Exception) -> Callable[..., object]:
    async def hook(self: object, request: object) -> None:
        raise error

    return hook


def answering(answer: object) -> Callable[..., object]:
    async def hook(self: object, request: object) -> object:
        return answer

    return hook


@asynccontextmanager
async def watched(lab: World, *observers: object) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both hosts of a world, the source's connection with observers."""
    async with two_hosts(lab) as (alpha, beta):
        for number, each in enumerate(observers):
            alpha.hooks.add_observer(each, f"{DIST}-{number}" if number else DIST)
        yield alpha, beta


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[object, str]]:
    """Distribution and exception of what the registry logged about observers."""
    return [
        (vars(record).get("distribution"), type(record.exc_info[1]).__name__)
        for record in caplog.records
        if record.name == "ferryman.registry" and record.levelno == logging.ERROR and record.exc_info
    ]


# Events


@pytest.mark.parametrize(
    ("fault", "address", "phases", "error"),
    [
        (None, None, 5, None),
        (Fault.FAIL, None, 2, "prepare-failed"),
        (Fault.HANG, None, 3, "migration-aborted"),
        # Even a migration that never began is seen to end.
        (None, "::1", 0, "plan-blocked"),
    ],
    ids=["success", "failure", "abort", "blocked"],
)
async def test_all_events_in_order(
    lab: World, fault: Fault | None, address: str | None, phases: int, error: str | None
) -> None:
    if fault is not None:
        lab.faults.at(
            "*.migrate_prepare.after" if fault is Fault.FAIL else "*.migrate_perform.stopped", fault
        )
    here, too, there = Watcher(), Watcher(), Watcher()
    async with watched(lab, here, too) as (alpha, beta):
        beta.hooks.add_observer(there, DIST)
        domain = await start(alpha)
        told = []
        async with domain.migrate(beta, MigrationOptions(listen_address=address)) as job:
            async for event in job.progress():
                told.append(event)
                if fault is Fault.HANG and isinstance(event, PhaseEvent) and event.phase is Phase.PERFORM:
                    job.abort()
            with suppress(MigrationError):
                await job.result()
    for watcher in (here, too, there):
        assert [seen.event for seen in watcher.seen] == told
    steps = [(e.phase, e.side, e.ended) for e in told if isinstance(e, PhaseEvent)]
    assert steps == [(*phase, ended) for phase in PHASES[:phases] for ended in (False, True)]
    errors = [e.error for e in told if isinstance(e, PhaseEvent) and e.error is not None]
    assert errors == ([error] if fault is not None else [])
    assert phases < 5 or any(isinstance(event, ProgressEvent) for event in told)
    (last,) = (event for event in told if isinstance(event, SettledEvent))
    assert last is told[-1]
    place = GuestState.SOURCE if error else GuestState.DESTINATION
    assert (last.guest_state, last.error) == (place, error)
    assert all(before.elapsed_ms <= after.elapsed_ms for before, after in pairwise(told))
    for seen in here.seen:
        assert (seen.uuid, seen.name) == (UUID, NAME)
        assert (seen.source, seen.destination) == (f"test:///{lab.name}/alpha", f"test:///{lab.name}/beta")
    # Begin makes the id: from its end on every event has it.
    assert {seen.id for seen in here.seen[1:]} == ({job.id} if phases else set())
    assert here.seen[0].id in (None, job.id)
    assert (job.id is None) == (phases == 0)


@pytest.mark.parametrize(
    ("see", "error"),
    [
        (raising(ValueError("planted")), "ValueError"),
        # Not even an error of Ferryman is the migration's.
        (raising(OURS), "PlanStaleError"),
        # These are not async: nothing is left to await.
        (lambda self, request: None, "TypeError"),
        (fails, "ValueError"),
    ],
)
async def test_a_failing_observer(
    lab: World, caplog: pytest.LogCaptureFixture, see: Callable[..., object], error: str
) -> None:
    """It is logged for each event, and neither the migration nor the next observer knows."""
    watcher = Watcher()
    async with watched(lab, observer(migration_event=see), watcher) as (alpha, beta):
        domain = await start(alpha)
        async with domain.migrate(beta) as job:
            told = [event async for event in job.progress()]
            await job.result()
        assert lab.runners(domain.uuid) == ["beta"]
        assert alpha.open_migrations() == beta.open_migrations() == []
    assert [seen.event for seen in watcher.seen] == told
    assert logged(caplog) == [(DIST, error)] * len(told)
    assert receivers(lab) == []


@pytest.mark.parametrize("aborted", [False, True])
async def test_a_slow_observer_lengthens_nothing(lab: World, aborted: bool) -> None:
    """It is busy with the first event when the guest's place is settled, and then sees the others in order."""
    if aborted:
        lab.faults.at("alpha.migrate_perform.iteration", Fault.HANG)
    entered, release = anyio.Event(), anyio.Event()
    seen: list[ObservedEvent] = []

    async def see(self: object, request: ObservedEvent) -> None:
        entered.set()
        await release.wait()
        seen.append(request)

    async with watched(lab, observer(migration_event=see)) as (alpha, beta):
        domain = await start(alpha)
        with anyio.fail_after(30):
            async with domain.migrate(beta) as job:
                await entered.wait()
                if aborted:
                    job.abort()
                with suppress(MigrationError):
                    await job.result()
                assert seen == []
                assert lab.runners(domain.uuid) == ["alpha" if aborted else "beta"]
                assert alpha.open_migrations() == beta.open_migrations() == []
                release.set()
        assert [each.event for each in seen] == [event async for event in job.progress()]


# Reviews


def finding(severity: FindingSeverity, code: str = "acme-curfew") -> Finding:
    return Finding(code=code, severity=severity, side=None, message="it is late", remedy="wait for the day")


def reviewer(*answer: Finding) -> object:
    return observer(migration_review=answering(list(answer)))


WARNING, VETO = finding(FindingSeverity.WARNING), finding(FindingSeverity.BLOCKER)


async def test_warnings_of_several(lab: World) -> None:
    """The same policy on both hosts says the same, and that is one finding."""
    second = finding(FindingSeverity.WARNING, "acme-quota")
    async with watched(lab, reviewer(WARNING), reviewer(second)) as (alpha, beta):
        beta.hooks.add_observer(reviewer(WARNING), DIST)
        domain = await start(alpha)
        plan = await domain.plan_migration(beta)
        assert (plan.findings, plan.blockers) == (plan.warnings, ())
        assert sorted(found.code for found in plan.findings) == ["acme-curfew", "acme-quota"]
        assert "warning: it is late [acme-curfew]: wait for the day" in plan.explain()
        await plan.execute()
        assert lab.runners(domain.uuid) == ["beta"]


@pytest.mark.parametrize("end", [0, 1], ids=["source", "destination"])
async def test_a_veto(lab: World, end: int) -> None:
    answer: list[Finding] = []
    async with two_hosts(lab) as ends:
        ends[end].hooks.add_observer(observer(migration_review=answering(answer)), DIST)
        domain = await start(ends[0])
        older = await domain.plan_migration(ends[1])
        answer.append(VETO)
        plan = await domain.plan_migration(ends[1])
        assert plan.blockers == (VETO,)
        for job in (domain.migrate(ends[1]), plan.execute()):
            with pytest.raises(PlanBlockedError, match="it is late: wait for the day") as raised:
                await job
            assert raised.value.findings == (VETO,)
        # It came after this one was shown.
        with pytest.raises(PlanStaleError, match="new: it is late"):
            await older.execute()
        assert lab.runners(domain.uuid) == ["alpha"]
        assert receivers(lab) == []


@pytest.mark.parametrize(
    ("review", "error"),
    [
        (raising(ValueError("planted")), "ValueError"),
        (raising(OURS), "PlanStaleError"),
        (answering(None), "TypeError"),
        (answering("it is late"), "TypeError"),
        (answering(["it is late"]), "TypeError"),
        # These are not async: nothing is left to await.
        (lambda self, request: [], "TypeError"),
        (fails, "ValueError"),
    ],
)
async def test_a_failing_reviewer_blocks(
    lab: World, caplog: pytest.LogCaptureFixture, review: Callable[..., object], error: str
) -> None:
    async with watched(lab, observer(migration_review=review), reviewer(WARNING)) as (alpha, beta):
        domain = await start(alpha)
        plan = await domain.plan_migration(beta)
        with pytest.raises(PlanBlockedError, match=DIST):
            await domain.migrate(beta)
        assert lab.runners(domain.uuid) == ["alpha"]
    (blocker,) = plan.blockers
    assert (blocker.code, blocker.side) == ("observer-failed", None)
    assert DIST in blocker.message
    assert error in blocker.message
    assert blocker.remedy
    assert "[observer-failed]" in plan.explain()
    # The others are heard all the same.
    assert plan.warnings == (WARNING,)
    assert logged(caplog) == [(DIST, error)] * 2


async def test_a_reviewer_that_waits_can_be_aborted(lab: World) -> None:
    reviewing = anyio.Event()

    async def wait(self: object, request: object) -> None:
        reviewing.set()
        await anyio.sleep_forever()

    async with watched(lab, observer(migration_review=wait)) as (alpha, beta):
        domain = await start(alpha)
        with anyio.fail_after(30):
            async with domain.migrate(beta) as job:
                await reviewing.wait()
                job.abort()
                with pytest.raises(MigrationError, match="aborted"):
                    await job.result()
        assert lab.runners(domain.uuid) == ["alpha"]


# What an observer may be


@pytest.mark.parametrize(
    ("hook", "see"),
    [
        ("capabilities", lambda self, request: None),
        ("migrate_confirm", lambda self, request: None),
        ("migration_events", lambda self, request: None),
        ("migration_event", lambda self, event: None),
    ],
)
async def test_observers_that_are_refused(lab: World, hook: str, see: Callable[..., object]) -> None:
    """Hooks of drivers, hooks that there are not, and other parameters."""
    async with two_hosts(lab) as (alpha, _):
        with pytest.raises(DriverContractError, match=hook) as raised:
            alpha.hooks.add_observer(observer(**{hook: see}), DIST)
        assert (raised.value.distribution, DIST in str(raised.value)) == (DIST, True)
