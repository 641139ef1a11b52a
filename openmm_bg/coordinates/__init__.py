"""Z-matrix from a Topology, Cartesian ↔ internal with log|J| and Φ, and what is modelled (y) or kept (s)."""

from openmm_bg.coordinates.constraints import Constraints, FixmanTerm, read_constraints
from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.coordinates.representation import Coordinate, CoordinateMap
from openmm_bg.coordinates.transform import InternalCoordinates, log_jacobian, place_like, wrap
from openmm_bg.coordinates.zmatrix import ZMatrix, build_zmatrix

__all__ = [
    "Constraints",
    "Coordinate",
    "CoordinateMap",
    "FixmanTerm",
    "InternalCoordinates",
    "MoleculeGraph",
    "ZMatrix",
    "build_zmatrix",
    "log_jacobian",
    "place_like",
    "read_constraints",
    "wrap",
]
