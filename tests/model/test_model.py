"""The shipped handover holds in every state within bounds, and the checker finds what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fault.points import points
from tests.model import __main__ as program
from tests.model.diagram import draw
from tests.model.explore import explore, walk
from tests.model.mutants import READINGS, SURVIVORS, Mutant, generated
from tests.model.pages import counterexamples, matrix
from tests.model.peers import LIBVIRT_V2, LIBVIRT_V3, XL, XL_OPERATOR
from tests.model.predict import predict
from tests.model.world import Bounds, Protocol, Words


@pytest.mark.parametrize("bounds", program.WORLDS.values(), ids=program.WORLDS)
def test_every_state_of_a_small_world(bounds: Bounds) -> None:
    found = explore(Protocol(), bounds)
    assert (found.violation, found.trace) == ("", [])
    assert found.complete
    assert found.states > 2_000


@pytest.mark.parametrize("seed", range(4))
def test_walks_through_a_large_world(seed: int) -> None:
    """Three hosts, three migrations of one domain, and everything fails."""
    bounds = Bounds(
        hosts=3,
        migrations=3,
        crash_hosts=True,
        paused=seed % 2 == 1,
        postcopy=seed >= 2,
        person=seed >= 2,
    )
    found = walk(Protocol(), bounds, seed=seed, walks=500, steps=200)
    assert (found.violation, found.trace) == ("", [])
    assert found.states > 2_000


@pytest.mark.parametrize("reading", [m for m in READINGS if m.name not in SURVIVORS], ids=lambda m: m.name)
def test_a_reading_that_breaks_is_found(reading: Mutant) -> None:
    found = explore(reading.protocol, reading.bounds, heal=reading.heal)
    assert found.violation, f"{found.summary()}"
    assert found.violation in found.trace[-1].what


def test_mutants_have_names_of_their_own_and_survivors_exist() -> None:
    names = [mutant.name for mutant in program.all_mutants()]
    assert len(names) == len(set(names))
    assert len(names) - len(READINGS) >= 40
    assert set(SURVIVORS) <= set(names)
    assert len(SURVIVORS) <= len(names) * 0.05


@pytest.mark.parametrize(
    "mutant", [m for m in generated() if m.name not in SURVIVORS][::12], ids=lambda m: m.name
)
def test_some_of_the_generated_mutants(mutant: Mutant) -> None:
    """All of them are tried by ``make model``."""
    assert explore(mutant.protocol, mutant.bounds, heal=mutant.heal).violation


@pytest.mark.parametrize(
    ("peer", "broken"), [(LIBVIRT_V2, "I2"), (LIBVIRT_V3, "I1"), (XL, "I4"), (XL_OPERATOR, "I1")]
)
def test_the_handshakes_of_others_break(peer: Mutant, broken: str) -> None:
    found = explore(peer.protocol, peer.bounds, heal=peer.heal)
    assert found.violation.startswith(broken)
    drawn = draw(found.trace)
    assert "B (destination)" in drawn
    assert found.violation in drawn


def test_a_diagram() -> None:
    drawn = draw([Words("caller", "begins", "A"), Words("B", "thinks"), Words("broken", "I1: two run")])
    _title, begins, thinks, _gap, broken = drawn.splitlines()
    assert begins.startswith("|-")
    assert "begins" in begins
    assert begins.index(">") < thinks.index("* thinks")
    assert broken == "=> broken: I1: two run"


def test_the_documentation_shows_what_is_found_now() -> None:
    page = (Path(__file__).parents[2] / "docs" / "why" / "handover.md").read_text(encoding="utf-8")
    for name, drawn in counterexamples().items():
        assert drawn in page, f"the diagram of {name} is another one now"
    assert matrix() in page


PREDICTED = {
    ("destination.claiming.ran.written", "kill-source-qemu"): {"destination"},
    ("destination.claiming.ran.written", "kill-destination-qemu"): {"none"},
    ("destination.claiming.never-ran.written", "kill-destination-qemu"): {"source"},
    ("destination.prepared.go.written", "kill-destination-manager"): {"source", "destination"},
    ("source.handing.proved.answered", "kill-source-qemu"): {"destination", "none"},
    ("source.stopped.claim.written", "kill-source-manager"): {"destination"},
    ("transfer at random", "kill-destination-qemu"): {"source"},
    ("transfer at random", "kill-source-qemu"): {"none"},
}


@pytest.mark.parametrize(("case", "where"), PREDICTED.items(), ids=lambda value: "-".join(sorted(value)))
def test_what_the_model_predicts(case: tuple[str, str], where: set[str]) -> None:
    assert predict(*case) == where


def test_the_model_comes_to_the_points_of_a_crossing() -> None:
    reached = 0
    for point in points():
        try:
            assert predict(point, "kill-coordinator")
            reached += 1
        except KeyError:
            continue
    assert reached > 120


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--world", "--no-kill", "--no-silent"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("model: ok ")
    assert said[-1].endswith(" s: every state")
    assert program.main(["--world", "--states", "100"]) == 0
    assert "not every state" in capsys.readouterr().out


def test_a_planted_violation_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(program, "WORLDS", {"small": Bounds(kill=False, silent=False, fail=False)})
    monkeypatch.setattr(program, "_RESULTS", tmp_path / "results" / "model.json")
    assert program.main(["--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("model: ok states=")
    assert program.main(["--quick", "--plant"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("model: FAILED ")
    assert "counterexamples=libvirt-v2,libvirt-v3,xl" in last
    assert json.loads(last[last.index("{") :])["violations"]
