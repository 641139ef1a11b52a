"""What works on this machine: versions, platforms, CUDA, openmm-torch, the shipped flow. `openmm-bg doctor` prints it.

A driver or a plugin that does not fit ends the process instead of raising. What may do so is tried in a process of its
own (`openmm_bg.isolated`), with a time limit.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata

from openmm_bg.isolated import TIMEOUT, run_isolated
from openmm_bg.openmm_torch import find_openmm_torch

_DISTRIBUTIONS = ("openmm-bg", "openmm", "torch", "openmmtools", "mdtraj", "pymbar", "openmmtorch")


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: does it work, one sentence about it, and can openmm_bg do without it."""

    name: str
    works: bool
    detail: str
    needed: bool = False

    def __str__(self) -> str:
        mark = "ok" if self.works else ("BROKEN" if self.needed else "no")
        return f"  {mark:<7}{self.name}: {self.detail}"


@dataclass(frozen=True)
class Report:
    """What `examine` found.

    ``versions`` maps names to versions, None where not installed; ``platforms`` are OpenMM's, fastest first.
    """

    versions: dict[str, str | None]
    platforms: list[Finding] = field(default_factory=list)
    cuda: Finding = Finding("CUDA in torch", False, "not tried")
    openmm_torch: Finding = Finding("openmm-torch", False, "not tried")
    flow: Finding = Finding("shipped flow", False, "not tried", needed=True)
    force: Finding = Finding("FlowForce", False, "not tried", needed=True)

    @property
    def ok(self) -> bool:
        """Whether everything works that openmm_bg cannot do without; one platform is enough."""
        needed = [f for f in (*self.platforms, self.cuda, self.openmm_torch, self.flow, self.force) if f.needed]
        return any(f.works for f in self.platforms) and all(f.works for f in needed)

    def __str__(self) -> str:
        lines = ["Versions"]
        lines += [f"  {name} {version or 'not installed'}" for name, version in self.versions.items()]
        lines += ["OpenMM platforms, fastest first", *(str(f) for f in self.platforms)]
        lines += ["What openmm_bg uses", *(str(f) for f in (self.cuda, self.openmm_torch, self.flow, self.force))]
        lines.append(
            "Everything needed works." if self.ok else "Something needed is broken: see the lines marked BROKEN or no."
        )
        return "\n".join(lines)


def examine(timeout: float = TIMEOUT) -> Report:
    """Try everything that openmm_bg builds on.

    Parameters
    ----------
    timeout
        Seconds for each probe in a process of its own.

    Returns
    -------
    Report
        Nothing raises: what is broken is in the report, in one sentence.
    """
    return Report(
        versions=_versions(),
        platforms=_platforms(timeout),
        cuda=_isolated("CUDA in torch", "probe_cuda", timeout, otherwise="flows run on the CPU."),
        openmm_torch=_openmm_torch(timeout),
        flow=_isolated("shipped flow", "probe_flow", timeout, needed=True),
        force=_isolated("FlowForce", "probe_force", timeout, needed=True),
    )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _platforms(timeout: float) -> list[Finding]:
    listed = _isolated("OpenMM", "probe_platforms", timeout)
    if not listed.works:
        return [listed]
    return [_isolated(name, "probe_platform", timeout, name) for name in listed.detail.split()]


def _openmm_torch(timeout: float) -> Finding:
    works, found = find_openmm_torch(timeout)
    if works:
        flow = _isolated("FlowForce", "probe_force", timeout, "torch")
        works, found = flow.works, f"{found}; {flow.detail}"
    used = ", or a TorchForce where backend='torch' is given" if works else ", which needs no plugin"
    return Finding("openmm-torch", works, f"{found.rstrip('.')}: FlowForce uses openmm.PythonForce{used}.")


# -------------------------------------------------------------------- processes


def _isolated(
    name: str, probe: str, timeout: float, *arguments: str, needed: bool = False, otherwise: str = ""
) -> Finding:
    """Run a probe of this module in a process of its own; ``otherwise`` is what happens if it does not work."""
    works, detail = run_isolated(f"from openmm_bg import doctor; doctor.main({probe!r})", timeout, *arguments)
    if not works:
        detail = f"{detail.rstrip('.')}" + (f": {otherwise}" if otherwise else ".")
    return Finding(name, works, detail, needed)


def main(probe: str) -> None:
    """Entry of the other process: one line of answer, or one line of error and code 1."""
    probes: dict[str, Callable[..., str]] = {
        f.__name__: f for f in (probe_platforms, probe_platform, probe_cuda, probe_flow, probe_force)
    }
    try:
        answer = probes[probe](*sys.argv[1:])
    except _Absent as absent:
        sys.exit(str(absent))
    except Exception as error:  # whatever a foreign library raises is the finding
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}")
    sys.stdout.write(f"\n{answer}\n")


# -------------------------------------------------------------------- probes: they run in the other process


class _Absent(Exception):
    """What was looked for is not there; not an error."""


def probe_platforms() -> str:
    """Names of OpenMM's platforms, fastest first."""
    import openmm

    found = [openmm.Platform.getPlatform(i) for i in range(openmm.Platform.getNumPlatforms())]
    return " ".join(p.getName() for p in sorted(found, key=lambda p: -p.getSpeed()))


def probe_platform(name: str) -> str:
    """Energy, forces and a step of a spring on this platform."""
    import openmm

    spring = openmm.HarmonicBondForce()
    spring.addBond(0, 1, 0.15, 1000.0)
    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    system.addForce(spring)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(name))
    context.setPositions([(0.0, 0.0, 0.0), (0.1, 0.0, 0.0)])
    energy = context.getState(energy=True, forces=True).getPotentialEnergy()._value
    if abs(energy - 1.25) > 1e-4:
        raise RuntimeError(f"a spring of 1.25 kJ/mol has {energy:g} kJ/mol here")
    context.getIntegrator().step(1)
    return "a Context works"


def probe_cuda() -> str:
    """Whether torch can compute on a GPU."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        raise _Absent(f"torch ({built}) sees no GPU")
    value = float(torch.ones(8, device="cuda").sum())
    if value != 8.0:
        raise RuntimeError(f"eight ones add up to {value:g} on the GPU")
    return torch.cuda.get_device_name()


def probe_flow() -> str:
    """Weighted samples of the shipped flow."""
    import numpy as np
    import torch  # noqa: F401  (before OpenMM)
    import openmm  # isort: skip

    from openmm_bg.data import load_alanine_dipeptide
    from openmm_bg.sampler import BoltzmannGeneratorSampler

    molecule = load_alanine_dipeptide()
    context = openmm.Context(
        molecule.system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(molecule.positions)
    with BoltzmannGeneratorSampler(
        molecule.flow, context, molecule.flow.temperature, device="cpu", seed=0, platform="Reference", n_workers=1
    ) as sampler:
        log_weights = sampler.sample(64).log_weights
    finite = int(np.isfinite(log_weights).sum())
    if not finite:
        raise RuntimeError("not one of 64 samples has a finite weight")
    return f"it loads, and {finite} of 64 samples have a finite weight"


def probe_force(backend: str = "python") -> str:
    """The energy of the shipped flow as an OpenMM force; that of another backend must be the same."""
    from importlib.resources import as_file, files

    from openmm_bg.data import FILE, load_alanine_dipeptide
    from openmm_bg.force import FlowForce
    import openmm  # isort: skip

    molecule = load_alanine_dipeptide()
    energies = []
    for kind in dict.fromkeys(("python", backend)):
        system = molecule.system
        for index in reversed(range(system.getNumForces())):
            system.removeForce(index)
        with as_file(files("openmm_bg.data") / FILE) as path:
            system.addForce(FlowForce(path, molecule.flow.temperature, backend=kind))
        reference = openmm.Platform.getPlatformByName("Reference")
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), reference)
        context.setPositions(molecule.positions)
        energies.append(context.getState(energy=True, forces=True).getPotentialEnergy()._value)
    if not all(abs(energy) < float("inf") for energy in energies):
        raise RuntimeError(f"the energy of the shipped positions is {energies[-1]}")
    if abs(energies[-1] - energies[0]) > 1e-5 * abs(energies[0]):
        raise RuntimeError(f"the shipped flow has {energies[0]:g} kJ/mol in one backend, {energies[-1]:g} in the other")
    return f"the shipped flow works as a {'PythonForce' if backend == 'python' else 'TorchForce'}"
