"""A trace as a sequence diagram in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tests.model.world import CALLER, Words

_LANES = (CALLER, "A", "B")
_TITLES = ("caller", "A (source)", "B (destination)")
_WIDTH = 32


def draw(trace: Sequence[Words], *, titles: Sequence[str] = _TITLES) -> str:
    """Draw a trace; a line for each move, an arrow where it goes from one lane to another."""
    lines = ["".join(title.ljust(_WIDTH) for title in titles).rstrip()]
    for words in trace:
        lines += _lines(words)
    return "\n".join(lines)


def _lines(words: Words) -> list[str]:
    lanes = ["|".ljust(_WIDTH)] * len(_LANES)
    if words.who not in _LANES:
        return ["".join(lanes).rstrip(), *textwrap.wrap(f"=> {words.who}: {words.what}", _WIDTH * 3)]
    first = _LANES.index(words.who)
    if words.to in _LANES and words.to != words.who:
        left, right = sorted((first, _LANES.index(words.to)))
        room = _WIDTH * (right - left) - 4
        text = f" {words.what} "[:room].center(room, "-")
        arrow = f"|-{text}>" if first == left else f"|<{text}-"
        span = arrow.ljust(_WIDTH * (right - left), " ")
        return ["".join([*lanes[:left], span, *lanes[right:]]).rstrip()]
    rows = textwrap.wrap(words.what, _WIDTH - 4)
    return ["".join([*lanes[:first], f"* {row}".ljust(_WIDTH), *lanes[first + 1 :]]).rstrip() for row in rows]


__all__ = ["draw"]
