"""Post-copy on real QEMU: switched, cut and mended, aborted, and lost as the plan says that it can be."""

from __future__ import annotations

from threading import Semaphore

import anyio
import anyio.to_thread
import pytest

import ferryman
from ferryman import GuestState, MigrationOptions, ProgressEvent
from ferryman.errors import GuestLostError
from ferryman.types import DomainEventKind, Postcopy, TimeoutAction
from tests.guests.inspect import pids
from tests.qemu import MIB, NAME, PROMPT_S, Field, RawRelay, end_process, relayed

_SLOW = MigrationOptions(
    postcopy=Postcopy.ON_REQUEST,
    bandwidth_bytes_per_s=MIB,
    postcopy_bandwidth_bytes_per_s=2 * MIB,
    patience_s=10.0,
)
"""20 MiB at these rates leave time for what is done to the stream."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def switched(field: Field, job: ferryman.MigrationJob) -> int:
    """Switch, and wait until the guest ticks at the destination; returns the source's process."""
    (source,) = pids(field.roots[0])
    async for event in job.progress():
        if isinstance(event, ProgressEvent):
            break
    await job.switch_to_postcopy()
    await anyio.to_thread.run_sync(
        lambda: field.witness.wait_new_process(timeout_s=PROMPT_S, other_than=source)
    )
    return source


async def started(field: Field, host: ferryman.Connection) -> ferryman.Domain:
    domain = await host.create(field.definition)
    await anyio.to_thread.run_sync(field.wait_ticks, 50)
    return domain


async def end(field: Field) -> None:
    """See that the guest arrived whole, and end it."""
    async with ferryman.connect(field.uris[1]) as b:
        domain = await b.lookup_by_name(NAME)
        await anyio.to_thread.run_sync(field.wait_ticks, 20)
        await domain.suspend()
    assert await anyio.to_thread.run_sync(field.wrong_pages, field.roots[1]) == 0
    field.assert_unbroken(crossings=1)
    async with ferryman.connect(field.uris[1]) as b:
        await (await b.lookup_by_name(NAME)).destroy()


@pytest.mark.parametrize("how", ["after the first pass", "by time-out"])
async def test_switched_by_itself(heavy_field: Field, how: str) -> None:
    field = heavy_field
    options = {
        "after the first pass": MigrationOptions(
            postcopy=Postcopy.AFTER_FIRST_PASS, bandwidth_bytes_per_s=20 * MIB
        ),
        "by time-out": MigrationOptions(
            postcopy=Postcopy.ON_REQUEST,
            bandwidth_bytes_per_s=20 * MIB,
            timeout_s=0.5,
            timeout_action=TimeoutAction.POSTCOPY,
        ),
    }[how]
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        plan = await domain.plan_migration(b, options)
        assert [finding.code for finding in plan.warnings] == ["postcopy-risk"]
        await plan.execute()
    await end(field)


async def test_a_stream_that_is_cut_three_times_is_mended(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Semaphore(0)

    def relay(target: tuple[str, int]) -> RawRelay:
        new = RawRelay(target)
        made.release()
        return new

    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with relayed(monkeypatch, relay) as relays:
            async with domain.migrate(b, _SLOW) as job:
                await anyio.to_thread.run_sync(made.acquire)
                await switched(field, job)
                for _ in range(3):
                    await anyio.to_thread.run_sync(relays[-1].close)
                    await anyio.to_thread.run_sync(made.acquire)
                    await anyio.to_thread.run_sync(field.wait_ticks, 5)
                await job.set_postcopy_bandwidth(0)
                await job.result()
            assert len(relays) == 4
        assert a.open_migrations() == b.open_migrations() == []
    await end(field)


async def test_an_abort_comes_back_and_the_guest_goes_on(field: Field) -> None:
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with a.events() as events:
            async with domain.migrate(b, _SLOW) as job:
                await switched(field, job)
                job.abort()
                assert (await job.result()).name == NAME
            # The source's half goes by itself when every page has come.
            assert field.emulators(field.roots[0]) != []
            with anyio.fail_after(PROMPT_S):
                async for event in events:
                    if event.kind is DomainEventKind.MIGRATED_OUT:
                        break
        assert field.emulators(field.roots[0]) == []
    await end(field)


@pytest.mark.parametrize("half", ["source", "destination"])
async def test_a_half_that_is_killed_loses_the_guest(field: Field, half: str) -> None:
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with anyio.fail_after(PROMPT_S), pytest.raises(GuestLostError) as caught:
            async with domain.migrate(b, _SLOW) as job:
                source = await switched(field, job)
                await anyio.to_thread.run_sync(
                    end_process, source if half == "source" else pids(field.roots[1])[0]
                )
                await job.result()
        assert caught.value.guest_state is GuestState.GONE
        assert field.emulators(field.roots[0]) == []
        assert a.open_migrations() == b.open_migrations() == []
        for left in await b.list_domains():
            await left.destroy()
    field.assert_unbroken(crossings=1)
