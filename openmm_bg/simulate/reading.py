"""From a PDB or PDBx/mmCIF file to OpenMM's reader, under the residue names whose bonds it knows.

OpenMM's readers take bonds from a table of residue names. It has ASH and HIP but neither LYN nor CYM, nor the names of
other programs: such a residue comes without a single bond. So names of a protonation become those of their amino acid
before OpenMM reads the file, as it does itself with ASH, and what they say about hydrogens is kept here.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import torch  # noqa: F401  # isort: skip  (before openmm: its torch plugin loads only then)
from openmm import app  # isort: skip

from openmm_bg.errors import InputError

AMINO_ACIDS = {
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE", "LEU", "LYS", "MET", "PHE", "PRO", "SER",
    "THR", "TRP", "TYR", "VAL",
}  # fmt: skip
#: Names that settle a protonation (Amber's, CHARMM's, GROMACS's), by amino acid and OpenMM's name of the form. OpenMM
#: has one form of a cysteine without its hydrogen, bonded (CYX) or charged (CYM).
_FORMS = {
    ("ASP", "ASH"): "ASH ASPP ASPH", ("GLU", "GLH"): "GLH GLUP GLUH",
    ("HIS", "HID"): "HID HSD HISD HISA", ("HIS", "HIE"): "HIE HSE HISE HISB", ("HIS", "HIP"): "HIP HSP HISH HIH HSH",
    ("LYS", "LYN"): "LYN LSN", ("LYS", "LYS"): "LYSH",
    ("CYS", "CYX"): "CYX CYS2 CYM", ("CYS", "CYS"): "CYSH",
}  # fmt: skip
FORMS = {name: found for found, names in _FORMS.items() for name in names.split()}
#: Names of a cysteine in a disulfide.
BRIDGED = {"CYX", "CYS2"}
#: Hydrogens that a form has on some of its atoms.
PROTONS = {
    "ASH": {"OD1 OD2": 1}, "GLH": {"OE1 OE2": 1}, "HID": {"ND1": 1, "NE2": 0}, "HIE": {"ND1": 0, "NE2": 1},
    "HIP": {"ND1": 1, "NE2": 1}, "LYN": {"NZ": 2}, "LYS": {"NZ": 3}, "CYX": {"SG": 0}, "CYS": {"SG": 1},
}  # fmt: skip
#: Chain, number and insertion code.
ResidueKey = tuple[str, str, str]


def is_structure(path: Path) -> bool:
    """Whether a file's ending is that of a PDB or PDBx/mmCIF file."""
    return path.suffix.lower() in (".pdb", ".ent", ".cif", ".pdbx", ".mmcif")


def first_line(error: BaseException | str) -> str:
    """The first line of an error of another library, without its full stop."""
    if isinstance(error, (LookupError, TypeError, AttributeError, UnicodeError)):
        return "its content is not of this format"  # a reader that stumbled: its words are about itself
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def amino_acid(name: str) -> str | None:
    """The amino acid of a residue name, None for others."""
    name = FORMS[name][0] if name in FORMS else name
    if name in AMINO_ACIDS:
        return name
    # Amber's names of residues at an end of the chain: NALA, CHIP.
    return amino_acid(name[1:]) if len(name) == 4 and name[0] in "NC" else None


def form(name: str) -> str | None:
    """OpenMM's name of the protonation that a residue name settles, None where it settles none."""
    if name in FORMS:
        return FORMS[name][1]
    return form(name[1:]) if len(name) == 4 and name[0] in "NC" else None


def read_structure(path: Path) -> Any:
    """The PDBFile or PDBxFile.

    Raises
    ------
    InputError
        Missing, unreadable or empty file, several models, or positions that are not finite.
    """
    if not path.is_file():
        raise InputError(f"There is no structure file {path}.")
    found = _read(path)
    frames = found.getNumFrames()
    if frames > 1:
        raise InputError(f"{path} holds {frames} models: keep the one to start from.")
    if not np.isfinite(found.getPositions(asNumpy=True)._value).all():
        raise InputError(f"{path} has atoms without finite coordinates.")
    return found


def read_topology(path: Path) -> app.Topology:
    """Topology with bonds from a PDB or PDBx/mmCIF file.

    Raises
    ------
    InputError
        Missing, unreadable or empty file.
    """
    if not path.is_file():
        raise InputError(f"There is no topology file {path}.")
    return _read(path).topology


def _read(path: Path) -> Any:
    pdb = _is_pdb(path)
    reader = app.PDBFile if pdb else app.PDBxFile
    try:
        found = reader(io.StringIO(_with_known_names(path)))
        n_atoms = found.topology.getNumAtoms()
    except Exception as error:  # these readers raise whatever they stumble over
        kind = reader.__name__.removesuffix("File")
        raise InputError(f"{path} is not a readable {kind} file ({first_line(error)}).") from error
    if n_atoms == 0:
        raise InputError(f"{path} holds no atoms.")
    return found


def _is_pdb(path: Path) -> bool:
    return path.suffix.lower() not in (".cif", ".pdbx", ".mmcif")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _pdb_name(line: str) -> str:
    """The residue name of an atom's line; one of four letters runs into the next column."""
    name = line[17:20].strip()
    return name + line[20:21].strip() if len(name) == 3 else name


def _with_known_names(path: Path) -> str:
    """The file's text with residue names that OpenMM knows the bonds of."""
    lines = _lines(path)
    if _is_pdb(path):
        for i, line in enumerate(lines):
            if line.startswith(("ATOM", "HETATM")):
                name = _pdb_name(line)
                known = amino_acid(name)
                if known not in (None, name):
                    lines[i] = f"{line[:17]}{known:4s}{line[21:]}"
        return "\n".join(lines) + "\n"
    for i, row in _cif_rows(lines):
        names = {key: amino_acid(row[key]) or row[key] for key in ("label_comp_id", "auth_comp_id") if key in row}
        if any(row[key] != name for key, name in names.items()):
            lines[i] = " ".join((row | names).values())
    return "\n".join(lines) + "\n"


def _cif_rows(lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and columns of each atom's line."""
    columns: list[str] = []
    for i, line in enumerate(lines):
        if line.startswith("_atom_site."):
            columns.append(line.split()[0].removeprefix("_atom_site."))
        elif columns and line.startswith(("ATOM", "HETATM")):
            values = line.split()
            if len(values) == len(columns):
                yield i, dict(zip(columns, values, strict=True))


def atom_records(path: Path) -> Iterator[tuple[ResidueKey, str, str]]:
    """Residue, its name and the location letter ("" for none) of every atom, as the file itself has them."""
    lines = _lines(path)
    if _is_pdb(path):
        for line in lines:
            if line.startswith(("ATOM", "HETATM")) and len(line) > 26:
                yield (line[21], line[22:26].strip(), line[26].strip()), _pdb_name(line), line[16].strip()
        return
    rows = [row for _, row in _cif_rows(lines)]
    # OpenMM's reader names chains by the author, unless the other column tells more of them apart.
    author, label = ({row.get(key, "") for row in rows} for key in ("auth_asym_id", "label_asym_id"))
    chain = "label_asym_id" if author == {""} or len(label) > len(author) else "auth_asym_id"
    for row in rows:
        number = row.get("auth_seq_id", row.get("label_seq_id", ""))
        code, letter = row.get("pdbx_PDB_ins_code", "?"), row.get("label_alt_id", ".")
        key = (row.get(chain, ""), number, "" if code in (".", "?") else code)
        name = row.get("auth_comp_id", row.get("label_comp_id", ""))
        yield key, name, "" if letter in (".", "?") else letter
