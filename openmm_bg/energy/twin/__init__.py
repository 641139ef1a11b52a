"""A torch twin of an OpenMM System: its formulas evaluated for whole batches of positions.

`SystemTwin` reads the forces of a System, translates them and OpenMM's algebraic expressions into torch, and is held
against a Context when it is made.
"""

from .twin import Deviation, SystemTwin

__all__ = ["Deviation", "SystemTwin"]
