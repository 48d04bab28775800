"""Processes of the QEMU driver, with real ones."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from ferryman_qemu.process import Process


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_signal_to_a_process_that_is_gone_or_was_let_go_is_nothing(tmp_path: Path) -> None:
    process = Process.spawn(["/bin/sleep", "1000"], output=tmp_path / "log", inherited=(), environment={})
    assert Process.find(process.identity) is not None
    process.signal(signal.SIGKILL)
    with anyio.fail_after(10):
        await process.wait()
    process.signal(signal.SIGKILL)
    process.close()
    process.signal(signal.SIGKILL)
    assert Process.find(process.identity) is None
