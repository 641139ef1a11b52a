"""The trained alanine dipeptide that ships with the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import numpy as np

from openmm_bg.artifact import Flow, load

FILE = "alanine_dipeptide.bg"


@dataclass(frozen=True)
class Molecule:
    """A molecule with a trained flow.

    ``system`` (``openmm.System``), ``topology`` (``openmm.app.Topology``), ``positions`` [N, 3] nm, ``flow`` (`Flow`).
    """

    system: Any
    topology: Any
    positions: np.ndarray
    flow: Flow


def load_alanine_dipeptide() -> Molecule:
    """Alanine dipeptide in vacuum (openmmtools' test system, amber ff96, HBonds constraints) with its flow, 300 K.

    Made by ``examples/train_alanine_dipeptide.py``; the figures it reached are in ``flow.metadata["figures"]``.

    Returns
    -------
    Molecule
        A fresh System and Topology at every call; positions are a minimised C7eq conformation.
    """
    with as_file(files("openmm_bg.data") / FILE) as path:
        flow = load(path)
    return Molecule(
        system=flow.system,
        topology=flow.topology,
        positions=np.asarray(flow.metadata["positions"], dtype=np.float64),
        flow=flow,
    )
