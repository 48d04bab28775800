"""Rewrite the command lines of the accepted definitions, and show what changed in them."""

from __future__ import annotations

import difflib
import sys

from tests.definitions import HERE, names, snapshot


def main() -> int:
    """Write every snapshot; returns 1 where one changed."""
    changed = 0
    for name in names():
        path = HERE / "accepted" / f"{name}.argv"
        before = path.read_text() if path.exists() else ""
        after = snapshot(name)
        if before != after:
            changed = 1
            path.write_text(after)
            sys.stdout.writelines(
                difflib.unified_diff(
                    before.splitlines(keepends=True), after.splitlines(keepends=True), name, name, n=0
                )
            )
    return changed


if __name__ == "__main__":
    sys.exit(main())
