"""The last line of ``make safety`` says when something is wrong, and its figures are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.safety import extra_of, main
from tests.qemu import need_qemu

FEW = ["--pairs", "2", "--simulated", "4"]
NUMBER = r"-?[0-9.]+"


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The figures of a test are not those of the last real run."""
    path = tmp_path / "safety.json"
    monkeypatch.setattr("tests.bench.safety._RESULTS", path)
    return path


def test_two_pairs(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    need_qemu()
    assert main(FEW) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    form = (
        rf"safety: ok pairs=2 blackout_ms={NUMBER}/{NUMBER} completed_to_cont_ms={NUMBER}/{NUMBER}"
        rf" extra_ms={NUMBER} \[{NUMBER}, {NUMBER}\] simulated_per_s={NUMBER}/{NUMBER} ({{.*}})"
    )
    found = re.fullmatch(form, last)
    assert found is not None, last
    figures = json.loads(found[1])
    written = json.loads(results.read_text())
    assert written["summary"] == last
    assert {key: written[key] for key in figures} == figures
    samples = written["samples"]
    assert [(each["pair"], each["journal"]) for each in samples["crossings"]] == [
        (0, False),
        (0, True),
        (1, True),
        (1, False),
    ]
    assert {kind: len(spent) for kind, spent in samples["simulated_s"].items()} == {"on": 4, "off": 4}


def test_a_lost_tick_fails(capsys: pytest.CaptureFixture[str]) -> None:
    need_qemu()
    assert main([*FEW, "--faults", "ferryman.migrate_perform.completed=corrupt"]) == 1
    *_, last = lines = capsys.readouterr().out.splitlines()
    assert last.startswith("safety: FAILED pairs=2 ")
    assert "violation: qemu: 1 ticks lost, 0 doubled, 0 overlaps" in lines


def test_the_interval_is_that_of_the_median() -> None:
    extra = extra_of([1.0, 2.0, 3.0, 4.0, 100.0] * 20)
    assert extra.ms == 3.0
    assert 2.0 <= extra.low_ms <= 3.0 <= extra.high_ms <= 4.0
    assert extra == extra_of([1.0, 2.0, 3.0, 4.0, 100.0] * 20)
    assert extra_of([0.5]) == extra_of([0.5, 0.5])
