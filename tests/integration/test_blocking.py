"""The blocking face: the same names, a whole life through it, many threads, and what Ctrl-C leaves behind.

Run as ``python -m tests.integration.test_blocking MOMENT WAY [SOURCE DESTINATION]`` it is the program that is
interrupted: it says ``here`` at the moment, and tells where the guest is when ``KeyboardInterrupt`` has come.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from traceback import extract_tb
from typing import Any
from unittest import mock

import anyio.to_thread
import pytest

import ferryman.sync
from ferryman import DomainState, MigrationOptions, Phase, PhaseEvent, ProgressEvent, SettledEvent, connection
from ferryman.errors import ConnectionClosedError, DomainNotFoundError, MigrationError, UnknownSchemeError
from ferryman.hookspecs import Verdict
from ferryman.migration import MigrationJob
from ferryman.plan import Plan
from ferryman.testing import Fault, FaultPlan, World, forget_world, world
from ferryman.testing.simulator import SimulatedDriver
from tests import qemu, simulated
from tests.simulated import NAME, UUID, definition, receivers

ROOT = Path(__file__).parents[2]
PROMPT_S = 20.0
"""Limit for what has nothing left to wait for, on a machine that is shared."""

PAIRS: list[tuple[type[Any], type[Any]]] = [
    (connection.Connection, ferryman.sync.Connection),
    (connection.Domain, ferryman.sync.Domain),
    (MigrationJob, ferryman.sync.MigrationJob),
    (Plan, ferryman.sync.Plan),
]
# What the engine and the plan use of a connection: names for Ferryman itself.
INTERNAL = {"hooks", "host", "hook_lookup"}


@contextmanager
def two_hosts(lab: World) -> Iterator[tuple[ferryman.sync.Connection, ferryman.sync.Connection]]:
    """Both hosts of a world, open."""
    alpha, beta = (ferryman.sync.connect(f"test:///{lab.name}/{host}") for host in ("alpha", "beta"))
    with alpha, beta:
        yield alpha, beta


def loops() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "portal" in thread.name]


# The same names


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")} - INTERNAL


def methods(thing: type[Any]) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in public(thing) if inspect.isfunction(getattr(thing, name))}


@pytest.mark.parametrize(("ours", "blocking"), PAIRS)
def test_the_same_methods(ours: type[Any], blocking: type[Any]) -> None:
    expected, found = methods(ours), methods(blocking)
    assert found.keys() == expected.keys() != set()
    for name, method in found.items():
        assert not inspect.iscoroutinefunction(method), name
        here, there = inspect.signature(method), inspect.signature(expected[name])
        assert here.parameters == there.parameters, name
        # What is awaited there is returned here, and what is iterated with await there is iterated here.
        assert here.return_annotation == there.return_annotation.replace("AsyncIterator", "Iterator"), name
        # The docstring leads to the one that says everything.
        (target, *_) = re.findall(r"See :meth:`ferryman\.([\w.]+)`", method.__doc__ or "")
        module, *names = target.split(".")
        assert names == [ours.__name__, name]
        assert getattr(importlib.import_module(f"ferryman.{module}"), ours.__name__) is ours
    assert f"See :class:`{ours.__module__}.{ours.__name__}`" in (blocking.__doc__ or "")
    assert inspect.signature(ferryman.sync.connect) == inspect.signature(connection.connect)


async def test_the_same_attributes(lab: World) -> None:
    """Not only what a class declares: an object has what its constructor gives it."""
    async with simulated.two_hosts(lab) as (alpha, beta):
        domain = await alpha.create(definition())
        plan = await domain.plan_migration(beta)
    with two_hosts(lab) as (one, two):
        found = one.lookup_by_name(NAME)
        shown = found.plan_migration(two)
        job = shown.execute()
        for expected, blocking in ((alpha, one), (domain, found), (plan.execute(), job), (plan, shown)):
            assert public(blocking) == public(expected)
        for name in public(plan) - {"domain", "source", "destination"} - methods(Plan).keys():
            assert getattr(shown, name) == getattr(plan, name), name
        assert (shown.domain, shown.source, shown.destination) == (found, one, two)
        assert (job.domain, job.destination, job.options, job.plan) == (found, two, plan.options, shown)


# A life


def test_a_life(lab: World) -> None:
    with two_hosts(lab) as (alpha, beta), alpha.events() as happens:
        assert len(loops()) == 1
        assert (alpha.capabilities().scheme, alpha.address) == ("test", f"test:///{lab.name}/alpha")
        assert alpha.list_domains() == []
        web = alpha.define(definition())
        assert [domain.uuid for domain in alpha.list_domains()] == [web.uuid] == [UUID]
        assert alpha.lookup_by_name(NAME).uuid == alpha.lookup_by_uuid(UUID.upper()).uuid == UUID
        assert [found.code for found in web.plan_migration(beta).blockers] == ["domain-not-active"]
        web.start(paused=True)
        assert web.info().state is DomainState.PAUSED
        web.resume()
        assert web.statistics().state is DomainState.RUNNING
        web.suspend()
        web.resume()
        assert f"<name>{NAME}</name>" in web.definition()

        lab.faults.at("alpha.migrate_perform.iteration", Fault.HANG)
        with web.migrate(beta) as job:
            for event in job.progress():
                if isinstance(event, PhaseEvent) and event.phase is Phase.PERFORM and not event.ended:
                    assert [row.migration_id for row in alpha.open_migrations()] == [job.id]
                    job.set_bandwidth(1 << 30)
                    job.set_max_downtime(100)
                    job.abort()
            assert isinstance(event, SettledEvent)
            with pytest.raises(MigrationError, match="aborted"):
                job.result()
        assert lab.runners(web.uuid) == ["alpha"]
        # The abort may have come before the transfer hung.
        lab.faults = FaultPlan()

        plan = web.plan_migration(beta, MigrationOptions(persist=True, undefine_source=True))
        assert plan.explain().endswith("ready")
        with plan.execute() as job:
            seen = list(job.progress())
            result = job.result()
        assert isinstance(seen[-1], SettledEvent)
        assert any(isinstance(event, ProgressEvent) for event in seen)
        assert (result.migration_id, lab.runners(web.uuid)) == (job.id, ["beta"])
        with pytest.raises(DomainNotFoundError):
            web.info()
        there = beta.lookup_by_uuid(result.uuid)
        there.shutdown()
        assert there.info().state is DomainState.SHUT_OFF
        there.undefine()

        # Without a look at it, too, and a paused guest stays paused.
        job = alpha.create(definition("other", UUID[:-2] + "00"), paused=True).migrate(beta)
        with pytest.raises(RuntimeError):
            job.abort()
        other = beta.lookup_by_name(job.result().name)
        assert other.info().state is DomainState.PAUSED
        other.destroy()
        assert alpha.list_domains() == beta.list_domains() == []
        told = [event.kind.value for event in islice(happens, 6)]
        assert told == ["defined", "started", "resumed", "suspended", "resumed", "migrated-out"]
    assert lab.violations == []
    assert loops() == []


def test_after_the_end(lab: World) -> None:
    with two_hosts(lab) as (alpha, beta):
        domain = alpha.create(definition())
        plan, job = domain.plan_migration(beta), domain.migrate(beta)
        with alpha.events() as happens:
            pass
    calls = (alpha.capabilities, alpha.list_domains, alpha.open_migrations, domain.info, domain.suspend)
    for call in (*calls, lambda: alpha.address, job.result, plan.execute().result, lambda: next(happens)):
        with pytest.raises(ConnectionClosedError):
            call()
    assert plan.explain()
    assert lab.runners(domain.uuid) == ["alpha"]
    with pytest.raises(UnknownSchemeError), ferryman.sync.connect("nosuch:///system"):
        pytest.fail("it must not open")
    assert loops() == []


def test_many_threads(lab: World) -> None:
    def live(number: int) -> str:
        uuid = UUID[:-2] + f"{number:02x}"
        domain = alpha.define(definition(f"web{number}", uuid, memory_mib=1))
        domain.start()
        with domain.migrate(beta) as job:
            assert isinstance(list(job.progress())[-1], SettledEvent)
        beta.lookup_by_uuid(uuid).destroy()
        domain.undefine()
        return job.result().name

    with two_hosts(lab) as (alpha, beta), ThreadPoolExecutor(8) as pool:
        assert list(pool.map(live, range(24))) == [f"web{number}" for number in range(24)]
        assert alpha.list_domains() == beta.list_domains() == []
        # And one thread ends what another awaits.
        lab.faults.at("*.migrate_perform.iteration", Fault.HANG)
        with alpha.create(definition()).migrate(beta) as job:
            waits = pool.submit(job.result)
            job.abort()
            with pytest.raises(MigrationError, match="aborted"):
                waits.result(PROMPT_S)
    assert lab.violations == []


# Ctrl-C: the program


class _Telling(FaultPlan):
    """Says ``here`` when the migration hangs."""

    def take(self, host: str, point: str) -> Fault | None:
        fault = super().take(host, point)
        if fault is Fault.HANG:
            print("here", flush=True)
        return fault


_came = [threading.Event(), threading.Event()]
"""Ctrl-C came once, and again."""
_aborted, _told = threading.Event(), threading.Event()
_real_abort = MigrationJob.abort


def _interrupt(number: int, frame: Any) -> None:
    next((event for event in _came if not event.is_set()), _came[-1]).set()
    signal.default_int_handler(number, frame)


def _abort(job: MigrationJob) -> None:
    _real_abort(job)
    _aborted.set()


async def _gate(moment: str, request: Any) -> None:
    """Hold opening, finish or confirm until Ctrl-C has come, and an abort until it has come again."""
    moment, twice, _ = moment.partition("-twice")
    verdict = getattr(request, "verdict", None)
    if {None: "opening", Verdict.RUN: "finish", Verdict.GIVEN: "confirm"}.get(verdict) == moment:
        print("here", flush=True)
        await anyio.to_thread.run_sync(_came[0].wait if verdict is None else _aborted.wait)
    elif verdict is not Verdict.DISCARD:
        return
    if twice:
        print("aborting", flush=True)
        await anyio.to_thread.run_sync(_came[1].wait)
        # A program that does not wait for the end of the abort talks now, and is heard; a good one is silent.
        assert not await anyio.to_thread.run_sync(_told.wait, 0.5)


def _gated(moment: str, real: Any) -> Any:
    @wraps(real)
    async def hook(driver: SimulatedDriver, request: Any) -> Any:
        await _gate(moment, request)
        return await real(driver, request)

    return hook


def _tell(where: str, places: list[str], *ends: ferryman.sync.Connection) -> None:
    _told.set()
    open_rows = [row.migration_id for end in ends for row in end.open_migrations()]
    print(json.dumps([where, places, open_rows]), flush=True)


def _go(way: str, job: ferryman.sync.MigrationJob, tell: Callable[[str], None]) -> None:
    if way == "result":
        job.result()
    with job:
        try:
            if way == "progress":
                for event in job.progress():
                    if isinstance(event, ProgressEvent) and event.statistics.transferred_bytes:
                        print("sent", flush=True)
            elif way == "inside":
                job.result()
        except KeyboardInterrupt as error:
            # Nothing may be undecided behind a call, though the job's block has not been left; it is, where Ctrl-C
            # came between two calls.
            if any(frame.filename == ferryman.sync.__file__ for frame in extract_tb(error.__traceback__)):
                tell("inside")
            raise


def _simulated(moment: str, way: str) -> None:
    lab = world("interrupted")
    lab.faults = _Telling()
    if "." in moment:
        lab.faults.at(f"*.{moment.removesuffix('-twice')}", Fault.HANG)
    signal.signal(signal.SIGINT, _interrupt)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(MigrationJob, "abort", _abort))
        for name in ("connection_open", "migrate_finish", "migrate_confirm"):
            hook = _gated(moment, getattr(SimulatedDriver, name))
            stack.enter_context(mock.patch.object(SimulatedDriver, name, hook))
        try:
            with two_hosts(lab) as (alpha, beta):
                domain = alpha.create(definition())

                def tell(where: str) -> None:
                    _tell(where, lab.runners(domain.uuid) + receivers(lab), alpha, beta)

                try:
                    _go(way, domain.migrate(beta, MigrationOptions(patience_s=5.0)), tell)
                except KeyboardInterrupt:
                    tell("open")
                    raise
        except KeyboardInterrupt:
            _tell("end", lab.violations + loops())
    forget_world("interrupted")


def _on_qemu(way: str, source: str, destination: str) -> None:
    with ferryman.sync.connect(source) as a, ferryman.sync.connect(destination) as b:
        domain = a.lookup_by_name(qemu.NAME)

        def tell(where: str) -> None:
            _tell(where, [str(e.uri) for e in (a, b) if e.list_domains()] + [domain.info().state.value], a, b)

        try:
            _go(way, domain.migrate(b, MigrationOptions(bandwidth_bytes_per_s=qemu.MIB)), tell)
        except KeyboardInterrupt:
            tell("open")


# Ctrl-C: the tests


def interrupted(*arguments: str, at: list[str]) -> list[Any]:
    """What the program tells that gets Ctrl-C at some lines, and then ends by itself, promptly and in silence.

    It runs in a session of its own, as a terminal has one: Ctrl-C is sent to all of it.
    """
    argv = [sys.executable, "-W", "error", "-m", "tests.integration.test_blocking", *arguments]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in at:
                assert any(told.strip() == line for told in process.stdout)
                os.killpg(process.pid, signal.SIGINT)
            told, complaints = process.communicate(timeout=PROMPT_S)
        finally:
            process.kill()
    assert (complaints, process.returncode) == ("", 0)
    return [json.loads(line) for line in told.splitlines() if line.startswith("[")]


HANGING = "migrate_perform.iteration"
SENDING = ["prepare.before", "prepare.after", "perform.before", "perform.stopped", "perform.last-byte"]
WAYS = ["result", "progress", "leave", "inside"]
LATE = ["finish", "confirm", "finish-twice", "confirm-twice"]


@pytest.mark.parametrize(
    ("moment", "way", "place"),
    [
        # Before anything is decided the guest stays at the source, and runs.
        *((f"migrate_{moment}", "result", "alpha") for moment in [*SENDING, "perform.completed"]),
        *((moment, way, "alpha") for way in WAYS for moment in (HANGING, f"{HANGING}-twice")),
        # It runs at the destination or is about to: that is how it ends, and never in doubt.
        *((moment, way, "beta") for way in WAYS for moment in LATE),
        # A host that is being opened is left again.
        ("opening", "result", None),
    ],
)
def test_interrupt(moment: str, way: str, place: str | None) -> None:
    told = interrupted(moment, way, at=["here", "aborting"] if "twice" in moment else ["here"])
    if told[0][0] == "inside":
        assert told.pop(0) == ["inside", [place], []]
    assert told == [*([["open", [place], []]] if place else []), ["end", [], []]]


@pytest.mark.timeout(180)
def test_interrupt_on_qemu() -> None:
    with qemu.laid_out() as field:
        with ferryman.sync.connect(field.uris[0]) as a:
            a.create(field.definition)
        field.wait_ticks(50)
        (emulator,) = field.emulators()
        told = interrupted("qemu", "progress", *field.uris, at=["sent"])
        assert told[-1][0] == "open"
        assert all(rest == [[field.uris[0], "running"], []] for _, *rest in told)
        assert field.the_runner() == emulator
        with ferryman.sync.connect(field.uris[0]) as a, ferryman.sync.connect(field.uris[1]) as b:
            # Nothing is left behind that would stand in the way.
            assert a.open_migrations() == b.open_migrations() == []
            result = a.lookup_by_name(qemu.NAME).migrate(b).result()
            field.wait_ticks(50)
            b.lookup_by_uuid(result.uuid).destroy()
        field.assert_unbroken(crossings=1)


if __name__ == "__main__":
    if sys.argv[1] == "qemu":
        _on_qemu(*sys.argv[2:])
    else:
        _simulated(*sys.argv[1:])
