"""A sample of the matrix of options on real QEMU, and its page."""

from __future__ import annotations

import anyio
import pytest

from ferryman.types import MigrationOptions
from tests.options.__main__ import PAGE, asked, run_cases
from tests.options.cases import CASES, Case
from tests.qemu import need_qemu

_SAMPLE = 7
"""Every so many cases are run here; ``python -m tests.options`` runs all."""


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().replace("\\|", "|") for cell in line.strip("| ").split(" | "))


@pytest.mark.timeout(120)
def test_a_sample() -> None:
    need_qemu()
    sample: list[Case] = list(CASES[::_SAMPLE])
    assert len(sample) >= 15
    outcomes = anyio.run(lambda: run_cases(sample, plain=True))
    assert [(asked(o.case), o.outcome, o.wrong) for o in outcomes if not o.ok] == []


def test_the_page_lists_exactly_the_cases() -> None:
    rows = [cells(line)[:3] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert rows == [(f"`{case.option}`", asked(case), case.outcome) for case in CASES]


def test_every_option_has_a_case() -> None:
    used = {name for case in CASES for name in case.options} | {"port_range", "destination_definition"}
    # How long hosts and callers wait for each other is tested with their faults; copies have tests of their own.
    elsewhere = {"lease_s", "patience_s", "copy_storage", "copy_disks", "copy_bandwidth_bytes_per_s"}
    names = set(MigrationOptions.__dataclass_fields__) - elsewhere - {"copy_synchronously"}
    assert names - used == set()
