"""Looking at ensembles: torsions, pictures, and one HTML page that holds them."""

from __future__ import annotations

from openmm_bg.analysis.torsions import dihedral_atoms, is_trans, phi_basin, ramachandran_free_energy, torsion

__all__ = ["dihedral_atoms", "is_trans", "phi_basin", "ramachandran_free_energy", "torsion"]
