"""Does a plan say what stops a migration, and does only that plan run which was shown?"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ferryman import Connection, Domain, MigrationOptions, Phase, PhaseEvent, Plan, Side
from ferryman.capabilities import Capabilities
from ferryman.errors import MigrationAbortedError, PlanBlockedError, PlanStaleError
from ferryman.hookspecs import HostRequest, hookimpl
from ferryman.journal import Journal
from ferryman.testing import Fault, FaultPlan, World
from ferryman.testing.simulator import SimulatedDriver
from ferryman.types import DomainEventKind, DomainUUID, Feature, FindingSeverity, TimeoutAction
from tests.simulated import NAME, UUID, definition, receivers, start, two_hosts

OTHER_UUID = "11111111-98b7-4d0e-8f0a-2f7d1c1f9e55"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "reference" / "findings.md").read_text()
KNOWN = dict(re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", DOCUMENT, re.MULTILINE))
S, D = Side.SOURCE, Side.DESTINATION
SIDES: dict[str, set[Side | None]] = {"source": {S}, "destination": {D}, "either": {S, D}, "both": {None}}
FEATURES = frozenset(Feature) - {Feature.POSTCOPY, Feature.LISTEN_ADDRESS}

Changes = dict[str, dict[str, Any]]
Act = Callable[["Lab"], Awaitable[object]]


@dataclass(kw_only=True)
class Lab:
    """Two open hosts and the usual guest."""

    world: World
    alpha: Connection
    beta: Connection
    domain: Domain

    async def plan(self, **options: Any) -> Plan:
        return await self.domain.plan_migration(self.beta, MigrationOptions(**options))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Changes:
    """Capabilities that hosts of the simulator have instead of their own, by the host's name."""
    changes: Changes = {}
    real = SimulatedDriver.capabilities

    @hookimpl
    async def capabilities(self: SimulatedDriver, request: HostRequest) -> Capabilities:
        return replace(await real(self, request), **changes.get(self._host.name, {}))

    monkeypatch.setattr(SimulatedDriver, "capabilities", capabilities)
    return changes


@asynccontextmanager
async def opened(world: World) -> AsyncIterator[Lab]:
    async with two_hosts(world) as (alpha, beta):
        yield Lab(world=world, alpha=alpha, beta=beta, domain=await start(alpha))


def rows(world: World) -> list[object]:
    """Every row of the hosts' journals, settled ones too; the hosts must be closed."""
    found: list[object] = []
    for host in world.hosts.values():
        with closing(Journal.open(host.journal)) as journal:
            for uuid in (UUID, OTHER_UUID):
                found += journal.rows_of(DomainUUID(uuid))
    return found


def processes(world: World) -> dict[str, tuple[str, int]]:
    return {
        p.identity: (p.state.value, p.steps) for host in world.hosts.values() for p in host.processes.values()
    }


# Findings


async def shut_off(lab: Lab) -> None:
    await lab.domain.destroy()
    await lab.alpha.define(definition())


async def fill(lab: Lab) -> None:
    lab.world.hosts["beta"].memory_bytes = 6 << 20
    await lab.beta.create(definition("other", OTHER_UUID))


async def redefine(lab: Lab) -> None:
    process = lab.world.hosts["alpha"].active(lab.domain.uuid)
    assert process is not None
    process.definition = definition(dirty_bytes_per_s=1)


async def nothing(lab: Lab) -> None:
    pass


ACTS: dict[str, Act] = {
    "": nothing,
    "fill": fill,
    "redefine": redefine,
    "shut off": shut_off,
    "suspend": lambda lab: lab.domain.suspend(),
    "make persistent": lambda lab: lab.alpha.define(definition()),
    "take the name": lambda lab: lab.beta.define(definition(uuid=OTHER_UUID)),
    "take a new name": lambda lab: lab.beta.create(definition("new", OTHER_UUID)),
    "run there": lambda lab: lab.beta.create(definition()),
    "define there": lambda lab: lab.beta.define(definition("older-name")),
}
SAME = {"host_uuid": OTHER_UUID}
NO_CAP = {"features": FEATURES - {Feature.BANDWIDTH}}
NOT_LIVE = {"features": FEATURES - {Feature.LIVE}}
REDEFINE = {"beta": {"features": FEATURES}}
CAP = {"bandwidth_bytes_per_s": 1}
DISK = {"disks": (("vda", "/srv/web"),)}
OTHER = {"destination_definition": definition(uuid=OTHER_UUID)}
LATE = {"timeout_s": 60.0, "timeout_action": TimeoutAction.POSTCOPY}
# The finding's code, what is asked, what the hosts say, what is done, the side, words of its two sentences.
Case = tuple[str, dict[str, Any], Changes, str, Side | None, str, str]
CASES: list[Case] = [
    ("same-host", {}, {"alpha": SAME, "beta": SAME}, "", None, "same host", "another host"),
    ("driver-mismatch", {}, {"beta": {"scheme": "other"}}, "", None, "other", "one hypervisor"),
    ("domain-not-active", {}, {}, "shut off", S, "web is shut-off", "start it"),
    ("name-taken", {}, {}, "take the name", D, NAME, "option name"),
    ("name-taken", {"name": "new"}, {}, "take a new name", D, "new", "option name"),
    ("uuid-taken", {}, {}, "run there", D, "active", "destroy"),
    ("uuid-taken", {}, {}, "define there", D, "older-name", "undefine"),
    ("memory-short", {}, {"beta": {"memory_bytes": 1 << 20}}, "", D, "1048576", "larger"),
    ("memory-short", {}, {}, "fill", D, "2097152 bytes of memory left", "free memory"),
    ("transport-unsupported", {}, {"beta": {"uri_transports": ()}}, "", None, "no transport", "see"),
    ("transport-unsupported", {"migration_uri": "rdma://h:1"}, {}, "", None, "rdma", "use tcp"),
    ("migration-uri-invalid", {"migration_uri": "tcp://h:x"}, {}, "", None, "port", "host:port"),
    ("option-unsupported", {"listen_address": "::1"}, {}, "", None, "listen_address", "best_effort"),
    ("option-unsupported", CAP, {"alpha": NO_CAP}, "", None, "the source", "leave bandwidth_bytes_"),
    ("option-unsupported", LATE, {}, "", None, "timeout_action", "another action"),
    ("option-unsupported", DISK, {}, "", None, "disks needs redefine", "leave disks out"),
    ("definition-unusable", DISK, REDEFINE, "", None, "path for the disk vda", "options"),
    ("definition-unusable", OTHER, REDEFINE, "", None, f"is of domain {OTHER_UUID}", "options"),
    ("arch-mismatch", {}, {"beta": {"arch": "riscv64"}}, "", D, "riscv64", "architecture"),
    ("live-unsupported", {}, {"beta": NOT_LIVE}, "", None, "live", "capabilities"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
async def test_blockers(lab: World, says: Changes, case: Case) -> None:
    code, options, changes, act, side, message, remedy = case
    async with opened(lab) as made:
        await ACTS[act](made)
        says.update(changes)
        before = processes(lab)
        plan = await made.plan(**options)
        (found,) = plan.findings
        assert (plan.blockers, plan.warnings) == ((found,), ())
        assert (found.code, found.side, found.severity) == (code, side, FindingSeverity.BLOCKER)
        assert message in found.message
        assert remedy in found.remedy
        assert found.side in SIDES[KNOWN[code]]
        for text in (f"[{code}]", found.message, found.remedy, "blocked by 1 finding(s)"):
            assert text in plan.explain()
        with pytest.raises(PlanBlockedError, match=re.escape(found.message)) as raised:
            await plan.execute()
        assert raised.value.findings == (found,)
        assert processes(lab) == before
    assert rows(lab) == []


async def test_an_older_destination_is_a_warning(lab: World, says: Changes) -> None:
    says["alpha"] = {"version": (1, 10)}
    says["beta"] = {"version": (1, 9)}
    async with opened(lab) as made:
        plan = await made.plan()
        (found,) = plan.warnings
        assert (plan.findings, found.code, found.side) == ((found,), "version-older", D)
        assert found.message == "simulated 1.9 is older than the source's 1.10"
        assert re.search(r"\[version-older\].*\n  ready$", plan.explain())
        await plan.execute()
        assert lab.runners(made.domain.uuid) == ["beta"]


async def test_best_effort(lab: World, says: Changes) -> None:
    says["alpha"] = {"features": FEATURES - {Feature.BANDWIDTH}}
    async with opened(lab) as made:
        droppable = frozenset({"bandwidth_bytes_per_s", "listen_address", "max_downtime_ms"})
        asked = {"bandwidth_bytes_per_s": 1, "max_downtime_ms": 100, "listen_address": "::1"}
        plan = await made.plan(**asked, best_effort=droppable - {"listen_address"})
        assert [finding.code for finding in plan.blockers] == ["option-unsupported"]
        plan = await made.plan(**asked, best_effort=droppable)
        assert plan.findings == ()
        assert set(plan.dropped) == {"bandwidth_bytes_per_s", "listen_address"}
        assert (plan.effective.bandwidth_bytes_per_s, plan.effective.listen_address) == (None, None)
        assert plan.effective.max_downtime_ms == plan.options.max_downtime_ms == 100
        assert plan.options.bandwidth_bytes_per_s == 1
        for outcome in ("bandwidth_bytes_per_s: dropped", "max_downtime_ms: used"):
            assert f"option {outcome}" in plan.explain()
        result = await plan.execute()
        assert set(result.dropped_options) == set(plan.dropped)


async def test_busy(lab: World) -> None:
    """While one migration is open, both ends say so, and a second one does not begin."""
    lab.faults.at("*.migrate_perform.iteration", Fault.HANG)
    async with opened(lab) as made:
        with pytest.raises(MigrationAbortedError):
            async with made.domain.migrate(made.beta) as job:
                async for event in job.progress():
                    if isinstance(event, PhaseEvent) and event.phase is Phase.PERFORM and not event.ended:
                        plan = await made.plan()
                        busy = [finding for finding in plan.blockers if finding.code == "domain-busy"]
                        assert [finding.side for finding in busy] == [Side.SOURCE, Side.DESTINATION]
                        assert all(str(job.id) in finding.message for finding in busy)
                        assert all("abort it" in finding.remedy for finding in busy)
                        assert "[domain-busy]" in plan.explain()
                        with pytest.raises(PlanBlockedError):
                            await made.domain.migrate(made.beta)
                        job.abort()
        # The abort may have come before the transfer.
        lab.faults = FaultPlan()
        assert (await made.plan()).findings == ()
        await made.domain.migrate(made.beta)
    assert lab.violations == []


def test_the_document_knows_what_is_tested() -> None:
    tested = {case[0] for case in CASES} | {"version-older", "domain-busy", "observer-failed"}
    source = (Path(__file__).parents[2] / "core/src/ferryman/plan.py").read_text()
    written = set(re.findall(r"_blocker\(\s*\"([a-z-]+)\"", source))
    assert len(written) >= 10
    assert written <= tested <= KNOWN.keys()


# The plan that runs is the plan that was shown


async def test_planning_changes_nothing(lab: World) -> None:
    async with opened(lab) as made:
        before = processes(lab)
        with made.alpha.events() as at_source, made.beta.events() as at_destination:
            plans = [await made.plan(name="new", persist=True) for _ in range(3)]
            # The first event of each is of what comes now, so that there was none before.
            await made.domain.suspend()
            await made.domain.resume()
            await made.beta.define(definition("other", OTHER_UUID))
            assert (await anext(at_source)).kind is DomainEventKind.SUSPENDED
            assert (await anext(at_destination)).kind is DomainEventKind.DEFINED
        assert processes(lab) == before
        assert made.alpha.open_migrations() == made.beta.open_migrations() == []
        assert [domain.name for domain in await made.beta.list_domains()] == ["other"]
        assert plans[0].changes(plans[2]) == []
    assert rows(lab) == []


async def test_a_plan_runs_as_it_was_shown(lab: World) -> None:
    async with opened(lab) as made:
        # What an earlier migration left there under that name is no other domain.
        await made.beta.define(definition("new"))
        plan = await made.plan(name="new", paused=True, persist=True)
        assert (plan.source, plan.domain, plan.destination) == (made.alpha, made.domain, made.beta)
        assert plan.findings == ()
        assert f"migrate {NAME} from {made.alpha.uri} to {made.beta.uri}" in plan.explain()
        async with plan.execute() as job:
            result = await job.result()
            assert job.plan is not None
            assert plan.changes(job.plan) == []
            assert job.options == plan.options
        info = await (await made.beta.lookup_by_name("new")).info()
        assert (result.name, info.state.value, info.persistent) == ("new", "paused", True)


@pytest.mark.parametrize(
    ("act", "changes", "said"),
    [
        ("suspend", {}, "the domain was running and is paused"),
        ("make persistent", {}, "the domain's name, size or persistence changed"),
        ("redefine", {}, "the domain's definition changed"),
        ("", {"alpha": {"cpu_model": "newer"}}, "the source's capabilities changed"),
        ("", {"beta": {"cpu_model": "newer"}}, "the destination's capabilities changed"),
        ("take the name", {}, f"new: another domain is called {NAME}"),
    ],
)
async def test_a_stale_plan(lab: World, says: Changes, act: str, changes: Changes, said: str) -> None:
    async with opened(lab) as made:
        plan = await made.plan()
        assert plan.blockers == ()
        await ACTS[act](made)
        says.update(changes)
        before = processes(lab)
        with pytest.raises(PlanStaleError, match=re.escape(said)) as raised:
            await plan.execute()
        assert (raised.value.changes, raised.value.rolled_back, raised.value.domain) == ((said,), (), NAME)
        assert processes(lab) == before
        assert receivers(lab) == []
        assert made.alpha.open_migrations() == made.beta.open_migrations() == []
        assert plan.changes(await made.plan()) == [said]
    assert rows(lab) == []


async def test_everything_is_told(lab: World, says: Changes) -> None:
    """All blockers, and all that changed; a stale plan is stale before it is blocked."""
    async with opened(lab) as made:
        shown = await made.plan()
        await made.domain.suspend()
        other = await made.beta.define(definition(uuid=OTHER_UUID))
        says["beta"] = {"arch": "riscv64", "uri_transports": ()}
        plan = await made.plan()
        codes = [found.code for found in plan.blockers]
        assert codes == ["arch-mismatch", "transport-unsupported", "name-taken"]
        assert all(f"[{code}]" in plan.explain() for code in codes)
        with pytest.raises(PlanBlockedError, match="and 2 more"):
            await plan.execute()
        with pytest.raises(PlanStaleError) as raised:
            await shown.execute()
        # The state, what the destination can do, and the three findings.
        assert len(raised.value.changes) == 5
        assert all(change in str(raised.value) for change in raised.value.changes)
        # Nor does what was shown as blocked run when the world is kinder: nobody has seen that plan.
        await other.undefine()
        with pytest.raises(PlanStaleError, match=f"no longer so: another domain is called {NAME}"):
            await plan.execute()
    assert rows(lab) == []
