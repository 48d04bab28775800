"""Set-up does nothing twice, believes nothing half done, and says what it cannot do itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import bootstrap
from tests.bootstrap import Program, SetupError, Stage

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """Stands in for everything that set-up would run; the commands are recorded, and a few can be made to fail.

    :param root: tree whose ``.venv`` is pretended to be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commands: list[str] = []
        self.failing: dict[str, BaseException] = {}
        self.programs: set[str] = set()

    def run(self, command: Sequence[str], *, at: Path = ROOT, stdin: str | None = None) -> str:
        text = " ".join(command)
        self.commands.append(text)
        for part, failure in self.failing.items():
            if part in text:
                raise failure
        if text.endswith(" .venv"):
            (self.root / ".venv/bin").mkdir(parents=True)
            (self.root / ".venv/bin/python").touch()
        return ""

    def which(self, name: str, path: str | None = None) -> str | None:
        # What draws diagrams is there for everybody: no test here is about it.
        return f"/usr/bin/{name}" if name in {*self.programs, "dot"} else None

    def created(self) -> int:
        """How many times the virtual environment was made."""
        return sum(command.endswith(" .venv") for command in self.commands)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a tree to set up, without uv, QEMU and apt-get, used by somebody who is not root."""
    (tmp_path / "tests").mkdir()
    for folder in (".", *bootstrap.DISTRIBUTIONS):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / folder / "pyproject.toml", tmp_path / folder)
    shutil.copy(ROOT / "tests/constraints.txt", tmp_path / "tests")
    machine = Machine(tmp_path)
    monkeypatch.setattr(bootstrap, "_run", machine.run)
    monkeypatch.setattr(shutil, "which", machine.which)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return machine


def test_a_second_run_runs_nothing(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    assert machine.created() == 1
    machine.commands.clear()
    bootstrap.set_up(machine.root, "docs")
    assert machine.commands == []


def test_a_stage_that_another_one_holds_is_set_up_with_it(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    assert bootstrap.python_ready(machine.root, "demo")
    assert not bootstrap.python_ready(machine.root, "test")


def test_a_further_stage_adds_to_what_is_there(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "demo")
    bootstrap.set_up(machine.root, "docs")
    assert machine.created() == 1
    assert bootstrap.python_ready(machine.root, "demo")
    assert bootstrap.python_ready(machine.root, "docs")


@pytest.mark.parametrize("step", [" .venv", "-c tests/constraints.txt", "--no-build-isolation"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SetupError("the disk is full")])
def test_an_interrupted_set_up_begins_again(machine: Machine, step: str, failure: BaseException) -> None:
    machine.failing = {step: failure}
    with pytest.raises(type(failure)):
        bootstrap.set_up(machine.root, "docs")
    machine.failing = {}
    assert not bootstrap.python_ready(machine.root, "docs")
    leftover = machine.root / ".venv/leftover"
    leftover.parent.mkdir(exist_ok=True)
    leftover.touch()
    bootstrap.set_up(machine.root, "docs")
    assert not leftover.exists()
    assert bootstrap.python_ready(machine.root, "docs")


def test_an_interrupted_addition_is_not_believed_either(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "demo")
    machine.failing = {"-c tests/constraints.txt": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        bootstrap.set_up(machine.root, "docs")
    assert not bootstrap.python_ready(machine.root, "demo")


def test_another_pin_makes_the_environment_anew(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    with (machine.root / "tests/constraints.txt").open("a") as constraints:
        constraints.write("left-out==1\n")
    bootstrap.set_up(machine.root, "docs")
    assert machine.created() == 2


def test_another_requirement_is_added_without_beginning_anew(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    machine.commands.clear()
    project = machine.root / "core/pyproject.toml"
    project.write_text(project.read_text().replace('"pluggy>=1.7,<2",', '"pluggy>=1.7,<2", "new-one",'))
    bootstrap.set_up(machine.root, "docs")
    assert machine.created() == 0
    assert any("new-one" in command for command in machine.commands)


def test_a_moved_tree_is_set_up_anew(machine: Machine, tmp_path: Path) -> None:
    bootstrap.set_up(machine.root, "docs")
    moved = tmp_path / "moved"
    shutil.copytree(machine.root, moved)
    assert not bootstrap.python_ready(moved, "docs")


def test_an_environment_whose_python_is_gone_is_made_anew(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    (machine.root / ".venv/bin/python").unlink()
    assert not bootstrap.python_ready(machine.root, "docs")


def test_configuration_of_tools_installs_nothing(machine: Machine) -> None:
    bootstrap.set_up(machine.root, "docs")
    with (machine.root / "pyproject.toml").open("a") as project:
        project.write("\n[tool.other]\nlimit = 3\n")
    assert bootstrap.python_ready(machine.root, "docs")


def test_uv_is_used_where_it_is_and_pip_where_uv_fails(machine: Machine) -> None:
    machine.programs = {"uv"}
    machine.failing = {"uv pip install": SetupError("uv knows no index here")}
    bootstrap.set_up(machine.root, "docs")
    assert machine.commands[0].startswith("/usr/bin/uv venv ")
    assert "-m pip install" in machine.commands[-1]
    assert machine.created() == 2


def test_pip_begins_anew_where_uv_fails_to_add_a_stage(machine: Machine) -> None:
    machine.programs = {"uv"}
    bootstrap.set_up(machine.root, "demo")
    machine.failing = {"uv pip install": SetupError("uv knows no index here")}
    bootstrap.set_up(machine.root, "docs")
    assert machine.created() == 2
    assert bootstrap.python_ready(machine.root, "demo")


def test_the_distributions_are_never_asked_of_an_index() -> None:
    for stage in bootstrap.STAGES:
        assert not [entry for entry in bootstrap.requirements(ROOT, stage) if entry.startswith("ferryman")]


def test_without_root_the_demo_goes_on_and_names_the_command(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.programs = {"apt-get"}
    bootstrap.set_up(machine.root, "demo")
    assert "sudo apt-get install --no-install-recommends qemu-system-x86\n" in capsys.readouterr().out
    assert not any("apt-get" in command for command in machine.commands)


def test_without_root_the_tests_stop_and_name_the_command(machine: Machine) -> None:
    machine.programs = {"apt-get", "qemu-system-x86_64", "nasm", "ip", "iptables-restore"}
    with pytest.raises(
        SetupError,
        match="--no-install-recommends qemu-utils busybox-static swtpm virtinst libvirt-clients"
        " qemu-guest-agent python3-libvirt\n",
    ):
        bootstrap.set_up(machine.root, "test")
    assert bootstrap.python_ready(machine.root, "test")


def test_root_installs_what_is_missing_and_only_that(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    machine.programs = {"apt-get"}
    there = Program(package="there", name="apt-get")
    wanted = Program(package="wanted", name="wanted-program")
    monkeypatch.setitem(
        bootstrap.STAGES, "docs", Stage(groups=("docs",), programs=(there, wanted), optional_programs=True)
    )
    bootstrap.set_up(machine.root, "docs")
    (install,) = [command for command in machine.commands if " install --yes " in command]
    assert install.startswith("apt-get ")
    assert install.endswith("--no-install-recommends wanted")


def test_an_old_python_is_told_what_is_needed() -> None:
    pretend = (
        "import runpy, sys; sys.version_info = (3, 9, 2, 'final', 0); "
        "runpy.run_path('tests/bootstrap.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", pretend], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer, and " in done.stderr
    assert " is 3.9.2: " in done.stderr
    assert "Traceback" not in done.stderr
