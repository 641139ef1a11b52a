"""Exact flow moves for openmmtools: fresh proposals (formulas D and E of docs/theory.md), latent moves (F) and
nonequilibrium candidate moves (G).

They stand beside MD in openmmtools' own schemes, ``SequenceMove([LangevinDynamicsMove(...),
BoltzmannGeneratorMove("adp.bg")])``, and in its multistate samplers with their NetCDF storage.
"""

from openmm_bg.mcmc.base import FlowMove
from openmm_bg.mcmc.independence import BoltzmannGeneratorMove
from openmm_bg.mcmc.latent import LatentFlowMove
from openmm_bg.mcmc.nonequilibrium import NonequilibriumFlowMove

__all__ = ["BoltzmannGeneratorMove", "FlowMove", "LatentFlowMove", "NonequilibriumFlowMove"]
