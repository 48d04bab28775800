"""What never returns: hooks, observers, and callers that are cancelled while they wait."""

from __future__ import annotations

import logging

import anyio
import pytest

import ferryman
from ferryman import GuestState, MigrationOptions, PhaseEvent
from ferryman.errors import (
    ConfirmError,
    DomainNotFoundError,
    InDoubtError,
    MigrationAbortedError,
    MigrationError,
    PlanStaleError,
)
from ferryman.hookspecs import ObservedEvent, hookimpl
from ferryman.testing import Fault, World
from ferryman.types import DomainUUID, Phase
from tests.simulated import UUID, receivers, start, two_hosts

IMPATIENT = MigrationOptions(patience_s=0.2, lease_s=0.2)


@pytest.mark.parametrize(
    ("point", "expected", "place"),
    [
        ("alpha.migrate_begin.before", MigrationAbortedError, GuestState.SOURCE),
        ("beta.migrate_prepare.before", MigrationAbortedError, GuestState.SOURCE),
        ("alpha.migrate_perform.iteration", MigrationAbortedError, GuestState.SOURCE),
        ("beta.migrate_finish.before", InDoubtError, GuestState.IN_DOUBT),
        ("alpha.migrate_confirm.before", ConfirmError, GuestState.DESTINATION),
    ],
)
async def test_a_hook_that_never_returns(
    lab: World, point: str, expected: type[MigrationError], place: GuestState
) -> None:
    """The caller is told where the guest is, and the hosts settle the rest by themselves."""
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        lab.faults.at(point, Fault.HANG)
        with anyio.fail_after(20), pytest.raises(expected) as caught:
            async with domain.migrate(beta, IMPATIENT) as job:
                if expected is MigrationAbortedError:
                    with anyio.move_on_after(0.2):
                        await job.result()
                    job.abort()
                await job.result()
        assert caught.value.guest_state is place
        with anyio.fail_after(20):
            while alpha.open_migrations() or beta.open_migrations():
                await anyio.sleep(0.02)
        assert len(lab.runners(DomainUUID(UUID))) == 1
        if place is GuestState.SOURCE:
            assert lab.runners(domain.uuid) == ["alpha"]
    assert receivers(lab) == lab.violations == []


async def test_a_caller_that_is_cancelled_while_it_leaves_the_job(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        lab.faults.at("alpha.migrate_perform.iteration", Fault.HANG)
        with anyio.fail_after(20), anyio.move_on_after(0.2) as scope:
            async with domain.migrate(beta):
                pass
        assert scope.cancelled_caught
        assert lab.runners(domain.uuid) == ["alpha"]
        assert alpha.open_migrations() == beta.open_migrations() == []


class Sleeper:
    """An observer that sees the first event, and never ends with it."""

    @hookimpl
    async def migration_event(self, request: ObservedEvent) -> None:
        await anyio.sleep_forever()


async def test_an_observer_that_never_returns(
    lab: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ferryman.migration._OBSERVERS_S", 0.1)
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        alpha.hooks.add_observer(Sleeper(), "ferryman-sleeper")
        with anyio.fail_after(20), caplog.at_level(logging.WARNING):
            assert (await domain.migrate(beta)).uuid == domain.uuid
    assert "did not see all events" in caplog.text


async def test_a_domain_that_is_gone_is_an_error_as_it_is(lab: World) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        plan = await domain.plan_migration(beta)
        await domain.destroy()
        with pytest.raises(DomainNotFoundError):
            await domain.plan_migration(beta)
        job = domain.migrate(beta)
        with pytest.raises(DomainNotFoundError):
            await job
        *_, last = [event async for event in job.progress()]
        assert isinstance(last, ferryman.SettledEvent)
        assert last.error == "domain-not-found"
        with pytest.raises(PlanStaleError, match="no longer at the source"):
            await plan.execute()


@pytest.mark.parametrize(
    ("fault", "code"), [(Fault.CUT, "perform-failed"), (Fault.HANG, "migration-aborted")]
)
async def test_the_end_of_a_phase_says_how_it_ended(lab: World, fault: Fault, code: str) -> None:
    async with two_hosts(lab) as (alpha, beta):
        domain = await start(alpha)
        lab.faults.at("alpha.migrate_perform.iteration", fault)
        job = domain.migrate(beta)
        with pytest.raises(MigrationError):
            async with job:
                with anyio.move_on_after(0.2):
                    await job.result()
                job.abort()
        ends = {
            event.phase: event.error
            async for event in job.progress()
            if isinstance(event, PhaseEvent) and event.ended
        }
        assert (ends[Phase.PREPARE], ends[Phase.PERFORM]) == (None, code)


async def test_a_guest_that_was_ended_begins_anew(lab: World) -> None:
    async with two_hosts(lab) as (alpha, _beta):
        domain = await start(alpha)
        await lab.elapse(1.0)
        await domain.destroy()
        await start(alpha)
    assert lab.violations == []
