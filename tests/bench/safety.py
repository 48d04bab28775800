"""``make safety``: what the journal costs, with the journal on and off in turns, in one process and with one guest.

An idle guest crosses with QEMU; a pair is two crossings, there and back, one of them with the journal.  The first
crossing of a pair has the journal in every other pair, so that neither the way nor the order counts.  Then a guest of
the simulated hypervisor crosses as often as it can.

Figures are medians; what the journal adds is the median of the differences within pairs, with the interval that holds
it in 95 of 100 resamplings.  Every sample stands in ``.cache/results/safety.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

import ferryman
from ferryman.testing import Fault, FaultPlan, forget_world, world
from tests.bench.journal_switch import SwitchedJournal, switched_journals
from tests.bench.peer import Direction, counter_guest, outage_of
from tests.bench.peer_ferryman import FerrymanPeer
from tests.faults import fault_plan
from tests.guests.counter import CounterGuest
from tests.guests.witness import Witness
from tests.simulated import NAME, definition

_RESULTS = Path(".cache/results/safety.json")
_GUEST = CounterGuest(
    memory_bytes=(32 << 20) + 8192, tick_hz=1000, page_count=16, pages_per_tick=0, prefill=False
)
_TICKS_BETWEEN = 15
_GOAL_MS = 1.0
_RESAMPLINGS = 2000
_SEED = 7
_WORLD = "safety"


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """One crossing with QEMU."""

    pair: int
    journal: bool
    blackout_ms: float
    completed_to_cont_ms: float


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What the journal adds to a figure: a median and its 95 % interval."""

    ms: float
    low_ms: float
    high_ms: float

    def __str__(self) -> str:
        return f"{self.ms:.2f} [{self.low_ms:.2f}, {self.high_ms:.2f}]"


@dataclass(kw_only=True)
class Report:
    """Everything that one run found."""

    machine: dict[str, Any]
    crossings: list[Crossing] = field(default_factory=list)
    sync_ms: list[float] = field(default_factory=list)
    """What this disk takes to make some pages durable, measured after each pair: the floor of what a journal costs."""
    simulated_s: dict[str, list[float]] = field(default_factory=lambda: {"on": [], "off": []})
    violations: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return len(self.crossings) // 2

    def figures(self, name: str, *, journal: bool) -> list[float]:
        """One figure of all crossings of a kind, in the order of their pairs."""
        return [getattr(crossing, name) for crossing in self.crossings if crossing.journal is journal]

    def medians(self, name: str) -> tuple[float, float]:
        """With the journal, and without."""
        on, off = (statistics.median(self.figures(name, journal=journal)) for journal in (True, False))
        return on, off

    def extra(self, name: str) -> Extra:
        """What the journal adds to a figure."""
        with_it, without = (self.figures(name, journal=journal) for journal in (True, False))
        return extra_of([on - off for on, off in zip(with_it, without, strict=True)])

    def simulated_per_s(self) -> tuple[float, float]:
        """Simulated migrations per second, with the journal and without."""
        on, off = (len(spent) / sum(spent) for spent in (self.simulated_s["on"], self.simulated_s["off"]))
        return on, off

    def figures_of_summary(self) -> dict[str, Any]:
        """What the last line says, for programs."""
        found: dict[str, Any] = {"pairs": self.pairs, "violations": len(self.violations)}
        for name in ("blackout_ms", "completed_to_cont_ms"):
            found[name] = dict(zip(("on", "off"), (round(ms, 3) for ms in self.medians(name)), strict=True))
            found[name]["extra"] = {key: round(ms, 3) for key, ms in asdict(self.extra(name)).items()}
        found["simulated_per_s"] = dict(
            zip(("on", "off"), (round(rate, 1) for rate in self.simulated_per_s()), strict=True)
        )
        found["sync_ms"] = round(statistics.median(self.sync_ms), 3)
        found["goal_ms"] = _GOAL_MS
        found["goal_met"] = self.extra("completed_to_cont_ms").ms <= _GOAL_MS
        return found

    def summary(self) -> str:
        """The last line."""
        blackout, to_cont, per_s = (
            f"{on:.{digits}f}/{off:.{digits}f}"
            for (on, off), digits in (
                (self.medians("blackout_ms"), 2),
                (self.medians("completed_to_cont_ms"), 2),
                (self.simulated_per_s(), 0),
            )
        )
        return (
            f"safety: {'FAILED' if self.violations else 'ok'} pairs={self.pairs} blackout_ms={blackout}"
            f" completed_to_cont_ms={to_cont} extra_ms={self.extra('completed_to_cont_ms')}"
            f" simulated_per_s={per_s} {json.dumps(self.figures_of_summary(), separators=(',', ':'))}"
        )


def extra_of(differences: Sequence[float]) -> Extra:
    """The median of differences, and its interval by resampling."""
    chance = random.Random(_SEED)
    medians = sorted(
        statistics.median(chance.choices(differences, k=len(differences))) for _ in range(_RESAMPLINGS)
    )
    return Extra(
        ms=statistics.median(differences),
        low_ms=medians[round(0.025 * (_RESAMPLINGS - 1))],
        high_ms=medians[round(0.975 * (_RESAMPLINGS - 1))],
    )


def _measure_crossings(report: Report, *, pairs: int, faults: FaultPlan) -> None:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs-")))
        _GUEST.write_image(directory / "image")
        witness = stack.enter_context(Witness(directory))
        guest = counter_guest(
            _GUEST,
            name="idle",
            uuid=str(uuid.uuid4()),
            image_path=directory / "image",
            serial_socket_path=witness.socket_path,
        )
        peer = FerrymanPeer(journal_can_be_off=True)
        stack.callback(peer.stop)
        peer.start([guest])
        witness.wait_tick(_TICKS_BETWEEN, timeout_s=60)
        direction = Direction.A_TO_B
        for pair in range(-1, pairs):  # the first one makes everything warm and is not counted
            for journal in (True, False) if pair % 2 else (False, True):
                last = witness.last()
                witness.wait_tick((last.value if last else 0) + _TICKS_BETWEEN, timeout_s=60)
                peer.journal_on = journal
                sample = peer.migrate(guest, direction)
                direction = direction.reverse
                witness.wait_new_process(60, other_than=sample.source_pid)
                assert sample.completed_to_cont_ms is not None
                if pair >= 0:
                    report.crossings.append(
                        Crossing(
                            pair=pair,
                            journal=journal,
                            blackout_ms=outage_of(sample, witness.ticks()).blackout_ms,
                            completed_to_cont_ms=sample.completed_to_cont_ms,
                        )
                    )
            report.sync_ms.append(_sync_ms(directory / "pages"))
        seen = witness.report()
    if faults.take("ferryman", "migrate_perform.completed") is Fault.CORRUPT:
        # As if the guest had not ticked once.
        seen = replace(seen, ticks_lost=seen.ticks_lost + 1)
    if seen.ticks_lost or seen.ticks_doubled or seen.overlaps:
        report.violations.append(
            f"qemu: {seen.ticks_lost} ticks lost, {seen.ticks_doubled} doubled, {len(seen.overlaps)} overlaps"
        )


def _sync_ms(path: Path) -> float:
    """Write as many pages as a record takes, and force them to the disk."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, bytes(4 * 4096))
        began_s = time.perf_counter()
        os.fdatasync(file)
        return (time.perf_counter() - began_s) * 1000
    finally:
        os.close(file)


async def _measure_simulated(report: Report, count: int) -> None:
    """Migrate the smallest simulated guest, with the journal and without in turns."""
    lab = world(_WORLD)
    try:
        with switched_journals():
            async with (
                ferryman.connect(f"test:///{_WORLD}/alpha") as alpha,
                ferryman.connect(f"test:///{_WORLD}/beta") as beta,
            ):
                await alpha.create(definition(memory_mib=1, dirty_bytes_per_s=0))
                here, there = alpha, beta
                for number in range(-4, 2 * count):
                    # In twos, so that each way is taken with the journal as often as without.
                    SwitchedJournal.on = number % 4 < 2
                    domain = await here.lookup_by_name(NAME)
                    began_s = time.perf_counter()
                    await domain.migrate(there)
                    spent_s = time.perf_counter() - began_s
                    here, there = there, here
                    if number >= 0:
                        report.simulated_s["on" if SwitchedJournal.on else "off"].append(spent_s)
        report.violations += [f"simulated: {violation}" for violation in lab.violations]
    finally:
        forget_world(_WORLD)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make safety", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of crossings (default %(default)s)")
    parser.add_argument(
        "--simulated", type=int, default=400, help="simulated migrations of each kind (default %(default)s)"
    )
    parser.add_argument(
        "--faults",
        type=fault_plan,
        default=FaultPlan(),
        help="faults to plant, such as ferryman.migrate_perform.completed=corrupt: a tick of the guest is lost",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; 0 unless a guest lost or doubled a tick, or ran twice."""
    arguments = _parse(argv)
    report = Report(
        machine={"python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release()}
    )
    _measure_crossings(report, pairs=arguments.pairs, faults=arguments.faults)
    anyio.run(_measure_simulated, report, arguments.simulated)
    report.faults = [f"{point}={fault.value}" for point, fault in arguments.faults.struck]
    if arguments.faults.left:
        print(f"faults that never struck: {', '.join(arguments.faults.left)}")
    print(f"{'':22}{'with':>9}{'without':>9}   more [95 % interval]")
    for name in ("blackout_ms", "completed_to_cont_ms"):
        on, off = report.medians(name)
        print(f"{name:22}{on:>9.2f}{off:>9.2f}   {report.extra(name)}")
    on, off = report.simulated_per_s()
    print(f"{'simulated_per_s':22}{on:>9.0f}{off:>9.0f}")
    print(f"one sync of this disk, without Ferryman: {statistics.median(report.sync_ms):.2f} ms")
    for violation in report.violations:
        print(f"violation: {violation}")
    _RESULTS.parent.mkdir(parents=True, exist_ok=True)
    _RESULTS.write_text(
        json.dumps(
            {"summary": report.summary(), **report.figures_of_summary(), "samples": asdict(report)}, indent=1
        )
    )
    print(f"figures: {_RESULTS}")
    print(report.summary())
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
