"""Moves on a plain Context: the exact kernels of formulas D to H beside MD.

`BoltzmannGeneratorSampler.step` makes independence moves (D, E); here stand latent and block moves (F), nonequilibrium
candidate moves (G) and annealed importance sampling (H), with s frozen or moving, and the reporter that makes
any of them while a simulation runs.
"""

from openmm_bg.moves.annealed import anneal
from openmm_bg.moves.cartesian import CartesianNonequilibriumMove, anneal_cartesian
from openmm_bg.moves.latent import LatentMove
from openmm_bg.moves.reporters import MoveReporter
from openmm_bg.moves.switching import NonequilibriumMove

__all__ = [
    "CartesianNonequilibriumMove",
    "LatentMove",
    "MoveReporter",
    "NonequilibriumMove",
    "anneal",
    "anneal_cartesian",
]
