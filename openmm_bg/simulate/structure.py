"""From a PDB or PDBx/mmCIF file to one complete chain with hydrogens; every doubt is settled before any dynamics.

What can be repaired without a decision is repaired and noted (water and ions leave, hydrogens come). What needs a
decision of the user is one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
import openmm  # isort: skip
from openmm import app, unit  # isort: skip

from openmm_bg.errors import InputError

WATER = {"HOH", "WAT", "H2O", "DOD", "TIP", "TIP3", "TIP4", "SOL", "SPC"}
IONS = {
    "NA", "NA+", "SOD", "K", "K+", "POT", "CL", "CL-", "CLA", "LI", "LI+", "RB", "CS", "BR", "IOD", "MG", "MG2", "CA",
    "CAL", "ZN", "ZN2", "MN", "FE", "FE2", "CU", "NI", "CO", "CD", "HG", "BA", "SR",
}  # fmt: skip
AMINO_ACIDS = {
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE", "LEU", "LYS", "MET", "PHE", "PRO", "SER",
    "THR", "TRP", "TYR", "VAL",
}  # fmt: skip
#: Other names of the same residues, by protonation or bond, to the amino acid.
VARIANTS = {
    "ASH": "ASP", "GLH": "GLU", "HID": "HIS", "HIE": "HIS", "HIP": "HIS", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS",
    "LYN": "LYS", "CYX": "CYS", "CYM": "CYS",
}  # fmt: skip
#: Names that settle a protonation, to OpenMM's name of it; its readers turn them into the plain amino acid.
PROTONATIONS = {
    "ASH": "ASH", "GLH": "GLH", "HID": "HID", "HIE": "HIE", "HIP": "HIP", "HSD": "HID", "HSE": "HIE", "HSP": "HIP",
}  # fmt: skip
#: Chain, number and insertion code.
ResidueKey = tuple[str, str, str]
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


def is_structure(path: Path) -> bool:
    """Whether a file's ending is that of a PDB or PDBx/mmCIF file."""
    return path.suffix.lower() in (".pdb", ".ent", ".cif", ".pdbx", ".mmcif")


def first_line(error: BaseException | str) -> str:
    """The first line of an error of another library, without its full stop."""
    if isinstance(error, (LookupError, TypeError, AttributeError, UnicodeError)):
        return "its content is not of this format"  # a reader that stumbled: its words are about itself
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def read_structure(path: Path) -> Any:
    """The PDBFile or PDBxFile.

    Raises
    ------
    InputError
        Missing, unreadable or empty file, several models, or positions that are not finite.
    """
    if not path.is_file():
        raise InputError(f"There is no structure file {path}.")
    reader = app.PDBFile if path.suffix.lower() in (".pdb", ".ent") else app.PDBxFile
    try:
        found = reader(str(path))
        frames = found.getNumFrames()
        n_atoms = found.topology.getNumAtoms()
    except Exception as error:  # these readers raise whatever they stumble over
        kind = reader.__name__.removesuffix("File")
        raise InputError(f"{path} is not a readable {kind} file ({first_line(error)}).") from error
    if n_atoms == 0:
        raise InputError(f"{path} holds no atoms.")
    if frames > 1:
        raise InputError(f"{path} holds {frames} models: keep the one to start from.")
    if not np.isfinite(found.getPositions(asNumpy=True)._value).all():
        raise InputError(f"{path} has atoms without finite coordinates.")
    return found


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
    notes: list[str] = []
    modeller = app.Modeller(found.topology, found.positions)
    _strip(modeller, notes)
    _one_chain(modeller, path, chain)
    kept = {(r.chain.id, r.id, r.insertionCode.strip()) for r in modeller.topology.residues()}
    _no_alternates(path, kept)
    modeller.topology.setPeriodicBoxVectors(None)  # one molecule in vacuum or implicit solvent has no box
    _known_residues(modeller.topology, path, field_)
    _complete(modeller.topology, path)
    _no_gaps(modeller, path)
    _add_hydrogens(modeller, field_, ph, path, notes)
    try:
        system = field_.createSystem(
            modeller.topology,
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds,
            hydrogenMass=None if hydrogen_mass is None else hydrogen_mass * unit.dalton,
        )
    except Exception as error:
        raise InputError(f"The force field cannot describe {path} ({first_line(error)}).") from error
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    return Molecule(modeller.topology, system, positions, notes)


def residue_label(residue: Any) -> str:
    """Name, number and chain of a residue, as the user's file has them."""
    chain = residue.chain.id.strip() or "(blank)"
    return f"{residue.name} {residue.id}{residue.insertionCode.strip()} of chain {chain}"


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
    peptides = [c for c in chains if any(_amino(r.name) for r in c.residues())]
    for chain in chains:
        if peptides and chain not in peptides:
            raise InputError(
                f"{path} has {residue_label(next(chain.residues()))} beside the protein: remove it, for flows model one"
                " molecule."
            )
    if len(chains) > 1:
        names = ", ".join(c.id.strip() or "(blank)" for c in chains)
        raise InputError(f"{path} has {len(chains)} chains ({names}): keep one of them, flows model a single molecule.")


def _amino(name: str) -> str | None:
    """The amino acid of a residue name, None for others."""
    name = VARIANTS.get(name, name)
    return name if name in AMINO_ACIDS else None


def _atom_records(path: Path) -> Iterator[tuple[ResidueKey, str, str]]:
    """Residue, its name and the location letter ("" for none) of every atom, as the file itself has them."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if path.suffix.lower() in (".pdb", ".ent"):
        for line in lines:
            if line.startswith(("ATOM", "HETATM")) and len(line) > 26:
                yield (line[21], line[22:26].strip(), line[26].strip()), line[17:20].strip(), line[16].strip()
        return
    columns: list[str] = []
    for line in lines:
        if line.startswith("_atom_site."):
            columns.append(line.split()[0].removeprefix("_atom_site."))
        elif columns and line.startswith(("ATOM", "HETATM")):
            try:
                row = dict(zip(columns, line.split(), strict=True))
            except ValueError:
                continue
            chain = row.get("auth_asym_id", row.get("label_asym_id", ""))
            number = row.get("auth_seq_id", row.get("label_seq_id", ""))
            code, letter = row.get("pdbx_PDB_ins_code", "?"), row.get("label_alt_id", ".")
            key = (chain, number, "" if code in (".", "?") else code)
            yield key, row.get("label_comp_id", ""), "" if letter in (".", "?") else letter


def _no_alternates(path: Path, kept: set[ResidueKey]) -> None:
    """OpenMM's readers take one location per atom and say nothing, so the file itself is asked.

    A residue of which somebody has kept location A alone, letter included, has no alternates.
    """
    letters: dict[ResidueKey, set[str]] = {}
    names: dict[ResidueKey, str] = {}
    for key, name, letter in _atom_records(path):
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
    amino_acids = {_amino(name) for name in templates}
    for residue in topology.residues():
        amino = _amino(residue.name)
        known = amino in amino_acids if amino is not None else residue.name in CAPS or residue.name in templates
        if not known:
            raise InputError(
                f"{path}: the force field does not know {residue_label(residue)}: replace it (PDBFixer does that for "
                "modified amino acids), remove it if it is a ligand, or add its parameters with --forcefield."
            )


def _complete(topology: app.Topology, path: Path) -> None:
    residues = list(topology.residues())
    for residue in residues:
        name = _amino(residue.name)
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


def _no_gaps(modeller: app.Modeller, path: Path) -> None:
    x = np.array(modeller.positions.value_in_unit(unit.nanometer), dtype=np.float64)
    for a, b in modeller.topology.bonds():
        length = float(np.linalg.norm(x[a.index] - x[b.index]))
        if SHORTEST_BOND <= length <= LONGEST_BOND:
            continue
        pair = f"{path}: {a.name} of {residue_label(a.residue)} and {b.name} of {residue_label(b.residue)} are bonded, "
        if a.residue is b.residue or length < SHORTEST_BOND:
            raise InputError(f"{pair}but {length:.2f} nm apart: correct their coordinates.")
        raise InputError(f"{pair}but {length:.2f} nm apart: residues between them are missing (PDBFixer adds them).")


def _misfit(forcefield: app.ForceField, topology: app.Topology) -> Exception | None:
    """Why the force field cannot describe the topology; None if it can.

    `ForceField.getUnmatchedResidues` would be quicker, but knows no patches: it reports every end of a CHARMM chain.
    """
    try:
        forcefield.createSystem(topology)
    except Exception as error:  # ValueError as a rule, others from scripts inside force fields
        return error
    return None


def _add_hydrogens(modeller: app.Modeller, forcefield: app.ForceField, ph: float, path: Path, notes: list[str]) -> None:
    """Add what the force field's templates want; leave a structure alone that has all of it.

    A name such as ASH or HIP in the file is the user's decision, and stands above the pH.
    """
    if _misfit(forcefield, modeller.topology) is None:
        return
    before = modeller.topology.getNumAtoms()
    names = {key: name for key, name, _ in _atom_records(path)}
    residues = [(r.chain.id, r.id, r.insertionCode.strip()) for r in modeller.topology.residues()]
    variants = [PROTONATIONS.get(names.get(key, "")) for key in residues]
    reference = openmm.Platform.getPlatformByName("Reference")
    try:
        modeller.addHydrogens(forcefield, pH=ph, variants=variants, platform=reference)
    except Exception as error:
        raise InputError(f"Hydrogens cannot be added ({first_line(error)}).") from error
    added = modeller.topology.getNumAtoms() - before
    misfit = _misfit(forcefield, modeller.topology)
    if misfit is not None:
        unmatched = forcefield.getUnmatchedResidues(modeller.topology)
        if not unmatched:
            raise InputError(f"The force field cannot describe the structure ({first_line(misfit)}).") from misfit
        atoms = " ".join(a.name for a in unmatched[0].atoms())
        raise InputError(
            f"The force field has no template for {residue_label(unmatched[0])} with the atoms {atoms}: correct its "
            "atom names or bonds, or add its parameters with --forcefield."
        ) from misfit
    if added:
        named = [f"{names[key]} {key[1]}" for key, variant in zip(residues, variants, strict=True) if variant]
        notes.append(f"Added {added} hydrogens for pH {ph:g}{'; ' + ', '.join(named) + ' as named' if named else ''}.")
