"""Look into a root of the QEMU driver from outside: its processes, and a guest's memory.

The root must not be open: QEMU's monitors take one client at a time.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


class QMPSocket:
    """A blocking QMP client, independent of the one under test."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            # By way of the directory: a socket's address holds no more than 107 bytes.
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute a command. :raises RuntimeError: QEMU refused it."""
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self._file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()

    def __enter__(self) -> QMPSocket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def run_directories(root: Path) -> list[Path]:
    """Directories of the root's processes."""
    run = root / "run"
    return sorted(run.iterdir()) if run.exists() else []


def pids_by_name(root: Path) -> dict[str, int]:
    """Process numbers that the root's processes wrote down, by domain."""
    found = {}
    for directory in run_directories(root):
        record = json.loads((directory / "guest.json").read_text())
        if record["identity"]:
            found[record["name"]] = int(record["identity"].split(":")[1])
    return found


def pids(root: Path) -> list[int]:
    """Process numbers that the root's processes wrote down."""
    return list(pids_by_name(root).values())


def dump_memory(root: Path, name: str, path: Path, memory_bytes: int) -> None:
    """Write the physical memory of a guest that stands still into a file."""
    for directory in run_directories(root):
        if json.loads((directory / "guest.json").read_text())["name"] == name:
            with QMPSocket(directory / "read") as qmp:
                status = qmp.execute("query-status")["status"]
                if status == "running":
                    raise RuntimeError(f"the guest {name} must stand still, and it is {status}")
                qmp.execute("pmemsave", val=0, size=memory_bytes, filename=str(path))
            return
    raise RuntimeError(f"no process of {name} in {root}")
