"""``python -m tests.fault.storage``: migrations that copy the guest's disk, cut at random moments, on real QEMU.

The guest writes its counter to its disk and to its serial port, so that a disk says how far it has come.  Most guests
are to arrive paused: before such a one runs, its disk must be what the source's was at the switch, byte for byte, since
the next write would hide a lost one.  Afterwards the guest is stopped where it runs, and its disk must hold exactly the
tick that the last one heard calls for: an older one is a lost write, a newer one a doubled one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.fault.campaign import Case, Lab, Result, Run, run_cases
from tests.fault.net import missing
from tests.fault.scenarios import TRANSFER, Scenario
from tests.guests.counter import IMAGE_BYTES, SECTOR_BYTES, CounterGuest
from tests.guests.inspect import QMPSocket, run_directories
from tests.qemu import MIB, end_process

FAULTS = (
    "kill-source-manager",
    "kill-destination-manager",
    "kill-source-qemu",
    "kill-destination-qemu",
    "cut-data-silent",
    "cut-data-reset",
    "kill-coordinator",
)

LOST, DOUBLED, LEFT = "a write was lost", "a write was doubled", "left over"
"""How the violations that are counted begin."""

_RESULTS = Path(".cache/results/fault-storage.json")
_SCENARIO = Scenario(name="copy", slow=True)
_GUEST = CounterGuest(
    memory_bytes=16 * MIB, tick_hz=1000, page_count=2000, pages_per_tick=1, prefill=True, disk_ticks=4
)
_DATA_BYTES = 12 * MIB
_HOLE_BYTES = 48 * MIB
_COPY_BYTES_PER_S = 24 * MIB
_LASTS_S = 2.4
"""How long a migration of these cases takes, from the word to begin to the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageCase(Case):
    """One migration that copies the disk, and a strike so many seconds after it was told to begin.

    :param paused: let the guest arrive paused.
    """

    paused: bool = False

    def start(self, lab: Lab, directory: Path) -> Run:
        """Make the case's run."""
        return _StorageRun(lab, self, directory)


class _StorageRun(Run):
    """One case under way: the disk is ``image`` at the source and ``copy`` at the destination."""

    def __init__(self, lab: Lab, case: Case, directory: Path) -> None:
        super().__init__(lab, case, directory)
        assert isinstance(case, StorageCase)
        self._paused = case.paused
        self._guest = _GUEST
        self._source_image = directory / "image"
        self._copy = directory / "copy"
        self._struck_pids: set[int] = set()
        self._rest = b""

    def _more_options(self) -> dict[str, object]:
        return {
            "copy_storage": "full",
            "copy_bandwidth_bytes_per_s": _COPY_BYTES_PER_S,
            "disks": [["hda", str(self._copy)]],
            "paused": self._paused,
        }

    def _write_image(self) -> None:
        """Behind the guest's own MiB come data, a hole, and data."""
        super()._write_image()
        data = random.Random(self.case.point).randbytes(_DATA_BYTES)
        with self._image.open("r+b") as image:
            image.seek(IMAGE_BYTES)
            image.write(data)
            image.seek(_HOLE_BYTES, 1)
            image.write(data[:MIB])
        self._rest = _without_counter(self._image)

    def _begun(self) -> None:
        self._later(self.case.moment_s, self._strike)

    def _coordinator_said(self, line: str | None) -> None:
        if line != "phase perform begin":  # the strike has a time of its own
            super()._coordinator_said(line)

    def _do(self, fault: str, *, away_s: float, cut_s: float) -> bool:
        if fault.endswith("-qemu"):
            self._struck_pids |= {pid for pids in self._runners().values() for pid in pids}
            done = super()._do(fault, away_s=away_s, cut_s=cut_s)
            self._struck_pids -= {pid for pids in self._runners().values() for pid in pids}
            return done
        return super()._do(fault, away_s=away_s, cut_s=cut_s)

    def _look(self) -> str:
        found = self._runners()
        # No tick of the guest's may be older on the disk that it has now than on the one that it had.
        if found["destination"]:
            self._image = self._copy
            if not found["source"]:
                self._run_arrived()
        if not any(found.values()):
            return self._look_at_none()
        outcome = super()._look()
        place = {"source": "a", "destination": "b"}.get(outcome)
        if place is not None:
            self._look_at_disks(outcome, self._root(place))
        return outcome

    def _run_arrived(self) -> None:
        """Hold the disk of a guest that has arrived and not run against the source's, then run it."""
        (directory,) = run_directories(self._root("b"))
        with QMPSocket(directory / "read") as qmp:
            if qmp.execute("query-status")["status"] != "paused":
                return
            self._check_window(self._copy)
            if self._copy.read_bytes() != self._source_image.read_bytes():
                ticks = [_GUEST.tick_on_disk(path) for path in (self._source_image, self._copy)]
                self.result.violations.append(
                    f"{LOST}: the disks differ at the switch, and hold the ticks {ticks}"
                )
            qmp.execute("cont")

    def _look_at_none(self) -> str:
        """The guest is nowhere: then it was its own QEMU that was killed, and its disk is whole."""
        self.result.outcome = "none"
        last = self._witness.last()
        claimed = self._copy.exists()
        if not self._struck_pids:
            self.result.violations.append("the guest is nowhere, and no QEMU was killed")
        elif not claimed and last is not None and last.pid not in self._struck_pids:
            self.result.violations.append(
                f"the guest of process {last.pid} is nowhere, and it was not killed"
            )
        self._check_window(self._copy if claimed else self._source_image)
        self._check_files(claimed=claimed)
        return "none"

    def _look_at_disks(self, outcome: str, root: Path) -> None:
        (directory,) = run_directories(root)
        with QMPSocket(directory / "read") as qmp:
            qmp.execute("stop")
            for question in ("query-block-jobs", "query-block-exports", "query-jobs"):
                if answer := qmp.execute(question):
                    self._leave(f"{question}: {answer}")
            nodes = [node["node-name"] for node in qmp.execute("query-named-block-nodes")]
            if left := [name for name in nodes if name.startswith("ferryman-copy")]:
                self._leave(f"block nodes {left}")
            self._check_window(self._image)
            self._check_files(claimed=outcome == "destination")
            qmp.execute("cont")

    def _check_window(self, image: Path) -> None:
        """A tick is printed before it is written, and the guest waits until it is."""
        heard = self._last_tick()
        due = heard - heard % _GUEST.disk_ticks
        on_disk = _GUEST.tick_on_disk(image)
        oldest = due - _GUEST.disk_ticks if heard == due else due
        if on_disk < oldest:
            self.result.violations.append(f"{LOST}: tick {heard} was heard, and the disk holds {on_disk}")
        # The next tick may be in the middle of being printed.
        if on_disk > heard + 1:
            self.result.violations.append(f"{DOUBLED}: tick {heard} was heard, and the disk holds {on_disk}")
        if _without_counter(image) != self._rest:
            self.result.violations.append(f"{LOST}: {image.name} is not what the source's disk was")

    def _check_files(self, *, claimed: bool) -> None:
        if not claimed and self._copy.exists():
            self._leave("the destination's image")
        for side, place in (("source", "a"), ("destination", "b")):
            made = self._root(place) / "made"
            if names := [path.name for path in made.glob("*")]:
                self._leave(f"notes of the {side}: {names}")
        if claimed and _without_counter(self._source_image) != self._rest:
            self.result.violations.append("the source's image was changed")
        if claimed:
            kept, after = _GUEST.tick_on_disk(self._source_image), self._last_tick()
            if kept > after:
                self.result.violations.append(f"{DOUBLED}: the source's disk holds tick {kept} of {after}")

    def _leave(self, what: str) -> None:
        self.result.violations.append(f"{LEFT}: {what}")

    def close(self) -> None:
        for pid in self._struck_pids:
            end_process(pid)
        super().close()


def _without_counter(path: Path) -> bytes:
    """A disk's content, but for the sector that the guest writes."""
    data = path.read_bytes()
    return data[:SECTOR_BYTES] + data[2 * SECTOR_BYTES :]


def storage_cases(count: int, randomly: random.Random) -> list[Case]:
    """Every fault as often as any other, each at a moment of its own, a third of them close to the switch."""
    cases: list[Case] = []
    for number in range(count):
        low, high = (0.8, 1.05) if number % 3 == 2 else (0.0, 1.05)
        cases.append(
            StorageCase(
                scenario=_SCENARIO,
                point=f"{TRANSFER}.{number}",
                fault=FAULTS[number % len(FAULTS)],
                moment_s=_LASTS_S * randomly.uniform(low, high),
                brief=number % 2 == 0,
                paused=number % 4 != 3,
            )
        )
    return cases


def count(results: Sequence[Result], what: str) -> int:
    """Cases with a violation of a kind."""
    return sum(any(violation.startswith(what) for violation in result.violations) for result in results)


def summary(results: Sequence[Result], cuts: int, **figures: object) -> tuple[bool, str]:
    """Whether all went as it must, and the last line."""
    good = sum(not result.violations and result.reached for result in results)
    told = {
        **figures,
        "struck": sum(result.struck for result in results),
        "outcomes": dict(sorted(Counter(result.outcome for result in results).items())),
        "faults": dict(sorted(Counter(result.fault for result in results).items())),
    }
    ok = good == cuts
    return ok, (
        f"storage: {'ok' if ok else 'FAILED'} cuts={good}/{cuts} lost_writes={count(results, LOST)}"
        f" doubled_writes={count(results, DOUBLED) + count(results, 'ticks lost')} leftovers={count(results, LEFT)}"
        f" {json.dumps(told)}"
    )


def told(path: Path = _RESULTS) -> dict[str, int]:
    """Figures of the last campaign, as it has written them down."""
    found = [Result(**one) for one in json.loads(path.read_text())["results"]]
    return {
        "cuts": sum(not result.violations and result.reached for result in found),
        "lost_writes": count(found, LOST),
        "doubled_writes": count(found, DOUBLED) + count(found, "ticks lost"),
        "leftovers": count(found, LEFT),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if nothing was lost, doubled or left."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.storage", description=__doc__)
    parser.add_argument("--cuts", type=int, default=50, help="migrations that are cut (default %(default)s)")
    parser.add_argument("--sample", type=int, default=0, help="run so many of them; 0 runs all")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: by the clock")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side (default %(default)s)")
    parser.add_argument("--only", default="", help="part of a fault")
    parser.add_argument("--json", type=Path, default=_RESULTS, help="full results (default %(default)s)")
    arguments = parser.parse_args(argv)
    lacking = missing() or (None if shutil.which("qemu-system-x86_64") else "the program qemu-system-x86_64")
    if lacking:
        print(f"storage: FAILED cuts=0/{arguments.cuts}: this machine lacks {lacking}")
        return 1
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    randomly = random.Random(seed)
    cases = [case for case in storage_cases(arguments.cuts, randomly) if arguments.only in case.fault]
    if arguments.sample:
        cases = randomly.sample(cases, min(arguments.sample, len(cases)))
    begin_s = time.monotonic()
    results: list[Result] = []
    with closing(run_cases(cases, arguments.jobs)) as running:
        for number, result in running:
            results.append(replace(result))
            print(
                f"{len(results):4}/{len(cases)} {result.fault:26} {cases[number].moment_s:5.2f} s"
                f" {result.outcome or '?':12} {result.seconds:5.1f} s",
                flush=True,
            )
            for violation in result.violations:
                print(f"     violation: {violation}", flush=True)
    ok, line = summary(results, len(cases), seed=seed, seconds=round(time.monotonic() - begin_s, 1))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        json.dumps({"ok": ok, "summary": line, "results": [asdict(one) for one in results]}, indent=1)
    )
    print(f"figures: {arguments.json}")
    print(line)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
