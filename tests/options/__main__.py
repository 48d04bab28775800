"""``python -m tests.options``: the matrix of options on real QEMU; ``--write`` writes its page."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import anyio

from tests.options.cases import CASES, Case
from tests.options.run import Outcome, started

PAGE = Path(__file__).parents[2] / "docs/reference/qemu-options.md"
RESULTS = Path(".cache/results/options.json")
_HEAD = """\
# Options of QEMU's migrations

Each row is a migration on real QEMU, with a guest that writes memory and a journal on its disk all the time. `python -m
tests.options --write` runs them and writes this page. Verified: no page of memory was wrong, no tick was missing or
doubled, the disk held what the guest had written, and one process was left; for what is refused or fails, that
the guest went on at the source.

| option | asked | outcome | verified | note |
| --- | --- | --- | --- | --- |
"""


async def run_cases(cases: Sequence[Case], *, plain: bool) -> list[Outcome]:
    """Run cases in their order, with one guest."""
    outcomes = []
    async with started() as course:
        for case in cases:
            outcome = await course.run(case)
            outcomes.append(outcome)
            if not plain or not outcome.ok:
                state = "ok" if outcome.ok else "WRONG"
                said = "; ".join([outcome.message, *outcome.wrong]).strip("; ")
                print(
                    f"{state:5} {outcome.seconds:5.1f} s  {case.option}: {asked(case)}: {outcome.outcome}  {said}",
                    flush=True,
                )
    return outcomes


def asked(case: Case) -> str:
    """What a case asks for, in the words of the table."""
    words = [f"{name}={_said(value)}" for name, value in case.options.items()]
    if case.ports is not None:
        words.append(f"port_range of {case.ports[0]}, {case.ports[1]} taken")
    if case.edit is not None:
        words.append("destination_definition")
    if case.credentials is not None:
        words.append("credentials: " + " / ".join(case.credentials))
    if case.taken:
        words.append(f"taken away at the {case.taken}")
    if case.persistent:
        words.append("a persistent domain")
    if case.suspended:
        words.append("a suspended guest")
    if case.does:
        words.append(f"then {case.does}")
    return ", ".join(words) or "nothing"


def _said(value: Any) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(value)) + "}"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def row(case: Case, verified: Sequence[str]) -> str:
    """A line of the page."""
    cells = (f"`{case.option}`", asked(case), case.outcome, ", ".join(verified), case.note)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.options", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--only", default="", help="only cases of this option")
    parser.add_argument("--plain", action="store_true", help="show only what is wrong")
    chosen = parser.parse_args(arguments)
    cases = [case for case in CASES if chosen.only in ("", case.option)]
    begin_s = time.monotonic()
    outcomes = anyio.run(lambda: run_cases(cases, plain=chosen.plain))
    good = sum(outcome.ok for outcome in outcomes)
    if chosen.write and good == len(CASES):
        PAGE.write_text(_HEAD + "".join(row(o.case, o.verified) + "\n" for o in outcomes))
    figures = {
        "tested": good,
        "total": len(cases),
        "seconds": round(time.monotonic() - begin_s, 1),
        "passes": sum(case.outcome == "passes" for case in cases),
        "wrong": [f"{o.case.option}: {asked(o.case)}: {o.outcome}" for o in outcomes if not o.ok],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1))
    ok = bool(cases) and good == len(cases)
    print(f"options: {'ok' if ok else 'FAILED'} tested={good}/{len(cases)} {json.dumps(figures)}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
