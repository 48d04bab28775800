"""``make bench``: Ferryman against raw QMP, the limit, and stock libvirt; all peers interleaved in one run.

Prints a table and one summary line; every sample stands in ``.cache/results/bench.json``.  Figures are medians; a
ratio is that of two medians of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ferryman.testing import Fault, FaultPlan
from tests.bench.peer import (
    Direction,
    GuestSpec,
    Peer,
    PeerError,
    PeerUnavailable,
    Sample,
    counter_guests,
    lot_wall_s,
    outage_of,
)
from tests.bench.peer_ferryman import FerrymanPeer
from tests.bench.peer_libvirt import LibvirtPeer
from tests.bench.peer_raw import RawPeer
from tests.faults import fault_plan
from tests.guests.counter import CounterGuest
from tests.guests.witness import Witness

_MIB = 1 << 20
_ODD = 8192
"""More memory for every guest, whoever drives it: QEMU 7.2 without KVM loses writes where the size is a multiple of
256 KiB (ferryman_qemu.probe), and finding out what was written takes longer where it is not."""
_RESULTS = Path(".cache/results/bench.json")
_TICK_HZ = 1000
_FULL = "2G, disk, net"
_SETTLE_TICKS = 150
_IMPORTS = 15

_MAKERS: dict[str, Callable[[], Peer]] = {
    "raw": RawPeer,
    "raw-return-path": lambda: RawPeer(return_path=True),
    "ferryman": FerrymanPeer,
    "ferryman-uvloop": lambda: FerrymanPeer(loop="uvloop"),
    "libvirt": LibvirtPeer,
}


@dataclass(kw_only=True)
class Series:
    """All samples of one peer with one guest."""

    guest: str
    peer: str
    at_once: int
    wall_ms: list[float] = field(default_factory=list)
    blackout_ms: list[float] = field(default_factory=list)
    first_tick_ms: list[float] = field(default_factory=list)
    completed_to_cont_ms: list[float] = field(default_factory=list)
    downtime_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    ticks_lost: int = 0

    def median(self, figure: str) -> float | None:
        """The median of one figure; None where nothing was measured."""
        values: list[float] = getattr(self, figure)
        return statistics.median(values) if values else None


@dataclass(kw_only=True)
class Report:
    """Everything that one run found."""

    machine: dict[str, Any]
    series: list[Series] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    import_ms: list[float] = field(default_factory=list)
    first_use_ms: list[float] = field(default_factory=list)
    peak_mib: float = float("nan")

    def find(self, guest: str, peer: str, at_once: int = 1) -> Series | None:
        """The series of one peer, if it was run."""
        return next((s for s in self.series if (s.guest, s.peer, s.at_once) == (guest, peer, at_once)), None)

    def ratio(self, figure: str, guest: str, peer: str, other: str, at_once: int = 1) -> float:
        """One peer's median over another's."""
        mine, theirs = self.find(guest, peer, at_once), self.find(guest, other, at_once)
        top, bottom = (s.median(figure) if s is not None else None for s in (mine, theirs))
        return float("nan") if top is None or not bottom else top / bottom

    def summary(self) -> str:
        """The last line."""
        mine, raw = self.find("idle", "ferryman"), self.find("idle", "raw")
        more = (
            (mine.median("blackout_ms") or 0) - (raw.median("blackout_ms") or 0)
            if mine and raw
            else float("nan")
        )
        imports = statistics.median(self.import_ms) if self.import_ms else float("nan")
        return (
            f"bench: {'FAILED' if self.violations else 'ok'}"
            f" wall_vs_raw={self.ratio('wall_ms', 'idle', 'ferryman', 'raw'):.2f}"
            f" blackout_minus_raw_ms={more:.1f}"
            f" wall_vs_libvirt={self.ratio('wall_ms', 'idle', 'ferryman', 'libvirt'):.2f}"
            f" parallel32_vs_raw={self.ratio('wall_ms', 'idle-100hz', 'ferryman', 'raw', 32):.2f}"
            f" full_vs_raw={self.ratio('wall_ms', _FULL, 'ferryman', 'raw'):.2f}"
            f" full_vs_libvirt={self.ratio('wall_ms', _FULL, 'ferryman', 'libvirt'):.2f}"
            f" import_ms={imports:.1f} peak_mib={self.peak_mib:.1f}"
        )


@contextmanager
def _field(guest: CounterGuest, count: int, names: Sequence[str], report: Report) -> Iterator[list[_Player]]:
    """Start every peer with guests of its own, each with a witness."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-")))
        players = []
        for name in names:
            witnesses = [stack.enter_context(Witness(directory)) for _ in range(count)]
            # A disk that is written belongs to one guest.
            images = [directory / f"{name}-{number}" for number in range(count)]
            for image in images:
                guest.write_image(image)
            specs = counter_guests(guest, images, witnesses)
            peer = _MAKERS[name]()
            stack.callback(peer.stop)
            try:
                peer.start(specs)
            except PeerUnavailable as unavailable:
                report.unavailable[name] = unavailable.reason
                continue
            except PeerError as failed:
                if name.startswith("ferryman"):
                    raise
                report.unavailable[f"{name}, {count} at once"] = str(failed)
                continue
            for witness in witnesses:
                witness.wait_tick(_SETTLE_TICKS, timeout_s=60)
            players.append(_Player(name, peer, specs, witnesses))
        yield players


class _Player:
    """One peer with its guests."""

    def __init__(self, name: str, peer: Peer, specs: list[GuestSpec], witnesses: list[Witness]) -> None:
        self.name = name
        self.peer = peer
        self.specs = specs
        self.witnesses = witnesses
        self.direction = Direction.A_TO_B

    def play(self, series: Series) -> None:
        """Migrate all guests once, at once, and look at what the witnesses heard."""
        for witness in self.witnesses:
            last = witness.last()
            witness.wait_tick((last.value if last else 0) + _SETTLE_TICKS // 10, timeout_s=60)
        if len(self.specs) == 1:
            samples: list[Sample] = [self.peer.migrate(self.specs[0], self.direction)]
        else:
            samples = self.peer.migrate_many(self.specs, self.direction)
        self.direction = self.direction.reverse
        series.wall_ms.append(lot_wall_s(samples) * 1000)
        for sample, witness in zip(samples, self.witnesses, strict=True):
            witness.wait_new_process(60, other_than=sample.source_pid)
            outage = outage_of(sample, witness.ticks())
            series.blackout_ms.append(outage.blackout_ms)
            series.first_tick_ms.append(outage.call_to_first_tick_ms)
            for figure, value in (
                ("completed_to_cont_ms", sample.completed_to_cont_ms),
                ("downtime_ms", sample.downtime_ms),
                ("cpu_ms", None if sample.cpu_s is None else sample.cpu_s * 1000),
            ):
                if value is not None:
                    getattr(series, figure).append(value)

    def settle(self, series: Series, report: Report, faults: FaultPlan) -> None:
        """Count what the witnesses saw wrong over the whole run."""
        for witness in self.witnesses:
            seen = witness.report()
            fault = faults.take(self.name, "migrate_perform.completed")
            if fault is Fault.CORRUPT:
                # As if the guest had not ticked once.
                seen = replace(seen, ticks_lost=seen.ticks_lost + 1)
            series.ticks_lost += seen.ticks_lost
            if self.name.startswith("ferryman") and (seen.ticks_lost or seen.ticks_doubled or seen.overlaps):
                report.violations.append(
                    f"{series.guest} {self.name}: {seen.ticks_lost} ticks lost, {seen.ticks_doubled} doubled,"
                    f" {len(seen.overlaps)} overlaps"
                )


def _measure(
    report: Report,
    label: str,
    guest: CounterGuest,
    names: Sequence[str],
    *,
    rounds: int,
    faults: FaultPlan,
    at_once: int = 1,
) -> None:
    with _field(guest, at_once, names, report) as players:
        series = {player.name: Series(guest=label, peer=player.name, at_once=at_once) for player in players}
        for number in range(rounds):
            # Each round begins with another peer, so that none always follows the same one.
            turn = number % max(1, len(players))
            for player in [*players[turn:], *players[:turn]]:
                player.play(series[player.name])
        for player in players:
            player.settle(series[player.name], report, faults)
            if (
                isinstance(player.peer, FerrymanPeer)
                and at_once == 1
                and label == "idle"
                and player.name == "ferryman"
            ):
                report.peak_mib = player.peer.peak_rss_bytes / _MIB
    report.series.extend(series.values())
    for one in series.values():
        print(_row(one), flush=True)


def _measure_import(report: Report) -> None:
    """What ``import ferryman`` adds to a bare interpreter, and what its names add at their first use."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def run(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return (time.perf_counter() - begin) * 1000

    names = "import ferryman; [getattr(ferryman, name) for name in ferryman.__all__]"
    run(names)  # compiles the modules
    for _ in range(_IMPORTS):
        bare_ms = run("pass")
        report.import_ms.append(run("import ferryman") - bare_ms)
        report.first_use_ms.append(run(names) - bare_ms)
    print(
        f"import ferryman: {statistics.median(report.import_ms):.1f} ms;"
        f" all of its names: {statistics.median(report.first_use_ms):.1f} ms"
    )


_HEAD = (
    f"{'guest':16}{'peer':18}{'n':>3}{'wall ms':>10}{'first tick':>12}{'blackout':>10}{'to cont':>9}{'cpu ms':>8}"
    f"{'lost':>6}"
)


def _row(series: Series) -> str:
    def cell(figure: str, width: int) -> str:
        value = series.median(figure)
        return f"{'-' if value is None else format(value, '.1f'):>{width}}"

    return (
        f"{series.guest:16}{series.peer:18}{series.at_once:>3}{cell('wall_ms', 10)}{cell('first_tick_ms', 12)}"
        f"{cell('blackout_ms', 10)}{cell('completed_to_cont_ms', 9)}{cell('cpu_ms', 8)}{series.ticks_lost:>6}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds with the idle guest (default %(default)s)"
    )
    parser.add_argument("--big-rounds", type=int, default=6, help="rounds with the 512 MiB guest")
    parser.add_argument(
        "--full-rounds",
        type=int,
        default=6,
        help="rounds with the 2 GiB guest, which has a disk and a network card",
    )
    parser.add_argument("--parallel", default="1,4,16,32", help="how many at once (default %(default)s)")
    parser.add_argument("--parallel-rounds", type=int, default=3)
    parser.add_argument(
        "--faults",
        type=fault_plan,
        default=FaultPlan(),
        help="faults to plant, such as ferryman.migrate_perform.completed=corrupt: a tick of that peer's guest is lost",
    )
    parser.add_argument("--peers", default=",".join(_MAKERS), help="default %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 unless a guest of ours lost or doubled a tick."""
    arguments = _parse(argv)
    names = [name for name in arguments.peers.split(",") if name]
    report = Report(
        machine={"python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release()}
    )
    _measure_import(report)
    print(_HEAD)
    idle = CounterGuest(
        memory_bytes=32 * _MIB + _ODD, tick_hz=_TICK_HZ, page_count=16, pages_per_tick=0, prefill=False
    )
    if arguments.rounds:
        _measure(report, "idle", idle, names, rounds=arguments.rounds, faults=arguments.faults)
    big = CounterGuest(
        memory_bytes=512 * _MIB + _ODD,
        tick_hz=_TICK_HZ,
        page_count=384 * _MIB // 4096,
        pages_per_tick=0,
        prefill=True,
    )
    if arguments.big_rounds:
        _measure(report, "512M, 384 full", big, names, rounds=arguments.big_rounds, faults=arguments.faults)
    full = CounterGuest(
        memory_bytes=2048 * _MIB + _ODD,
        tick_hz=_TICK_HZ,
        page_count=1024 * _MIB // 4096,
        pages_per_tick=0,
        prefill=True,
        disk_ticks=128,
        network=True,
    )
    if arguments.full_rounds:
        _measure(report, _FULL, full, names, rounds=arguments.full_rounds, faults=arguments.faults)
    slow = CounterGuest(
        memory_bytes=32 * _MIB + _ODD, tick_hz=100, page_count=16, pages_per_tick=0, prefill=False
    )
    for at_once in (int(number) for number in arguments.parallel.split(",") if number):
        most = [
            name
            for name in names
            if name in ("raw", "ferryman") or (name == "libvirt" and at_once in (1, 32))
        ]
        _measure(
            report,
            "idle-100hz",
            slow,
            most,
            rounds=arguments.parallel_rounds,
            faults=arguments.faults,
            at_once=at_once,
        )
    report.faults = [f"{point}={fault.value}" for point, fault in arguments.faults.struck]
    if arguments.faults.left:
        print(f"faults that never struck: {', '.join(arguments.faults.left)}")
    for name, reason in report.unavailable.items():
        print(f"{name} was not measured: {reason}")
    for violation in report.violations:
        print(f"violation: {violation}")
    _RESULTS.parent.mkdir(parents=True, exist_ok=True)
    _RESULTS.write_text(json.dumps({"summary": report.summary(), **asdict(report)}, indent=1))
    print(f"figures: {_RESULTS}")
    print(report.summary())
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
