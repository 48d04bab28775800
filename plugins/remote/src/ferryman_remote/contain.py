"""Where a defect stops: tasks of one client stand beside those of all others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)


@contextmanager
def contained(what: str) -> Iterator[None]:
    """Log whatever goes wrong in a block, and go on after it.

    In one group of tasks an error that leaves one of them ends them all: here that would be every client, and every
    migration that one of them has begun.  Nobody is told of it otherwise, so what waits for a result looks whether
    there is one.  A cancellation is no error, and passes.

    :param what: was tried, for the log.
    """
    try:
        yield
    except Exception:  # noqa: BLE001 - see above
        _log.exception("%s failed", what)
