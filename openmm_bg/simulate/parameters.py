"""From Amber, Gromacs and CHARMM files, which bring their own parameters, to one molecule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.errors import InputError
from openmm_bg.simulate.reading import first_line, is_structure, read_structure
from openmm_bg.simulate.structure import LONGEST_BOND, SHORTEST_BOND, WATER, Molecule

AMBER = (".prmtop", ".parm7")
GROMACS = (".top",)
CHARMM = (".psf",)


def is_parameters(path: Path) -> bool:
    """Whether a file's ending is that of a topology with parameters."""
    return path.suffix.lower() in (*AMBER, *GROMACS, *CHARMM)


def prepare(
    path: Path,
    positions: Path,
    *,
    solvent: Literal["obc2", "none"] = "obc2",
    parameters: Sequence[Path] = (),
    hydrogen_mass: float | None = None,
) -> Molecule:
    """Read a .prmtop, .top or .psf with its positions, and build the System.

    Parameters
    ----------
    path
        The file with the topology.
    positions
        .inpcrd/.rst7, .gro, .crd, PDB or PDBx/mmCIF file of the same atoms.
    solvent
        Implicit solvent that OpenMM adds.
    parameters
        CHARMM parameter, topology and stream files for a .psf.
    hydrogen_mass
        dalton, or None.

    Raises
    ------
    InputError
        A file that cannot be read, water or a second molecule, or positions of other atoms.
    """
    for each in (path, positions, *parameters):
        if not each.is_file():
            raise InputError(f"There is no file {each}.")
    common: dict[str, Any] = {
        "nonbondedMethod": app.NoCutoff,
        "constraints": app.HBonds,
        "hydrogenMass": None if hydrogen_mass is None else hydrogen_mass * unit.dalton,
    }
    implicit = app.OBC2 if solvent == "obc2" else None
    if path.suffix.lower() in CHARMM and not parameters:
        raise InputError(f"{path} holds no parameters: give CHARMM's files with --parameters, once for each.")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            topology, system = _read(path, parameters, implicit, common)
    except Exception as error:  # these readers raise whatever they stumble over
        hint = ""
        if path.suffix.lower() in CHARMM:  # "Could not find atom type for NH3", where a file was forgotten
            hint = ": give all parameter and topology files that it was made with, each with --parameters"
        raise InputError(f"OpenMM cannot read {path} ({first_line(error)}){hint}.") from error
    water = [r for r in topology.residues() if r.name.upper() in WATER]
    if water:
        raise InputError(f"{path} has {len(water)} water molecules: strip them with ParmEd, solvent is implicit.")
    topology.setPeriodicBoxVectors(None)
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0, 2, 0], [0, 0, 2])  # OpenMM's own default: there is no box
    x = _read_positions(positions, amber=path.suffix.lower() in AMBER)
    if len(x) != topology.getNumAtoms():
        raise InputError(f"{positions} has {len(x)} atoms, {path} has {topology.getNumAtoms()}.")
    for a, b in topology.bonds():
        length = float(np.linalg.norm(x[a.index] - x[b.index]))
        if not SHORTEST_BOND <= length <= LONGEST_BOND:
            raise InputError(
                f"In {positions} the bonded atoms {a.index} ({a.name}) and {b.index} ({b.name}) are {length:.2f} nm "
                "apart: another atom order, or a molecule split by the periodic box."
            )
    notes = list(dict.fromkeys(f"OpenMM says of {path}: {first_line(each.message)}." for each in caught))
    return Molecule(topology, system, x, notes)


def _read(
    path: Path, parameters: Sequence[Path], implicit: Any, common: dict[str, Any]
) -> tuple[app.Topology, openmm.System]:
    """Topology and System by OpenMM's own readers."""
    ending = path.suffix.lower()
    if ending in AMBER:
        amber = app.AmberPrmtopFile(str(path))
        return amber.topology, amber.createSystem(implicitSolvent=implicit, **common)
    if ending in GROMACS:
        gromacs = app.GromacsTopFile(str(path))
        system = gromacs.createSystem(**common)
        if implicit is not None:
            system.addForce(_obc2(gromacs.topology, system))  # OpenMM's reader of .top files has no implicit solvent
        return gromacs.topology, system
    charmm = app.CharmmPsfFile(str(path))
    known = app.CharmmParameterSet(*map(str, parameters))
    return charmm.topology, charmm.createSystem(known, implicitSolvent=implicit, **common)


def _read_positions(path: Path, amber: bool) -> NDArray[np.float64]:
    """[N, 3] nm; Amber's programs and CHARMM's both write .crd, each its own format."""
    if is_structure(path):
        return np.array(read_structure(path).getPositions(asNumpy=True)._value, dtype=np.float64)
    readers = {
        ".inpcrd": app.AmberInpcrdFile, ".rst7": app.AmberInpcrdFile,
        ".crd": app.AmberInpcrdFile if amber else app.CharmmCrdFile, ".gro": app.GromacsGroFile,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} has no known ending for positions: give .inpcrd, .rst7, .crd, .gro, .pdb or .cif.")
    try:
        found = np.array(unit.Quantity(reader(str(path)).positions).value_in_unit(unit.nanometer), dtype=np.float64)
    except Exception as error:
        raise InputError(f"OpenMM cannot read positions from {path} ({first_line(error)}).") from error
    if found.ndim != 2 or found.shape[1] != 3 or not np.isfinite(found).all():
        raise InputError(f"{path} has atoms without finite coordinates.")
    return found


def _obc2(topology: app.Topology, system: openmm.System) -> openmm.GBSAOBCForce:
    """The solvent of implicit/obc2.xml for the charges of a System."""
    from openmm.app.internal.customgbforces import GBSAOBC2Force  # where obc2.xml takes its radii from, too

    charges = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    force = openmm.GBSAOBCForce()
    force.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    force.setSoluteDielectric(1.0)
    force.setSolventDielectric(78.5)
    for i, (radius, scale) in enumerate(GBSAOBC2Force.getStandardParameters(topology)):
        force.addParticle(charges.getParticleParameters(i)[0], radius, scale)
    charges.setReactionFieldDielectric(1.0)
    return force
