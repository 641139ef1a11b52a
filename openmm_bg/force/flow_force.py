"""The public function `FlowForce` and its two backends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (before OpenMM, whose torch plugin loads only then)

import openmm  # isort: skip

from openmm_bg.artifact import Flow
from openmm_bg.energy import thermal_energy
from openmm_bg.errors import InputError
from openmm_bg.force.potential import FlowPotential, read_flow, remember
from openmm_bg.openmm_torch import require_openmm_torch

BACKENDS = ("python", "torch")


def FlowForce(
    path: str | os.PathLike[str] | Flow, temperature: Any, parameter: str = "flow_scale", backend: str = "python"
) -> openmm.Force:
    """A force whose potential is ``-kT (log q(y) + log g(s|y) - log J - Φ)`` times a global parameter.

    MD at ``temperature`` under this force alone samples the flow. The System must have the masses and constraints
    that the flow was trained with: they make up Φ, and nothing else holds the constrained lengths. g is the completion
    of a `reduced` flow; a `full` one needs none.

    Parameters
    ----------
    path
        Artifact of a `full` flow, or of a `reduced` one with a completion.
    temperature
        K or Quantity: kT of the potential.
    parameter
        Name of the global parameter, 1 by default, that multiplies energy and forces:
        ``context.setParameter("flow_scale", 0.5)``. It has no energy derivative, for a PythonForce has none.
    backend
        "python" for a PythonForce, which works everywhere; "torch" for a TorchForce, which needs openmm-torch in one of
        the few combinations of versions in which it works (``openmm-bg doctor`` tells). Before the first one is made,
        a process of its own tries that, for a wrong combination ends the process instead of raising.

    Returns
    -------
    openmm.Force
        "python": a PythonForce, computed on the CPU, log q, log J and Φ in float64. It acts on all particles; in a
        larger System name the molecule's, in the order of the flow's atoms, with ``setParticles`` (OpenMM >= 8.6, which
        does not check that the System has particles of these indices). XML and copies of the System hold the
        artifact's path and sha256, not the flow, in a pickle: read only XML that you trust.

        "torch": a TorchForce with the same energies and forces, tested on the Reference and CPU platforms; a GPU gives
        it positions in the platform's precision, and TorchScript compiles for seconds at its first evaluations. It acts
        on all particles, and there must be no others than the molecule's. XML and copies hold the flow itself
        (megabytes) and no longer need the artifact; they lose the force's name, and XML is read where torch was
        imported before OpenMM.

    Raises
    ------
    ArtifactError
        The artifact cannot be read. In MD, as an OpenMMException ("python"): in a process that has not read it yet,
        the file has vanished or changed.
    InputError
        ``path`` is no path; the flow is `reduced` without a completion; a bad temperature, parameter name or backend;
        "torch" where openmm-torch does not work, with what was found. In MD, as an OpenMMException: another number of
        particles, or kept lengths that the System does not constrain ("torch": in the last line of what TorchScript
        says).

    Notes
    -----
    Where q = 0 (another chirality or amide isomer, a domain's edge) the energy is +inf, also in sums with other
    forces, and Metropolis tests on it reject. MD does not crash there: the forces are those of the flow's density
    continued past its edge, whose tails lead back, or zero where these are not finite. Frames with an infinite energy
    are no samples of the flow. NaN positions give NaN, as with OpenMM's own forces.

    Examples
    --------
    >>> import openmm_bg as bg
    >>> from importlib.resources import files
    >>> system = bg.load_alanine_dipeptide().system
    >>> for index in reversed(range(system.getNumForces())):
    ...     system.removeForce(index)
    >>> system.addForce(bg.FlowForce(files("openmm_bg.data") / "alanine_dipeptide.bg", 300))
    0
    """
    if isinstance(path, Flow):
        raise InputError("FlowForce needs the artifact's path, not a Flow: write it with flow.save() first.")
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"FlowForce takes the path of a saved flow, got {path!r}.")
    if not isinstance(parameter, str) or not parameter:
        raise InputError(f"The name of the global parameter must be a non-empty string, not {parameter!r}.")
    if backend not in BACKENDS:
        raise InputError(f"Unknown backend {backend!r} of FlowForce: choose 'python' or 'torch'.")
    kT = thermal_energy(temperature)
    file = Path(path).absolute()
    flow, digest = read_flow(file)
    if not flow.is_complete:
        kept = [c for c in flow.coordinates.coordinates if not (c.modelled or c.constrained)]
        raise InputError(
            f"{file} holds a {flow.representation!r} flow, which says nothing of {len(kept)} coordinates: its force "
            "needs a completion, their density given the rest, so train it anew, or with representation='full'."
        )
    if backend == "torch":
        force = _torch_force(flow, kT, parameter)
    else:
        remember(flow, digest)
        force = openmm.PythonForce(FlowPotential(str(file), digest, kT, parameter), {parameter: 1.0})
    force.setName("FlowForce")
    return force


def _torch_force(flow: Flow, kT: float, parameter: str) -> Any:
    """A TorchForce of the flow, in a process where openmm-torch works."""
    openmmtorch = require_openmm_torch()
    from openmm_bg.force.script import scripted_potential

    force = openmmtorch.TorchForce(scripted_potential(flow, kT))
    force.setOutputsForces(True)
    force.addGlobalParameter(parameter, 1.0)
    return force
