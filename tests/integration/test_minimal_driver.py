"""A driver with ``capabilities`` and three ``migrate_*`` hooks, built as a wheel beside core, migrates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "ferryman-mylab"
version = "1.0"
dependencies = ["ferryman"]

[project.entry-points."ferryman.drivers"]
mylab = "ferryman_mylab:MyLabDriver"
"""

DRIVER = """
from ferryman.capabilities import Capabilities
from ferryman.hookspecs import PerformReply, PrepareReply, hookimpl
from ferryman.types import Feature, TransferStatistics

ran = []


class MyLabDriver:
    @hookimpl
    async def capabilities(self, request):
        MyLabDriver.opened = getattr(MyLabDriver, "opened", 0) + 1
        return Capabilities(
            scheme="mylab", hypervisor="lab", version=(1, 0), arch="x86_64", cpu_model="", machines=(),
            host_uuid=f"7e0fb9c1-4d35-4b44-9d8a-{id(self) % 10**12:012}", memory_bytes=None,
            features=frozenset({Feature.LIVE}), uri_transports=("tcp",), domain_types=("lab",),
        )

    @hookimpl
    async def migrate_prepare(self, request):
        return PrepareReply(migration_uri="tcp://127.0.0.1:4444")

    @hookimpl
    async def migrate_perform(self, request):
        return PerformReply(statistics=TransferStatistics(transferred_bytes=1))

    @hookimpl
    async def migrate_finish(self, request):
        ran.append(request.verdict.value)
"""

PROGRAM = """
from ferryman.sync import connect
import ferryman_mylab
with connect("mylab:///a") as a, connect("mylab:///b") as b:
    result = a.lookup_by_name("web").migrate(b).result()
    print(result.name, result.transferred_bytes, ferryman_mylab.ran, a.open_migrations(), b.open_migrations())
"""


def test_a_driver_of_four_hooks(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "ferryman_mylab").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "ferryman_mylab" / "__init__.py").write_text(DRIVER)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "wheel", *options, "-w", str(tmp_path), str(project)], check=True, timeout=100)
    wheel = next(tmp_path.glob("*.whl"))
    beside = tmp_path / "beside"
    subprocess.run([*pip, "install", *options, "--target", str(beside), str(wheel)], check=True, timeout=100)
    environment = {**os.environ, "PYTHONPATH": str(beside), "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.stdout == "web 1 ['run'] [] []\n", done.stderr
    assert len(list((tmp_path / "state" / "ferryman").glob("mylab-*.journal"))) == 2
