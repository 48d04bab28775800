"""``python -m ferryman`` is the command line."""

from __future__ import annotations

from ferryman.cli import main

main()
