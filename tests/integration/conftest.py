"""Two hosts of the QEMU driver with a guest that is watched from outside, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ferryman.sync
from tests.guests.counter import CounterGuest
from tests.guests.inspect import dump_memory, pids, run_directories
from tests.guests.witness import Witness

NAME = "counter"


@dataclass(kw_only=True)
class Field:
    """Two roots, a guest's definition, and its witness."""

    directory: Path
    guest: CounterGuest
    definition: str
    witness: Witness

    @property
    def roots(self) -> list[Path]:
        return [self.directory / "a", self.directory / "b"]

    @property
    def uris(self) -> list[str]:
        return [f"qemu:///embed?root={root}" for root in self.roots]

    def wrong_pages(self, root: Path) -> int:
        """Pages of the paused guest that break its rule; the root must be closed."""
        dump = self.directory / "memory"
        dump_memory(root, NAME, dump, self.guest.memory_bytes)
        report = self.guest.verify_memory(dump)
        dump.unlink()
        assert report.pages_checked > 1000
        return report.errors

    def wait_ticks(self, count: int) -> None:
        """Wait until the guest has gone on by some ticks."""
        last = self.witness.last()
        self.witness.wait_tick((last.value if last else 0) + count, timeout_s=30)


@pytest.fixture
def field() -> Iterator[Field]:
    if shutil.which("qemu-system-x86_64") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("qemu-system-x86_64 is not installed")
        pytest.skip("qemu-system-x86_64 is not installed")
    directory = Path(tempfile.mkdtemp(prefix="ferryman-it-"))
    guest = CounterGuest(memory_bytes=32 << 20, tick_hz=500, page_count=5000, pages_per_tick=4, prefill=True)
    guest.write_image(directory / "image")
    with Witness() as witness:
        made = Field(
            directory=directory,
            guest=guest,
            definition=guest.domain_xml(NAME, uuid.uuid4(), directory / "image", witness.socket_path),
            witness=witness,
        )
        try:
            yield made
            left = [str(path) for root in made.roots for path in run_directories(root)]
            assert left == [], "run directories are left behind"
            assert not [path for path in directory.rglob("*") if path.is_socket()]
        finally:
            for uri, root in zip(made.uris, made.roots, strict=True):
                if pids(root):
                    with ferryman.sync.connect(uri) as connection:
                        for domain in connection.list_domains():
                            domain.destroy()
            shutil.rmtree(directory)
