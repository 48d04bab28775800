"""The last lines of ``make demo`` and ``make bench`` are there, and say when something is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench.__main__ import main as bench
from tests.bench.domains import main as domains
from tests.demo.__main__ import main as demo
from tests.qemu import need_qemu

QUICK = ["--legs", "1", "--memory-mib", "32", "--dirty-mib-per-s", "4", "--settle-ticks", "50", "--plain"]
FEW = ["--peers", "ferryman", "--rounds", "2", "--big-rounds", "0", "--full-rounds", "0", "--parallel", ""]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of a test are not those of the last real run."""
    monkeypatch.setattr("tests.demo.__main__._RESULTS", tmp_path / "figures.json")
    monkeypatch.setattr("tests.bench.__main__._RESULTS", tmp_path / "figures.json")
    monkeypatch.setattr("tests.bench.domains._RESULTS", tmp_path / "figures.json")


@pytest.mark.parametrize("driver", ["qemu", "test"])
def test_demo(driver: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if driver == "qemu":
        need_qemu()
    assert demo(["--driver", driver, *QUICK]) == 0
    form = r"demo: ok ticks_lost=0 memory_errors=0 blackout_ms=[0-9.]+ total_ms=[0-9.]+ driver=" + driver
    assert re.fullmatch(form, capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "figures.json").read_text())["ok"] is True
    assert demo(["--driver", driver, *QUICK, "--faults", "*.migrate_perform.completed=corrupt"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("demo: FAILED ticks_lost=0 memory_errors=1 ")
    assert json.loads((tmp_path / "figures.json").read_text())["ok"] is False


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    need_qemu()
    assert bench(FEW) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("bench: ok wall_vs_raw=")
    assert bench([*FEW, "--faults", "ferryman.migrate_perform.completed=corrupt"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("bench: FAILED wall_vs_raw=")
    (series,) = json.loads((tmp_path / "figures.json").read_text())["series"]
    assert (series["ticks_lost"], len(series["wall_ms"])) == (1, 2)


def test_domains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    need_qemu()
    assert domains(["--peers", "raw,ferryman", "--rounds", "2", "--guests", "2", "--simulated", "3"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"domains: ok start_vs_raw=[0-9.]+ start_vs_libvirt=nan counters2_vs_raw=[0-9.]+ ", last)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [len(figures[kind]["ferryman"]) for kind in ("start_ms", "count_ms", "simulated_ms")] == [2, 2, 2]
    assert "QEMU, until it answers" in figures["parts_ms"]
