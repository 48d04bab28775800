"""The fault campaign: some of its cases, the violation that it must find, and how it picks what it runs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from ferryman.handover import TABLE
from tests.fault.__main__ import run_all
from tests.fault.campaign import FAULTS, MOMENTS, Case, Result, all_cases, reached_by, run_cases, sampled
from tests.fault.expected import predict
from tests.fault.net import missing
from tests.fault.points import entry_name, points
from tests.fault.scenarios import _REASONS, SCENARIOS, unreached
from tests.qemu import need, need_qemu

ROOT = Path(__file__).parents[2]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture
def lab() -> None:
    """What the campaign's cases need of a machine."""
    need_qemu()
    lacking = missing()
    need(lacking or "nothing", here=lacking is None)


def case(scenario: str, point: str, fault: str, *, incarnation: int = 0) -> Case:
    return Case(
        scenario=BY_NAME[scenario],
        point=point,
        fault=fault,
        incarnation=incarnation,
        brief=True,
        again=fault == "kill-source-manager",
    )


@pytest.mark.usefixtures("lab")
def test_some_cases() -> None:
    """One of every program that is killed, and of every way to cut, at the steps where the owner changes."""
    cases = [
        case("crossing", "source.handing.proved.answered", "kill-coordinator"),
        case("crossing", "source.stopped.claim.written", "kill-source-manager"),
        case("crossing", "destination.prepared.go.written", "kill-destination-manager"),
        case("crossing", "destination.prepared.go.before", "kill-source-qemu"),
        case("crossing", "destination.prepared.go.did-run-guest", "kill-destination-qemu"),
        case("cont-fails", "destination.claiming.never-ran.written", "cut-control-reset"),
        case(
            "claiming-restart",
            "destination.claiming.run-again.did-run-guest",
            "cut-data-silent",
            incarnation=1,
        ),
    ]
    with closing(run_cases(cases, 2)) as running:
        found = dict(running)
    for number, result in sorted(found.items()):
        assert (cases[number].point, result.violations) == (cases[number].point, [])
        assert result.reached
        assert result.struck
        assert not result.needs_human
        assert result.migrated_again == cases[number].again
    outcomes = [found[number].outcome for number in range(len(cases))]
    assert outcomes[1] == outcomes[2] == outcomes[3] == outcomes[6] == "destination"
    assert outcomes[4] == "none"
    assert outcomes[5] == "source"


@pytest.mark.usefixtures("lab")
def test_a_planted_violation_is_found(tmp_path: Path) -> None:
    results = tmp_path / "fault.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault", "--plant", "--json", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    *_, last = done.stdout.splitlines()
    assert last.startswith("fault: FAILED cases=1 pairs=1/1 violations=1 "), done.stdout + done.stderr
    assert done.returncode == 1
    (result,) = json.loads(results.read_text())["results"]
    assert result["outcome"] == "source+destination"
    assert any("overlaps (Overlap(" in violation for violation in result["violations"])


def test_points_follow_the_table() -> None:
    made = points()
    assert len(made) == len(set(made)) > len(TABLE)
    assert {point.rsplit(".", 1)[0] for point in made} == {entry_name(entry) for entry in TABLE}
    assert "source.begun.perform.before" in made
    assert "source.begun.perform.written" in made
    assert "destination.prepared.go.did-run-guest" in made
    assert {scenario.point for scenario in SCENARIOS} <= {*made, "", "transfer"}


def test_reasons_are_about_the_table() -> None:
    entries = [entry_name(entry).split(".") for entry in TABLE]
    for pattern in _REASONS:
        wanted = pattern.split(".")
        assert any(all(w in ("*", e) for w, e in zip(wanted, entry, strict=True)) for entry in entries), (
            pattern
        )
    assert len(unreached(set())) == len(TABLE)


def test_every_point_and_moment_meets_every_fault() -> None:
    reached = {point: [(SCENARIOS[0], 0)] for point in points()}
    assert reached_by([]) == {}
    cases = all_cases(reached, 1.0, random.Random(1))
    pairs = {(case.point, case.fault) for case in cases}
    assert len(pairs) == len(cases) == (len(reached) + MOMENTS) * len(FAULTS)


def test_a_point_that_is_missed_is_waited_for_in_other_scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int]] = []

    def run(cases: list[Case], jobs: int) -> Generator[tuple[int, Result], None, None]:
        for index, case in enumerate(cases):
            tried.append((case.scenario.name, case.incarnation))
            reached = case.scenario is SCENARIOS[2]
            yield (
                index,
                Result(scenario=case.scenario.name, point=case.point, fault=case.fault, reached=reached),
            )

    monkeypatch.setattr("tests.fault.__main__.run_cases", run)
    elsewhere = ((SCENARIOS[1], 1), (SCENARIOS[2], 2), (SCENARIOS[3], 0))
    results: list[Result] = []
    run_all([Case(scenario=SCENARIOS[0], point="p", fault="f", elsewhere=elsewhere)], 1, results)
    names = [scenario.name for scenario in SCENARIOS]
    assert tried == [(names[0], 0), (names[0], 0), (names[1], 1), (names[2], 2)]
    assert [(result.scenario, result.reached) for result in results] == [(names[2], True)]
    # Where no scenario comes to it, that is what is told.
    results.clear()
    run_all([Case(scenario=SCENARIOS[0], point="p", fault="f", elsewhere=elsewhere[:1])], 1, results)
    assert [(result.scenario, result.reached) for result in results] == [(names[1], False)]


def test_a_sample_is_even() -> None:
    reached = {point: [(SCENARIOS[0], 0)] for point in points()[:30]}
    cases = all_cases(reached, 1.0, random.Random(1))
    chosen = sampled(cases, 6 * len(FAULTS), random.Random(2))
    assert len(chosen) == len({(case.point, case.fault) for case in chosen}) == 6 * len(FAULTS)
    assert [sum(case.fault == fault for case in chosen) for fault in FAULTS] == [6] * len(FAULTS)
    assert {sum(case.point == point for case in chosen) for point in {case.point for case in cases}} <= {1, 2}
    assert chosen == sampled(cases, 6 * len(FAULTS), random.Random(2))


def test_predictions_leave_the_guest_somewhere() -> None:
    for point in [*points(), "transfer.3"]:
        for fault in FAULTS:
            predicted = predict(point, fault)
            assert predicted
            assert ("none" in predicted) <= fault.endswith("-qemu")
