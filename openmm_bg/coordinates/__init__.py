"""Z-matrix from a Topology, Cartesian ↔ internal with log|J| and Φ, and what is modelled (y) or kept (s)."""

from openmm_bg.coordinates.constraints import Constraints, FixmanTerm, read_constraints
from openmm_bg.coordinates.graph import MoleculeGraph
from openmm_bg.coordinates.reduction import ReductionRMSD, reduction_rmsd
from openmm_bg.coordinates.representation import CoordinateMap
from openmm_bg.coordinates.statistics import Coordinate, Statistics
from openmm_bg.coordinates.transform import InternalCoordinates, dihedral_angle, log_jacobian, place_like, wrap
from openmm_bg.coordinates.zmatrix import ZMatrix, build_zmatrix

__all__ = [
    "Constraints",
    "Coordinate",
    "CoordinateMap",
    "FixmanTerm",
    "InternalCoordinates",
    "MoleculeGraph",
    "ReductionRMSD",
    "Statistics",
    "ZMatrix",
    "build_zmatrix",
    "dihedral_angle",
    "log_jacobian",
    "place_like",
    "read_constraints",
    "reduction_rmsd",
    "wrap",
]
