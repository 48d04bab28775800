"""Each distribution builds as a wheel that installs alone, with its declared requirements, and imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from tests.bootstrap import DISTRIBUTIONS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A built wheel.

    :param files: names inside.
    :param entry_points: text of entry_points.txt, empty where there is none.
    """

    path: Path
    metadata: Message
    files: frozenset[str]
    entry_points: str


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """The wheels of all distributions by folder, built from a copy so that the tree stays as it is."""
    work = tmp_path_factory.mktemp("wheels")
    shutil.copy(ROOT / "LICENSE", work)
    built = {}
    for folder in DISTRIBUTIONS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, work / folder, symlinks=True, ignore=ignore)
        _run(
            [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", f"{work}/dist", folder],
            work,
        )
        stem = DISTRIBUTIONS[folder]
        (path,) = (work / "dist").glob(f"{stem}-*.whl")
        built[folder] = _read_wheel(path)
    return built


def _read_wheel(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        files = frozenset(archive.namelist())
        info = "-".join(path.name.split("-")[:2]) + ".dist-info"
        points = f"{info}/entry_points.txt"
        return Wheel(
            path=path,
            metadata=Parser().parsestr(archive.read(f"{info}/METADATA").decode()),
            files=files,
            entry_points=archive.read(points).decode() if points in files else "",
        )


def _run(command: Sequence[str], at: Path) -> str:
    done = subprocess.run(command, cwd=at, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{command} said\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_a_wheel_holds_its_package_its_types_and_the_licence(wheels: dict[str, Wheel], folder: str) -> None:
    wheel = wheels[folder]
    name = DISTRIBUTIONS[folder]
    info = f"{name}-{wheel.metadata['Version']}.dist-info"
    units = {
        f"{name}-{wheel.metadata['Version']}.data/data/share/ferryman/systemd/{file.name}"
        for file in (ROOT / folder).glob("systemd/*")
    }
    assert {file for file in wheel.files if file.split("/")[0] not in (name, info)} == units
    assert len(units) == (2 if folder == "plugins/remote" else 0)
    sources = {
        f"{name}/{file.relative_to(ROOT / folder / 'src' / name)}"
        for file in (ROOT / folder / "src" / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert sources <= wheel.files
    assert {f"{name}/py.typed", f"{info}/licenses/LICENSE"} <= wheel.files
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.metadata["Requires-Python"] == ">=3.11"


def test_the_drivers_that_are_written_are_registered_and_no_others(wheels: dict[str, Wheel]) -> None:
    core, qemu = (wheels[folder].entry_points for folder in ("core", "plugins/qemu"))
    assert "[ferryman.drivers]\ntest = ferryman.testing.simulator:SimulatedDriver\n" in core
    assert "[ferryman.drivers]\nqemu = ferryman_qemu.driver:QemuDriver\n" in qemu
    assert wheels["plugins/xen"].entry_points == ""
    remote = wheels["plugins/remote"].entry_points
    assert "ferrymand = ferryman_remote.daemon.main:main\n" in remote
    for transport in ("tcp", "tls", "unix"):
        assert f"{transport} = ferryman_remote.driver:RemoteDriver\n" in remote
    assert "[ferryman.drivers]" not in remote


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_a_wheel_installs_alone_and_imports(wheels: dict[str, Wheel], folder: str, tmp_path: Path) -> None:
    _run([sys.executable, "-m", "venv", "--without-pip", "bare"], tmp_path)
    python = str(tmp_path / "bare/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--no-input"]
    # Whatever an index may offer under the core's name, the core is the wheel that was built here.
    constraints = tmp_path / "constraints.txt"
    pins = (ROOT / "tests/constraints.txt").read_text()
    constraints.write_text(f"{pins}ferryman @ {wheels['core'].path.as_uri()}\n")
    _run([*pip, "install", "--quiet", "-c", str(constraints), str(wheels[folder].path)], tmp_path)

    name = DISTRIBUTIONS[folder]
    look = f"import {name}; print({name}.__file__, *(found.name for found in importlib.metadata.distributions()))"
    place, *installed = _run(
        [python, "-I", "-W", "error", "-c", f"import importlib.metadata; {look}"], tmp_path
    ).split()
    assert Path(place).is_relative_to(tmp_path / "bare")
    ours = {found for found in installed if found.startswith("ferryman")}
    assert ours == {"ferryman", wheels[folder].metadata["Name"]}
    _run([*pip, "check"], tmp_path)
