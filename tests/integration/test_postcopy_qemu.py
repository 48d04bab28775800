"""Post-copy on real QEMU: switched, cut and mended, aborted, and lost as the plan says that it can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from threading import Semaphore

import anyio
import anyio.to_thread
import pytest

import ferryman
import ferryman_qemu.migrations
import ferryman_qemu.transfer
from ferryman import GuestState, MigrationOptions, Phase, PhaseEvent, ProgressEvent
from ferryman.errors import FinishError, GuestLostError, PerformError
from ferryman.hookspecs import FinishRequest
from ferryman.types import DomainEventKind, Postcopy, TimeoutAction
from ferryman_qemu.driver import QemuDriver
from tests.guests.inspect import pids
from tests.qemu import MIB, NAME, PROMPT_S, Field, RawRelay, Target, end_process, relayed, settled

_SLOW = MigrationOptions(
    postcopy=Postcopy.ON_REQUEST,
    bandwidth_bytes_per_s=MIB,
    postcopy_bandwidth_bytes_per_s=2 * MIB,
    patience_s=10.0,
)
"""20 MiB at these rates leave time for what is done to the stream."""
_ENDLESS = replace(_SLOW, postcopy_bandwidth_bytes_per_s=MIB // 8)
"""A transfer that does not end before it is struck, or told to hurry."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


_ROOT = Path(__file__).parents[2]
_DISCARD = b"\x08\x00\x06"
"""MIG_CMD_POSTCOPY_RAM_DISCARD: the guest stands still, and its devices are not sent yet (QEMU, migration/savevm.c)."""
_PACKAGE = b"\x08\x00\x07\x00\x04"
"""MIG_CMD_PACKAGED, followed by a length of four bytes and the devices' state."""
_PACKAGE_BYTES = 50_000
"""No more than the devices' state of the usual guest has."""


async def switch(job: ferryman.MigrationJob) -> None:
    """Command the switch once something has been sent."""
    async for event in job.progress():
        if isinstance(event, ProgressEvent):
            break
    await job.switch_to_postcopy()


async def switched(field: Field, job: ferryman.MigrationJob) -> int:
    """Switch, and wait until the guest ticks at the destination; returns the source's process."""
    (source,) = pids(field.roots[0])
    await switch(job)
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


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_a_stream_that_is_cut_three_times_is_mended(
    field: Field, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    made = Semaphore(0)

    def relay(target: Target) -> RawRelay:
        assert isinstance(target, str) == (transport == "unix")
        new = RawRelay(target)
        made.release()
        return new

    options = _ENDLESS
    if transport == "unix":
        options = replace(_ENDLESS, migration_uri=f"unix:{field.directory / 'stream'}")
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with relayed(monkeypatch, relay) as relays:
            async with domain.migrate(b, options) as job:
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
            async with domain.migrate(b, _ENDLESS) as job:
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


@pytest.mark.parametrize("how", ["cut", "killed"])
@pytest.mark.parametrize(
    ("begin", "more_bytes"),
    [(_DISCARD, 0), (_PACKAGE, 0), (_PACKAGE, _PACKAGE_BYTES // 2)],
    ids=["before-the-devices", "no-devices", "half-the-devices"],
)
async def test_what_strikes_inside_the_switch_is_told_as_it_is(
    field: Field, monkeypatch: pytest.MonkeyPatch, begin: bytes, more_bytes: int, how: str
) -> None:
    """The devices' state never arrives: the guest has not run at the destination, and cannot run at the source."""
    relay = partial(RawRelay, stop_at=begin, stop_after_bytes=more_bytes)
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        source = pids(field.roots[0])
        with relayed(monkeypatch, relay) as relays, anyio.fail_after(PROMPT_S):
            with pytest.raises((GuestLostError, PerformError, FinishError)) as caught:
                async with domain.migrate(b, _SLOW) as job:
                    await switch(job)
                    assert await anyio.to_thread.run_sync(relays[0].stopped.wait, PROMPT_S)
                    strike: Callable[[], None] = relays[0].close
                    if how == "killed":
                        strike = partial(end_process, pids(field.roots[1])[0])
                    await anyio.to_thread.run_sync(strike)
                    await job.result()
        assert field.emulators(field.roots[1]) == []
        assert a.open_migrations() == b.open_migrations() == []
        if isinstance(caught.value, GuestLostError):
            assert caught.value.guest_state is GuestState.GONE
            assert "lost, as the plan warned (postcopy-risk)" in str(caught.value)
            assert await a.list_domains() == []
            assert field.emulators() == []
        else:
            # QEMU noticed before it had begun to switch: while it still sent (perform), or once the source had written
            # down that it switches, and has its guest back by the destination's refusal (finish).
            assert begin == _DISCARD
            assert caught.value.guest_state is GuestState.SOURCE
            assert field.the_runner() == source[0]
            await domain.destroy()
        assert await b.list_domains() == []
    assert field.witness.report().pids == tuple(source)
    field.assert_unbroken(crossings=0)


async def test_a_peer_that_is_silent_in_the_switch_and_comes_back(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's main loop waits at the source, and goes on."""
    relay = partial(RawRelay, stop_at=_PACKAGE, stop_after_bytes=_PACKAGE_BYTES // 2, buffer_bytes=4096)
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with relayed(monkeypatch, relay) as relays, anyio.fail_after(PROMPT_S):
            async with domain.migrate(b, _SLOW) as job:
                await switch(job)
                assert await anyio.to_thread.run_sync(relays[0].stopped.wait, PROMPT_S)
                count = await anyio.to_thread.run_sync(field.witness.count)
                await anyio.sleep(2)
                assert await anyio.to_thread.run_sync(field.witness.count) == count
                relays[0].go_on()
                await job.set_postcopy_bandwidth(0)
                await job.result()
        assert a.open_migrations() == b.open_migrations() == []
    await end(field)


async def test_a_peer_that_is_silent_in_the_switch_for_good(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ferryman_qemu.transfer, "SILENCE_S", 3)
    monkeypatch.setattr(ferryman_qemu.migrations, "_LOAD_PATIENCE_S", 5.0)
    relay = partial(RawRelay, stop_at=_PACKAGE, stop_after_bytes=_PACKAGE_BYTES // 2, buffer_bytes=4096)
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await started(field, a)
        with relayed(monkeypatch, relay), anyio.fail_after(PROMPT_S):
            with pytest.raises(GuestLostError, match=r"lost, as the plan warned \(postcopy-risk\)"):
                async with domain.migrate(b, replace(_SLOW, patience_s=PROMPT_S)) as job:
                    await switch(job)
                    await job.result()
        assert field.emulators() == []
        assert a.open_migrations() == b.open_migrations() == []
        assert await a.list_domains() == await b.list_domains() == []
    field.assert_unbroken(crossings=0)


@pytest.mark.parametrize("who", ["both", "the source alone"])
@pytest.mark.parametrize("when", ["ran", "claimed"])
async def test_both_programs_die_with_the_stream_and_others_mend_it(
    field: Field, when: str, who: str
) -> None:
    """They die when the guest was commanded to run, or when that is written down too."""
    async with ferryman.connect(field.uris[0]) as a:
        await started(field, a)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.test_postcopy_qemu", when, *field.uris],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        try:
            assert await anyio.to_thread.run_sync(program.stdout.readline) == f"{when}\n".encode()
        finally:
            os.kill(program.pid, signal.SIGKILL)
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(ferryman.connect(field.uris[0]))
        events = stack.enter_context(a.events())
        ends = [a]
        if who == "both":
            ends.append(await stack.enter_async_context(ferryman.connect(field.uris[1])))
        assert [row.peer_address for row in a.open_migrations()] == [field.uris[1]]
        with anyio.fail_after(PROMPT_S):
            async for event in events:
                if event.kind is DomainEventKind.MIGRATED_OUT:
                    break
            await settled(*ends)
    assert field.emulators(field.roots[0]) == []
    await end(field)


async def _migrate_through_a_relay(when: str, source: str, destination: str) -> None:
    """What a program does whose end is that of the stream too."""
    with pytest.MonkeyPatch.context() as patch, relayed(patch, RawRelay):
        if when == "ran":
            finish = QemuDriver.migrate_finish

            @wraps(finish)
            async def run(self: QemuDriver, request: FinishRequest) -> None:
                await finish(self, request)
                print("ran", flush=True)
                await anyio.sleep_forever()

            patch.setattr(QemuDriver, "migrate_finish", run)
        async with ferryman.connect(source) as a, ferryman.connect(destination) as b:
            async with (await a.lookup_by_name(NAME)).migrate(b, _SLOW) as job:
                await switch(job)
                async for event in job.progress():
                    if isinstance(event, PhaseEvent) and event.phase is Phase.CONFIRM:
                        print("claimed", flush=True)
                await job.result()


if __name__ == "__main__":
    anyio.run(_migrate_through_a_relay, sys.argv[1], sys.argv[2], sys.argv[3])
