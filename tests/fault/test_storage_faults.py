"""Some cases of the storage campaign, and how it counts."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import closing

import pytest

from tests.fault.campaign import Result, run_cases
from tests.fault.net import missing
from tests.fault.storage import DOUBLED, FAULTS, LEFT, LOST, storage_cases, summary
from tests.qemu import need, need_qemu


@pytest.mark.timeout(120)
def test_some_cuts() -> None:
    need_qemu()
    lacking = missing()
    need(lacking or "nothing", here=lacking is None)
    cases = storage_cases(6, random.Random(7))
    with closing(run_cases(cases, 2)) as running:
        found = dict(running)
    for number, result in sorted(found.items()):
        assert (cases[number].fault, result.violations) == (cases[number].fault, [])
        assert result.reached
    ok, line = summary(list(found.values()), 6)
    assert ok
    assert line.startswith("storage: ok cuts=6/6 lost_writes=0 doubled_writes=0 leftovers=0 {")


def test_every_fault_comes_up_as_often() -> None:
    cases = storage_cases(50, random.Random(1))
    counts = Counter(case.fault for case in cases)
    assert set(counts) == set(FAULTS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({case.moment_s for case in cases}) == 50


def test_violations_are_counted() -> None:
    results = [
        Result(scenario="copy", point="transfer.0", fault="", reached=True, violations=violations)
        for violations in ([], [f"{LOST}: x"], [f"{DOUBLED}: x", f"{LEFT}: y"])
    ]
    ok, line = summary(results, 3)
    assert not ok
    assert line.startswith("storage: FAILED cuts=1/3 lost_writes=1 doubled_writes=1 leftovers=1 ")
