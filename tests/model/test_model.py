"""The shipped handover holds in every state within bounds, and the checker finds what is wrong with others."""

from __future__ import annotations

import pytest

from tests.model.__main__ import main
from tests.model.explore import explore, walk
from tests.model.world import Bounds, Protocol

SMALL = {
    "one migration": Bounds(crash_hosts=True),
    "a paused guest": Bounds(crash_hosts=True, paused=True),
    "three hosts": Bounds(hosts=3, silent=False),
    "there and back": Bounds(migrations=2, kill=False, silent=False),
    "journals are lost": Bounds(crash_hosts=True, lose_journals=True, fail=False, silent=False),
}


@pytest.mark.parametrize("bounds", SMALL.values(), ids=SMALL)
def test_every_state_of_a_small_world(bounds: Bounds) -> None:
    found = explore(Protocol(), bounds)
    assert (found.violation, found.trace) == ("", [])
    assert found.complete
    assert found.states > 2_000


@pytest.mark.parametrize("seed", range(4))
def test_walks_through_a_large_world(seed: int) -> None:
    """Three hosts, three migrations of one domain, and everything fails."""
    bounds = Bounds(hosts=3, migrations=3, crash_hosts=True, paused=seed % 2 == 1)
    found = walk(Protocol(), bounds, seed=seed, walks=1_500, steps=200)
    assert (found.violation, found.trace) == ("", [])
    assert found.states > 5_000


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-kill", "--no-silent"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("model: ok ")
    assert said[-1].endswith(" s: every state")
    assert main(["--states", "100"]) == 0
    assert "not every state" in capsys.readouterr().out
