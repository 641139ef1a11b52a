"""What works on this machine: versions, platforms, CUDA, openmm-torch, the shipped flow. `openmm-bg doctor` prints it.

A driver or a plugin that does not fit ends the process instead of raising. What may do so is tried in a process of its
own, with a time limit.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Any

#: Seconds that a probe may take; the first import of torch from a slow disk needs most of them.
TIMEOUT = 120.0
_DISTRIBUTIONS = ("openmm-bg", "openmm", "torch", "openmmtools", "mdtraj", "pymbar", "openmmtorch")
_FALLBACK = "FlowForce uses openmm.PythonForce, which needs no plugin."


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
    if find_spec("openmmtorch") is None:
        return Finding("openmm-torch", False, f"it is not installed: {_FALLBACK}")
    return _isolated("openmm-torch", "probe_openmm_torch", timeout, otherwise=_FALLBACK)


# -------------------------------------------------------------------- processes


def _isolated(
    name: str, probe: str, timeout: float, *arguments: str, needed: bool = False, otherwise: str = ""
) -> Finding:
    """Run a probe of this module in a process of its own; ``otherwise`` is what happens if it does not work."""
    works, detail = run_isolated(f"from openmm_bg import doctor; doctor.main({probe!r})", timeout, *arguments)
    if not works:
        detail = f"{detail.rstrip('.')}" + (f": {otherwise}" if otherwise else ".")
    return Finding(name, works, detail, needed)


def run_isolated(code: str, timeout: float, *arguments: str) -> tuple[bool, str]:
    """Run code in another Python with the same import path.

    Parameters
    ----------
    code
        Python source; its last line of output is the answer.
    timeout
        Seconds.
    *arguments
        For ``sys.argv[1:]``.

    Returns
    -------
    works : bool
        Whether it ended normally.
    detail : str
        The last line that it wrote, or how it ended.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    except OSError as error:
        return False, f"Python could not be started ({error.strerror or error})"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if done.returncode == 0:
        return True, last
    if done.returncode < 0:
        try:
            how = signal.Signals(-done.returncode).name
        except ValueError:
            how = f"signal {-done.returncode}"
        return False, f"the process crashed ({how})"
    return False, last or f"the process ended with code {done.returncode}"


def main(probe: str) -> None:
    """Entry of the other process: one line of answer, or one line of error and code 1."""
    probes: dict[str, Callable[..., str]] = {
        f.__name__: f
        for f in (probe_platforms, probe_platform, probe_cuda, probe_openmm_torch, probe_flow, probe_force)
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


def _pair(name: str, *forces: Any) -> Any:
    """A Context of two particles 0.1 nm apart."""
    import openmm

    system = openmm.System()
    for _ in range(2):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(name))
    context.setPositions([(0.0, 0.0, 0.0), (0.1, 0.0, 0.0)])
    return context


def probe_platform(name: str) -> str:
    """Energy, forces and a step of a spring on this platform."""
    import openmm

    spring = openmm.HarmonicBondForce()
    spring.addBond(0, 1, 0.15, 1000.0)
    context = _pair(name, spring)
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


def probe_openmm_torch() -> str:
    """A TorchForce in a Context and in a copied System: what fails in wrong combinations of versions."""
    import copy
    import tempfile

    import torch  # isort: skip  (before OpenMM, or the plugin is not loaded)
    import openmm  # isort: skip
    import openmmtorch

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "spring.pt")
        torch.jit.script(_Spring()).save(file)
        force = openmmtorch.TorchForce(file)
        context = _pair("Reference", copy.deepcopy(force))
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(context.getSystem()))
        if system.getNumForces() != 1:
            raise RuntimeError("a System loses its TorchForce when it is copied")
        state = context.getState(energy=True, forces=True)
    energy, slope = state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value[1, 0]
    if abs(energy - 0.01) > 1e-5 or abs(slope + 0.2) > 1e-4:
        raise RuntimeError(f"wrong energy {energy:g} or force {slope:g}")
    return f"a TorchForce works and can be copied; {_FALLBACK}"


def _Spring() -> Any:
    import torch

    class Spring(torch.nn.Module):
        def forward(self, positions):
            return (positions**2).sum()

    return Spring()


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


def probe_force() -> str:
    """The energy of the shipped flow as an OpenMM force."""
    from importlib.resources import as_file, files

    from openmm_bg.data import FILE, load_alanine_dipeptide
    from openmm_bg.force import FlowForce
    import openmm  # isort: skip

    molecule = load_alanine_dipeptide()
    system = molecule.system
    for index in reversed(range(system.getNumForces())):
        system.removeForce(index)
    with as_file(files("openmm_bg.data") / FILE) as path:
        system.addForce(FlowForce(path, molecule.flow.temperature))
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(molecule.positions)
        energy = context.getState(energy=True, forces=True).getPotentialEnergy()._value
    if not abs(energy) < float("inf"):
        raise RuntimeError(f"the energy of the shipped positions is {energy}")
    return "the shipped flow works as a PythonForce"
