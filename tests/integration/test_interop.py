"""Stock clients against our daemons: a part of what ``make interop`` does in full."""

from __future__ import annotations

import json
import random
import re
import subprocess

import pytest

from tests.daemons import need_virsh
from tests.interop import __main__ as interop
from tests.interop import faults, verbs
from tests.interop.proxy import Kind

SEED = random.randrange(1 << 31)


@pytest.fixture(autouse=True)
def _virsh() -> None:
    need_virsh()


def test_verbs_of_virsh(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = verbs.run_verbs(print)
    assert all(each.good for each in outcomes), capsys.readouterr().out
    assert verbs.PAGE.read_text() == verbs.page(outcomes), "run python -m tests.interop --write"


def test_clients() -> None:
    assert interop._clients() == ["virsh", "libvirt-python", "ferryman"]


@pytest.mark.parametrize("protocol", ["v1", "v2", "v3", "params"])
def test_broken_messages(protocol: str) -> None:
    assert faults.run(protocol, 6, SEED, print) == 6


def test_what_the_last_line_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(protocol: str, *_: object) -> int:
        if protocol == "v3":
            raise faults.Wrong("the guest is at both")
        return 40

    outcomes = [verbs.Outcome(f"verb{number}", number != 7, "") for number in range(30)]
    monkeypatch.setattr(verbs, "run_verbs", lambda _say: outcomes)
    monkeypatch.setattr(faults, "run", wrong)
    monkeypatch.setattr(interop, "_clients", lambda: ["virsh", "libvirt-python", "ferryman"])
    assert interop.main([]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"interop: FAILED verbs=29/30 migrations=v1,v2 clients=virsh,libvirt-python,ferryman (.*)", line
    )
    assert found is not None
    assert json.loads(found[1])["wrong"] == "the guest is at both"
    assert json.loads(found[1])["wrong_verbs"] == ["verb7"]


def test_a_client_that_is_told_a_lie_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_done(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(faults, "virsh_tried", nothing_done)
    with faults.ring("params") as ring:
        with pytest.raises(faults.Wrong, match="without a fault failed"):
            ring.migrate(None)
        with pytest.raises(faults.Wrong, match="reports success, and the guest has not moved"):
            ring.migrate(faults.Case("params", 0, 99, Kind.LOST))
