"""``python -m tests.bench.domains``: what starting a guest costs, and what counters of many guests cost.

Starting: one idle guest is ended and started again, with raw QMP, Ferryman and stock libvirt in turns; Ferryman's time
is split into its parts.  Counters: many guests of each peer run on one host, and all are asked in one call; then a
thousand simulated domains, against as many of libvirt's own simulated driver.

Figures are medians; every sample stands in ``.cache/results/domains.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio

import ferryman
from ferryman.testing import forget_world
from tests.bench.peer import GuestSpec, Peer, PeerUnavailable, counter_guests
from tests.bench.peer_ferryman import FerrymanPeer
from tests.bench.peer_libvirt import LibvirtPeer
from tests.bench.peer_raw import RawPeer
from tests.guests.counter import CounterGuest
from tests.guests.witness import Witness

_RESULTS = Path(".cache/results/domains.json")
_GUEST = CounterGuest(
    memory_bytes=(32 << 20) + 8192, tick_hz=19, page_count=16, pages_per_tick=0, prefill=False
)
_WORLD = "bench-domains"


@dataclass(kw_only=True)
class Report:
    """Everything that one run found; times in milliseconds."""

    machine: dict[str, Any]
    start_ms: dict[str, list[float]] = field(default_factory=dict)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)
    guests: int = 0
    count_ms: dict[str, list[float]] = field(default_factory=dict)
    simulated: int = 0
    simulated_ms: dict[str, list[float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """The last line."""
        return (
            f"domains: ok start_vs_raw={_ratio(self.start_ms, 'raw')}"
            f" start_vs_libvirt={_ratio(self.start_ms, 'libvirt')}"
            f" counters{self.guests}_vs_raw={_ratio(self.count_ms, 'raw')}"
            f" counters{self.guests}_vs_libvirt={_ratio(self.count_ms, 'libvirt')}"
            f" simulated{self.simulated}_vs_libvirt={_ratio(self.simulated_ms, 'libvirt')}"
        )


def _ratio(samples: dict[str, list[float]], other: str) -> str:
    if not samples.get("ferryman") or not samples.get(other):
        return "nan"
    return f"{statistics.median(samples['ferryman']) / statistics.median(samples[other]):.2f}"


_MAKERS: dict[str, Callable[[], Peer]] = {
    "raw": RawPeer,
    "ferryman": FerrymanPeer,
    # Stock libvirt does not start many at once within minutes.
    "libvirt": lambda: LibvirtPeer(width=4, timeout_s=600.0),
}


@contextmanager
def _peers(
    names: Iterable[str], count: int, report: Report
) -> Iterator[dict[str, tuple[Peer, list[GuestSpec]]]]:
    """Start some peers, each with so many guests of its own."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fb-")))
        image = directory / "image"
        _GUEST.write_image(image)
        peers: dict[str, tuple[Peer, list[GuestSpec]]] = {}
        for name in names:
            peer = _MAKERS[name]()
            witnesses = [stack.enter_context(Witness(directory)) for _ in range(count)]
            specs = counter_guests(_GUEST, [image] * count, witnesses)
            stack.callback(peer.stop)
            try:
                peer.start(specs)
            except PeerUnavailable as unavailable:
                report.unavailable[name] = unavailable.reason
                continue
            for witness in witnesses:
                witness.wait_tick(2, timeout_s=60)
            peers[name] = (peer, specs)
        yield peers


def _measure_starts(report: Report, peer_names: Sequence[str], rounds: int) -> None:
    with _peers(peer_names, 1, report) as peers:
        names = list(peers)
        for number in range(rounds):
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                peer, (spec,) = peers[name]
                report.start_ms.setdefault(name, []).append(peer.restart(spec) * 1000)
        for peer, _ in peers.values():
            if isinstance(peer, FerrymanPeer):
                for parts in peer.start_parts_ms:
                    for part, value in parts.items():
                        report.parts_ms.setdefault(part, []).append(value)
    _print_table("start one guest", report.start_ms)
    for part, samples in report.parts_ms.items():
        print(f"    {part:26}{statistics.median(samples):10.2f}")


def _measure_counters(report: Report, peer_names: Sequence[str], guests: int, rounds: int) -> None:
    report.guests = guests
    for name in peer_names:
        # One peer after the other: so many guests of all three would be busy with their own timers.
        with _peers([name], guests, report) as peers:
            for peer, _ in peers.values():
                # The first look is not counted: virsh connects, and we read every definition once.
                looks = peer.count_all(rounds + 1)[1:]
                report.count_ms[name] = [look * 1000 for look in looks]
    _print_table(f"counters of {guests} guests of QEMU", report.count_ms)


def simulated_xml(number: int, *, for_libvirt: bool) -> str:
    """Definition of a simulated domain, for libvirt's driver of that kind or for ours."""
    kind = "<os><type>hvm</type></os>" if for_libvirt else ""
    return (
        f"<domain type='test'><name>d{number}</name><uuid>{uuid.UUID(int=number + 1)}</uuid>"
        f"<memory unit='MiB'>8</memory><vcpu>1</vcpu>{kind}</domain>"
    )


async def _count_simulated(domains: int, rounds: int) -> list[float]:
    async with ferryman.connect(f"test:///{_WORLD}/alpha") as connection:
        for number in range(domains):
            await connection.create(simulated_xml(number, for_libvirt=False))
        taken_ms = []
        for _ in range(rounds + 1):
            begin_s = time.perf_counter()
            found = await connection.statistics()
            taken_ms.append((time.perf_counter() - begin_s) * 1000)
            assert len(found) == domains
        return taken_ms[1:]


def _measure_simulated(report: Report, domains: int, rounds: int) -> None:
    report.simulated = domains
    report.simulated_ms["ferryman"] = anyio.run(_count_simulated, domains, rounds)
    forget_world(_WORLD)
    if shutil.which("virsh") is None:
        report.unavailable["virsh"] = "it is not installed"
    else:
        with tempfile.TemporaryDirectory(prefix="fb-") as directory:
            node = Path(directory, "node.xml")
            machines = "".join(simulated_xml(number, for_libvirt=True) for number in range(domains))
            node.write_text(f"<node>{machines}</node>")
            looks = "; ".join(["domstats --list-running"] * (rounds + 1))
            done = subprocess.run(
                ["virsh", "--quiet", "--connect", f"test://{node}", "--timing", looks],
                check=False,
                capture_output=True,
                text=True,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": directory},
            )
            taken_ms = [float(ms) for ms in re.findall(r"\(Time: ([\d.]+) ms\)", done.stdout)]
            if done.returncode or done.stdout.count("Domain: ") != domains * (rounds + 1):
                report.unavailable["virsh"] = f"its simulated driver did not count: {done.stderr.strip()}"
            else:
                report.simulated_ms["libvirt"] = taken_ms[1:]
    _print_table(f"counters of {domains} simulated domains", report.simulated_ms)


def _print_table(title: str, samples: dict[str, list[float]]) -> None:
    print(f"{title}, ms")
    for name, values in samples.items():
        print(
            f"  {name:28}{statistics.median(values):10.2f}   [{min(values):.2f}, {max(values):.2f}]",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.domains", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each figure (default %(default)s)")
    parser.add_argument("--guests", type=int, default=50, help="of each peer (default %(default)s)")
    parser.add_argument("--simulated", type=int, default=1000, help="simulated domains (default %(default)s)")
    parser.add_argument("--peers", default=",".join(_MAKERS), help="default %(default)s")
    arguments = parser.parse_args(argv)
    peer_names = arguments.peers.split(",")
    report = Report(
        machine={"python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release()}
    )
    _measure_starts(report, peer_names, arguments.rounds)
    _measure_counters(report, peer_names, arguments.guests, arguments.rounds)
    _measure_simulated(report, arguments.simulated, arguments.rounds)
    conclude(report, report.unavailable, report.summary(), _RESULTS)
    return 0


def conclude(report: Any, unavailable: dict[str, str], summary: str, results: Path) -> None:
    """Say what was not measured, write every figure down, and print the last line.

    :param report: a data class.
    """
    for name, reason in unavailable.items():
        print(f"{name} was not measured: {reason}")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"summary": summary, **asdict(report)}, indent=1))
    print(f"figures: {results}")
    print(summary)


if __name__ == "__main__":
    sys.exit(main())
