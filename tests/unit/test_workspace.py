"""The workspace keeps its shape: what lies where, what is pinned, who may import whom."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import bootstrap
from tests.bootstrap import DISTRIBUTIONS

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "core",
    "docs",
    "plugins",
    "pyproject.toml",
    "tests",
}

# Each contract of pyproject.toml with one import that must break it: the file it is planted in, and the line.
PLANTED = {
    "core-knows-no-driver": ("core/src/ferryman/types.py", "import ferryman_qemu"),
    "drivers-are-independent": ("plugins/xen/src/ferryman_xen/__init__.py", "import ferryman_qemu"),
    "drivers-use-public-names": ("plugins/xen/src/ferryman_xen/__init__.py", "import ferryman.journal"),
    "rules-do-no-io": ("core/src/ferryman/handover.py", "from sqlite3 import connect"),
    "lxml-behind-two-modules": ("core/src/ferryman/handover.py", "from lxml import etree"),
    "stevedore-behind-registry": ("plugins/qemu/src/ferryman_qemu/qmp.py", "import stevedore.driver"),
    "nothing-needs-the-cli": ("core/src/ferryman/__init__.py", "from ferryman import cli"),
}


# What lies where


def _listed_files() -> list[str]:
    """The files that belong to the work tree: all but those that .gitignore names."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        assert os.environ.get("CI") != "true", "continuous integration runs in a clone, with git"
        pytest.skip("this copy of the tree is no clone, or git is not installed")
    listing = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return [name for name in listing.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


def test_the_top_level_holds_what_the_design_lists_and_nothing_else() -> None:
    names = {name.split("/")[0] for name in _listed_files()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL
    assert {name for name in names if name.startswith(".")} <= {".ci", ".editorconfig", ".gitignore"}


def test_a_plugin_is_xen_qemu_or_remote() -> None:
    plugins = {name.split("/")[1] for name in _listed_files() if name.startswith("plugins/")}
    assert plugins == {"qemu", "remote", "xen"}


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_a_distribution_has_one_typed_package_in_a_src_layout(folder: str) -> None:
    name = DISTRIBUTIONS[folder]
    inside = [Path(file).relative_to(folder) for file in _listed_files() if file.startswith(f"{folder}/")]
    outside_src = {str(file) for file in inside if file.parts[0] != "src"}
    units = {"systemd/ferrymand.service", "systemd/ferrymand.socket"} if folder == "plugins/remote" else set()
    assert outside_src == {"LICENSE", "README.md", "pyproject.toml"} | units
    assert {file.parts[1] for file in inside if file.parts[0] == "src"} == {name}
    assert Path("src", name, "py.typed") in inside
    assert Path("src", name, "__init__.py") in inside


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_a_distribution_holds_the_licence_of_the_repository(folder: str) -> None:
    assert (ROOT / folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_root_builds_nothing() -> None:
    assert {"project", "build-system"}.isdisjoint(_configuration())


def _configuration() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# What is pinned


def _pins() -> dict[str, str]:
    """Names and versions of tests/constraints.txt; each line but comments must be an exact pin."""
    pins = {}
    for line in (ROOT / "tests/constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([0-9][0-9a-z.]*)(?: ; .+)?", line)
        assert pin is not None, f"not an exact pin: {line}"
        assert pin[1] not in pins, f"pinned twice: {pin[1]}"
        pins[pin[1]] = pin[2]
    return pins


def _required(entries: list[str]) -> set[str]:
    """Names of all that the entries bring in on this machine, by the metadata of what is installed."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(entry) for entry in entries]
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        found.add(name)
        try:
            further = requires(name) or []
        except PackageNotFoundError:  # belongs to a stage that is not set up here
            continue
        for requirement in map(Requirement, further):
            extras = wanted.extras or {""}
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras):
                queue.append(requirement)
    return found


@pytest.mark.parametrize("stage", bootstrap.STAGES)
def test_all_that_a_stage_installs_is_pinned(stage: str) -> None:
    assert _required(bootstrap.requirements(ROOT, stage)) <= set(_pins())


def test_the_constraints_name_no_place_on_a_network_and_no_digest() -> None:
    text = (ROOT / "tests/constraints.txt").read_text()
    assert re.search(r"://|@|--|sha\d|\.(?:org|com|net|io)\b", text) is None


# Who imports whom


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and of the contracts about them."""
    copy = tmp_path_factory.mktemp("sources")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for folder in DISTRIBUTIONS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder / "src", copy / folder / "src", ignore=ignore)
    # A command line to plant an import of, even while the core ships none.
    (copy / "core/src/ferryman/cli").mkdir(exist_ok=True)
    (copy / "core/src/ferryman/cli/__init__.py").touch()
    return copy


def _lint_imports(sources: Path, *options: str) -> subprocess.CompletedProcess[str]:
    paths = [str(sources / folder / "src") for folder in DISTRIBUTIONS]
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache", *options],
        cwd=sources,
        # Ahead of the installed distributions, which are this tree.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_contract_is_kept_and_has_a_violation_to_try_it_with(sources: Path) -> None:
    contracts = _configuration()["tool"]["importlinter"]["contracts"]
    assert {contract["id"] for contract in contracts} == set(PLANTED)
    done = _lint_imports(sources)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("contract", PLANTED)
def test_a_planted_import_breaks_its_contract(sources: Path, contract: str) -> None:
    file, line = PLANTED[contract]
    path = sources / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try:
        done = _lint_imports(sources, "--contract", contract)
    finally:
        path.write_text(before)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 kept, 1 broken" in done.stdout
