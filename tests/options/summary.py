"""``make qemu``: the matrix of options on real QEMU, and the command lines of the accepted definitions."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

from tests.options.__main__ import RESULTS
from tests.options.__main__ import main as options


def definitions() -> tuple[int, int]:
    """How many accepted definitions make the command line that stands beside them, and how many there are."""
    if find_spec("tests.definitions") is None:
        return 0, 0
    from tests.definitions import HERE, names, snapshot

    good = sum((HERE / "accepted" / f"{name}.argv").read_text() == snapshot(name) for name in names())
    return good, len(names())


def main() -> int:
    failed = options(["--plain"])
    figures = json.loads(RESULTS.read_text())
    good, total = definitions()
    state = "FAILED" if failed or good < total else "ok"
    figures["definitions"] = {"tested": good, "total": total}
    print(
        f"qemu: {state} options={figures['tested']}/{figures['total']} definitions={good}/{total}"
        f" {json.dumps(figures)}"
    )
    return int(state != "ok")


if __name__ == "__main__":
    sys.exit(main())
