"""Reduced energies and forces of batches of positions, evaluated by OpenMM.

`ContextPool` evaluates many frames at once in copies of the user's Context, or in its System's twin; `reduced_energy`
makes that a differentiable torch function; `Target` combines it with a coordinate map into the log-density that a flow
is weighed against; `regularise_energy` tames energies for training, and for training only. `SystemTwin` evaluates a
System without OpenMM, by its formulas in torch.
"""

from .pool import ContextPool
from .reduced import BOLTZMANN, in_kelvin, reduced_energy, thermal_energy
from .regulariser import regularise_energy
from .snapshot import make_context
from .target import Target
from .tuning import tune
from .tuning_report import Tuning
from .twin import SystemTwin

__all__ = [
    "BOLTZMANN",
    "ContextPool",
    "SystemTwin",
    "Target",
    "Tuning",
    "in_kelvin",
    "make_context",
    "reduced_energy",
    "regularise_energy",
    "thermal_energy",
    "tune",
]
