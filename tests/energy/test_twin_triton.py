"""What only Triton's kernels have: tiles of atoms and frames, their precision, and where they cannot be had.

They run on a CUDA device if there is one, and else in Triton's interpreter; see also test_twin_compiled.py.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from openmm_bg.energy import SystemTwin
from openmm_bg.energy.implicit_solvent import COULOMB_OF_OPENMM
from openmm_bg.energy.twin import triton_kernels
from openmm_bg.errors import EnergyError, InputError

import openmm  # isort: skip

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, FRAMES = triton_kernels.ROWS, triton_kernels.FRAMES
EPSILON = float(np.finfo(np.float32).eps) / 2


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Triton's interpreter where there is no device for its kernels."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def charged(n: int, solvent: bool = False, seed: int = 3) -> openmm.System:
    """Atoms with charges and Lennard-Jones spheres, a few exceptions, and perhaps a solvent."""
    rng = np.random.default_rng(seed)
    system, nonbonded, gbsa = openmm.System(), openmm.NonbondedForce(), openmm.GBSAOBCForce()
    for _ in range(n):
        system.addParticle(12.0)
        charge = rng.normal(scale=0.4)
        nonbonded.addParticle(charge, rng.uniform(0.08, 0.15), rng.uniform(0.1, 1.0))
        gbsa.addParticle(charge, rng.uniform(0.1, 0.2), rng.uniform(0.7, 1.0))
    if n > 3:
        nonbonded.addException(0, 3, 0.0, 0.1, 0.0)
        nonbonded.addException(2, 1, 0.1, 0.12, 0.3)
    system.addForce(nonbonded)
    if solvent:
        system.addForce(gbsa)
    return system


def frames_of(n: int, count: int, seed: int = 5) -> np.ndarray:
    """Frames [count, n, 3] of a bent chain, jittered."""
    rng = np.random.default_rng(seed)
    k = np.arange(n)
    chain = np.stack((0.12 * k, 0.1 * (k % 2), 0.03 * (k % 3)), axis=1)
    return chain + rng.normal(scale=0.01, size=(count, n, 3))


def fused(system: openmm.System, frames: np.ndarray, **options: object) -> SystemTwin:
    twin = SystemTwin(system, frames, compile="triton", device=DEVICE, **options)
    assert twin.backend == "triton" and twin.compiled
    return twin


@needs_triton
@pytest.mark.parametrize("n", [1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 1])
def test_atoms_that_do_not_fill_tiles(n):
    system, frames = charged(n, solvent=True), frames_of(n, 3)
    twin = fused(system, frames)
    assert twin.deviation.relative_energy < 1e-12 and twin.deviation.relative_force < 1e-11
    for ours, theirs in zip(
        twin.energies_and_forces(frames), SystemTwin(system, frames).energies_and_forces(frames), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-10)
    assert np.ptp(twin.energies(frames)) > 0.0 or n == 1


@needs_triton
@pytest.mark.parametrize("count", [1, FRAMES - 1, FRAMES, FRAMES + 1, 2 * FRAMES + 1])
def test_frames_that_do_not_fill_tiles(count, monkeypatch):
    system, frames = charged(ROWS + 1), frames_of(ROWS + 1, count)
    twin = fused(system, frames[:1])
    monkeypatch.setattr(twin, "_chunk_size", lambda _: 4 * FRAMES)
    shapes = []
    evaluate = twin._evaluator.evaluate
    monkeypatch.setattr(twin._evaluator, "evaluate", lambda x, g: shapes.append(x.shape[2]) or evaluate(x, g))
    eager = SystemTwin(system, frames[:1])
    for ours, theirs in zip(twin.energies_and_forces(frames), eager.energies_and_forces(frames), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-9)
    assert shapes == [count]


@needs_triton
def test_nothing_is_written_beyond_the_arrays(monkeypatch):
    """Outputs lie between guards, which stay as they were."""
    system = charged(ROWS + 1, solvent=True)
    frames = frames_of(ROWS + 1, 7)
    twin = fused(system, frames[:1])
    guarded: list[torch.Tensor] = []
    new_empty = torch.Tensor.new_empty

    def between_guards(like, shape, **options):
        wide = new_empty(like, int(np.prod(shape)) + 2000, **options).fill_(7.25)
        guarded.append(wide)
        return wide[1000:-1000].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", between_guards)
    twin.energies_and_forces(frames)
    assert len(guarded) >= 3
    for wide in guarded:
        assert bool((wide[:1000] == 7.25).all() and (wide[-1000:] == 7.25).all())
    assert any(bool((wide[1000:-1000] != 7.25).all()) for wide in guarded)


def absolute_terms(system: openmm.System, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the absolute terms of a NonbondedForce's energy [B] and force components [B, N, 3].

    Each term is multiplied by how much of a relative error of r it passes on.
    """
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    rows = [[v._value for v in force.getParticleParameters(i)] for i in range(force.getNumParticles())]
    q, sigma, epsilon = np.array(rows).T
    d = frames[:, :, None] - frames[:, None]
    r = np.sqrt((d**2).sum(-1) + np.eye(len(q)))
    s6 = (0.5 * (sigma[:, None] + sigma) / r) ** 6 * (1 - np.eye(len(q)))
    lj = 4 * np.sqrt(epsilon[:, None] * epsilon)
    coulomb = COULOMB_OF_OPENMM * np.abs(q[:, None] * q) / r * (1 - np.eye(len(q)))
    energy = coulomb + lj * (12 * s6**2 + 6 * s6)
    slope = (2 * coulomb + lj * (12 * 13 * s6**2 + 6 * 7 * s6)) / r
    return 0.5 * energy.sum((1, 2)), (slope[..., None] * np.abs(d) / r[..., None]).sum(2)


@needs_triton
def test_single_precision_is_as_far_off_as_its_rounding():
    """Positions, centred, are rounded by half a unit; a difference of two of them costs a relative error of r.

    That is (largest coordinate) / r units, and another 8 for the operations of a term; terms are independent enough
    for the sum of absolute terms to be an upper bound by far.
    """
    n = 9
    system, frames = charged(n), frames_of(n, 40)
    twin, exact = fused(system, frames[:2], dtype=torch.float32), SystemTwin(system, frames[:2])
    (energies, forces), (right, right_forces) = twin.energies_and_forces(frames), exact.energies_and_forces(frames)
    widest = np.abs(frames - np.median(frames, axis=1, keepdims=True)).max()
    nearest = min(np.linalg.norm(f[i] - f[j]) for f in frames for i in range(n) for j in range(i))
    units = 8.0 + 2.0 * np.sqrt(3.0) * widest / nearest
    bound, bound_forces = (units * EPSILON * terms for terms in absolute_terms(system, frames))
    error, force_error = np.abs(energies - right), np.abs(forces - right_forces)
    print((error / bound).max(), (force_error / bound_forces.max((1, 2), keepdims=True)).max())
    assert np.all(error < bound) and np.all(force_error < bound_forces.max((1, 2), keepdims=True))
    assert error.max() > 0.0, "is it single precision?"
    # An error in a parameter of one atom that is small to the eye would not pass.
    wrong = charged(n)
    wrong.getForce(0).setParticleParameters(4, *[1.001 * v for v in wrong.getForce(0).getParticleParameters(4)])
    assert np.any(np.abs(SystemTwin(wrong, frames[:2]).energies(frames) - energies) > bound)


@needs_triton
@pytest.mark.parametrize("precision", ["double", "single"])
def test_energies_and_sums_over_pairs_are_added_up_in_double_precision(monkeypatch, precision):
    """Sums that are exact in double precision only: single precision holds no odd numbers beyond 2^24."""
    if precision == "single":  # a deliberate error, which must show
        function = triton_kernels._function

        def careless(kernel, names):
            kernel.source = kernel.source.replace("0.0, tl.float64)", "0.0, tl.float32)").replace(".to(tl.float64)", "")
            return function(kernel, names)

        monkeypatch.setattr(triton_kernels, "_function", careless)
    n, large = 16, 2**23 + 1
    system, force = openmm.System(), openmm.CustomNonbondedForce(f"{large}+step(r-1000)")
    born = openmm.CustomGBForce()
    born.addComputedValue("I", f"{large}+step(r-1000)", born.ParticlePair)
    born.addEnergyTerm("1e-9*I", born.SingleParticle)
    for _ in range(n):
        system.addParticle(1.0)
        force.addParticle([])
        born.addParticle([])
    for each in (force, born):
        system.addForce(each)
    frames = frames_of(n, 2)
    evaluator = fused(system, frames, dtype=torch.float32)._evaluator
    x = torch.tensor(frames, dtype=torch.float32, device=DEVICE).permute(2, 1, 0).contiguous()
    energies, _ = evaluator._energy.kernel.run(x, {}, None)
    _, sums = evaluator._sums.kernel.run(x, {}, None)
    right = bool((energies == n * (n - 1) // 2 * large).all())
    # The sum over an atom's pairs is rounded once, when it is handed on.
    right_sums = bool((next(iter(sums.values())) == torch.tensor(float((n - 1) * large))).all())
    assert (right, right_sums) == ((True, True) if precision == "double" else (False, False))


@needs_triton
def test_a_batch_gives_the_same_bits_each_time():
    frames = frames_of(9, FRAMES + 3)
    twin = fused(charged(9, solvent=True), frames[:1], dtype=torch.float32)
    first = twin.energies_and_forces(frames)
    for ours, theirs in zip(twin.energies_and_forces(frames), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A frame's neighbours in the batch do not matter either.
    np.testing.assert_array_equal(twin.energies(frames[5:9]), twin.energies(frames)[5:9])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_atoms_that_touch_and_terms_that_overflow(dtype):
    frames = frames_of(9, 4)
    system = charged(9)
    twin = fused(system, frames[:1], dtype=dtype)
    good = twin.energies(frames)
    frames[1, 7] = frames[1, 4]
    frames[2, 7] = frames[2, 4] + [5e-5, 0.0, 0.0]  # r^-12 is 4e51
    energies, forces = twin.energies_and_forces(frames)
    assert energies[1] == np.inf and not forces[1].any()
    exact = SystemTwin(system, frames[:1]).energies(frames)
    assert 1e38 < exact[2] < np.inf
    if dtype == torch.float64:
        assert energies[2] == pytest.approx(exact[2], rel=1e-12) and forces[2].any()
    else:
        assert energies[2] == np.inf and not forces[2].any()
    np.testing.assert_array_equal(energies[[0, 3]], good[[0, 3]])


@needs_triton
def test_soft_core_pairs_may_touch():
    system, force = openmm.System(), openmm.CustomNonbondedForce("1/(0.2+(r/0.1)^6)")
    for _ in range(6):
        system.addParticle(1.0)
        force.addParticle([])
    system.addForce(force)
    frames = frames_of(6, 3)
    twin = fused(system, frames)
    frames[1, 5] = frames[1, 0]
    np.testing.assert_allclose(twin.energies(frames), SystemTwin(system, frames[:1]).energies(frames), rtol=1e-13)
    assert np.isfinite(twin.energies_and_forces(frames)[1]).all()


@needs_triton
@pytest.mark.parametrize(
    "part, right, wrong",
    [
        ("LOOP", "@P@dz * @P@dz", "@P@dy * @P@dz"),
        ("LOOP", "@P@dy = yi", "@P@dy = xi"),
        ("KERNEL", "atom = i < n", "atom = i < n - 1"),
        ("KERNEL", "first = tl.program_id(0)", "first = 0 * tl.program_id(0)"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_wrong_code_is_noticed(monkeypatch, part, right, wrong, dtype):
    text = getattr(triton_kernels, part)
    assert right in text
    frames = frames_of(ROWS + 1, 2)
    fused(charged(ROWS + 1), frames, dtype=dtype)
    monkeypatch.setattr(triton_kernels, part, text.replace(right, wrong))
    with pytest.raises(EnergyError, match="differs from OpenMM"):
        fused(charged(ROWS + 1), frames, dtype=dtype)


# ---------------------------------------------------------------- where it cannot be had


def reasoned(caplog, **options: object) -> tuple[SystemTwin, str]:
    """A twin that should have been compiled by Triton, and the one sentence that it says."""
    frames = frames_of(5, 2)
    with caplog.at_level(logging.WARNING, logger="openmm_bg"):
        twin = SystemTwin(charged(5), frames, **{"compile": "triton", **options})
    (record,) = caplog.records
    assert twin.backend == "torch" and not twin.compiled
    assert twin.deviation.relative_energy < 1e-12
    return twin, record.getMessage()


def test_without_triton_torch_does_it(monkeypatch, caplog):
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda _: None)
    assert "Triton is not installed" in reasoned(caplog)[1]


@needs_triton
def test_a_cpu_without_the_interpreter_is_told(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "needs a CUDA device" in reasoned(caplog, device="cpu")[1]


@needs_triton
def test_a_kernel_that_does_not_start_is_told_and_torch_does_it(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Cannot find ptxas.\nand more")

    monkeypatch.setattr(triton_kernels, "unavailable", lambda _: None)
    monkeypatch.setattr(triton_kernels.TritonKernel, "run", fail)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = reasoned(caplog, device=DEVICE)[1]
    assert said.endswith("(RuntimeError: Cannot find ptxas).") and "run in torch" in said


@pytest.mark.parametrize(
    "device, compile, backend",
    [
        ("cpu", None, "torch"),
        ("cpu", True, "c++"),
        ("cpu", False, "torch"),
        ("cpu", "triton", "triton"),
        ("cuda", None, "triton"),
        ("cuda:1", True, "triton"),
        ("cuda", False, "torch"),
        ("mps", None, "torch"),
        ("cuda", "c++", "c++"),
    ],
)
def test_what_is_chosen(device, compile, backend):
    from openmm_bg.energy.twin.twin import backend_for

    assert backend_for(torch.device(device), compile) == backend
    with pytest.raises(InputError, match="compile must be"):
        backend_for(torch.device(device), "fortran")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_is_an_error_in_one_sentence():
    with pytest.raises(InputError, match="no CUDA device"):
        SystemTwin(charged(2), frames_of(2, 1), device="cuda")


def run_python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    given = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    """To machine code of compute capability 9.0: no atomic additions, and nothing is exchanged between threads."""
    printed = run_python(
        """
        import json, numpy as np, torch
        from openmm_bg.energy.twin import triton_kernels
        from openmm_bg.energy.twin.evaluator import Evaluator
        from openmm_bg.energy.twin.system import Forces
        import openmm, triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        system, nonbonded, gbsa = openmm.System(), openmm.NonbondedForce(), openmm.GBSAOBCForce()
        custom = openmm.CustomNonbondedForce("tan(q1*r)+atan2(r,q2)+min(r,q1)+select(step(r-q2),r^1.5,3)+floor(r)")
        custom.addPerParticleParameter("q")
        for i in range(5):
            system.addParticle(1.0)
            nonbonded.addParticle(0.1 * i, 0.1, 0.5), gbsa.addParticle(0.1 * i, 0.1, 0.8), custom.addParticle([i])
        born = openmm.CustomGBForce()  # whose energy has functions of what the second particle alone has
        born.addComputedValue("B", "exp(-r)", born.ParticlePair)
        born.addEnergyTerm("r*(max(1/(1+B2),0.1)+sinh(1/(1+B2))+select(step(B2-1.2),1/(4+B2),0.3))", born.ParticlePair)
        for _ in range(5):
            born.addParticle([])
        for force in (nonbonded, gbsa, custom, born):
            system.addForce(force)
        triton_kernels.unavailable = lambda device: None
        found = {}
        for dtype in (torch.float32, torch.float64):
            evaluator = Evaluator(Forces(system), dtype, torch.device("cpu"))
            assert evaluator.compile("triton") is None
            for kernel in evaluator._triton:
                if dtype == torch.float64 and kernel.name != "pass_both":
                    continue
                real = "*fp32" if dtype == torch.float32 else "*fp64"
                kinds = {"n": "i32", "batch": "i32", "energy": "*fp64"}
                signature = {name: kinds.get(name, real) for name in kernel.arguments}
                constants = {"ROWS": triton_kernels.ROWS, "FRAMES": triton_kernels.FRAMES}
                source = ASTSource(kernel.call, signature | dict.fromkeys(constants, "constexpr"), constants)
                made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=triton_kernels.OPTIONS)
                assert len(made.asm["cubin"]) > 1000
                found[f"{kernel.name} {real}"] = made.asm["ptx"]
        print(json.dumps(found))
        """,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    found = json.loads(printed.splitlines()[-1])
    assert {name.split()[0] for name in found} == {"pass_energy", "pass_both", "pass_sums", "pass_chain"}
    assert len(found) == 5
    for name, ptx in found.items():
        assert "ld.global" in ptx and "st.global" in ptx
        assert re.search(r"\b(atom|red|bar|barrier|shfl|(ld|st)\.shared)\.[a-z]", ptx) is None, name


@needs_triton
def test_the_interpreter_may_be_asked_for_after_triton_has_been_imported():
    printed = run_python(
        """
        import os, logging
        import triton, triton.language
        os.environ["TRITON_INTERPRET"] = "1"
        import numpy as np, openmm
        from openmm_bg.energy import SystemTwin
        system, force = openmm.System(), openmm.CustomNonbondedForce("tanh(r)")
        for _ in range(3):
            system.addParticle(1.0), force.addParticle([])
        system.addForce(force)
        frames = np.random.default_rng(0).normal(size=(2, 3, 3))
        twin = SystemTwin(system, frames, compile="triton")
        print(twin.backend, twin.deviation.relative_force < 1e-12)
        """,
        TRITON_INTERPRET="0",
        CUDA_VISIBLE_DEVICES="",
    )
    assert printed.split() == ["triton", "True"]


def test_triton_is_not_imported_before_it_is_used():
    printed = run_python(
        """
        import sys
        import openmm_bg, openmm_bg.energy, openmm_bg.energy.twin.triton_kernels
        print("triton" in sys.modules)
        """
    )
    assert printed.split() == ["False"]
