"""Molecular dynamics for training data and references.

`tempering` holds replica exchange in temperature of a System in memory; the other modules are ``openmm-bg simulate``:
`structure` and `parameters` read and check what the user brings, `protocol` holds the settings, `engine` the choice of
platform and the System that runs on it, `folder` the files, `replica` one trajectory of many, `run` all of it.
"""

from .tempering import TemperedTrajectory, TorsionBias, temperature_ladder, tempered_md, torsion_angle

__all__ = ["TemperedTrajectory", "TorsionBias", "temperature_ladder", "tempered_md", "torsion_angle"]
