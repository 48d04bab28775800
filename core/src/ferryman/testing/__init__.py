"""For authors of drivers and of programs that embed Ferryman: a simulated hypervisor with faults on demand."""

from __future__ import annotations

from ferryman.testing.faults import Fault, FaultPlan
from ferryman.testing.world import World, forget_world, world

__all__ = ["Fault", "FaultPlan", "World", "forget_world", "world"]
