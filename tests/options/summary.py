"""``make qemu``: options, cuts of copied disks, and definitions on real QEMU, and one line about all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.definitions import HERE, names, snapshot
from tests.fault import storage
from tests.options.__main__ import RESULTS
from tests.options.__main__ import main as options

_DEFINITIONS = Path(__file__).parents[1] / "integration" / "test_definitions.py"


def definitions() -> tuple[int, int]:
    """How many accepted definitions make the command line that stands beside them, and how many there are.

    None counts unless they all start, and make the same machine at both ends of a migration.
    """
    # In a process of its own: pytest takes none in which much of what it watches is imported already.
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", str(_DEFINITIONS)], check=False
    )
    if tested.returncode:
        return 0, len(names())
    good = sum((HERE / "accepted" / f"{name}.argv").read_text() == snapshot(name) for name in names())
    return good, len(names())


def main() -> int:
    options_failed = options(["--plain"])
    figures = json.loads(RESULTS.read_text())
    cuts_failed = storage.main([])
    cuts = storage.told()
    good, total = definitions()
    ok = not options_failed and not cuts_failed and good == total > 0
    figures |= {"storage": cuts, "definitions": {"tested": good, "total": total}}
    print(
        f"qemu: {'ok' if ok else 'FAILED'} options={figures['tested']}/{figures['total']}"
        f" storage_faults={cuts['cuts']} lost_writes={cuts['lost_writes']} definitions={good}/{total}"
        f" {json.dumps(figures)}"
    )
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
