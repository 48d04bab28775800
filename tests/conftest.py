"""What all tests share: the event loops, simulated worlds that are forgotten, and two hosts of the QEMU driver."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from ferryman.testing import World, forget_world, world

pytest.register_assert_rewrite("tests.qemu")

from tests.qemu import CALM, HEAVY, Field, laid_out  # noqa: E402 - its assertions are rewritten like a test's

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


@pytest.fixture
def field() -> Iterator[Field]:
    """Two hosts of the QEMU driver and the usual guest."""
    with laid_out() as made:
        yield made


@pytest.fixture
def heavy_field() -> Iterator[Field]:
    """Two hosts and a guest that writes more than most networks carry."""
    with laid_out(HEAVY) as made:
        yield made


@pytest.fixture
def calm_field() -> Iterator[Field]:
    """Two hosts and a guest that writes nothing once it has begun."""
    with laid_out(CALM) as made:
        yield made
