"""The command line ``ferryman``; needs the extra ``ferryman[cli]``."""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line."""
    try:
        import click  # noqa: F401 - only to say what is missing
    except ImportError:
        sys.exit("ferryman: the command line needs click: pip install 'ferryman[cli]'")
    from ferryman.cli.commands import ferryman

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal's encoding lacks is no reason to fail after something was done.
        sys.stdout.reconfigure(errors="backslashreplace")
    ferryman(prog_name="ferryman")


__all__ = ["main"]
