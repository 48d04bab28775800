"""``make model``: the shipped handover explored within bounds, and the checker shown to find what is wrong with others.

Without arguments everything: the worlds of ``WORLDS``, random walks through larger ones, the readings that break, the
generated mutants, and the handshakes of libvirt and ``xl``.  With ``--world`` one exploration, of the bounds that the
other options say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tests.model.diagram import draw
from tests.model.explore import Found, explore, walk
from tests.model.mutants import READINGS, SURVIVORS, Mutant, generated
from tests.model.peers import PEERS
from tests.model.world import Bounds, Protocol

_RESULTS = Path(".cache/results/model.json")

WORLDS = {
    "one migration": Bounds(crash_hosts=True),
    "a paused guest": Bounds(crash_hosts=True, paused=True),
    "post-copy": Bounds(postcopy=True, silent=False),
    "a person, truthful or not": Bounds(person=True, silent=False, crash_hosts=True),
    "journals put back": Bounds(old_journals=True),
    "journals lost": Bounds(lose_journals=True, kill=False, fail=False, silent=False),
    "three hosts": Bounds(hosts=3, silent=False),
    "there and back": Bounds(migrations=2, crash_managers=False, kill=False, silent=False),
}
"""Small worlds, all of which are part of ``make test``."""

LARGER = {
    "post-copy, hosts crash": Bounds(postcopy=True, crash_hosts=True),
    "post-copy, a person": Bounds(postcopy=True, person=True, silent=False),
    "there and back, managers die": Bounds(migrations=2, kill=False, silent=False, fail=False),
}

WALKED = {
    "three migrations, three hosts": Bounds(hosts=3, migrations=3, crash_hosts=True),
    "the same, paused": Bounds(hosts=3, migrations=3, crash_hosts=True, paused=True),
    "the same, post-copy, a person": Bounds(
        hosts=3, migrations=3, crash_hosts=True, postcopy=True, person=True
    ),
}


@dataclass(kw_only=True)
class Report:
    """What one run found."""

    states: int = 0
    depth: int = 0
    violations: list[str] = field(default_factory=list)
    worlds: dict[str, str] = field(default_factory=dict)
    killed: int = 0
    mutants: int = 0
    survivors: dict[str, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    counterexamples: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The last line."""
        state = "FAILED" if self.violations else "ok"
        return (
            f"model: {state} states={self.states} depth={self.depth} violations={len(self.violations)}"
            f" mutants={self.killed}/{self.mutants} counterexamples={','.join(self.counterexamples)}"
            f" {json.dumps(asdict(self), sort_keys=True)}"
        )


def _explore(bounds: Bounds) -> Found:
    return explore(Protocol(), bounds)


def _walk(bounds: Bounds) -> Found:
    return walk(Protocol(), bounds, seed=1, walks=1_500, steps=250)


def _try(number: int) -> Found:
    """One mutant, by its number: a protocol is made of functions, which do not travel between processes."""
    mutant = all_mutants()[number]
    return explore(mutant.protocol, mutant.bounds, heal=mutant.heal, most_s=120)


def all_mutants() -> list[Mutant]:
    """The readings that break, and what is generated."""
    return [*READINGS, *generated()]


def everything(*, plant: bool = False, quick: bool = False) -> Report:
    """Explore, walk, and try every mutant.

    :param plant: take a protocol that breaks for the shipped one. :param quick: small worlds, and no mutants.
    """
    report = Report()
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        explored = WORLDS if quick else WORLDS | LARGER
        for name, found in zip(explored, pool.map(_explore, explored.values()), strict=True):
            _note(report, name, found, whole=True)
        if plant:
            _note(report, "planted", explore(READINGS[0].protocol, READINGS[0].bounds), whole=True)
        if not quick:
            for name, found in zip(WALKED, pool.map(_walk, WALKED.values()), strict=True):
                _note(report, f"walks: {name}", found, whole=False)
            mutants = all_mutants()
            for mutant, found in zip(mutants, pool.map(_try, range(len(mutants))), strict=True):
                _judge(report, mutant, found)
    for peer in PEERS:
        found = explore(peer.protocol, peer.bounds, heal=peer.heal)
        print(f"\n{peer.name}: {found.violation}\n\n{draw(found.trace)}\n")
        if found.violation:
            report.counterexamples.append(peer.name)
        else:
            report.violations.append(f"no counterexample is found for {peer.name}")
    return report


def _note(report: Report, name: str, found: Found, *, whole: bool) -> None:
    print(f"{name}: {found.summary()}", flush=True)
    for excuse, count in found.excuses.items():
        print(f"  {count} ends without the guest: {excuse}")
    report.worlds[name] = found.summary()
    report.states += found.states
    report.depth = max(report.depth, found.depth)
    if found.violation:
        report.violations.append(f"{name}: {found.violation}")
        print(draw(found.trace))
    elif whole and not found.complete:
        report.violations.append(f"{name}: not every state was seen")


def _judge(report: Report, mutant: Mutant, found: Found) -> None:
    report.mutants += 1
    report.slowest_s = max(report.slowest_s, found.seconds)
    if found.violation:
        report.killed += 1
        print(
            f"killed: {mutant.name}: {found.violation} ({found.states} states, {found.seconds:.1f} s)",
            flush=True,
        )
        return
    reason = SURVIVORS.get(mutant.name)
    print(f"SURVIVES: {mutant.name}: {reason or 'nobody knows why'}", flush=True)
    if reason is None:
        report.violations.append(f"the mutant survives, unexplained: {mutant.name}")
    else:
        report.survivors[mutant.name] = reason


def _one_world(bounds: Bounds, *, walks: int, steps: int, seed: int, states: int) -> int:
    if walks:
        found = walk(Protocol(), bounds, seed=seed, walks=walks, steps=steps)
    else:
        found = explore(Protocol(), bounds, most_states=states)
    for words in found.trace:
        print(f"  {words}")
    for excuse, count in found.excuses.items():
        print(f"  {count} times the end is without the guest: {excuse}")
    print(f"model: {'FAILED' if found.violation else 'ok'} {found.summary()}")
    return 1 if found.violation else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--plant", action="store_true", help="plant a violation, which must be found")
    parser.add_argument("--quick", action="store_true", help="small worlds only, and no mutants")
    parser.add_argument("--world", action="store_true", help="explore one world, of these bounds:")
    for bound in fields(Bounds):
        name = "--" + bound.name.replace("_", "-")
        if isinstance(bound.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=bound.default)
        else:
            parser.add_argument(name, type=int, default=bound.default)
    parser.add_argument("--states", type=int, default=10_000_000, help="stop after so many")
    parser.add_argument("--walks", type=int, default=0, help="walk at random so many times instead")
    parser.add_argument("--steps", type=int, default=200, help="length of a walk")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Explore; 0 if every invariant held, and whatever survives is explained."""
    arguments = vars(_parser().parse_args(argv))
    if arguments["world"]:
        bounds = Bounds(**{bound.name: arguments[bound.name] for bound in fields(Bounds)})
        return _one_world(bounds, **{key: arguments[key] for key in ("walks", "steps", "seed", "states")})
    report = everything(plant=arguments["plant"], quick=arguments["quick"])
    _RESULTS.parent.mkdir(parents=True, exist_ok=True)
    _RESULTS.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    print(report.summary())
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
