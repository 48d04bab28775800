"""``python -m tests.fault``: real kills and real cuts at every point of the handover's table, on real QEMU."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tests.fault.campaign import (
    FAULTS,
    RUN_TWICE,
    Case,
    Passage,
    Result,
    all_cases,
    reached_by,
    run_cases,
    sampled,
    survey_cases,
)
from tests.fault.net import missing
from tests.fault.points import points
from tests.fault.scenarios import SCENARIOS, unreached

_RESULTS = Path(".cache/results/fault.json")
_TRIES = 2
"""How often a case that did not come to its point is run there: what two programs do at once has no fixed order."""

_AGAIN_EVERY = 4
"""Every so many cases migrate once more at their end."""


@dataclass(kw_only=True)
class Campaign:
    """What a campaign found."""

    seed: int
    pairs: int = 0
    """All pairs of a fault and a reachable point or moment."""
    points: int = 0
    survey: list[Result] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    earlier: list[tuple[str, str]] = field(default_factory=list)
    """Pairs that an interrupted run had covered, and that are not run again."""
    unreached: dict[str, str | None] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def covered(self) -> int:
        """Pairs of which the strike came where it was meant to."""
        now = {(result.point, result.fault) for result in self.results if result.reached}
        return len(now | set(self.earlier))

    @property
    def violations(self) -> int:
        """Cases, and scenarios without a fault, in which something was wrong."""
        return sum(bool(result.violations) for result in (*self.survey, *self.results))

    @property
    def needs_human(self) -> int:
        """Cases that did not end by themselves."""
        return sum(result.needs_human for result in (*self.survey, *self.results))

    @property
    def ok(self) -> bool:
        """Whether all that was tried went as the rules say."""
        missed = sum(not result.reached for result in self.results)
        return bool(self.results) and not (self.violations or self.needs_human or missed or self.interrupted)

    def figures(self) -> dict[str, object]:
        """What the summary line ends with."""
        return {
            "seed": self.seed,
            "interrupted": self.interrupted,
            "earlier": len(self.earlier),
            "points": self.points,
            "missed": sum(not result.reached for result in self.results),
            "nothing_there": sum(result.reached and not result.struck for result in self.results),
            "migrated_again": sum(result.migrated_again for result in self.results),
            "unreached": len(self.unreached),
            "unexplained": sum(reason is None for reason in self.unreached.values()),
            "outcomes": dict(sorted(Counter(result.outcome for result in self.results).items())),
            "seconds": round(self.seconds, 1),
        }

    def summary(self) -> str:
        """The last line."""
        return (
            f"fault: {'ok' if self.ok else 'FAILED'} cases={len(self.results)} pairs={self.covered}/{self.pairs}"
            f" violations={self.violations} needs_human={self.needs_human} {json.dumps(self.figures())}"
        )


def _tell(number: int, total: int, result: Result) -> None:
    how = "" if result.struck else " (nothing there to strike)" if result.reached else " (not reached)"
    if not result.fault:
        how = ""
    print(
        f"{number:4}/{total} {result.scenario:16} {result.point or '-':48} {result.fault or '-':26}"
        f" {result.outcome or '?':12} {result.seconds:5.1f} s{how}",
        flush=True,
    )
    for violation in result.violations:
        print(f"     violation: {violation}", flush=True)


def _coverage(campaign: Campaign, reached: dict[str, list[Passage]]) -> None:
    print("\ncoverage by fault: cases, struck, by outcome")
    for fault in FAULTS:
        mine = [result for result in campaign.results if result.fault == fault]
        outcomes = " ".join(
            f"{name}={count}" for name, count in sorted(Counter(r.outcome for r in mine).items())
        )
        print(f"  {fault:26} {len(mine):5} {sum(result.struck for result in mine):5}  {outcomes}")
    print("coverage by scenario: points first reached, cases, reached")
    owned = Counter(passages[0][0].name for passages in reached.values())
    for scenario in SCENARIOS:
        mine = [result for result in campaign.results if result.scenario == scenario.name]
        print(f"  {scenario.name:26} {owned[scenario.name]:5} {len(mine):5} {sum(r.reached for r in mine):5}")
    print(f"entries of the table that no scenario reaches: {len(campaign.unreached)}")
    for entry, why in campaign.unreached.items():
        print(f"  {entry:36} {why or 'NO REASON IS KNOWN'}")


def _numbered(cases: Iterable[Case]) -> list[Case]:
    """Let every so many cases migrate once more."""
    return [replace(case, again=number % _AGAIN_EVERY == 0) for number, case in enumerate(cases)]


def run_all(cases: list[Case], jobs: int, into: list[Result]) -> None:
    """Run cases; one that did not come to its point is run once more, and then in each other scenario that did."""
    left, total, number, attempt = list(cases), len(cases), 0, 0
    while left:
        attempt += 1
        missed: list[Case] = []
        with closing(run_cases(left, jobs)) as running:
            for index, result in running:
                case = left[index]
                if not (result.reached or result.violations):
                    if attempt < _TRIES:
                        missed.append(case)
                        continue
                    if case.elsewhere:
                        (scenario, incarnation), *elsewhere = case.elsewhere
                        missed.append(
                            replace(
                                case, scenario=scenario, incarnation=incarnation, elsewhere=tuple(elsewhere)
                            )
                        )
                        continue
                number += 1
                _tell(number, total, result)
                into.append(result)
        left = missed


def _survey(campaign: Campaign, jobs: int) -> dict[str, list[Passage]]:
    """Run every scenario without a strike."""
    cases = survey_cases()
    found: dict[int, Result] = {}
    with closing(run_cases(cases, jobs)) as running:
        for number, result in running:
            found[number] = result
            _tell(len(found), len(cases), result)
    campaign.survey = [found[number] for number in sorted(found)]
    reached = reached_by(campaign.survey)
    campaign.points = len(reached)
    campaign.unreached = unreached(set(reached))
    return reached


def _plan(arguments: argparse.Namespace, campaign: Campaign) -> tuple[list[Case], dict[str, list[Passage]]]:
    if arguments.plant:
        scenario = SCENARIOS[0]
        campaign.pairs = 1
        return [Case(scenario=scenario, point="destination.claiming.ran.answered", fault=RUN_TWICE)], {}
    reached = _survey(campaign, arguments.jobs)
    randomly = random.Random(arguments.seed)
    slow = next(result.transfer_s for result in campaign.survey if result.scenario == "asked")
    assert slow is not None
    cases = all_cases(reached, slow, randomly)
    campaign.pairs = len(cases)
    if arguments.resume:
        covered = {
            (result["point"], result["fault"])
            for path in arguments.resume
            for result in json.loads(path.read_text(encoding="utf-8"))["results"]
            if result["reached"] and not result["violations"]
        }
        campaign.earlier = sorted({(case.point, case.fault) for case in cases} & covered)
        cases = [case for case in cases if (case.point, case.fault) not in covered]
    if arguments.only:
        cases = [
            case for case in cases if arguments.only in f"{case.scenario.name} {case.point} {case.fault}"
        ]
    if arguments.sample:
        cases = sampled(cases, arguments.sample, randomly)
    else:
        # In no order, so that an interrupted campaign has seen something of everything.
        randomly.shuffle(cases)
    return _numbered(cases), reached


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fault", description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="run so many cases; 0 runs every pair")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the sample and the moments; default: by the clock"
    )
    parser.add_argument("--list", action="store_true", help="list all points and faults, and end")
    parser.add_argument("--only", default="", help="part of a scenario, point or fault")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side (default %(default)s)")
    parser.add_argument("--json", type=Path, default=_RESULTS, help="full results (default %(default)s)")
    parser.add_argument(
        "--resume",
        type=Path,
        action="append",
        metavar="FILE",
        help="go on where the run ended that wrote these results",
    )
    parser.add_argument("--plant", action="store_true", help="let a guest be run twice, which must be found")
    return parser.parse_args(argv)


def _interrupt(_number: int, _frame: object) -> None:
    """End once, and leave nothing behind: a second signal must not come between."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 0 if everything went as the rules say."""
    arguments = _parse(argv)
    if arguments.list:
        print("\n".join([*points(), *FAULTS]))
        return 0
    lacking = missing() or (None if shutil.which("qemu-system-x86_64") else "the program qemu-system-x86_64")
    if lacking:
        print(f"fault: FAILED cases=0: this machine lacks {lacking}")
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if arguments.seed is None:
        arguments.seed = int(time.time())
    campaign = Campaign(seed=arguments.seed)
    begin_s = time.monotonic()
    reached: dict[str, list[Passage]] = {}
    try:
        cases, reached = _plan(arguments, campaign)
        run_all(cases, arguments.jobs, campaign.results)
    except KeyboardInterrupt:
        campaign.interrupted = True
    campaign.seconds = time.monotonic() - begin_s
    _coverage(campaign, reached)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        json.dumps({"ok": campaign.ok, "summary": campaign.summary(), **asdict(campaign)}, indent=1)
    )
    print(f"figures: {arguments.json}")
    print(campaign.summary())
    return 0 if campaign.ok else 1


if __name__ == "__main__":
    sys.exit(main())
