"""Keep what is slow and needs root out of a normal run: it is collected when a path in here is named.

``pytest`` and ``pytest tests`` pass it by; ``pytest tests/bench`` runs it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    # None leaves the decision to others; False would overrule them.
    return None if any(path.resolve().is_relative_to(HERE) for path in named) else True
