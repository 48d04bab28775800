"""``python -m tests.model``: explore the shipped handover within bounds, and print what was found."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from tests.model.explore import explore, walk
from tests.model.world import Bounds, Protocol


def main(argv: list[str] | None = None) -> int:
    """Explore; 0 if every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    for bound in fields(Bounds):
        name = "--" + bound.name.replace("_", "-")
        if isinstance(bound.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=bound.default)
        else:
            parser.add_argument(name, type=int, default=bound.default)
    parser.add_argument("--states", type=int, default=10_000_000, help="stop after so many")
    parser.add_argument("--walks", type=int, default=0, help="walk at random so many times instead")
    parser.add_argument("--steps", type=int, default=200, help="length of a walk")
    parser.add_argument("--seed", type=int, default=1)
    arguments = vars(parser.parse_args(argv))
    bounds = Bounds(**{bound.name: arguments[bound.name] for bound in fields(Bounds)})
    if arguments["walks"]:
        found = walk(
            Protocol(),
            bounds,
            seed=arguments["seed"],
            walks=arguments["walks"],
            steps=arguments["steps"],
        )
    else:
        found = explore(Protocol(), bounds, most_states=arguments["states"])
    for line in found.trace:
        print(f"  {line}")
    for excuse, count in found.excuses.items():
        print(f"  {count} times the end is without the guest: {excuse}")
    print(f"model: {'FAILED' if found.violation else 'ok'} {found.summary()}")
    return 1 if found.violation else 0


if __name__ == "__main__":
    sys.exit(main())
