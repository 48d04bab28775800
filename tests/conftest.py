"""What all tests share: the event loops, and simulated worlds that are forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ferryman.testing import World, forget_world, world

_numbers = itertools.count()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def lab() -> Iterator[World]:
    """A simulated world of its own, whose guests must have run in one place at a time."""
    name = f"lab{next(_numbers)}"
    made = world(name)
    yield made
    forget_world(name)
