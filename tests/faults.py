"""Fault plans on command lines, to see a program say that something is wrong."""

from __future__ import annotations

import argparse

from ferryman.testing import FaultPlan


def fault_plan(text: str) -> FaultPlan:
    """Read a fault plan as an argument. :raises argparse.ArgumentTypeError: it names an unknown point or fault."""
    try:
        return FaultPlan.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
