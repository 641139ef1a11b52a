"""Does openmm-torch work here? Asked in a process of its own, for a wrong combination of versions ends the process.

Its wheel is built for one release of torch and one of OpenMM. Next to others it cannot be imported, or does not
differentiate, or works until a System is copied and then ends the process. No table of versions tells them all apart
(conda has builds for other releases), so what users do with a TorchForce is tried: on every platform, copied, written
and read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openmm_bg.errors import InputError
from openmm_bg.isolated import TIMEOUT, run_isolated

logger = logging.getLogger(__name__)

_KERNEL = "CalcTorchForce"


def find_openmm_torch(timeout: float = TIMEOUT, openmm_first: bool = False) -> tuple[bool, str]:
    """Whether a TorchForce works, and what was found.

    Parameters
    ----------
    timeout
        Seconds for the try in another process.
    openmm_first
        Import OpenMM before torch there, whose plugin is then loaded afterwards.

    Returns
    -------
    works : bool
        Whether it works, on one platform at least.
    found : str
        A clause for a sentence: versions, and platforms or what is wrong.
    """
    if find_spec("openmmtorch") is None:
        return False, "it is not installed"
    code = f"from openmm_bg import openmm_torch; openmm_torch.main({openmm_first!r})"
    works, detail = run_isolated(code, timeout)
    versions = f"with torch {_version('torch')} and OpenMM {_version('openmm')}"
    if works:
        return True, f"version {_version('openmmtorch')} works {versions} on {detail}"
    return False, f"version {_version('openmmtorch')} does not work {versions} ({detail.rstrip('.')})"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(unknown)"


def require_openmm_torch() -> Any:
    """The module ``openmmtorch``, ready for use in this process.

    Raises
    ------
    InputError
        It does not work here; says what was found.
    """
    import torch  # noqa: F401  (before OpenMM)
    import openmm  # isort: skip

    works, found = _asked(openmm_first=not _supported(openmm))
    if not works:
        raise InputError(f"backend='torch' needs openmm-torch, but {found}: leave backend out for a PythonForce.")
    openmmtorch = _imported()
    _load_plugin(openmm)
    if not _supported(openmm):
        raise InputError(
            "OpenMM's plugin for TorchForce cannot be loaded in this process: import torch before OpenMM, or leave "
            "backend='torch' out."
        )
    return openmmtorch


@functools.cache
def _asked(openmm_first: bool) -> tuple[bool, str]:
    """`find_openmm_torch`, once per process: it takes seconds."""
    works, found = find_openmm_torch(openmm_first=openmm_first)
    logger.info("openmm-torch: %s.", found)
    return works, found


def _supported(openmm: Any) -> bool:
    """Whether this process has OpenMM's plugin for TorchForce."""
    return openmm.Platform.getPlatformByName("Reference").supportsKernels([_KERNEL])


def _imported() -> Any:
    """Import ``openmmtorch``, whose own way to import OpenMM makes that log a warning no user can do anything about."""
    root = logging.getLogger()

    def other(record: logging.LogRecord) -> bool:
        return "simtk" not in record.getMessage()

    root.addFilter(other)
    try:
        import openmmtorch
    finally:
        root.removeFilter(other)
    return openmmtorch


def _load_plugin(openmm: Any) -> None:
    """Load the plugin where OpenMM was imported before torch, whose libraries it could not find then."""
    if _supported(openmm):
        return
    folder, library_path = os.environ.get("OPENMM_PLUGIN_DIR"), openmm.version.openmm_library_path
    if folder is None and os.path.isdir(library_path):  # as OpenMM itself finds its plugins
        folder = os.path.join(library_path, "plugins")
    for library in sorted(Path(folder or openmm.Platform.getDefaultPluginsDirectory()).glob("*OpenMMTorch*")):
        with contextlib.suppress(openmm.OpenMMException):  # the library of a platform that is not there
            openmm.Platform.loadPluginLibrary(str(library))


# -------------------------------------------------------------------- in the other process


def main(openmm_first: bool) -> None:
    """Entry of the other process: a line with the platforms that work, or a line of error and code 1."""
    try:
        answer = probe(openmm_first)
    except Exception as error:  # whatever a foreign library raises is the finding
        sys.exit(_reason(error))
    sys.stdout.write(f"\n{answer}\n")


def _reason(error: Exception) -> str:
    """One line of an error. TorchScript names its cause below a traceback of its own, and a stack in C++ may follow."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    causes = [line.strip() for line in lines if re.match(r"[\w.]*(Error|Exception): ", line.strip())]
    return causes[-1] if causes else f"{type(error).__name__}: {lines[0]}"


def probe(openmm_first: bool) -> str:
    """Names of the platforms on which a TorchForce works; exits with the first one's error if there is none."""
    if openmm_first:
        import openmm
    import torch
    import openmm  # isort: skip

    openmmtorch = _imported()
    _load_plugin(openmm)
    force = openmmtorch.TorchForce(torch.jit.script(_Spring()))
    force.setOutputsForces(True)
    force.addGlobalParameter("scale", 1.0)
    found = [openmm.Platform.getPlatform(i) for i in range(openmm.Platform.getNumPlatforms())]
    works, broken = [], []
    for platform in sorted(found, key=lambda p: -p.getSpeed()):
        name = platform.getName()
        with contextlib.suppress(openmm.OpenMMException):
            _pair(platform)  # a platform without its device has nothing to do with openmm-torch
            try:
                _try(platform, force)
                works.append(name)
            except Exception as error:
                broken.append(f"{name}: {_reason(error)}")
    if not works:
        sys.exit(broken[0] if broken else "OpenMM has no platform that works")
    return " and ".join(works) + (f", not on {'; '.join(broken)}" if broken else "")


def _try(platform: Any, force: Any) -> None:
    """Energy and forces of a spring, of its copies and of its XML; a parameter; some steps."""
    import copy

    import openmm

    for twin in (copy.deepcopy(force), openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))):
        context = _pair(platform, twin)
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(copy.deepcopy(context.getSystem())))
        if system.getNumForces() != 1:
            raise RuntimeError("a System loses its TorchForce when it is copied")
        for scale in (1.0, 2.0, 0.5):  # TorchScript compiles anew at the second time
            context.setParameter("scale", scale)
            state = context.getState(energy=True, forces=True)
            energy, slope = state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value[1, 0]
            if abs(energy - 0.01 * scale) > 1e-5 or abs(slope + 0.2 * scale) > 1e-4:
                raise RuntimeError(f"a spring of energy {0.01 * scale:g} has energy {energy:g} and force {slope:g}")
        context.getIntegrator().step(2)


def _pair(platform: Any, *forces: Any) -> Any:
    """A Context of two particles 0.1 nm apart."""
    import openmm

    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions([(0.0, 0.0, 0.0), (0.1, 0.0, 0.0)])
    return context


def _Spring() -> Any:
    import torch
    from torch import Tensor

    class Spring(torch.nn.Module):
        """x² times a scale with its slope from autograd, as a flow's potential has it."""

        def forward(self, positions: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = positions.detach().requires_grad_(True)
            energy = (x * x).sum() * scale.to(x.dtype)
            slope = torch.autograd.grad([energy], [x])[0]
            assert slope is not None
            return energy.detach(), -slope

    return Spring()
