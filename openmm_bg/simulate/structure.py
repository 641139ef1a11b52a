"""From a PDB or PDBx/mmCIF file to one complete chain with hydrogens; every doubt is settled before any dynamics.

What can be repaired without a decision is repaired and noted (water and ions leave, hydrogens come). What needs a
decision of the user is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.errors import InputError
from openmm_bg.simulate.caps import CapsInside, groups, knowing_caps, main
from openmm_bg.simulate.reading import (
    BRIDGED,
    PROTONS,
    ResidueKey,
    amino_acid,
    atom_records,
    first_line,
    form,
    read_structure,
)

WATER = {"HOH", "WAT", "H2O", "DOD", "TIP", "TIP3", "TIP4", "SOL", "SPC"}
IONS = {
    "NA", "NA+", "SOD", "K", "K+", "POT", "CL", "CL-", "CLA", "LI", "LI+", "RB", "CS", "BR", "IOD", "MG", "MG2", "CA",
    "CAL", "ZN", "ZN2", "MN", "FE", "FE2", "CU", "NI", "CO", "CD", "HG", "BA", "SR",
}  # fmt: skip
CAPS = {"ACE", "NME", "NMA", "NH2"}
SIDE_CHAINS = {
    "ALA": "CB", "ARG": "CB CG CD NE CZ NH1 NH2", "ASN": "CB CG OD1 ND2", "ASP": "CB CG OD1 OD2", "CYS": "CB SG",
    "GLN": "CB CG CD OE1 NE2", "GLU": "CB CG CD OE1 OE2", "GLY": "", "HIS": "CB CG ND1 CD2 CE1 NE2",
    "ILE": "CB CG1 CG2 CD1", "LEU": "CB CG CD1 CD2", "LYS": "CB CG CD CE NZ", "MET": "CB CG SD CE",
    "PHE": "CB CG CD1 CD2 CE1 CE2 CZ", "PRO": "CB CG CD", "SER": "CB OG", "THR": "CB OG1 CG2",
    "TRP": "CB CG CD1 CD2 NE1 CE2 CE3 CZ2 CZ3 CH2", "TYR": "CB CG CD1 CD2 CE1 CE2 CZ OH", "VAL": "CB CG1 CG2",
}  # fmt: skip
#: A bond longer than this, nm, spans residues that the file lacks; one shorter joins atoms on one spot.
LONGEST_BOND = 0.3
SHORTEST_BOND = 0.04


@dataclass
class Molecule:
    """One molecule, ready for dynamics.

    Attributes
    ----------
    topology, system
        With all bonds; the System with constraints of ``HBonds`` and without a box.
    positions
        [N, 3] nm.
    notes
        What was changed or is worth knowing, one sentence each.
    """

    topology: app.Topology
    system: openmm.System
    positions: NDArray[np.float64]
    notes: list[str] = field(default_factory=list)


def prepare(
    path: Path,
    forcefield: Sequence[str],
    *,
    chain: str | None = None,
    ph: float = 7.0,
    hydrogen_mass: float | None = None,
) -> Molecule:
    """Read, check and complete a structure, and build its System.

    Parameters
    ----------
    path
        PDB or PDBx/mmCIF file.
    forcefield
        XML files as `openmm.app.ForceField` takes them.
    chain
        Identifier of the chain to keep, where the file has several.
    ph
        For the protonation of residues whose hydrogens are not in the file.
    hydrogen_mass
        dalton, for hydrogen mass repartitioning; None leaves masses alone.

    Raises
    ------
    InputError
        Everything that cannot be simulated as given.
    """
    found = read_structure(path)
    try:
        field_ = app.ForceField(*forcefield)
    except Exception as error:
        raise InputError(
            f"OpenMM cannot load the force field {', '.join(forcefield)} ({first_line(error)})."
        ) from error
    _fixed_charges(field_, forcefield)
    notes: list[str] = []
    modeller = app.Modeller(found.topology, found.positions)
    _strip(modeller, notes)
    _one_chain(modeller, path, chain)
    kept = {(r.chain.id, r.id, r.insertionCode.strip()) for r in modeller.topology.residues()}
    _no_alternates(path, kept)
    modeller.topology.setPeriodicBoxVectors(None)  # one molecule in vacuum or implicit solvent has no box
    _known_residues(modeller.topology, path, field_)
    _complete(modeller.topology, path)
    _bonds(modeller.topology, path)
    _no_gaps(modeller, path)
    options = {
        "nonbondedMethod": app.NoCutoff,
        "constraints": app.HBonds,
        "hydrogenMass": None if hydrogen_mass is None else hydrogen_mass * unit.dalton,
    }
    system = _with_hydrogens(modeller, field_, options, ph, path, notes)
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    return Molecule(modeller.topology, system, positions, notes)


def _fixed_charges(field_: app.ForceField, files: Sequence[str]) -> None:
    """Polarisable force fields need platforms and integrators of their own; AMOEBA's may end the process on a CPU."""
    kinds = {type(generator).__name__ for generator in field_.getGenerators()}
    for part, what in (("AmoebaMultipole", "AMOEBA's multipoles"), ("Drude", "Drude particles")):
        if any(kind.startswith(part) for kind in kinds):
            raise InputError(
                f"The force field {', '.join(files)} is polarisable ({what}), which is not supported: take one with "
                "fixed charges, such as amber14-all.xml or charmm36.xml."
            )


def residue_label(residue: Any, name: str | None = None) -> str:
    """Name (OpenMM's, unless it is given), number and chain of a residue, as the user's file has them."""
    chain = residue.chain.id.strip() or "(blank)"
    return f"{residue.name if name is None else name} {residue.id}{residue.insertionCode.strip()} of chain {chain}"


def _strip(modeller: app.Modeller, notes: list[str]) -> None:
    """Water and ions go: the implicit solvent stands for them."""

    def is_ion(residue: Any) -> bool:
        return residue.name.upper() in IONS and len(list(residue.atoms())) == 1

    water = [r for r in modeller.topology.residues() if r.name.upper() in WATER]
    ions = [r for r in modeller.topology.residues() if is_ion(r)]
    modeller.delete(water + ions)
    if water or ions:
        names = ", ".join(sorted({r.name for r in ions}))
        what = [f"{len(water)} water molecules"] * bool(water) + [f"{len(ions)} ions ({names})"] * bool(ions)
        notes.append(f"Left out {' and '.join(what)}.")


def _one_chain(modeller: app.Modeller, path: Path, wanted: str | None) -> None:
    chains = list(modeller.topology.chains())
    if not chains:
        raise InputError(f"{path} holds nothing but water and ions.")
    if wanted is not None:
        if wanted not in [c.id for c in chains]:
            raise InputError(f"{path} has no chain {wanted!r}, only {', '.join(repr(c.id) for c in chains)}.")
        modeller.delete([c for c in chains if c.id != wanted])
        chains = list(modeller.topology.chains())
    # A ligand often stands behind the protein as a chain of its own: then it is the residue that needs an answer.
    peptides = [c for c in chains if any(amino_acid(r.name) for r in c.residues())]
    for chain in chains:
        if peptides and chain not in peptides:
            raise InputError(
                f"{path} has {residue_label(next(chain.residues()))} beside the protein: remove it, for flows model one"
                " molecule."
            )
    if len(chains) > 1:
        names = ", ".join(c.id.strip() or "(blank)" for c in chains)
        same = "give them different letters and " * (len({c.id for c in chains}) < len(chains))
        raise InputError(
            f"{path} has {len(chains)} chains ({names}): {same}keep one of them with --chain, flows model a single "
            "molecule."
        )


def _no_alternates(path: Path, kept: set[ResidueKey]) -> None:
    """OpenMM's readers take one location per atom and say nothing, so the file itself is asked.

    A residue of which somebody has kept location A alone, letter included, has no alternates.
    """
    letters: dict[ResidueKey, set[str]] = {}
    names: dict[ResidueKey, str] = {}
    for key, name, letter in atom_records(path):
        if letter:
            letters.setdefault(key, set()).add(letter)
            names[key] = name
    found = [key for key in letters if len(letters[key]) > 1 and key in kept]
    if found:
        chain, number, code = found[0]
        raise InputError(
            f"{path} has alternate locations in {len(found)} residue{'s' * (len(found) > 1)}, the first is "
            f"{names[found[0]]} {number}{code} of chain {chain.strip() or '(blank)'}: keep one of each (PDBFixer and "
            "pdb4amber do that)."
        )


def _known_residues(topology: app.Topology, path: Path, forcefield: app.ForceField) -> None:
    templates = forcefield._templates  # no public list of template names exists
    # Under any name, for a histidine's template depends on hydrogens that are still to come.
    amino_acids = {amino_acid(name) for name in templates}
    for residue in topology.residues():
        amino = amino_acid(residue.name)
        known = amino in amino_acids if amino is not None else residue.name in CAPS or residue.name in templates
        if not known:
            raise InputError(
                f"{path}: the force field does not know {residue_label(residue)}: replace it (PDBFixer does that for "
                "modified amino acids), remove it if it is a ligand, or add its parameters with --forcefield."
            )


def _complete(topology: app.Topology, path: Path) -> None:
    residues = list(topology.residues())
    for residue in residues:
        name = amino_acid(residue.name)
        if name is None:
            continue
        present = {a.name for a in residue.atoms()}
        wanted = ["N", "CA", "C", "O", *SIDE_CHAINS[name].split()]
        missing = [atom for atom in wanted if atom not in present]
        if residue is residues[-1] and not {"OXT", "OT2", "O2"} & present:
            missing.append("OXT")
        if missing:
            raise InputError(
                f"{path}: {residue_label(residue)} lacks the heavy atom{'s' * (len(missing) > 1)} {', '.join(missing)}"
                ": add what is missing (PDBFixer does that), or cap a cut end with NME."
            )


def _bonds(topology: app.Topology, path: Path) -> None:
    """OpenMM's readers know the bonds of standard residues by their atoms' names."""
    bonded = _neighbours(topology)
    for residue in topology.residues():
        heavy = [a for a in residue.atoms() if not _is_hydrogen(a)]
        alone = [a.name for a in heavy if not bonded[a]]
        if alone and len(heavy) > 1:
            raise InputError(
                f"{path}: OpenMM knows no bond of {alone[0]} in {residue_label(residue)}: correct its name, or give "
                "the bonds (CONECT records, struct_conn in a .cif file)."
            )


def _no_gaps(modeller: app.Modeller, path: Path) -> None:
    x = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    for a, b in modeller.topology.bonds():
        length = float(np.linalg.norm(x[a.index] - x[b.index]))
        if SHORTEST_BOND <= length <= LONGEST_BOND:
            continue
        pair = f"{path}: {a.name} of {residue_label(a.residue)} and {b.name} of {residue_label(b.residue)} are bonded, "
        if a.residue is b.residue or length < SHORTEST_BOND:
            raise InputError(f"{pair}but {length:.2f} nm apart: correct their coordinates.")
        raise InputError(f"{pair}but {length:.2f} nm apart: {_break(a.residue, b.residue)}.")


def _break(before: Any, after: Any) -> str:
    """What a broken chain may be: a gap, or two chains with one letter and no TER record between them."""
    chains = "put a TER record before the second, give the chains different letters, and choose one with --chain"
    ended = {"OXT", "OT2"} & {a.name for a in before.atoms()}
    started = sum(_is_hydrogen(a) and a.name in ("H1", "H", "H2", "H3") for a in after.atoms()) > 2
    number = [re.match(r"-?\d+", r.id) for r in (before, after)]
    again = number[0] and number[1] and int(number[1][0]) <= int(number[0][0])
    if ended or started or again or before.name in ("NME", "NH2") or after.name == "ACE":
        return f"a second chain of the same letter begins there: {chains}"
    return (
        f"residues between them are missing (PDBFixer adds them), or a second chain begins there without a TER record "
        f"({chains})"
    )


def _with_hydrogens(
    modeller: app.Modeller, forcefield: app.ForceField, options: dict[str, Any], ph: float, path: Path, notes: list[str]
) -> openmm.System:
    """Add what the force field's templates want, leave a structure alone that has all of it; the System of it.

    A name such as ASH or LYN in the file is the user's decision, and stands above the pH.
    """
    capped = knowing_caps(forcefield, modeller.topology)
    names = {key: name for key, name, _ in atom_records(path)}
    keys = [(r.chain.id, r.id, r.insertionCode.strip()) for r in modeller.topology.residues()]
    forms = [form(names.get(key, "")) for key in keys]
    _bridges(modeller.topology, names, path)
    unlike = _unlike(modeller.topology, forms)
    if not unlike and any(_is_hydrogen(a) for a in modeller.topology.atoms()):  # patches are tried for seconds
        try:
            return capped.createSystem(modeller.topology, **options)
        except Exception:  # ValueError as a rule, others from scripts inside force fields
            pass  # as a rule a hydrogen is missing; if it is not that, the error comes again
    before = modeller.topology.getNumAtoms()
    _rename_lysines(modeller.topology, forms)
    reference = openmm.Platform.getPlatformByName("Reference")
    variants = [
        _of_template(residue, forcefield) if wanted is None else wanted
        for residue, wanted in zip(modeller.topology.residues(), forms, strict=True)
    ]
    try:
        modeller.addHydrogens(capped, pH=ph, variants=variants, platform=reference)
        system = capped.createSystem(modeller.topology, **options)
    except Exception as error:
        raise InputError(_misfit(error, modeller.topology, capped, names, path)) from error
    added = modeller.topology.getNumAtoms() - before
    if added > 0:
        named = [f"{names[key]} {key[1]}" for key, found in zip(keys, forms, strict=True) if found]
        notes.append(f"Added {added} hydrogens for pH {ph:g}{'; ' + ', '.join(named) + ' as named' if named else ''}.")
    elif unlike:
        notes.append(f"Hydrogens of {', '.join(f'{names[keys[i]]} {keys[i][1]}' for i in unlike)} changed, as named.")
    return system


def _of_template(residue: Any, forcefield: app.ForceField) -> list[tuple[str, str]] | None:
    """Hydrogens and the atoms that hold them, of a residue without any that the force field knows and OpenMM does not.

    None for all others; hydroxyproline is one.
    """
    template = forcefield._templates.get(residue.name)  # no public list of template names exists
    standard = amino_acid(residue.name) is not None or residue.name in CAPS
    if standard or template is None or any(_is_hydrogen(a) for a in residue.atoms()):
        return None
    pairs = [(template.atoms[i], template.atoms[j]) for i, j in template.bonds]
    pairs = [(a, b) if _is_hydrogen(a) else (b, a) for a, b in pairs]
    return [(hydrogen.name, heavy.name) for hydrogen, heavy in pairs if _is_hydrogen(hydrogen)]


def _is_hydrogen(atom: Any) -> bool:
    return atom.element is not None and atom.element.symbol in ("H", "D")


def _neighbours(topology: app.Topology) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {atom: [] for atom in topology.atoms()}
    for a, b in topology.bonds():
        found[a].append(b)
        found[b].append(a)
    return found


def _unlike(topology: app.Topology, forms: Sequence[str | None]) -> list[int]:
    """Residues without the hydrogens of the form that their name settles."""
    bonded = _neighbours(topology)
    found = []
    for residue, wanted in zip(topology.residues(), forms, strict=True):
        for atoms, n in PROTONS.get(wanted or "", {}).items():
            there = [b for a in residue.atoms() if a.name in atoms.split() for b in bonded[a] if _is_hydrogen(b)]
            if len(there) != n:
                found.append(residue.index)
                break
    return found


def _rename_lysines(topology: app.Topology, forms: Sequence[str | None]) -> None:
    """A neutral lysine's hydrogens are HZ2 and HZ3 to Amber, HZ1 and HZ2 to OpenMM, which would take one away."""
    for residue, wanted in zip(topology.residues(), forms, strict=True):
        found = {a.name: a for a in residue.atoms() if a.name in ("HZ1", "HZ2", "HZ3")}
        if wanted == "LYN" and "HZ3" in found and len(found) < 3:
            found["HZ3"].name = "HZ1" if "HZ1" not in found else "HZ2"


def _bridges(topology: app.Topology, names: dict[ResidueKey, str], path: Path) -> None:
    """A cysteine that is named as one of a disulfide needs its partner."""
    bonded = _neighbours(topology)
    for residue in topology.residues():
        name = names.get((residue.chain.id, residue.id, residue.insertionCode.strip()), "")
        if name[-3:] not in BRIDGED and name not in BRIDGED:
            continue
        if not any(b.residue is not residue for a in residue.atoms() if a.name == "SG" for b in bonded[a]):
            raise InputError(
                f"{path}: {residue_label(residue, name)} is named as in a disulfide, but no other sulfur of the chain "
                "is within 0.3 nm: name it CYS, CYM if it is charged, or give the bond by a CONECT record."
            )


def _misfit(error: Exception, topology: app.Topology, capped: Any, names: dict[ResidueKey, str], path: Path) -> str:
    """Why the force field cannot describe the structure, in terms of its file."""
    found = re.search(r"residue (\d+) \((\w+)\)", str(error))
    residues = [r for chain in topology.chains() for r in chain.residues()]
    if isinstance(capped, CapsInside):
        residues = [main(group) for chain in topology.chains() for group in groups(list(chain.residues()))]
    if found is None or int(found[1]) >= len(residues):
        return f"The force field cannot describe {path} ({first_line(error)})."
    residue = residues[int(found[1])]
    name = names.get((residue.chain.id, residue.id, residue.insertionCode.strip()), residue.name)
    ends = [" at an end of the chain"] * (residue in (residues[0], residues[-1]))
    atoms = " ".join(a.name for a in residue.atoms())
    return (
        f"{path}: the force field has no template for {residue_label(residue, name)}{''.join(ends)} with the atoms "
        f"{atoms} and the hydrogens that belong to them: correct its atom names or bonds, choose another protonation "
        "or cap, or add its parameters with --forcefield."
    )
