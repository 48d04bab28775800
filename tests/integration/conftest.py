"""Two hosts of the QEMU driver for every test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.qemu")

from tests.qemu import CALM, HEAVY, Field, laid_out  # noqa: E402 - its assertions are rewritten like a test's


@pytest.fixture
def field() -> Iterator[Field]:
    """Two hosts and the usual guest."""
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
